"""Frames: golden bytes, round trips, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.transport.conversation import NEXT, Listener, Role, State
from common.transport.decoding import BODY_BYTES_MAX, decode_body, decode_header
from common.transport.frames import (
    DEADLINE_MS_MAX,
    HEADER_BYTES,
    REQUEST_BYTES_MAX,
    Cancel,
    Event,
    Extents,
    FoundPrefix,
    Goodbye,
    Hello,
    Lookup,
    Mode,
    Op,
    ProtocolError,
    Reason,
    Reply,
    Transfer,
    Welcome,
    encode,
)
from common.transport.interface import LeaseToken, Part, PartStatus
from common.transport.memory import crc32c

TOKEN = LeaseToken(bytes(range(16)))
GOLDEN: list[tuple[Event, str]] = [
    (
        Hello(Mode.REGION, 1 << 20),
        "50534250 01 01 0000 0000000000000000 00000000 10000000 0000000000000000 00000000 83868cac "
        "01000000 00000000 0000100000000000",
    ),
    (
        Welcome(TOKEN, 32, 128 << 20),
        "50534250 01 02 0000 0000000000000000 00000000 20000000 0000000000000000 00000000 3fe44f4e "
        "000102030405060708090a0b0c0d0e0f 20000000 00000000 0000000800000000",
    ),
    (
        Transfer(Op.READ, 7, TOKEN, 1500, (Part(3, 4096, 512),), (0,), (8192,)),
        "50534250 01 03 0100 0700000000000000 dc050000 30000000 0000000000000000 00000000 203ac366 "
        "000102030405060708090a0b0c0d0e0f 03000000 00000000 0010000000000000 0002000000000000 0020000000000000",
    ),
    (
        Transfer(Op.WRITE, 8, TOKEN, 1500, (Part(3, 0, 9),), (0xE3069283,), (0,), 9),
        "50534250 01 04 0100 0800000000000000 dc050000 30000000 0900000000000000 00000000 c8d29ede "
        "000102030405060708090a0b0c0d0e0f 03000000 839206e3 0000000000000000 0900000000000000 0000000000000000",
    ),
    (
        Reply(7, (PartStatus.OK, PartStatus.REJECTED), (0xE3069283, 0), 9),
        "50534250 01 05 0200 0700000000000000 00000000 10000000 0900000000000000 00000000 2f1cba47 "
        "00 000000 839206e3 03 000000 00000000",
    ),
    (Cancel(7), "50534250 01 06 0000 0700000000000000 00000000 00000000 0000000000000000 00000000 a7b61d36"),
    (
        Goodbye(Reason.FULL, "full"),
        "50534250 01 07 0000 0000000000000000 00000000 08000000 0000000000000000 00000000 3b3b010f 01000000 66756c6c",
    ),
    (
        Transfer(Op.LOCATE, 9, TOKEN, 1500, (Part(3, 0, 1 << 21),), (0,), (0,)),
        "50534250 01 08 0100 0900000000000000 dc050000 30000000 0000000000000000 00000000 085abae9 "
        "000102030405060708090a0b0c0d0e0f 03000000 00000000 0000000000000000 0000200000000000 0000000000000000",
    ),
    (
        Extents(9, (PartStatus.OK, PartStatus.MISSING), (0xE3069283, 0), (1, 0), (8192, 0)),
        "50534250 01 09 0200 0900000000000000 00000000 30000000 0000000000000000 00000000 c1a0b20d "
        "00 000000 839206e3 01000000 00000000 0020000000000000  01 000000 00000000 00000000 00000000 0000000000000000",
    ),
]


KEYS = (bytes(range(32)), bytes(range(32, 64)))
GOLDEN += [
    (
        Lookup(10, 1500, b"\xa1" * 32, 30_000, KEYS),
        "50534250 01 0a 0200 0a00000000000000 dc050000 68000000 0000000000000000 00000000 13dc57de "
        + "a1" * 32
        + "30750000 00000000 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f "
        "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f",
    ),
    (
        FoundPrefix(10, PartStatus.OK, 2, 30_000, TOKEN, bytes(range(16, 32))),
        "50534250 01 0b 0000 0a00000000000000 00000000 30000000 0000000000000000 00000000 b9c21670 "
        "00 000000 02000000 30750000 00000000 000102030405060708090a0b0c0d0e0f 101112131415161718191a1b1c1d1e1f",
    ),
]


SAMPLES: dict[Op, Event] = {
    Op.HELLO: GOLDEN[0][0],
    Op.WELCOME: GOLDEN[1][0],
    Op.READ: GOLDEN[2][0],
    Op.WRITE: GOLDEN[3][0],
    Op.REPLY: GOLDEN[4][0],
    Op.CANCEL: GOLDEN[5][0],
    Op.GOODBYE: GOLDEN[6][0],
    Op.LOCATE: GOLDEN[7][0],
    Op.EXTENTS: GOLDEN[8][0],
    Op.LOOKUP: GOLDEN[9][0],
    Op.FOUND: GOLDEN[10][0],
}


@pytest.mark.parametrize("event, text", GOLDEN, ids=[type(event).__name__ for event, _ in GOLDEN])
def test_a_frame_has_the_published_bytes(event: Event, text: str) -> None:
    assert encode(event) == bytes.fromhex(text)


def decode(frame: bytes) -> Event:
    header = decode_header(frame[:HEADER_BYTES])
    assert len(frame) == HEADER_BYTES + header.body_bytes
    return decode_body(header, frame[HEADER_BYTES:])


parts = st.builds(
    Part, item=st.integers(0, 2**32 - 1), offset=st.integers(0, 2**64 - 1), length=st.integers(1, REQUEST_BYTES_MAX // 8)
)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    op = draw(st.sampled_from([Op.READ, Op.WRITE]))
    table = tuple(draw(st.lists(parts, min_size=1, max_size=8)))
    columns = [tuple(draw(st.lists(column, min_size=len(table), max_size=len(table)))) for column in (u32, u64)]
    payload = sum(part.length for part in table) if op is Op.WRITE and draw(st.booleans()) else 0
    token = LeaseToken(draw(st.binary(min_size=16, max_size=16)))
    return Transfer(op, draw(u64), token, draw(st.integers(0, DEADLINE_MS_MAX)), table, columns[0], columns[1], payload)


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    rows = draw(st.lists(st.tuples(st.sampled_from(PartStatus), u32), max_size=50))
    statuses, checksums = tuple(row[0] for row in rows), tuple(row[1] for row in rows)
    return Reply(draw(u64), statuses, checksums, draw(st.integers(0, REQUEST_BYTES_MAX)))


@st.composite
def lookups(draw: st.DrawFn) -> Lookup:
    words = st.binary(min_size=32, max_size=32)
    return Lookup(
        draw(u64),
        draw(st.integers(0, DEADLINE_MS_MAX)),
        draw(words),
        draw(u32),
        tuple(draw(st.lists(words, min_size=1, max_size=9))),
    )


@st.composite
def founds(draw: st.DrawFn) -> FoundPrefix:
    status = draw(st.sampled_from(PartStatus))
    blocks = draw(st.integers(0, 4096)) if status is PartStatus.OK else 0
    token, epoch = draw(st.binary(min_size=16, max_size=16)), draw(st.binary(min_size=16, max_size=16))
    return FoundPrefix(draw(u64), status, blocks, draw(u32), LeaseToken(token), epoch)


EXTENT_ROWS = st.tuples(st.sampled_from(PartStatus), st.integers(0, 2**32 - 1), st.integers(0, 63), st.integers(0, 2**64 - 1))
events = st.one_of(
    st.builds(Hello, mode=st.sampled_from(Mode), region_bytes=u64),
    st.builds(Welcome, st.binary(min_size=16, max_size=16), st.integers(1, 2**32 - 1), st.integers(REQUEST_BYTES_MAX, 2**64 - 1)),
    transfers(),
    replies(),
    lookups(),
    founds(),
    st.builds(Cancel, u64),
    st.builds(lambda rows: Extents(5, *zip(*rows, strict=True)), st.lists(EXTENT_ROWS, min_size=1, max_size=9)),
    st.builds(Goodbye, st.sampled_from(Reason), st.text(max_size=100)),
)


@given(events)
def test_every_event_comes_back_as_it_was(event: Event) -> None:
    assert decode(encode(event)) == event


@given(events, st.data())
def test_any_damaged_byte_of_a_frame_is_refused(event: Event, data: st.DataObject) -> None:
    frame = bytearray(encode(event))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        header = decode_header(bytes(frame[:HEADER_BYTES]))
        body = bytes(frame[HEADER_BYTES:])
        # A damaged length makes a receiver take more or fewer bytes than were sent: the checksum finds that too.
        decode_body(header, body[: header.body_bytes].ljust(header.body_bytes, b"\0"))


@given(st.sampled_from(list(SAMPLES)), st.data())
def test_any_body_with_a_right_checksum_is_an_event_or_refused_by_name(op: Op, data: st.DataObject) -> None:
    """What a peer that means harm, not a damaged wire, may send."""
    frame = encode(SAMPLES[op])
    length = len(frame) - HEADER_BYTES
    body = data.draw(st.binary(min_size=length, max_size=length))
    covered = frame[: HEADER_BYTES - 4]
    header = decode_header(covered + crc32c(covered + body).to_bytes(4, "little"))
    try:
        event = decode_body(header, body)
    except ProtocolError as error:
        assert "expected" in error.message or "part status" in error.message
    else:
        again = decode(encode(event))
        assert again == event or isinstance(event, Goodbye)  # whose text is cut


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_never_pass_as_a_header_that_asks_for_much(raw: bytes) -> None:
    for data in (raw, b"PSBP\x01" + raw[5:]):
        try:
            header = decode_header(data)
        except ProtocolError:
            continue
        assert header.body_bytes <= BODY_BYTES_MAX and header.payload_bytes <= REQUEST_BYTES_MAX


@pytest.mark.parametrize(
    "event, message",
    [
        (Transfer(Op.READ, 1, TOKEN, 1, (Part(0, 0, 0),), (0,), (0,)), "at least one byte"),
        (Transfer(Op.READ, 1, TOKEN, 1, (), (), ()), "expected parts"),
        (Transfer(Op.READ, 1, TOKEN, 1, (Part(0, 0, 1), Part(0, 0, REQUEST_BYTES_MAX)), (0, 0), (0, 0)), "bytes of a request"),
        (Transfer(Op.READ, 1, TOKEN, 1, (Part(0, 0, 5),), (0,), (0,), 5), "expected none"),
        (Transfer(Op.WRITE, 1, TOKEN, 1, (Part(0, 0, 5),), (0,), (0,), 4), "expected the parts' 5"),
        (Transfer(Op.WRITE, 1, TOKEN, DEADLINE_MS_MAX + 1, (Part(0, 0, 5),), (0,), (0,)), "deadline_ms"),
        (Extents(1, (PartStatus.OK,), (0,), (64,), (0,)), "file 64: expected at most 63"),
        (Lookup(1, 1, bytes(32), 0, ()), "LOOKUP of 0 keys"),
        (Lookup(1, DEADLINE_MS_MAX + 1, bytes(32), 0, KEYS), "deadline_ms"),
        (Lookup(1, 1, bytes(32), 0, (bytes(31),)), "body_bytes 71 of LOOKUP with count 1: expected 72 to 72"),
        (Lookup(1, 1, bytes(32), 0, (bytes(32),) * 4097), "count 4097: expected at most 4096"),
        (FoundPrefix(1, PartStatus.OK, 4097), "blocks 4097: expected at most 4096"),
        (FoundPrefix(1, PartStatus.FULL, 1), "blocks 1: expected at most 0"),
        (Welcome(TOKEN, 0, REQUEST_BYTES_MAX), "limits"),
        (Welcome(TOKEN, 1, REQUEST_BYTES_MAX - 1), "limits"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(event: Event, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(encode(event))


def test_more_parts_than_allowed_are_refused_before_the_body_is_read() -> None:
    many = tuple(Part(i, 0, 1) for i in range(4097))
    frame = encode(Transfer(Op.READ, 1, TOKEN, 1, many, (0,) * 4097, (0,) * 4097))
    with pytest.raises(ProtocolError, match="count 4097: expected at most 4096"):
        decode_header(frame[:HEADER_BYTES])


def feed(listener: Listener, frame: bytes) -> Event | None:
    assert listener.need == HEADER_BYTES
    assert listener.feed(frame[:HEADER_BYTES]) is None
    assert listener.need == len(frame) - HEADER_BYTES
    return listener.feed(frame[HEADER_BYTES:])


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("op", Op)
def test_a_listener_takes_what_its_table_lists_and_nothing_else(role: Role, state: State, op: Op) -> None:
    listener = Listener(role)
    listener.state = state
    allowed = NEXT[role].get(state, {})
    if op in allowed:
        assert feed(listener, encode(SAMPLES[op])) == SAMPLES[op]
        assert listener.state is allowed[op]
    else:
        with pytest.raises(ProtocolError, match=f"{op.name} to a {role.value} in state {state.value}"):
            feed(listener, encode(SAMPLES[op]))

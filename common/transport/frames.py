"""The byte plane's frames: bytes in, typed events out, no I/O.

A frame is a fixed header, a body that the header sizes, and a payload that only inline carriers
(tcp, grpc) have. All integers are little-endian.

    header (40 bytes)  magic "PSBP" | version u8 | op u8 | count u16 | request u64 | deadline_ms u32
                       | body_bytes u32 | payload_bytes u64 | zero u32 | crc32c u32
    HELLO    body      mode u32 | zero u32 | region_bytes u64         (the memfd rides along as SCM_RIGHTS)
    WELCOME  body      epoch 16s | requests_max u32 | offers u32 | bytes_max u64
    READ     body      token 16s | count × part                       a READ has no payload
    WRITE    body      token 16s | count × part                       payload: the parts' bytes, in order
    LOCATE   body      as of a READ
    EXTENTS  body      count × (status u8, zero 3s, crc32c u32, file u32, zero u32, offset u64)
                                                                      (the files ride along as SCM_RIGHTS, [0] first)
    REPLY    body      count × (status u8, zero 3s, crc32c u32)       payload: of a READ, the OK parts' bytes
    CANCEL   body      empty                                          the request is still replied to
    GOODBYE  body      reason u32 | UTF-8 text                        nothing more will be answered

    part (32 bytes)    item u32 | crc32c u32 | offset u64 | length u64 | span u64

The header's crc32c covers its first 36 bytes and the body: a damaged table never steers bytes.
`span` is an offset in the client's region (mode REGION), else zero. A part's crc32c is set by whoever
sends the bytes. Every length is bounded before anything is allocated; whatever is out of bounds is a
`ProtocolError`, and the connection that sent it is closed.
"""

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum, IntFlag

import msgspec

from common.errors import PenstockError
from common.transport.interface import EXTENT_FILES_MAX, PARTS_MAX, TOKEN_BYTES, LeaseToken, Part, PartStatus
from common.transport.memory import crc32c

MAGIC = b"PSBP"
VERSION = 1
REQUEST_BYTES_MAX = 64 << 20  # of one frame; a client splits what is larger
DEADLINE_MS_MAX = 3_600_000
EPOCH_BYTES = 16
TEXT_BYTES_MAX = 512

_COVERED = struct.Struct("<4sBBHQIIQI")
_CRC = struct.Struct("<I")
_HELLO = struct.Struct("<IIQ")
_WELCOME = struct.Struct("<16sIIQ")
_PART = struct.Struct("<IIQQQ")
_RESULT = struct.Struct("<B3sI")
_EXTENT = struct.Struct("<B3sIIIQ")
_REASON = struct.Struct("<I")
HEADER_BYTES = _COVERED.size + _CRC.size
BODY_BYTES_MAX = TOKEN_BYTES + PARTS_MAX * _PART.size


class ProtocolError(PenstockError):
    """The peer sent what the protocol doesn't allow: its connection is closed."""


class Op(IntEnum):
    HELLO = 1
    WELCOME = 2
    READ = 3
    WRITE = 4
    REPLY = 5
    CANCEL = 6
    GOODBYE = 7
    LOCATE = 8
    EXTENTS = 9


class Offers(IntFlag):
    """What a server can do beyond READ and WRITE. A client ignores what it doesn't know."""

    NOTHING = 0
    EXTENTS = 1  # LOCATE


class Mode(IntEnum):
    """Where bulk bytes lie."""

    INLINE = 0  # after the frame
    REGION = 1  # in the client's shared memory


class Reason(IntEnum):
    """Why a server says goodbye."""

    DRAINING = 0
    FULL = 1  # too many connections
    MALFORMED = 2  # protocol error, described by the text


class Hello(msgspec.Struct, frozen=True):
    mode: Mode
    region_bytes: int


class Welcome(msgspec.Struct, frozen=True):
    """`requests_max` and `bytes_max`: what the client may have in flight on this connection."""

    epoch: bytes
    requests_max: int
    bytes_max: int
    offers: Offers = Offers.NOTHING


class Transfer(msgspec.Struct, frozen=True):
    """A READ, a WRITE or a LOCATE. `checksums` are zero but in a WRITE; `spans` are zero in mode INLINE.

    `payload_bytes`: of the WRITE's payload that follows the frame; zero in mode REGION.
    """

    op: Op
    request: int
    token: LeaseToken
    deadline_ms: int
    parts: tuple[Part, ...]
    checksums: tuple[int, ...]
    spans: tuple[int, ...]
    payload_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(part.length for part in self.parts)


class Reply(msgspec.Struct, frozen=True):
    request: int
    statuses: tuple[PartStatus, ...]
    checksums: tuple[int, ...]
    payload_bytes: int = 0


class Extents(msgspec.Struct, frozen=True):
    """The answer to a LOCATE: per part its status and, if that is OK, checksum, number of its file, and offset there."""

    request: int
    statuses: tuple[PartStatus, ...]
    checksums: tuple[int, ...]
    files: tuple[int, ...]
    offsets: tuple[int, ...]


class Cancel(msgspec.Struct, frozen=True):
    request: int


class Goodbye(msgspec.Struct, frozen=True):
    reason: Reason
    text: str


Event = Hello | Welcome | Transfer | Extents | Reply | Cancel | Goodbye


class Header(msgspec.Struct, frozen=True):
    op: Op
    count: int
    request: int
    deadline_ms: int
    body_bytes: int
    payload_bytes: int
    raw: bytes


def encode(event: Event) -> bytes:
    """Header and body of a frame; its `payload_bytes` of payload must follow."""
    match event:
        case Hello(mode, region_bytes):
            return _frame(Op.HELLO, _HELLO.pack(mode, 0, region_bytes))
        case Welcome(epoch, requests_max, bytes_max, offers):
            return _frame(Op.WELCOME, _WELCOME.pack(epoch, requests_max, offers, bytes_max))
        case Transfer(op, request, token, deadline_ms, parts, checksums, spans, payload_bytes):
            return _frame(op, token + _pack_parts(parts, checksums, spans), len(parts), request, deadline_ms, payload_bytes)
        case Reply(request, statuses, checksums, payload_bytes):
            body = b"".join(_RESULT.pack(s, b"\0\0\0", c) for s, c in zip(statuses, checksums, strict=True))
            return _frame(Op.REPLY, body, len(statuses), request, payload_bytes=payload_bytes)
        case Extents(request, statuses, checksums, files, offsets):
            rows = zip(statuses, checksums, files, offsets, strict=True)
            body = b"".join(_EXTENT.pack(s, b"\0\0\0", c, file, 0, offset) for s, c, file, offset in rows)
            return _frame(Op.EXTENTS, body, len(statuses), request)
        case Cancel(request):
            return _frame(Op.CANCEL, b"", request=request)
        case Goodbye(reason, text):
            return _frame(Op.GOODBYE, _REASON.pack(reason) + text.encode()[:TEXT_BYTES_MAX])


def _pack_parts(parts: Sequence[Part], checksums: Sequence[int], spans: Sequence[int]) -> bytes:
    rows = zip(parts, checksums, spans, strict=True)
    return b"".join(_PART.pack(part.item, crc, part.offset, part.length, span) for part, crc, span in rows)


def _frame(op: Op, body: bytes, count: int = 0, request: int = 0, deadline_ms: int = 0, payload_bytes: int = 0) -> bytes:
    head = _COVERED.pack(MAGIC, VERSION, op, count, request, deadline_ms, len(body), payload_bytes, 0)
    return head + _CRC.pack(crc32c(head + body)) + body


def decode_header(raw: bytes) -> Header:
    """Checks everything about a header that doesn't need the body."""
    magic, version, op, count, request, deadline_ms, body_bytes, payload_bytes, zero = _COVERED.unpack_from(raw)
    if magic != MAGIC:
        raise ProtocolError(f"magic {magic!r}: expected {MAGIC!r}")
    if version != VERSION:
        raise ProtocolError(f"version {version}: expected {VERSION}")
    if op not in _BODY_BYTES:
        raise ProtocolError(f"op {op}: expected {min(Op)} to {max(Op)}")
    _at_most("count", count, PARTS_MAX)
    _at_most("deadline_ms", deadline_ms, DEADLINE_MS_MAX)
    _at_most("payload_bytes", payload_bytes, REQUEST_BYTES_MAX)
    low, high = _BODY_BYTES[Op(op)](count)
    if zero or not low <= body_bytes <= high:
        raise ProtocolError(f"body_bytes {body_bytes} of {Op(op).name} with count {count}: expected {low} to {high}")
    return Header(Op(op), count, request, deadline_ms, body_bytes, payload_bytes, raw)


def decode_body(header: Header, body: bytes) -> Event:
    """The event of a complete frame, every field within its bounds."""
    (crc,) = _CRC.unpack_from(header.raw, _COVERED.size)
    actual = crc32c(header.raw[: _COVERED.size] + body)
    if actual != crc:
        raise ProtocolError(f"{header.op.name} says crc32c {crc:#010x} of header and body: expected {actual:#010x}")
    if header.payload_bytes and header.op not in (Op.WRITE, Op.REPLY):
        raise ProtocolError(f"{header.op.name} with {header.payload_bytes} payload bytes: expected none")
    match header.op:
        case Op.HELLO:
            mode, zero, region_bytes = _HELLO.unpack(body)
            if mode not in (Mode.INLINE, Mode.REGION) or zero:
                raise ProtocolError(f"mode {mode}: expected {Mode.INLINE} or {Mode.REGION}")
            return Hello(Mode(mode), region_bytes)
        case Op.WELCOME:
            epoch, requests_max, offers, bytes_max = _WELCOME.unpack(body)
            if not requests_max or bytes_max < REQUEST_BYTES_MAX:
                raise ProtocolError(f"limits {requests_max}, {bytes_max}: expected at least 1 and {REQUEST_BYTES_MAX}")
            return Welcome(epoch, requests_max, bytes_max, Offers(offers & Offers.EXTENTS))
        case Op.READ | Op.WRITE | Op.LOCATE:
            return _decode_transfer(header, body)
        case Op.EXTENTS:
            return _decode_extents(header, body)
        case Op.REPLY:
            return _decode_reply(header, body)
        case Op.CANCEL:
            return Cancel(header.request)
        case Op.GOODBYE:
            (reason,) = _REASON.unpack_from(body)
            if reason not in (Reason.DRAINING, Reason.FULL, Reason.MALFORMED):
                raise ProtocolError(f"reason {reason}: expected {min(Reason)} to {max(Reason)}")
            return Goodbye(Reason(reason), body[_REASON.size :].decode(errors="replace"))


def _decode_transfer(header: Header, body: bytes) -> Transfer:
    rows = list(_PART.iter_unpack(memoryview(body)[TOKEN_BYTES:]))
    parts = tuple(Part(item, offset, length) for item, _, offset, length, _ in rows)
    total = sum(part.length for part in parts)
    if not parts or not all(part.length for part in parts):
        raise ProtocolError(f"{header.op.name} of {len(parts)} parts, {total} bytes: expected parts, each of at least one byte")
    _at_most("bytes of a request", total if header.op is not Op.LOCATE else 0, REQUEST_BYTES_MAX)  # a LOCATE moves none
    if header.payload_bytes not in (0, total):
        raise ProtocolError(f"payload_bytes {header.payload_bytes}: expected the parts' {total}, or 0")
    return Transfer(
        op=header.op,
        request=header.request,
        token=LeaseToken(body[:TOKEN_BYTES]),
        deadline_ms=header.deadline_ms,
        parts=parts,
        checksums=tuple(row[1] for row in rows),
        spans=tuple(row[4] for row in rows),
        payload_bytes=header.payload_bytes,
    )


def _decode_extents(header: Header, body: bytes) -> Extents:
    rows = list(_EXTENT.iter_unpack(body))
    for row in rows:
        _at_most("file", row[3], EXTENT_FILES_MAX - 1)
    columns = list(zip(*rows, strict=True)) if rows else [()] * 6
    return Extents(header.request, _statuses(columns[0]), columns[2], columns[3], columns[5])


def _statuses(numbers: Sequence[int]) -> tuple[PartStatus, ...]:
    try:
        return tuple(map(PartStatus, numbers))
    except ValueError as error:
        raise ProtocolError(f"part status: {error}") from error


def _decode_reply(header: Header, body: bytes) -> Reply:
    rows = list(_RESULT.iter_unpack(body))
    return Reply(
        header.request, _statuses([status for status, _, _ in rows]), tuple(crc for _, _, crc in rows), header.payload_bytes
    )


def _at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ProtocolError(f"{name} {value}: expected at most {limit}")


def _table(count: int) -> tuple[int, int]:
    return (TOKEN_BYTES + count * _PART.size,) * 2


# The least and the most bytes of a body, given the header's count.
_BODY_BYTES: dict[Op, Callable[[int], tuple[int, int]]] = {
    Op.HELLO: lambda count: (_HELLO.size, _HELLO.size),
    Op.WELCOME: lambda count: (_WELCOME.size, _WELCOME.size),
    Op.READ: _table,
    Op.WRITE: _table,
    Op.LOCATE: _table,
    Op.EXTENTS: lambda count: (count * _EXTENT.size,) * 2,
    Op.REPLY: lambda count: (count * _RESULT.size,) * 2,
    Op.CANCEL: lambda count: (0, 0),
    Op.GOODBYE: lambda count: (_REASON.size, _REASON.size + TEXT_BYTES_MAX),
}

"""Bytes into the byte plane's events (frames.py): every field within its bounds, or a `ProtocolError`. No I/O."""

from collections.abc import Callable, Sequence

import msgspec

from common.blocks import KEY_BYTES
from common.transport.frames import (
    COVERED_LAYOUT,
    CRC_LAYOUT,
    DEADLINE_MS_MAX,
    EXTENT_LAYOUT,
    FOUND_LAYOUT,
    HELLO_LAYOUT,
    LOOKUP_LAYOUT,
    MAGIC,
    PART_LAYOUT,
    REASON_LAYOUT,
    REQUEST_BYTES_MAX,
    RESULT_LAYOUT,
    TEXT_BYTES_MAX,
    VERSION,
    WELCOME_LAYOUT,
    Cancel,
    Event,
    Extents,
    FoundPrefix,
    Goodbye,
    Hello,
    Lookup,
    Mode,
    Offers,
    Op,
    ProtocolError,
    Reason,
    Reply,
    Transfer,
    Welcome,
)
from common.transport.interface import EXTENT_FILES_MAX, PARTS_MAX, TOKEN_BYTES, LeaseToken, Part, PartStatus
from common.transport.memory import crc32c

BODY_BYTES_MAX = LOOKUP_LAYOUT.size + PARTS_MAX * KEY_BYTES  # of a LOOKUP


class Header(msgspec.Struct, frozen=True):
    op: Op
    count: int
    request: int
    deadline_ms: int
    body_bytes: int
    payload_bytes: int
    raw: bytes


def decode_header(raw: bytes) -> Header:
    """Checks everything about a header that doesn't need the body."""
    magic, version, op, count, request, deadline_ms, body_bytes, payload_bytes, zero = COVERED_LAYOUT.unpack_from(raw)
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
    (crc,) = CRC_LAYOUT.unpack_from(header.raw, COVERED_LAYOUT.size)
    actual = crc32c(header.raw[: COVERED_LAYOUT.size] + body)
    if actual != crc:
        raise ProtocolError(f"{header.op.name} says crc32c {crc:#010x} of header and body: expected {actual:#010x}")
    if header.payload_bytes and header.op not in (Op.WRITE, Op.REPLY):
        raise ProtocolError(f"{header.op.name} with {header.payload_bytes} payload bytes: expected none")
    match header.op:
        case Op.HELLO:
            mode, zero, region_bytes = HELLO_LAYOUT.unpack(body)
            if mode not in (Mode.INLINE, Mode.REGION) or zero:
                raise ProtocolError(f"mode {mode}: expected {Mode.INLINE} or {Mode.REGION}")
            return Hello(Mode(mode), region_bytes)
        case Op.WELCOME:
            epoch, requests_max, offers, bytes_max = WELCOME_LAYOUT.unpack(body)
            if not requests_max or bytes_max < REQUEST_BYTES_MAX:
                raise ProtocolError(f"limits {requests_max}, {bytes_max}: expected at least 1 and {REQUEST_BYTES_MAX}")
            return Welcome(epoch, requests_max, bytes_max, Offers(offers & (Offers.EXTENTS | Offers.LOOKUPS)))
        case Op.READ | Op.WRITE | Op.LOCATE:
            return _decode_transfer(header, body)
        case Op.EXTENTS:
            return _decode_extents(header, body)
        case Op.LOOKUP:
            return _decode_lookup(header, body)
        case Op.FOUND:
            return _decode_found(header, body)
        case Op.REPLY:
            return _decode_reply(header, body)
        case Op.CANCEL:
            return Cancel(header.request)
        case Op.GOODBYE:
            (reason,) = REASON_LAYOUT.unpack_from(body)
            if reason not in (Reason.DRAINING, Reason.FULL, Reason.MALFORMED):
                raise ProtocolError(f"reason {reason}: expected {min(Reason)} to {max(Reason)}")
            return Goodbye(Reason(reason), body[REASON_LAYOUT.size :].decode(errors="replace"))


def _decode_transfer(header: Header, body: bytes) -> Transfer:
    rows = list(PART_LAYOUT.iter_unpack(memoryview(body)[TOKEN_BYTES:]))
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


def _decode_lookup(header: Header, body: bytes) -> Lookup:
    namespace, lease_ms, zero = LOOKUP_LAYOUT.unpack_from(body)
    if not header.count or zero:
        raise ProtocolError(f"LOOKUP of {header.count} keys, then {zero}: expected at least one key, then 0")
    keys = tuple(body[at : at + KEY_BYTES] for at in range(LOOKUP_LAYOUT.size, len(body), KEY_BYTES))
    return Lookup(header.request, header.deadline_ms, namespace, lease_ms, keys)


def _decode_found(header: Header, body: bytes) -> FoundPrefix:
    number, _, blocks, ttl_ms, zero, token, epoch = FOUND_LAYOUT.unpack(body)
    if zero:
        raise ProtocolError(f"FOUND with {zero} behind ttl_ms: expected 0")
    (status,) = _statuses([number])
    _at_most("blocks", blocks, PARTS_MAX if status is PartStatus.OK else 0)
    return FoundPrefix(header.request, status, blocks, ttl_ms, LeaseToken(token), epoch)


def _decode_extents(header: Header, body: bytes) -> Extents:
    rows = list(EXTENT_LAYOUT.iter_unpack(body))
    for row in rows:
        _at_most("file", row[3], EXTENT_FILES_MAX - 1)
    columns = list(zip(*rows, strict=True)) if rows else [()] * 6
    return Extents(header.request, _statuses(columns[0]), columns[2], columns[3], columns[5])


def _statuses(numbers: Sequence[int]) -> tuple[PartStatus, ...]:
    try:
        return tuple(map(_STATUSES.__getitem__, numbers))
    except KeyError as error:
        raise ProtocolError(f"part status {error}: expected {min(PartStatus)} to {max(PartStatus)}") from error


def _decode_reply(header: Header, body: bytes) -> Reply:
    rows = list(RESULT_LAYOUT.iter_unpack(body))
    return Reply(
        header.request, _statuses([status for status, _, _ in rows]), tuple(crc for _, _, crc in rows), header.payload_bytes
    )


def _at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ProtocolError(f"{name} {value}: expected at most {limit}")


def _table(count: int) -> tuple[int, int]:
    return (TOKEN_BYTES + count * PART_LAYOUT.size,) * 2


_STATUSES = {int(status): status for status in PartStatus}  # quicker than the enumeration's own look-up
# The least and the most bytes of a body, given the header's count.
_BODY_BYTES: dict[Op, Callable[[int], tuple[int, int]]] = {
    Op.HELLO: lambda count: (HELLO_LAYOUT.size, HELLO_LAYOUT.size),
    Op.WELCOME: lambda count: (WELCOME_LAYOUT.size, WELCOME_LAYOUT.size),
    Op.READ: _table,
    Op.WRITE: _table,
    Op.LOCATE: _table,
    Op.EXTENTS: lambda count: (count * EXTENT_LAYOUT.size,) * 2,
    Op.REPLY: lambda count: (count * RESULT_LAYOUT.size,) * 2,
    Op.LOOKUP: lambda count: (LOOKUP_LAYOUT.size + count * KEY_BYTES,) * 2,
    Op.FOUND: lambda count: (FOUND_LAYOUT.size, FOUND_LAYOUT.size),
    Op.CANCEL: lambda count: (0, 0),
    Op.GOODBYE: lambda count: (REASON_LAYOUT.size, REASON_LAYOUT.size + TEXT_BYTES_MAX),
}

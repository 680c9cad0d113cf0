"""The byte plane's frames: what they say, and how an event becomes bytes. `decoding.py` is the way back. No I/O.

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
    LOOKUP   body      namespace 32s | lease_ms u32 | zero u32 | count × key 32s
    FOUND    body      status u8 | zero 3s | blocks u32 | ttl_ms u32 | zero u32 | token 16s | epoch 16s

    part (32 bytes)    item u32 | crc32c u32 | offset u64 | length u64 | span u64

The header's crc32c covers its first 36 bytes and the body: a damaged table never steers bytes.
`span` is an offset in the client's region (mode REGION), else zero. A part's crc32c is set by whoever
sends the bytes. Every length is bounded before anything is allocated; whatever is out of bounds is a
`ProtocolError`, and the connection that sent it is closed.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag

import msgspec

from common.errors import PenstockError
from common.transport.interface import TOKEN_BYTES, LeaseToken, Part, PartStatus
from common.transport.memory import crc32c

MAGIC = b"PSBP"
VERSION = 1
REQUEST_BYTES_MAX = 64 << 20  # of one frame; a client splits what is larger
DEADLINE_MS_MAX = 3_600_000
EPOCH_BYTES = 16
TEXT_BYTES_MAX = 512

COVERED_LAYOUT = struct.Struct("<4sBBHQIIQI")
CRC_LAYOUT = struct.Struct("<I")
HELLO_LAYOUT = struct.Struct("<IIQ")
WELCOME_LAYOUT = struct.Struct("<16sIIQ")
PART_LAYOUT = struct.Struct("<IIQQQ")
RESULT_LAYOUT = struct.Struct("<B3sI")
EXTENT_LAYOUT = struct.Struct("<B3sIIIQ")
REASON_LAYOUT = struct.Struct("<I")
LOOKUP_LAYOUT = struct.Struct("<32sII")
FOUND_LAYOUT = struct.Struct("<B3sIII16s16s")
HEADER_BYTES = COVERED_LAYOUT.size + CRC_LAYOUT.size
NO_TOKEN = LeaseToken(bytes(TOKEN_BYTES))


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
    LOOKUP = 10
    FOUND = 11


class Offers(IntFlag):
    """What a server can do beyond READ and WRITE. A client ignores what it doesn't know."""

    NOTHING = 0
    EXTENTS = 1  # LOCATE
    LOOKUPS = 2  # LOOKUP


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


class Lookup(msgspec.Struct, frozen=True):
    """How long a prefix of this chain is stored? `lease_ms`: lease it for as long; 0: only count."""

    request: int
    deadline_ms: int
    namespace: bytes
    lease_ms: int
    keys: tuple[bytes, ...]


class FoundPrefix(msgspec.Struct, frozen=True):
    """The answer to a LOOKUP; what isn't OK found nothing. `token`: of the lease, zeros where none was granted."""

    request: int
    status: PartStatus
    blocks: int = 0
    ttl_ms: int = 0
    token: LeaseToken = NO_TOKEN
    epoch: bytes = bytes(EPOCH_BYTES)


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


Event = Hello | Welcome | Transfer | Lookup | FoundPrefix | Extents | Reply | Cancel | Goodbye


def encode(event: Event) -> bytes:
    """Header and body of a frame; its `payload_bytes` of payload must follow."""
    match event:
        case Hello(mode, region_bytes):
            return _frame(Op.HELLO, HELLO_LAYOUT.pack(mode, 0, region_bytes))
        case Welcome(epoch, requests_max, bytes_max, offers):
            return _frame(Op.WELCOME, WELCOME_LAYOUT.pack(epoch, requests_max, offers, bytes_max))
        case Transfer(op, request, token, deadline_ms, parts, checksums, spans, payload_bytes):
            return _frame(op, token + _pack_parts(parts, checksums, spans), len(parts), request, deadline_ms, payload_bytes)
        case Reply(request, statuses, checksums, payload_bytes):
            body = b"".join(RESULT_LAYOUT.pack(s, b"\0\0\0", c) for s, c in zip(statuses, checksums, strict=True))
            return _frame(Op.REPLY, body, len(statuses), request, payload_bytes=payload_bytes)
        case Extents(request, statuses, checksums, files, offsets):
            rows = zip(statuses, checksums, files, offsets, strict=True)
            body = b"".join(EXTENT_LAYOUT.pack(s, b"\0\0\0", c, file, 0, offset) for s, c, file, offset in rows)
            return _frame(Op.EXTENTS, body, len(statuses), request)
        case Lookup(request, deadline_ms, namespace, lease_ms, keys):
            body = b"".join((LOOKUP_LAYOUT.pack(namespace, lease_ms, 0), *keys))
            return _frame(Op.LOOKUP, body, len(keys), request, deadline_ms)
        case FoundPrefix(request, status, blocks, ttl_ms, token, epoch):
            return _frame(Op.FOUND, FOUND_LAYOUT.pack(status, b"\0\0\0", blocks, ttl_ms, 0, token, epoch), request=request)
        case Cancel(request):
            return _frame(Op.CANCEL, b"", request=request)
        case Goodbye(reason, text):
            return _frame(Op.GOODBYE, REASON_LAYOUT.pack(reason) + text.encode()[:TEXT_BYTES_MAX])


def _pack_parts(parts: Sequence[Part], checksums: Sequence[int], spans: Sequence[int]) -> bytes:
    rows = zip(parts, checksums, spans, strict=True)
    return b"".join(PART_LAYOUT.pack(part.item, crc, part.offset, part.length, span) for part, crc, span in rows)


def _frame(op: Op, body: bytes, count: int = 0, request: int = 0, deadline_ms: int = 0, payload_bytes: int = 0) -> bytes:
    head = COVERED_LAYOUT.pack(MAGIC, VERSION, op, count, request, deadline_ms, len(body), payload_bytes, 0)
    return head + CRC_LAYOUT.pack(crc32c(head + body)) + body

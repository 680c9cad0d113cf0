"""A segment's checkpoint: its blocks in one small file, so that a start needn't read the segment.

1. `save` writes it aside, makes it durable, and renames it to `<segment>.ckp`.
2. A start that finds it whole takes its word. Anything else about it, and the segment is scanned.
3. `discard` removes it, durably, before anything is written to the segment.

Invariants:
- A checkpoint that exists under its name tells of every block in its segment, because nothing
  was written there since. So a stale one can't exist, and a torn, damaged or missing one costs a scan.
- A segment has one such file at most, the one under its name or the one being written: it is discarded long before
  the next is begun. Its bytes are reserved with the segment's (`footprint_bytes`), so that it always has room.
"""

import os
import struct
from pathlib import Path

import msgspec
import numpy as np

from common.logs import Log
from common.transport.memory import crc32c
from services.kvstore.entries import ENTRY, Entries
from services.kvstore.files import Files
from services.kvstore.record import PAGE_BYTES, Geometry, pages
from services.kvstore.segment import Segment

log = Log("checkpoint")
SUFFIX = ".ckp"
TEMPORARY_SUFFIX = ".ckp-tmp"
MAGIC = b"PNSTKCKP"
VERSION = 1
_HEADER = struct.Struct("<8sII32sIIIIQII")
_HEADER_BYTES = 128  # the fields, zeros, and the CRC-32C of the 124 bytes before


class Checkpoint(msgspec.Struct, frozen=True):
    """The blocks of a segment, and the store's time when they were noted."""

    entries: Entries
    time_s: int


def footprint_bytes(geometry: Geometry) -> int:
    """What a segment takes of the budget: its file, and the largest checkpoint of it, in whole pages."""
    return geometry.segment_bytes + pages(_HEADER_BYTES + geometry.slots_per_segment * ENTRY.itemsize)


def slots_that_fit(payload_bytes: int, footprint_max: int) -> int:
    """How many slots the largest segment has that takes so much of the budget; not positive when it is too little for one."""
    slot_bytes = Geometry(payload_bytes, 1).slot_bytes
    slots = (footprint_max - PAGE_BYTES - _HEADER_BYTES) // (slot_bytes + ENTRY.itemsize)  # but for the last page
    return slots if footprint_bytes(Geometry(payload_bytes, slots)) <= footprint_max else slots - 1


def path_of(segment: Segment) -> Path:
    return segment.path.with_suffix(SUFFIX)


def encode(segment: Segment, checkpoint: Checkpoint) -> bytes:
    body = checkpoint.entries.tobytes()
    geometry = segment.geometry
    fields = _HEADER.pack(
        MAGIC,
        VERSION,
        0,
        segment.namespace,
        geometry.payload_bytes,
        geometry.slots_per_segment,
        segment.number,
        len(checkpoint.entries),
        checkpoint.time_s,
        crc32c(body),
        0,
    ).ljust(_HEADER_BYTES - 4, b"\0")
    return fields + struct.pack("<I", crc32c(fields)) + body


def decode(data: bytes | memoryview, segment: Segment) -> Checkpoint | str:
    """What the bytes say of the segment, or why they are no checkpoint of it."""
    if len(data) < _HEADER_BYTES:
        return f"{len(data)} bytes: expected {_HEADER_BYTES} at least"
    if struct.unpack_from("<I", data, _HEADER_BYTES - 4)[0] != crc32c(data[: _HEADER_BYTES - 4]):
        return "the header's checksum doesn't match"
    magic, version, flags, namespace, *place, count, time_s, body_crc, _ = _HEADER.unpack_from(data)
    geometry = segment.geometry
    if magic != MAGIC or version != VERSION or flags:
        return f"magic {magic!r}, version {version}, flags {flags}: expected {MAGIC!r}, {VERSION}, 0"
    if namespace != segment.namespace or place != [geometry.payload_bytes, geometry.slots_per_segment, segment.number]:
        return "it is of another segment"
    body = data[_HEADER_BYTES:]
    if len(body) != count * ENTRY.itemsize or crc32c(body) != body_crc:
        return f"{len(body)} bytes of entries: expected {count * ENTRY.itemsize}, or their checksum doesn't match"
    entries = np.frombuffer(body, ENTRY)
    slots = entries["slot"]
    if count and (int(slots.max()) >= geometry.slots_per_segment or len(np.unique(slots)) != count):
        return "it names a slot twice, or one that the segment doesn't have"
    return Checkpoint(entries, time_s)


def save(files: Files, segment: Segment, checkpoint: Checkpoint) -> None:
    """Makes a checkpoint durable. Blocking; raises `OSError`.

    From here on nothing may be written to the segment, also when this fails: the new name may exist or not.
    """
    segment.checkpointed = True
    temporary = segment.path.with_suffix(TEMPORARY_SUFFIX)
    fd = files.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        data = memoryview(encode(segment, checkpoint))
        done = 0
        while done < len(data):
            done += files.write(fd, data[done:], done)
        files.sync(fd)
    except BaseException:
        files.close(fd)
        files.remove(temporary)
        raise
    files.close(fd)
    files.rename(temporary, path_of(segment))
    files.sync_folder(segment.path.parent)


def load(files: Files, segment: Segment) -> Checkpoint | None:
    """The segment's checkpoint, when there is one that can be believed. Blocking."""
    path = path_of(segment)
    if not path.exists():
        return None
    try:
        fd = files.open(path, os.O_RDONLY)
        try:
            data = memoryview(bytearray(min(files.size(fd), _HEADER_BYTES + segment.geometry.slots_per_segment * ENTRY.itemsize)))
            found = decode(data[: files.read(fd, [data], 0)], segment)
        finally:
            files.close(fd)
    except OSError as error:
        found = str(error)
    if isinstance(found, str):
        log.warning("checkpoint_unusable", path=str(path), reason=found, effect="the segment is scanned")
        return None
    return found


def discard(files: Files, segment: Segment) -> None:
    """The segment is about to change: nothing vouches for it any more, durably. Blocking; raises `OSError`."""
    remove_leftover(files, segment.path)
    files.sync_folder(segment.path.parent)  # also where an earlier attempt failed between the two
    segment.checkpointed = False


def remove_leftover(files: Files, segment_path: Path) -> None:
    """Removes what may be left of a segment that was there before; durable when the folder is synced. Raises `OSError`."""
    path = segment_path.with_suffix(SUFFIX)
    if path.exists():
        files.remove(path)

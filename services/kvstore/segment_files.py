"""Makes and removes segment files, and counts their bytes against the disk they lie on.

A file counts from before it is begun until after it is gone; one that can't be removed counts for ever. What counts is
the file and room for its checkpoint, so that a checkpoint may be written at any moment.
Belongs to the event loop; the file system is called through `FileCalls`, one segment at a time being made on a disk.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common.blocks import Namespace
from common.logs import Log
from services.kvstore import checkpoint
from services.kvstore.disk import Disk, DiskState
from services.kvstore.file_calls import FileCalls
from services.kvstore.files import Files
from services.kvstore.record import SegmentHeader, pages
from services.kvstore.segment import TEMPORARY_SUFFIX, Segment, create, file_name
from services.kvstore.shelf import Shelf

log = Log("space")
FULL_PAUSE_S = 5.0  # after a failed allocation: don't ask the file system for every request


class SegmentFiles:
    """The segment files of all disks."""

    def __init__(
        self,
        files: Files,
        disks: Sequence[Disk],
        calls: FileCalls,
        clock: Callable[[], float],
        failed: Callable[[Disk, BaseException], None],
    ) -> None:
        """`failed` is told of errors on a disk."""
        self.unusable_numbers: dict[tuple[int, Namespace], set[int]] = {}  # by disk and namespace: left alone, or being removed
        self._files = files
        self._disks = disks
        self._calls = calls
        self._clock = clock
        self._failed = failed
        self._making: set[int] = set()  # positions of disks

    def paused(self, disk: Disk) -> bool:
        """A segment is being made there, or an allocation failed a moment ago."""
        return disk.position in self._making or self._clock() < disk.full_until_s

    async def make(self, shelf: Shelf, disk: Disk) -> Segment | None:
        """A new segment on a disk, or None: it is full, paused, failing, or by now not serving any more."""
        if self.paused(disk):
            return None
        unusable = self._unusable(disk.position, shelf.namespace)
        number = shelf.next_segment_number(disk.position, unusable.__contains__)
        header = SegmentHeader(shelf.namespace_bytes, shelf.geometry, number)
        folder = disk.namespaces / shelf.namespace
        footprint = checkpoint.footprint_bytes(shelf.geometry)
        disk.changing_bytes += footprint
        self._making.add(disk.position)
        made = await self._calls.run(disk.position, partial(self._create, disk, folder, header))
        self._making.remove(disk.position)
        disk.changing_bytes -= footprint
        if isinstance(made, BaseException):
            disk.full_until_s = self._clock() + FULL_PAUSE_S
            log.warning("no_new_segment", path=str(folder), bytes=header.geometry.segment_bytes, reason=str(made))
            if isinstance(made, _LeftBehind):
                self._count_unusable(disk, shelf.namespace, number, made.left_bytes)
            self._failed(disk, made.__cause__ or made)
            return None
        if disk.state is not DiskState.SERVING:
            made.close()
            self._count_unusable(disk, shelf.namespace, number, footprint)
            return None
        disk.segment_bytes += footprint
        return made

    async def remove(self, segment: Segment) -> None:
        """Deletes the file of a segment that no shelf has any more. Its number isn't given out again before it is gone."""
        disk, numbers = self._disks[segment.disk], self._unusable(segment.disk, Namespace(segment.namespace.hex()))
        numbers.add(segment.number)
        footprint = checkpoint.footprint_bytes(segment.geometry)
        disk.segment_bytes -= footprint
        disk.changing_bytes += footprint
        async with segment.changing:
            result = await self._calls.run(segment.disk, partial(self._remove, segment))
        disk.changing_bytes -= footprint
        if isinstance(result, BaseException):
            self._keep(segment, result)
        else:
            numbers.remove(segment.number)

    def remove_now(self, segment: Segment) -> None:
        """`remove`, blocking; at start."""
        self._disks[segment.disk].segment_bytes -= checkpoint.footprint_bytes(segment.geometry)
        try:
            self._remove(segment)
        except OSError as error:
            self._keep(segment, error)

    def _keep(self, segment: Segment, error: BaseException) -> None:
        segment.close()
        namespace = Namespace(segment.namespace.hex())
        footprint = checkpoint.footprint_bytes(segment.geometry)
        self._count_unusable(self._disks[segment.disk], namespace, segment.number, footprint)
        log.error("segment_not_removed", path=str(segment.path), reason=str(error))

    def _count_unusable(self, disk: Disk, namespace: Namespace, number: int, length: int) -> None:
        disk.unusable_bytes += length
        self._unusable(disk.position, namespace).add(number)

    def _unusable(self, disk: int, namespace: Namespace) -> set[int]:
        return self.unusable_numbers.setdefault((disk, namespace), set())

    def _create(self, disk: Disk, folder: Path, header: SegmentHeader) -> Segment:
        if not folder.exists():
            self._files.make_folder(folder)
            self._files.sync_folder(folder.parent)
        path = folder / file_name(header.segment)
        checkpoint.remove_leftover(self._files, path)
        try:
            return create(self._files, folder, header, direct=disk.direct, disk=disk.position)
        except OSError as error:
            left = [one for one in (path, path.with_suffix(TEMPORARY_SUFFIX)) if one.exists()]
            if not left:
                raise
            raise _LeftBehind(str(error), sum(pages(one.stat().st_size) for one in left)) from error

    def _remove(self, segment: Segment) -> bool:
        if segment.checkpointed:
            checkpoint.discard(self._files, segment)
        segment.remove()
        return True


class _LeftBehind(Exception):
    """A segment could be neither made nor taken away again."""

    def __init__(self, reason: str, left_bytes: int) -> None:
        super().__init__(reason)
        self.left_bytes = left_bytes

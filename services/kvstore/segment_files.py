"""Makes and removes segment files, and counts their bytes against the disk they lie on.

A file counts from before it is begun until after it is gone; one that can't be removed counts for ever. What counts is
the file and room for its checkpoint, so that a checkpoint may be written at any moment.
Belongs to the event loop; the file system is called in the pool.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common.blocks import Namespace
from common.disk.io_pool import IoPool
from common.errors import Overloaded
from common.logs import Log
from services.kvstore import checkpoint
from services.kvstore.disk import Disk
from services.kvstore.files import Files
from services.kvstore.record import SegmentHeader
from services.kvstore.segment import Segment, create, file_name
from services.kvstore.shelf import Shelf

log = Log("space")
FULL_PAUSE_S = 5.0  # after a failed allocation: don't ask the file system for every request


class SegmentFiles:
    """The segment files of all disks."""

    def __init__(
        self,
        files: Files,
        disks: Sequence[Disk],
        pool: IoPool,
        clock: Callable[[], float],
        failed: Callable[[Disk, BaseException], None],
    ) -> None:
        """`failed` is told of errors on a disk."""
        self.unusable_numbers: dict[tuple[int, Namespace], set[int]] = {}  # by disk and namespace
        self._files = files
        self._disks = disks
        self._pool = pool
        self._clock = clock
        self._failed = failed

    def paused(self, disk: Disk) -> bool:
        """An allocation there failed a moment ago."""
        return self._clock() < disk.full_until_s

    async def make(self, shelf: Shelf, disk: Disk) -> Segment | None:
        """A new segment on a disk, or None: it is full, paused, or failing."""
        if self.paused(disk):
            return None
        folder = disk.namespaces / shelf.namespace
        unusable = self.unusable_numbers.get((disk.position, shelf.namespace), set())
        number = shelf.next_segment_number(disk.position, unusable.__contains__)
        header = SegmentHeader(shelf.namespace_bytes, shelf.geometry, number)
        footprint = checkpoint.footprint_bytes(shelf.geometry)
        disk.changing_bytes += footprint
        result: Segment | BaseException
        try:
            (result,) = await self._pool.submit([partial(self._create, disk, folder, header)]).done
        except Overloaded:
            return None
        finally:
            disk.changing_bytes -= footprint
        if isinstance(result, BaseException):
            disk.full_until_s = self._clock() + FULL_PAUSE_S
            log.warning("no_new_segment", path=str(folder), bytes=header.geometry.segment_bytes, reason=str(result))
            self._failed(disk, result)
            return None
        disk.segment_bytes += footprint
        return result

    async def remove(self, segment: Segment) -> None:
        """Deletes the file of a segment that no shelf has any more."""
        disk = self._disks[segment.disk]
        footprint = checkpoint.footprint_bytes(segment.geometry)
        disk.segment_bytes -= footprint
        disk.changing_bytes += footprint
        result: bool | BaseException
        try:
            async with segment.changing:
                (result,) = await self._pool.submit([partial(self._remove, segment)]).done
        except Overloaded as refused:
            result = refused
        finally:
            disk.changing_bytes -= footprint
        if isinstance(result, BaseException):
            self._keep(segment, result)

    def remove_now(self, segment: Segment) -> None:
        """`remove`, blocking; at start."""
        self._disks[segment.disk].segment_bytes -= checkpoint.footprint_bytes(segment.geometry)
        try:
            self._remove(segment)
        except OSError as error:
            self._keep(segment, error)

    def _keep(self, segment: Segment, error: BaseException) -> None:
        segment.close()
        self._disks[segment.disk].unusable_bytes += checkpoint.footprint_bytes(segment.geometry)
        namespace = Namespace(segment.namespace.hex())
        self.unusable_numbers.setdefault((segment.disk, namespace), set()).add(segment.number)
        log.error("segment_not_removed", path=str(segment.path), reason=str(error))

    def _create(self, disk: Disk, folder: Path, header: SegmentHeader) -> Segment:
        if not folder.exists():
            self._files.make_folder(folder)
            self._files.sync_folder(folder.parent)
        checkpoint.remove_leftover(self._files, folder / file_name(header.segment))
        return create(self._files, folder, header, direct=disk.direct, disk=disk.position)

    def _remove(self, segment: Segment) -> bool:
        if segment.checkpointed:
            checkpoint.discard(self._files, segment)
        segment.remove()
        return True

"""The server's answers to LOCATE: where a client on this host may read the disk itself.

The files go along as open, read-only descriptors, so a client needs no right to the folder and no path that means
the same to both. One answer carries at most EXTENT_FILES_MAX of them; parts in further files are FULL, and are
read in the usual way. A client closes them when its read is over: a file that was removed keeps its space
until then, which is why they live no longer than the lease.
"""

from common.transport.frames import Extents, Transfer, encode
from common.transport.interface import EXTENT_FILES_MAX, Extent, ExtentArea, PartStatus
from common.transport.streams import SocketStream


class ExtentDesk:
    """Answers for one connection."""

    def __init__(self, area: ExtentArea, stream: SocketStream) -> None:
        self._area, self._stream = area, stream

    async def answer(self, request: Transfer) -> None:
        """Sends one EXTENTS. Raises `TransferFailed`; the caller sees to it that nobody else sends meanwhile."""
        numbers: dict[int, int] = {}  # by descriptor
        rows: list[tuple[PartStatus, int, int, int]] = []
        for one in self._area.locate(request.token, request.parts):
            if isinstance(one, PartStatus):
                rows.append((one, 0, 0, 0))
            elif one.fd not in numbers and len(numbers) == EXTENT_FILES_MAX:
                rows.append((PartStatus.FULL, 0, 0, 0))
            else:
                rows.append(_row(one, numbers.setdefault(one.fd, len(numbers))))
        statuses, checksums, files, offsets = zip(*rows, strict=True)
        await self._stream.send([encode(Extents(request.request, statuses, checksums, files, offsets))], list(numbers))


def _row(extent: Extent, file: int) -> tuple[PartStatus, int, int, int]:
    return (PartStatus.OK, extent.checksum, file, extent.offset)

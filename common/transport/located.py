"""What a peer on this host said of where parts lie on its disk."""

import os

from common.transport.frames import Extents
from common.transport.interface import Extent, PartStatus


class Located:
    """Extents, and the descriptors they are in: ours until everybody who holds them has closed them. Made held once."""

    def __init__(self, answer: Extents, fds: list[int]) -> None:
        self._fds = fds
        self._holders = 1
        rows = zip(answer.statuses, answer.checksums, answer.files, answer.offsets, strict=True)
        self.parts: list[Extent | PartStatus] = [self._part(*row) for row in rows]

    def _part(self, status: PartStatus, checksum: int, file: int, offset: int) -> Extent | PartStatus:
        if status is not PartStatus.OK:
            return status
        return Extent(self._fds[file], offset, checksum) if file < len(self._fds) else PartStatus.FAILED

    def hold(self) -> None:
        """For one more `close`."""
        assert self._holders, "the descriptors are closed"
        self._holders += 1

    def close(self) -> None:
        """The last one closes the descriptors; idempotent after that."""
        self._holders = max(0, self._holders - 1)
        if not self._holders:
            for fd in self._fds:
                os.close(fd)
            self._fds = []

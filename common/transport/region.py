"""Shared memory for bulk transfers: our own `Region`, and a peer's as `RemoteRegion`.

Invariants:
- A region is an anonymous memfd: nothing is named in /dev/shm, so nothing is left after kill -9.
- Its size is sealed. A peer that maps it checks the seals first, so that no truncation can turn an
  access into SIGBUS.
- Held bytes: a span that a hung peer on this host may still write. A holder of the region doesn't
  hand such bytes out again until they are released (see `connection.py`).
"""

import fcntl
import os
import stat
from collections import Counter

from common.errors import InvalidRequest
from common.transport.interface import Span
from common.transport.shared_pages import SharedPages

REGION_BYTES_MAX = 1 << 42
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Region:
    """Our memory, pre-faulted, with an fd that peers on this host may map. `huge`: on huge pages, so fit for direct I/O."""

    def __init__(self, size: int, *, name: str = "penstock", prefault: bool = True) -> None:
        if not 0 < size <= REGION_BYTES_MAX:
            raise InvalidRequest(f"region size {size}: expected 1 to {REGION_BYTES_MAX} bytes", param="size")
        self.size = size
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._pages = SharedPages(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.huge = prefault and self._pages.make_present()
        self._held: Counter[Span] = Counter()

    def view(self, span: Span) -> memoryview:
        """The bytes of a span, writable. Out of bounds raises `InvalidRequest`."""
        return _slice(self._pages.view, span.offset, span.length)

    def hold(self, span: Span) -> None:
        """Notes that a hung peer may still write this span."""
        self._held[span] += 1

    def unhold(self, span: Span) -> None:
        """The peer answered, or is gone."""
        self._held[span] -= 1
        if not self._held[span]:
            del self._held[span]

    def held(self, span: Span) -> bool:
        """Whether any byte of the span may still be written by a hung peer."""
        end = span.offset + span.length
        return any(other.offset < end and span.offset < other.offset + other.length for other in self._held)

    def close(self) -> None:
        """Gives the memory back. Views that are still out keep the mapping until they go."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._pages.close()

    def __repr__(self) -> str:
        return f"Region(size={self.size}, held={sum(self._held.values())})"


class RemoteRegion:
    """A peer's region, mapped here. Every access is checked against its size."""

    def __init__(self, pages: SharedPages, size: int) -> None:
        self.size = size
        self._pages = pages

    @classmethod
    def map(cls, fd: int, size: int) -> "RemoteRegion":
        """Maps a peer's memfd; the caller keeps and closes `fd`. Raises `InvalidRequest`."""
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or not 0 < size <= REGION_BYTES_MAX or facts.st_size != size:
            raise InvalidRequest(
                f"region fd: {facts.st_size} bytes, announced as {size}: expected a memfd of just that size", param="fd"
            )
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise InvalidRequest("region fd: expected a memfd, which carries seals", param="fd") from error
        if seals & _SEALS != _SEALS:
            raise InvalidRequest(f"region fd: seals {seals:#x}: expected SHRINK and GROW to be sealed", param="fd")
        try:
            return cls(SharedPages(fd, size), size)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"region fd: cannot be mapped for reading and writing: {error}", param="fd") from error

    def view(self, offset: int, length: int) -> memoryview:
        """Bytes `[offset, offset + length)`. Out of bounds raises `InvalidRequest`."""
        return _slice(self._pages.view, offset, length)

    def close(self) -> None:
        """Unmaps. Views that are still out keep the mapping until they go."""
        self._pages.close()


def _slice(view: memoryview, offset: int, length: int) -> memoryview:
    if offset < 0 or length < 0 or offset + length > len(view):
        raise InvalidRequest(f"span [{offset}, {offset + length}): outside the region's [0, {len(view)})", param="span")
    return view[offset : offset + length]

"""Shared memory on huge pages, whatever `shmem_enabled` says: a memfd's pages are collapsed, 2 MiB at a time.

To a disk, memory on huge pages is a few long pieces instead of one for each 4 KiB: on the virtual disk of
docs/benchmarks.md a read straight into shared memory then takes 0.6 ms instead of 1.6. The kernel collapses
(MADV_COLLAPSE, Linux 6.1) where the mapping starts on a huge page's boundary and it finds 2 MiB in one piece;
where it doesn't, what is left gets ordinary pages.
"""

import ctypes
import mmap
import os
from contextlib import suppress

from common.disk.pages import HUGE_BYTES, PAGE_BYTES, address

_MADV_POPULATE_WRITE = 23  # linux/mman-common.h, since Linux 5.14; not yet in the mmap module
_MADV_COLLAPSE = 25  # since Linux 6.1
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000  # asm-generic/mman-common.h
_MAP_FAILED = ctypes.c_void_p(-1).value
_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class SharedPages:
    """`size` bytes of a memfd, mapped at a huge page's boundary. `close` unmaps when no view is out any more."""

    def __init__(self, fd: int, size: int) -> None:
        """Raises `OSError`."""
        self._size = size
        self._map = mmap.mmap(-1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        whole = memoryview(self._map)
        self._start = -address(whole) % HUGE_BYTES
        place = address(whole) + self._start
        # The mapping lies inside of the anonymous one, which goes as a whole when it is closed.
        if _mmap(place, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.view = whole[self._start : self._start + size]

    def make_present(self) -> bool:
        """Makes every page present, as writing to fresh ones costs 5-10 times as much; whether all that can be are huge."""
        with suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE, self._start, self._size)  # heeded where shmem_enabled is "advise" or more
        done = 0
        while done + HUGE_BYTES <= self._size and self._collapse(done):
            done += HUGE_BYTES
        self._populate(done)
        return done + HUGE_BYTES > self._size

    def _collapse(self, offset: int) -> bool:
        self.view[offset] = 0  # nothing is collapsed where there is no page yet
        try:
            self._map.madvise(_MADV_COLLAPSE, self._start + offset, HUGE_BYTES)
        except OSError:
            return False
        return True

    def _populate(self, offset: int) -> None:
        if offset == self._size:
            return
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, self._start + offset, self._size - offset)
        except OSError:
            for at in range(offset, self._size, PAGE_BYTES):
                self.view[at] = 0

    def close(self) -> None:
        """Idempotent."""
        self.view.release()
        with suppress(BufferError):  # somebody still holds a view: the last one to go unmaps
            self._map.close()

"""Page-aligned memory, as direct I/O wants it."""

import ctypes
import mmap

PAGE_BYTES = 4096  # the largest logical block size of common SSDs, and the memory page


def aligned(length: int) -> memoryview:
    """Zeroed, pre-faulted memory that starts on a page."""
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))


def address(view: memoryview) -> int:
    """Where a non-empty, writable view's bytes lie."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))

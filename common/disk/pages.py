"""Page-aligned memory, as direct I/O wants it."""

import mmap

import numpy as np

PAGE_BYTES = 4096  # the largest logical block size of common SSDs, and the memory page


def aligned(length: int) -> memoryview:
    """Zeroed, pre-faulted memory that starts on a page."""
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))


def address(view: memoryview) -> int:
    """Where a non-empty view's bytes lie."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])

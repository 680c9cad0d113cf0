"""Page-aligned memory, as direct I/O wants it.

Memory on huge pages is a few long pieces to a disk instead of one piece per 4 KiB. On the virtual disk of
docs/benchmarks.md that doubles to triples the bandwidth of direct I/O and takes a fifth of its CPU time.
"""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

PAGE_BYTES = 4096  # the largest logical block size of common SSDs, and the memory page


HUGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # linux/mman-common.h, since Linux 5.14; not yet in the mmap module


def pages(length: int) -> int:
    """`length` rounded up to whole pages."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def aligned(length: int) -> memoryview:
    """Zeroed, pre-faulted memory that starts on a page."""
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))


def huge(length: int) -> memoryview:
    """As `aligned`, on huge pages where the kernel has them to give."""
    mapping = mmap.mmap(-1, length + 2 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -address(memoryview(mapping)) % HUGE_BYTES
    whole = -(-length // HUGE_BYTES) * HUGE_BYTES
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE, start, whole)
    view = memoryview(mapping)[start : start + length]
    try:
        mapping.madvise(_MADV_POPULATE_WRITE, start, length)
    except OSError:
        for offset in range(0, length, PAGE_BYTES):
            view[offset] = 0
    return view


def shared_memory_is_huge() -> bool:
    """Whether the kernel puts shared memory on huge pages when asked to, as regions do."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return False
    return "[never]" not in setting and "[deny]" not in setting


def address(view: memoryview) -> int:
    """Where a non-empty, writable view's bytes lie."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))

"""Memory that a start needed and the store doesn't: back to the system with it."""

import ctypes
import gc


def trim() -> None:
    """Gives freed memory back where the C library can (glibc): it would keep what a start has used for ever."""
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)

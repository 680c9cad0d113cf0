"""What a start leaves on the heap: seen by the garbage collector once, not again and again.

Importing makes up to 360,000 objects (a worker: torch, transformers) that live as long as the process. While they are made each full
collection looks at all of them for nothing, and afterwards one that comes in the middle of a decode step would do so again: 0.2 s on a slow
core. So `process.run` starts with the collector off, and a service calls `settle` when what it keeps is there.
"""

import ctypes
import gc


def hold() -> None:
    """No collections until `settle`."""
    gc.disable()


def settled() -> bool:
    return gc.isenabled()


def settle() -> None:
    """After `hold`: collections from now on, of what is new from now on. Always: gives freed memory back where the C library can (glibc),
    which would keep what a start has used for ever."""
    gc.collect()
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)

"""One number per slot, in one piece of memory: `view` reads and writes single values, `array` many.

The memory is an anonymous mapping, so that it grows in place (nothing is copied, nothing is kept twice),
pages that were never written cost nothing, and what is let go goes back to the system.
"""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
Slots = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
NO_SLOTS: Slots = np.empty(0, np.int32)
NONE = -1  # no slot, inside columns of slots


class Column:
    """Numbers of one type, `fill` where nothing was written. Indexing is by slot number.

    Nobody keeps `array`, `view` or slices of them while the column may grow.
    """

    def __init__(self, dtype: npt.DTypeLike, fill: int = 0) -> None:
        self._dtype = np.dtype(dtype)
        self._fill = fill
        self._memory: mmap.mmap | None = None
        self.array: Numbers = np.empty(0, dtype)
        self.view: memoryview[int] = self.array.data

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def grow(self, places: int) -> None:
        """At least `places` places; what was there stays."""
        have = len(self.array)
        if places <= have:
            return
        length = places * self._dtype.itemsize
        self.view.release()
        self.array = np.empty(0, self._dtype)
        if self._memory is None:
            self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._memory.resize(length)
        self.array = np.frombuffer(self._memory, self._dtype)
        self.view = self.array.data
        if self._fill:
            self.array[have:] = self._fill

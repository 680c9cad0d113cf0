"""One slice of a run on our side: what ends after the ramp counts, with its latency and the CPU seconds meanwhile."""

import time
from collections.abc import Callable

from loadtest.store.fio import GIB, Sample


class Slice:
    """`cpu_s` says how many CPU seconds all processes that are ours have used so far."""

    def __init__(self, ramp_s: float, seconds: float, cpu_s: Callable[[], float]) -> None:
        self._cpu_s = cpu_s
        self._starts = time.perf_counter() + ramp_s
        self._ends = self._starts + seconds
        self._cpu_before_s: float | None = None
        self._began = self._starts
        self._latencies_s: list[float] = []
        self._moved_bytes = 0

    @property
    def running(self) -> bool:
        return time.perf_counter() < self._ends

    def note(self, began: float, moved_bytes: int) -> None:
        """Something that was begun at `began` has ended."""
        now = time.perf_counter()
        if now < self._starts:
            return
        if self._cpu_before_s is None:
            self._cpu_before_s, self._began = self._cpu_s(), now  # counts from here on
            return
        self._latencies_s.append(now - began)
        self._moved_bytes += moved_bytes

    def sample(self) -> Sample:
        assert self._cpu_before_s is not None and self._latencies_s, "nothing ended within the slice: take a longer one"
        seconds, cpu_s = time.perf_counter() - self._began, self._cpu_s() - self._cpu_before_s
        ordered = sorted(self._latencies_s)
        p50_s, p99_s = ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]
        return Sample(self._moved_bytes / seconds, p50_s, p99_s, cpu_s / (self._moved_bytes / GIB))

"""How fast an engine is, measured before anybody waits for it: the router needs to know what computing costs before it routes to it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from services.worker.engine.types import StepResult

STEP_S = 0.3  # no size is tried that would take longer than a step may
GROWTH = 4  # from one prompt's length to the next
ID = "calibration"


class Calibrated(Protocol):
    """An engine, as far as this needs it."""

    @property
    def idle(self) -> bool: ...

    def step(self) -> StepResult: ...

    def forget_speed(self) -> None:
        """As if nothing had been measured."""
        ...


def calibrate(engine: Calibrated, add: Callable[[int], AbstractContextManager[None]], first: int, longest: int) -> None:
    """Computes made-up prompts of `first` tokens and up, to `longest`, as long as they take less than `STEP_S`: each twice, because at first
    kernels are chosen and memory is touched, then all once more, which counts. `add` hands one of so many tokens to the engine, which is idle, its
    thread not yet running, and takes back what it was given for it."""

    def computed_s(tokens: int) -> float:
        with add(tokens):
            began = time.perf_counter()
            while not engine.idle:
                for step in engine.step().sequences:
                    if step.error is not None:
                        raise step.error
            return time.perf_counter() - began

    sizes = []
    size, took_s = min(first, longest), 0.0
    while size <= longest and took_s * GROWTH < STEP_S:
        computed_s(size)
        took_s = computed_s(size)
        sizes.append(size)
        size *= GROWTH
    engine.forget_speed()
    for size in sizes:
        computed_s(size)


def prompt_of(tokens: int, vocab_size: int) -> list[int]:
    """Made up."""
    return [position % vocab_size for position in range(tokens)]

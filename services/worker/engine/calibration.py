"""How fast an engine is, measured before anybody waits for it: the router needs to know what computing costs before it routes to it."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from services.worker.engine.types import StepResult

STEP_S = 0.3  # no size is tried that would take longer than a step may
GROWTH = 4  # from one prompt's length to the next
TIMES = 4
ID = "calibration"


class Calibrated(Protocol):
    """An engine, as far as this needs it."""

    @property
    def idle(self) -> bool: ...

    def step(self) -> StepResult: ...

    def set_speed(self, steps: Iterable[tuple[int, float]]) -> None:
        """As if these steps, of so many tokens from a prompt's start in so many seconds, were all that was measured."""
        ...


def calibrate(engine: Calibrated, add: Callable[[int], AbstractContextManager[None]], longest: int) -> None:
    """Computes made-up prompts of one token and up, to `longest`, as long as they take less than `STEP_S`: one token is a step's fixed part, which a
    short tail consists of. Of each, the quickest of a few counts: at first kernels are chosen and memory is touched, and the machine may be busy
    with others. `add` hands one of so many tokens to the engine, which is idle, its thread not yet running, and takes back what it was given for it."""

    def computed_s(tokens: int) -> float:
        with add(tokens):
            began = time.perf_counter()
            while not engine.idle:
                for step in engine.step().sequences:
                    if step.error is not None:
                        raise step.error
            return time.perf_counter() - began

    steps: list[tuple[int, float]] = []
    size, took_s = 1, 0.0
    while size <= longest and took_s * GROWTH < STEP_S:
        took_s = min(computed_s(size) for _ in range(TIMES))
        steps.append((size, took_s))
        size *= GROWTH
    engine.set_speed(steps)


def prompt_of(tokens: int, vocab_size: int) -> list[int]:
    """Made up."""
    return [position % vocab_size for position in range(tokens)]

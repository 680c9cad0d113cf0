"""What a worker knows of its speed before the first request."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.decode.worker import DecodeKind
from services.worker.engine import calibration
from services.worker.engine.calibration import STEP_S, calibrate
from services.worker.engine.speed import Speed
from services.worker.engine.types import StepResult
from services.worker.settings import WorkerSettings
from services.worker.stage import Stage
from tests.worker.conftest import Tiny


def test_a_fresh_decode_worker_knows_its_speed_and_keeps_nothing(llama: Tiny) -> None:
    layout = llama.loaded.layout
    stage = Stage(1, layout.bytes_per_block)
    settings = WorkerSettings(model="-", pool_bytes=8 * layout.bytes_per_block)
    engine = DecodeKind().engine(settings, llama.loaded, stage, 100)
    load = engine.load
    assert load.prefill_tokens_per_s > 0 and (load.running, load.waiting, load.tokens) == (0, 0, 0)
    assert load.pool_blocks_free == load.pool_blocks_total and load.pool_blocks_named == 0 and engine.idle
    engine.check_integrity()


class Clocked:
    """An engine of a known speed, cold at first and held up now and then, by a clock of its own."""

    def __init__(self, tokens_per_s: float, step_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.steps: list[tuple[int, float]] = []
        self._tokens_per_s, self._step_s = tokens_per_s, step_s
        self._times: dict[int, int] = {}
        self._left = 0

    @property
    def idle(self) -> bool:
        return not self._left

    @contextmanager
    def add(self, tokens: int) -> Iterator[None]:
        self._left = tokens
        yield

    def step(self) -> StepResult:
        times = self._times[self._left] = self._times.get(self._left, 0) + 1
        self.now_s += self._step_s + self._left / self._tokens_per_s + (1.0 if times == 1 else 0.05 if times % 2 else 0.0)
        self._left = 0
        return StepResult((), None)  # type: ignore[arg-type]

    def set_speed(self, steps: object) -> None:
        self.steps = list(steps)  # type: ignore[call-overload]


def test_cold_and_disturbed_tries_do_not_count_and_no_size_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Clocked(1000.0)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: engine.now_s)
    calibrate(engine, engine.add, 10_000)
    assert [tokens for tokens, _ in engine.steps] == [1, 4, 16, 64, 256]
    speed = Speed()
    for tokens, seconds in engine.steps:
        assert seconds == pytest.approx(tokens / 1000.0) and seconds < STEP_S
        speed.measured(tokens, seconds)
    assert speed.tokens_per_s == pytest.approx(1000.0, rel=1e-6)


def test_what_a_short_tail_takes_is_known_although_few_sizes_are_quick_enough_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Clocked(1000.0, step_s=0.03)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: engine.now_s)
    calibrate(engine, engine.add, 10_000)
    speed = Speed()
    for tokens, seconds in engine.steps:
        speed.measured(tokens, seconds)
    assert engine.steps[-1][0] == 64
    assert (speed.step_s, speed.tokens_per_s) == (pytest.approx(0.03), pytest.approx(1000.0))

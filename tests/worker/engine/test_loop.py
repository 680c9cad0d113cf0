"""The engine's thread: commands go in at any time, one result per step comes out on the event loop."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from common.blocks import ChainRoot, block_keys
from common.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from services.worker.engine.engine import Engine
from services.worker.engine.loop import EngineLoop
from services.worker.engine.types import LoadedKv, StepResult
from tests.worker.conftest import make_prompt
from tests.worker.engine.drive import Outcome, collect, greedy, make_engine, new

DEADLINE_S = 30


class WatchedQueue(queue.SimpleQueue):
    """Says when its reader sleeps."""

    def __init__(self) -> None:
        self.asleep = threading.Event()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self.asleep.set()
        command = super().get(block, timeout)
        self.asleep.clear()
        return command


class WatchedSemaphore(threading.Semaphore):
    """Says when someone has to wait for it."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.contended = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if super().acquire(blocking=False):
            return True
        self.contended.set()
        return super().acquire(blocking, timeout)


class Runner:
    """A running loop and what has come out of it so far."""

    def __init__(self, engine: Engine) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.results: list[StepResult] = []
        self.loop = EngineLoop(engine, self._on_step)
        self.commands = self.loop._commands = WatchedQueue()
        self._news = asyncio.Event()
        self._event_thread = threading.get_ident()

    def _on_step(self, result: StepResult) -> None:
        assert threading.get_ident() == self._event_thread
        self.results.append(result)
        collect(result, self.outcomes)
        self._news.set()

    async def _until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def heard_of(self, name: str) -> None:
        await self._until(lambda: name in self.outcomes)

    async def finished(self, *names: str) -> None:
        await self._until(lambda: all(name in self.outcomes and self.outcomes[name].finish for name in names))

    async def asleep(self) -> None:
        assert await asyncio.to_thread(self.commands.asleep.wait, DEADLINE_S)

    async def occupied(self) -> tuple[threading.Event, "asyncio.Task[bool]"]:
        """Keeps the engine's thread busy until the event is set."""
        inside, leave = threading.Event(), threading.Event()

        def wait(engine: Engine) -> bool:
            inside.set()
            return leave.wait(DEADLINE_S)

        task = asyncio.create_task(self.loop.call(wait))
        assert await asyncio.to_thread(inside.wait, DEADLINE_S)
        return leave, task


@pytest.fixture
async def runner(llama) -> AsyncIterator[Runner]:
    runner = Runner(make_engine(llama.loaded, sequences_max=4, waiting_max=2))
    runner.loop.start()
    yield runner
    await runner.loop.stop()
    assert not runner.loop.alive and runner.loop.failure is None


async def test_sequences_added_at_any_time_give_the_oracles_tokens(runner: Runner, llama) -> None:
    runner.loop.add(new("a", make_prompt(30), greedy(20)))
    await runner.heard_of("a")
    runner.loop.add(new("b", make_prompt(17), greedy(20)))
    await runner.finished("a", "b")
    assert runner.outcomes["a"].ids == llama.generate(make_prompt(30), 20)[0]
    assert runner.outcomes["b"].ids == llama.generate(make_prompt(17), 20)[0]
    assert runner.loop.load.running == 0
    await runner.loop.call(Engine.check_integrity)


async def test_a_cancelled_sequence_is_reported_and_the_thread_sleeps_again(runner: Runner) -> None:
    runner.loop.add(new("long", make_prompt(30), greedy(900, ignore_eos=True)))
    await runner.heard_of("long")
    runner.loop.cancel("long")
    await runner.finished("long")
    assert runner.outcomes["long"].finish == "cancelled"
    await runner.asleep()
    assert runner.loop.stalled_s() == 0


async def test_refusals_are_raised_at_once_and_give_the_buffers_back(runner: Runner) -> None:
    copied: list[int] = []
    with pytest.raises(InvalidRequest):
        runner.loop.add(new("bad", [], greedy(5), kv=LoadedKv(0, [], lambda: copied.append(1))))
    assert copied == [1]
    leave, stuck = await runner.occupied()
    for index in range(6):
        runner.loop.add(new(f"s{index}", make_prompt(5), greedy(2)))
    with pytest.raises(Overloaded) as caught:
        runner.loop.add(new("s6", make_prompt(5), greedy(2), kv=LoadedKv(0, [], lambda: copied.append(1))))
    assert caught.value.retry_after_s and copied == [1, 1]
    assert runner.loop.stalled_s() > 0  # a stuck engine can be seen
    leave.set()
    await stuck
    await runner.finished(*(f"s{index}" for index in range(6)))


async def test_an_id_in_use_is_reported_as_an_error_of_the_second(runner: Runner) -> None:
    runner.loop.add(new("same", make_prompt(20), greedy(1), hold=True))
    await runner.finished("same")
    del runner.outcomes["same"]
    runner.loop.add(new("same", make_prompt(20), greedy(1)))
    await runner.finished("same")
    assert isinstance(runner.outcomes["same"].error, InvalidRequest)


async def test_call_returns_and_raises_what_the_function_does(runner: Runner) -> None:
    assert await runner.loop.call(lambda engine: engine.layout.layers) == 2
    assert await runner.loop.call(lambda engine: threading.current_thread().name) == "engine"
    with pytest.raises(ZeroDivisionError):
        await runner.loop.call(lambda engine: 1 // 0)


async def test_a_cancelled_call_never_runs_later(runner: Runner) -> None:
    ran: list[int] = []
    leave, first = await runner.occupied()
    second = asyncio.create_task(runner.loop.call(lambda engine: ran.append(1)))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    first.cancel()  # runs already: the cancellation waits for its end
    await asyncio.sleep(0)
    assert not first.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await runner.loop.call(lambda engine: None)
    assert not ran


async def test_full_blocks_are_exported_while_the_engine_steps_and_claimed_from_any_thread(runner: Runner) -> None:
    prompt, root = make_prompt(40), ChainRoot(bytes(32))
    runner.loop.add(new("a", prompt, greedy(100, ignore_eos=True), hold=True, root=root))
    await runner.heard_of("a")
    copies = [memoryview(bytearray(runner.loop.engine.layout.bytes_per_block)) for _ in range(2)]
    await runner.loop.export("a", 0, 2, copies)
    claim = runner.loop.claim(block_keys(root, prompt, runner.loop.engine.layout.block_tokens))
    assert len(claim.blocks) == 2
    await runner.finished("a")
    runner.loop.release("a")
    with pytest.raises(NotFound):
        await runner.loop.export("a", 0, 1, copies[:1])
    load = await runner.loop.call(lambda engine: engine.load)
    assert load.pool_blocks_free == load.pool_blocks_total - 2
    runner.loop.give_up(claim)
    load = await runner.loop.call(lambda engine: engine.load)
    assert load.pool_blocks_free == load.pool_blocks_total


async def test_stopping_ends_what_runs_and_refuses_what_comes(llama) -> None:
    runner, copied = Runner(make_engine(llama.loaded, sequences_max=1)), []
    runner.loop.start()
    runner.loop.add(new("runs", make_prompt(20), greedy(900, ignore_eos=True)))
    runner.loop.add(new("waits", make_prompt(20), greedy(5), kv=LoadedKv(0, [], lambda: copied.append(1))))
    await runner.heard_of("runs")
    await runner.loop.stop()
    await runner.finished("runs", "waits")
    assert all(isinstance(outcome.error, Unavailable) for outcome in runner.outcomes.values())
    assert copied == [1]
    with pytest.raises(Unavailable):
        runner.loop.add(new("late", make_prompt(5), greedy(2)))
    with pytest.raises(Unavailable):
        await runner.loop.call(lambda engine: None)
    runner.loop.cancel("runs")
    runner.loop.release("runs")
    await runner.loop.stop()


async def test_a_loop_that_never_started_stops_quietly(llama) -> None:
    await EngineLoop(make_engine(llama.loaded), lambda result: None).stop()


async def test_a_step_that_raises_ends_its_sequences_and_the_loop_goes_on(runner: Runner, monkeypatch) -> None:
    engine, step = runner.loop.engine, runner.loop.engine.step

    def broken_once() -> StepResult:
        monkeypatch.setattr(engine, "step", step)
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "step", broken_once)
    runner.loop.add(new("a", make_prompt(20), greedy(5)))
    await runner.finished("a")
    assert "a bug" in str(runner.outcomes["a"].error) and runner.loop.alive
    runner.loop.add(new("b", make_prompt(20), greedy(5)))
    await runner.finished("b")
    assert runner.outcomes["b"].finish in ("length", "stop")


async def test_a_thread_that_dies_says_why_and_leaves_no_sequence_without_an_end(llama, monkeypatch) -> None:
    runner = Runner(make_engine(llama.loaded))

    def broken() -> StepResult:
        raise RuntimeError("for good")

    monkeypatch.setattr(runner.loop.engine, "step", broken)
    runner.loop.start()
    runner.loop.add(new("a", make_prompt(20), greedy(5)))
    await runner.finished("a")
    assert "for good" in str(runner.outcomes["a"].error)
    assert isinstance(runner.loop.failure, RuntimeError) and not runner.loop.alive
    await runner.loop.stop()


async def test_an_event_loop_that_does_not_keep_up_slows_the_engine(llama) -> None:
    runner = Runner(make_engine(llama.loaded))
    waiting = runner.loop._results = WatchedSemaphore(8)
    runner.loop.start()
    runner.loop.add(new("a", make_prompt(5), greedy(200, ignore_eos=True)))
    assert waiting.contended.wait(DEADLINE_S)  # holds the event loop up: no result can be taken
    assert not runner.results
    await runner.finished("a")
    assert len(runner.outcomes["a"].ids) == 200
    await runner.loop.stop()

"""The layerwise engine over a stage: chunks, prefixes that come late or not at all, and who suffers from it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest

from common.errors import Internal, Overloaded, PenstockError
from common.routes import Leg, Source
from services.prefill import gate
from services.prefill.engine import PrefillEngine
from services.prefill.layerwise import InPlace, Layerwise
from services.prefill.quota import Quota
from services.prefill.ring import Ring
from services.prefill.run import NewRun
from services.worker.engine.types import SequenceStep
from services.worker.ledger import Ledger
from services.worker.model import LoadedModel
from services.worker.stage import Stage
from tests.worker.conftest import Tiny, make_prompt
from tests.worker.engine.drive import greedy

BLOCK = 16


class ByTheToken(Quota):
    """A quota that no clock changes."""

    def measured(self, chunks: list[tuple[int, int]], seconds: float) -> None:
        pass


class Rig:
    """An engine, its stage, and what came out."""

    def __init__(self, model: Tiny, way: Callable[[Stage, LoadedModel], Layerwise] | None = None, **options: int) -> None:
        self.model = model
        layout = model.loaded.layout
        way = way or (InPlace if model.loaded.device.type == "cpu" else Ring)
        self.stage = Stage(64, layout.bytes_per_block)
        self.engine = PrefillEngine(
            model.loaded, way(self.stage, model.loaded), context_tokens=1024, **({"step_tokens_max": 64} | options)
        )
        self.engine._quota = ByTheToken(float("inf"), tokens_max=64)
        self.announced: list[tuple[int, str, range]] = []
        self.engine.announce = lambda layer, done: self.announced.extend((layer, name, blocks) for name, blocks in done)
        self.steps: dict[str, list[SequenceStep]] = {}

    def new(self, name: str, prompt: Sequence[int], legs: Sequence[Leg] = ()) -> NewRun:
        slots = self.stage.reserve(-(-len(prompt) // BLOCK))
        ledger = Ledger(len(slots), self.model.loaded.layout.layers, legs)
        for leg in legs:
            ledger.claim_leg(leg)
        run = NewRun(name, prompt, greedy(4), slots=slots, ledger=ledger)
        self.engine.add(run)
        return run

    def step(self) -> None:
        for step in self.engine.step().sequences:
            self.steps.setdefault(step.id, []).append(step)
        self.engine.check_integrity()

    def run(self) -> None:
        for _ in range(200):
            if self.engine.idle:
                return
            self.step()
        raise AssertionError("the engine did not come to an end")

    def first(self, name: str) -> int:
        (token,) = self.steps[name][-1].tokens
        return token.id

    def copy(self, source: NewRun, target: NewRun, blocks: Sequence[int]) -> None:
        """The bytes of the same prompt's blocks."""
        for block in blocks:
            self.stage.view(target.slots[block])[:] = self.stage.view(source.slots[block])


@pytest.fixture(params=[InPlace, partial(Ring, layers_per_group=1), Ring], ids=["in place", "ring of layers", "ring of groups"])
def rig(llama: Tiny, request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param is InPlace and llama.loaded.device.type != "cpu":
        pytest.skip("the stage is in host memory")
    rig = Rig(llama, request.param)
    yield rig
    rig.stage.check_integrity()


def test_a_prompt_is_computed_in_chunks_that_end_on_block_borders(rig: Rig) -> None:
    prompt = make_prompt(150)
    rig.new("a", prompt)
    rig.run()
    assert [step.computed for step in rig.steps["a"]] == [64, 128, 150]
    assert rig.first("a") == rig.model.generate(prompt, 1)[0][0]
    assert rig.announced == [
        (layer, "a", blocks) for blocks in (range(4), range(4, 8), range(8, 10)) for layer in range(2)
    ]  # every layer of every block once, in order


def test_loaded_blocks_are_read_where_they_lie_and_holes_are_computed(rig: Rig) -> None:
    prompt = make_prompt(100)
    whole = rig.new("whole", prompt)
    rig.run()
    for missing in range(6):
        legs = [Leg(a, b, Source.STORAGE_TO_PREFILL) for a, b in ((0, missing), (missing + 1, 6)) if a < b]
        run = rig.new(f"hole {missing}", prompt, legs)
        there = [block for block in range(6) if block != missing]
        rig.copy(whole, run, there)
        run.ledger.arrived(there, run.ledger.layers)
        rig.announced.clear()
        rig.run()
        assert rig.first(f"hole {missing}") == rig.model.generate(prompt, 1)[0][0]
        assert {block for _, _, blocks in rig.announced for block in blocks} == {missing, 6}
        rig.stage.free(run.slots)


def test_a_run_whose_prefix_breaks_within_a_step_loses_that_step_alone(rig: Rig) -> None:
    prompt, other = make_prompt(40), make_prompt(50, seed=1)
    whole = rig.new("whole", prompt)
    rig.run()
    run = rig.new("breaks", prompt, [Leg(0, 2, Source.STORAGE_TO_DECODE)])
    rig.copy(whole, run, [0, 1])
    run.ledger.arrived([0, 1], 1)  # enough to be planned
    rig.new("other", other)
    announce, losses = rig.engine.announce, [1]

    def breaks(layer: int, done: Sequence[tuple[str, range]]) -> None:
        announce(layer, done)
        if losses and losses.pop():
            run.ledger.arrived([0], run.ledger.layers)
            run.ledger.failed([1])

    rig.engine.announce = breaks
    rig.announced.clear()
    rig.step()
    assert rig.first("other") == rig.model.generate(other, 1)[0][0]
    assert "breaks" not in rig.steps
    assert [name for layer, name, _ in rig.announced if layer == 1] == ["other"]
    rig.run()
    assert rig.first("breaks") == rig.model.generate(prompt, 1)[0][0]


def test_a_run_that_comes_late_is_planned_again_when_it_is_whole(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LATE_S", 0.0)
    monkeypatch.setattr(gate, "LATE_ALONE_S", 0.0)
    prompt, other = make_prompt(40), make_prompt(50, seed=1)
    whole = rig.new("whole", prompt)
    rig.run()
    run = rig.new("late", prompt, [Leg(0, 2, Source.STORAGE_TO_DECODE)])
    rig.copy(whole, run, [0, 1])
    run.ledger.arrived([0, 1], 1)
    rig.step()
    assert not rig.engine.blocked and "late" not in rig.steps  # alone, and given up for the step
    rig.step()
    assert rig.engine.blocked  # one layer is not enough any more
    rig.new("other", other)
    rig.step()
    assert rig.first("other") == rig.model.generate(other, 1)[0][0]
    run.ledger.arrived([0, 1], run.ledger.layers)
    rig.run()
    assert rig.first("late") == rig.model.generate(prompt, 1)[0][0]


def test_a_layer_that_is_still_coming_is_waited_for(llama: Tiny) -> None:
    if llama.loaded.device.type != "cpu":
        pytest.skip("a ring waits for a group of layers")
    rig = Rig(llama)
    prompt = make_prompt(40)
    whole = rig.new("whole", prompt)
    rig.run()
    run = rig.new("waits", prompt, [Leg(0, 2, Source.STORAGE_TO_DECODE)])
    rig.copy(whole, run, [0, 1])
    run.ledger.arrived([0, 1], 1)
    announce, computed = rig.engine.announce, threading.Event()

    def announced(layer: int, done: Sequence[tuple[str, range]]) -> None:
        announce(layer, done)
        computed.set()

    rig.engine.announce = announced
    stepping = threading.Thread(target=rig.step)
    stepping.start()
    assert computed.wait(60)  # the first layer was computed without the second
    run.ledger.arrived([0, 1], run.ledger.layers)
    stepping.join(60)
    assert rig.first("waits") == rig.model.generate(prompt, 1)[0][0]


def test_runs_share_a_step_to_the_quota_in_order_of_arrival(rig: Rig) -> None:
    for number in range(4):
        rig.new(str(number), make_prompt(24, seed=number))
    rig.step()
    assert [(name, steps[0].computed) for name, steps in rig.steps.items()] == [("0", 24), ("1", 24), ("2", 16)]
    rig.run()
    for number in range(4):
        assert rig.first(str(number)) == rig.model.generate(make_prompt(24, seed=number), 1)[0][0]


def test_a_short_run_goes_before_a_long_one_that_came_first_but_not_before_one_that_is_due(llama: Tiny) -> None:
    rig = Rig(llama)
    rig.engine._quota.speed.measured(BLOCK, 100.0)  # so slow that nothing is due while this test runs
    long = rig.new("long", make_prompt(200))
    rig.new("short", make_prompt(20))
    load = rig.engine.load
    assert [run.tokens for run in load.queued_runs] == [208, 32] and load.queued_tokens == 240, "whole blocks"
    assert load.queued_runs[0].due_s > load.queued_runs[1].due_s
    rig.step()
    assert [step.computed for step in rig.steps["short"]] == [20] and rig.steps["long"][0].computed == 32
    rig.engine._live["long"].came_s -= 1e6
    rig.new("later", make_prompt(20))
    rig.step()
    assert rig.steps["long"][-1].computed == 96 and "later" not in rig.steps
    rig.run()
    assert rig.first("long") == rig.model.generate(make_prompt(200), 1)[0][0] and len(long.slots) == 13


def test_a_cancelled_run_is_forgotten_and_its_slots_are_not_touched_again(rig: Rig) -> None:
    run = rig.new("gone", make_prompt(200))
    rig.step()
    rig.engine.cancel("gone")
    rig.engine.cancel("nobody")
    before = [bytes(rig.stage.view(slot)) for slot in run.slots]
    rig.new("other", make_prompt(50))
    rig.run()
    assert [bytes(rig.stage.view(slot)) for slot in run.slots] == before and len(rig.steps["gone"]) == 1


def test_a_full_engine_refuses_and_a_step_that_raises_ends_its_runs(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(llama, sequences_max=1, waiting_max=0)
    rig.new("a", make_prompt(20))
    with pytest.raises(Overloaded, match="at most 1 may be"):
        rig.new("b", make_prompt(20))

    def breaks(*_: object) -> None:
        raise RuntimeError("out of luck")

    rig.engine.announce = breaks
    rig.step()
    error: PenstockError | None = rig.steps["a"][-1].error
    assert isinstance(error, Internal) and "out of luck" in error.message and rig.engine.idle

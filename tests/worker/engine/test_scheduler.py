"""The scheduler and the block allocator, without any model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation import Sampling
from services.worker.engine.allocator import BlockAllocator, blocks_for
from services.worker.engine.scheduler import Plan, Scheduler
from services.worker.engine.sequence import NEXT, Event, Sequence
from services.worker.engine.types import NewSequence, Phase

BLOCK_TOKENS = 4


def make(name: str, tokens: int, arrival: int) -> Sequence:
    return Sequence(NewSequence(name, list(range(tokens)), Sampling(100)), arrival)


def make_scheduler(blocks: int, **options: int) -> Scheduler:
    limits = {"sequences_max": 8, "waiting_max": 100, "step_tokens_max": 16} | options
    return Scheduler(BlockAllocator(blocks), BLOCK_TOKENS, **limits)


def compute(plan: Plan) -> None:
    """What the engine does with a plan."""
    for chunk in plan.chunks:
        chunk.sequence.computed = chunk.end
        if chunk.samples:
            chunk.sequence.tokens.append(0)
            chunk.sequence.advance(Event.SAMPLE)


def shown(plan: Plan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.end) for chunk in plan.chunks]


def test_every_phase_can_end_and_the_end_is_final() -> None:
    assert all(Event.FINISH in events for phase, events in NEXT.items() if phase is not Phase.FINISHED)
    assert NEXT[Phase.FINISHED] == {}
    assert set(NEXT) == set(Phase)


def test_decodes_come_first_then_prompts_in_order_of_arrival_within_the_budget() -> None:
    scheduler = make_scheduler(100)
    scheduler.add(make("a", 6, 0))
    compute(scheduler.plan())
    scheduler.add(make("b", 20, 1))
    scheduler.add(make("c", 9, 2))
    plan = scheduler.plan()
    assert shown(plan) == [("a", 6, 7), ("b", 0, 15)]
    compute(plan)
    plan = scheduler.plan()
    assert shown(plan) == [("a", 7, 8), ("b", 15, 20), ("c", 0, 9)]
    compute(plan)
    assert shown(scheduler.plan()) == [("a", 8, 9), ("b", 20, 21), ("c", 9, 10)]


def test_the_head_of_the_queue_is_not_overtaken_by_what_would_fit() -> None:
    scheduler = make_scheduler(8)
    scheduler.add(make("a", 16, 0))
    scheduler.add(make("big", 20, 1))
    scheduler.add(make("small", 2, 2))
    assert shown(scheduler.plan()) == [("a", 0, 16)]
    assert [sequence.id for sequence in scheduler.waiting] == ["big", "small"]


def test_a_full_pool_preempts_the_latest_arrival_which_comes_back_first() -> None:
    scheduler = make_scheduler(4)
    for index, name in enumerate("abc"):
        scheduler.add(make(name, 4, index))
    compute(scheduler.plan())
    assert [sequence.id for sequence in scheduler.running] == ["a", "b", "c"]
    plan = scheduler.plan()  # each needs a second block and one is free
    assert [sequence.id for sequence in plan.preempted] == ["c"]
    assert shown(plan) == [("a", 4, 5), ("b", 4, 5)]
    scheduler.add(make("d", 1, 3))
    assert [sequence.id for sequence in scheduler.waiting] == ["c", "d"]
    scheduler.check_integrity()


def test_a_sequence_alone_may_take_the_whole_pool() -> None:
    scheduler = make_scheduler(3)
    scheduler.add(make("a", 12, 0))
    assert shown(scheduler.plan()) == [("a", 0, 12)]


@given(
    st.integers(3, 20),
    st.lists(st.tuples(st.integers(1, 11), st.integers(1, 30)), min_size=1, max_size=25),
    st.integers(1, 20),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_ends_with_all_its_tokens_and_no_block_is_lost(blocks, wanted, budget, data) -> None:
    allocator = BlockAllocator(blocks)
    scheduler = Scheduler(allocator, BLOCK_TOKENS, sequences_max=6, waiting_max=100, step_tokens_max=budget)
    capacity = blocks * BLOCK_TOKENS
    live: dict[str, tuple[Sequence, int]] = {}
    for index, (prompt, output) in enumerate(wanted):
        sequence = make(str(index), prompt, index)
        live[sequence.id] = (sequence, min(prompt + output, capacity))
        scheduler.add(sequence)
    for _ in range(3000):
        if not live:
            break
        plan = scheduler.plan()
        assert plan.chunks or plan.preempted, "neither progress nor preemption"
        assert sum(chunk.end - chunk.start for chunk in plan.chunks) <= max(budget, len(scheduler.running))
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.computed and chunk.end <= len(chunk.sequence.blocks) * BLOCK_TOKENS
        compute(plan)
        for sequence, length in list(live.values()):
            cancelled = data.draw(st.integers(0, 99)) == 0 if len(live) < 4 else False
            if len(sequence.tokens) >= length or cancelled:
                scheduler.finish(sequence, keep_blocks=False)
                del live[sequence.id]
        scheduler.check_integrity()
        allocator.check_integrity([block for sequence in scheduler.running for block in sequence.blocks])
    assert not live and allocator.free == blocks


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]

"""The claim table of a prompt's blocks: two ends meet, whatever happens on the way."""

import random
import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from common.routes import Leg, Source
from services.worker.ledger import Ledger, Loader, State, Wait

LAYERS = 3
LOADS = Source.STORAGE_TO_PREFILL


def one_leg(first: int, last: int) -> Leg:
    return Leg(first, last, LOADS)


def test_what_no_leg_covers_is_computed_when_what_comes_before_it_has_begun_to_come() -> None:
    leg = one_leg(1, 3)
    ledger = Ledger(5, LAYERS, [leg])
    assert list(ledger.claim_leg(leg)) == [1, 2]
    assert ledger.next_run() == range(1)
    assert ledger.take(range(1)) == 1
    ledger.computed(range(1))
    assert not ledger.next_run()
    ledger.arrived([1], LAYERS)
    ledger.arrived([2], 1)
    assert ledger.next_run() == range(3, 5) and not ledger.next_run(LAYERS)
    assert ledger.frontier == 2 and ledger.to_compute == 2


def test_a_block_that_fails_is_computed_and_what_follows_it_is_kept() -> None:
    leg = one_leg(0, 4)
    ledger = Ledger(5, LAYERS, [leg])
    ledger.arrived([block for block in ledger.claim_leg(leg) if block != 1], LAYERS)
    ledger.arrived([1], 2)
    ledger.failed([1])
    assert ledger.next_run() == range(1, 2)
    ledger.take(range(1, 2))
    ledger.computed(range(1, 2))
    assert ledger.next_run() == range(4, 5) and ledger.frontier == 4


def test_waiting_for_a_layer_ends_when_it_comes_when_it_can_not_and_when_it_is_late() -> None:
    leg = one_leg(0, 2)
    ledger = Ledger(3, LAYERS, [leg])
    ledger.claim_leg(leg)
    ledger.arrived([0, 1], 1)
    soon = time.monotonic() + 60
    assert ledger.wait(2, 0, soon) is Wait.READY
    assert ledger.wait(2, 1, time.monotonic()) is Wait.LATE
    for change, outcome in (
        (lambda: ledger.arrived([0, 1], 2), Wait.READY),
        (lambda: ledger.failed([1]), Wait.BROKEN),
        (ledger.close, Wait.BROKEN),
    ):
        ended: list[Wait] = []
        waiter = threading.Thread(target=lambda: ended.append(ledger.wait(2, 1, soon)))  # noqa: B023
        waiter.start()
        change()
        waiter.join(60)
        assert ended == [outcome]
        if outcome is Wait.READY:
            ledger._layers[:] = 1


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=3), st.integers())
def test_two_ends_meet_and_no_block_is_made_twice(blocks: int, spans: list[tuple[int, int]], seed: int) -> None:
    chance = random.Random(seed)
    legs: list[Leg] = []
    for gap, length in spans:
        first = (legs[-1].last_block if legs else 0) + gap
        if first + length < blocks:
            legs.append(one_leg(first, first + length))
    ledger = Ledger(blocks, LAYERS, legs)
    loading: list[int] = []
    made = [0] * blocks
    for _ in range(10_000):
        if ledger.frontier == blocks:
            break
        choices = ["compute", *(["claim"] if legs else []), *(["arrive", "fail"] if loading else [])]
        match chance.choice(choices):
            case "claim":
                loading += ledger.claim_back(chance.choice(legs), chance.randint(1, 4))
            case "arrive":
                block = loading.pop(chance.randrange(len(loading)))
                ledger.arrived([block], chance.randint(1, LAYERS - 1))
                ledger.arrived([block], LAYERS)
                made[block] += 1
            case "fail":
                ledger.failed([loading.pop()])
            case _:
                run = ledger.next_run(chance.choice([1, LAYERS]))
                if run:
                    run = range(run.start, run.start + ledger.take(run))
                    if chance.random() < 0.5:
                        ledger.computed(run)
                        for block in run:
                            made[block] += 1
                    else:
                        ledger.give_back(run)
    assert made == [1] * blocks and (ledger._state == State.THERE).all() and not ledger.to_compute


@given(st.integers(2, 200))
def test_compute_takes_less_the_nearer_the_loader_is(blocks: int) -> None:
    leg = one_leg(0, blocks)
    ledger = Ledger(blocks + 1, LAYERS, [leg])
    before = blocks
    while run := ledger.next_run():
        if run.start >= leg.last_block:
            break
        assert len(run) <= max(2, before)
        before = len(run)
        ledger.take(run)
        ledger.computed(run)


def test_what_is_left_to_a_loader_is_computed_when_it_fails() -> None:
    leg = one_leg(0, 10)
    ledger = Ledger(11, LAYERS, [leg])
    assert ledger.left(leg) == 10 and list(ledger.claim_back(leg, 3)) == [7, 8, 9] and ledger.left(leg) == 7
    ledger.arrived([8, 9], LAYERS)
    seen: list[Loader] = []

    def nothing(first: int, loader: Loader) -> int:
        seen.append(loader)
        return 0

    assert not ledger.next_run(1, nothing)
    ((left, coming, blocks_per_s),) = seen
    assert (left, coming) == (7, 1) and blocks_per_s > 0
    ledger.failed([7])
    while claimed := ledger.claim_back(leg, 16):
        ledger.failed(claimed)
    assert ledger.left(leg) == 0 and ledger.next_run(1, nothing) == range(8)

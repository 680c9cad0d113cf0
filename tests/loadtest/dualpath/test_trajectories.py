"""Agents: reproducible, of the paper's statistics, nearly everything stored."""

import statistics

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.dualpath import model, trajectories
from loadtest.dualpath.trajectories import Agent, Turn

VOCAB = 4096
STATISTICS = model.CPU.statistics


def test_the_same_seed_says_the_same() -> None:
    first, again, other = (trajectories.agents(seed, 3, 2, STATISTICS, VOCAB) for seed in (1, 1, 2))
    assert first == again != other


def test_lengths_have_the_papers_means() -> None:
    agents = trajectories.agents(1, 400, 5, STATISTICS, VOCAB)
    of = STATISTICS
    assert (of.context, of.appended, of.generated) == (2043, 26, 11)
    turns = [turn for agent in agents for turn in agent.turns]
    assert 0.9 < statistics.mean(len(agent.context) for agent in agents) / of.context < 1.1
    assert 0.9 < statistics.mean(len(turn.appended) for turn in turns) / of.appended < 1.1
    assert 0.9 < statistics.mean(turn.generated for turn in turns) / of.generated < 1.15


def test_at_least_95_percent_is_stored_when_a_turn_comes() -> None:
    assert trajectories.hit_rate(trajectories.agents(1, 50, 4, STATISTICS, VOCAB), model.CPU.block_tokens) > 0.95


def test_hit_rate_by_hand() -> None:
    # 10 tokens known, blocks of 4: prompts of 13 and 13 + 2 + 3 = 18 tokens; the first finds 8 stored. Then 13 + 2 - 1 = 14
    # tokens have KV: the second finds 12.
    agent = Agent(0, tuple(range(10)), (Turn((1, 2, 3), 2), Turn((4, 5, 6), 2)))
    assert trajectories.hit_rate([agent], 4) == (8 + 12) / (13 + 18)


def test_shared_contexts_are_stored_once() -> None:
    agents = trajectories.agents(1, 7, 1, STATISTICS, VOCAB, contexts=3)
    assert len(trajectories.contexts_of(agents)) == 3
    assert agents[0].context == agents[3].context
    assert agents[0].turns != agents[3].turns


@given(st.floats(0.05, 20), st.floats(1, 200), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_arrivals_are_ordered_one_in_every_interval_and_inside_the_window(rate: float, window: float, seed: int) -> None:
    found = trajectories.arrivals(seed, rate, window)
    assert found == sorted(found)
    assert len(found) == int(window * rate)
    assert all(number <= at * rate * (1 + 1e-9) and at * rate <= (number + 1) * (1 + 1e-9) for number, at in enumerate(found))


def test_the_models_sums() -> None:
    assert model.CPU.kv_bytes_per_token == 8 * 2 * 256 * 2
    assert model.CPU.bytes_per_block == 256 << 10
    cost = model.cost(model.CPU, context_tokens=2000, new_tokens=40)
    assert cost.bytes == 2000 * 8192
    linear, attention, head = 2 * 8 * (2.5 * 1024**2 + 10.5 * 1024**2), 4 * 8 * 1024 * 2020, 2 * 4096 * 1024
    assert cost.flop == 40 * (linear + attention) + head

"""Agents and what they say, turn by turn. Pure: the same seed gives the same tokens.

The statistics are those of the paper's 64K set (arXiv 2602.21548: 157 turns, 32.7k tokens of context, 429 appended and
176 generated a turn, 98.7 % hit), every length divided by a scale. An agent starts somewhere in its life, with a context that is stored already,
and takes a few turns; its tools answer at once. Lengths: a context is uniform in [1/2, 3/2] of the mean, as that of an agent caught at
any of its turns; what is appended is exponential, at least 1 and at most 4 times the mean. An answer is uniform in [1/2, 3/2] of its mean: the
time from the first token, which prefill samples, to the second holds the rest of the hand-over, and in answers of two tokens TPOT would be
nothing else.
"""

import random
from collections.abc import Sequence

import msgspec

PAPER_CONTEXT_TOKENS, PAPER_APPENDED_TOKENS, PAPER_GENERATED_TOKENS = 32_700, 429, 176
PAPER_HIT_RATE = 0.987
PAPER_AGENTS_OVER_BASIC = 1.96  # per second within the objective
LENGTH_MAX = 4.0  # times its mean
FIRST_TOKEN_ID = 100  # below are the tokenizer's special ones


class Statistics(msgspec.Struct, frozen=True):
    """Mean lengths in tokens: the paper's over `scale`."""

    scale: int

    @property
    def context(self) -> int:
        return PAPER_CONTEXT_TOKENS // self.scale

    @property
    def appended(self) -> int:
        return PAPER_APPENDED_TOKENS // self.scale

    @property
    def generated(self) -> int:
        return PAPER_GENERATED_TOKENS // self.scale


class Turn(msgspec.Struct, frozen=True):
    """What a tool says, and how many tokens the agent answers: the length is forced."""

    appended: tuple[int, ...]
    generated: int


class Agent(msgspec.Struct, frozen=True):
    """Its stored context, then its turns. A turn's prompt is all that was said before, and what is appended."""

    id: int
    context: tuple[int, ...]
    turns: tuple[Turn, ...]


def agents(seed: int, count: int, turns: int, of: Statistics, vocab: int, contexts: int = 0) -> list[Agent]:
    """`count` agents. With `contexts`, they share so many contexts, in turn (agents at work on the same few projects)."""
    rng = random.Random(seed)
    stored = [_tokens(rng, _around(rng, of.context), vocab) for _ in range(contexts or count)]
    return [
        Agent(
            number,
            stored[number % len(stored)],
            tuple(Turn(_tokens(rng, _length(rng, of.appended), vocab), _around(rng, of.generated)) for _ in range(turns)),
        )
        for number in range(count)
    ]


def contexts_of(those: Sequence[Agent]) -> list[tuple[int, ...]]:
    """The contexts to store before, each once."""
    return list(dict.fromkeys(agent.context for agent in those))


def hit_rate(those: Sequence[Agent], block_tokens: int) -> float:
    """Of all prompt tokens, those in whole blocks that are stored when their turn comes."""
    cached = prompt = 0
    for agent in those:
        known = len(agent.context)  # whose KV exists; the last token of an answer has none
        length = len(agent.context)
        for turn in agent.turns:
            length += len(turn.appended)
            prompt += length
            cached += min(known // block_tokens, (length - 1) // block_tokens) * block_tokens
            length += turn.generated
            known = length - 1
    return cached / prompt if prompt else 0.0


def arrivals(seed: int, rate_per_s: float, window_s: float) -> list[float]:
    """When agents come, in seconds: one in every interval of 1/rate, at a random moment of it. Less noisy than Poisson's over a short window."""
    rng = random.Random(seed)
    gap = 1 / rate_per_s
    return [(number + rng.random()) * gap for number in range(int(window_s * rate_per_s))]


def _around(rng: random.Random, mean: int) -> int:
    return round(mean * rng.uniform(0.5, 1.5))


def _length(rng: random.Random, mean: int) -> int:
    return max(1, round(min(rng.expovariate(1 / mean), LENGTH_MAX * mean)))


def _tokens(rng: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN_ID, vocab) for _ in range(count))

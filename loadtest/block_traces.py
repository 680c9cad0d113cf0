"""Synthetic traces of requests as chains of block numbers: agents, chats, documents asked about, and scans.

Everything follows from a seed. A number stands for one block in its chain: two requests share a number exactly
where they share the whole prefix up to it. Sizes are in blocks of 256 tokens.

- *agents*: DualPath's coding trace in shape (arXiv 2602.21548): a context that grows by 2.5 blocks a turn, 60 turns on
  average, a few seconds between turns, some dozens of agents at once, few system prompts.
- *chats*: 4 turns on average, a heavy-tailed pause between them (log-normal, median 60 s), many at once.
- *documents*: 2,000 documents of about 25 blocks, asked about with Zipf's frequencies; one question each time.
- *scan*: documents of about 75 blocks that nobody asks about again.
"""

import heapq
import itertools
import random
from collections.abc import Iterator

import msgspec

TURN_BLOCKS = 2.5


class Mix(msgspec.Struct, frozen=True):
    """How many of each kind are at work at once."""

    name: str
    agents: int = 0
    chats: int = 0
    readers: int = 0
    scanners: int = 0


MIXES = (
    Mix("agents", agents=60),
    Mix("chats", chats=400),
    Mix("documents", readers=20),
    Mix("agents+scan", agents=60, scanners=3),
    Mix("chats+scan", chats=400, scanners=2),
    Mix("all", agents=30, chats=200, readers=10, scanners=2),
)


class _Numbers:
    """Fresh numbers, and the shared chains that sessions start with."""

    def __init__(self, choice: random.Random) -> None:
        self._next = itertools.count()
        self.agent_prompts = [self.take(choice.randint(10, 30)) for _ in range(4)]
        self.chat_prompts = [self.take(choice.randint(1, 5)) for _ in range(8)]
        self.documents = [self.take(choice.randint(10, 40)) for _ in range(2000)]
        self.weights = list(itertools.accumulate(1 / rank for rank in range(1, 2001)))

    def take(self, count: int) -> list[int]:
        return list(itertools.islice(self._next, count))


def trace(mix: Mix, seed: int, requests: int) -> list[list[int]]:
    """The requests' chains, in order of time."""
    choice = random.Random(f"{mix.name}/{seed}")
    numbers = _Numbers(choice)
    kinds = [_agent] * mix.agents + [_chat] * mix.chats + [_reader] * mix.readers + [_scanner] * mix.scanners
    actors = [kind(choice, numbers) for kind in kinds]
    due = [(choice.uniform(0, 60), i) for i in range(len(actors))]
    heapq.heapify(due)
    out: list[list[int]] = []
    while len(out) < requests:
        now, i = heapq.heappop(due)
        chain, pause_s = next(actors[i])
        out.append(chain)
        heapq.heappush(due, (now + pause_s, i))
    return out


Actor = Iterator[tuple[list[int], float]]  # the request's chain, and the time until the actor's next


def _agent(choice: random.Random, numbers: _Numbers) -> Actor:
    while True:
        chain = choice.choice(numbers.agent_prompts) + numbers.take(choice.randint(2, 15))
        for _ in range(1 + int(choice.expovariate(1 / 60))):
            chain = chain + numbers.take(1 + int(choice.expovariate(1 / (TURN_BLOCKS - 0.5))))
            yield chain, choice.expovariate(1 / 8)


def _chat(choice: random.Random, numbers: _Numbers) -> Actor:
    while True:
        chain = list(choice.choice(numbers.chat_prompts))
        for _ in range(1 + int(choice.expovariate(1 / 3))):
            chain = chain + numbers.take(1 + int(choice.expovariate(1 / (TURN_BLOCKS - 0.5))))
            yield chain, choice.lognormvariate(4.1, 1.2)


def _reader(choice: random.Random, numbers: _Numbers) -> Actor:
    while True:
        document = choice.choices(numbers.documents, cum_weights=numbers.weights)[0]
        yield document + numbers.take(choice.randint(1, 2)), choice.expovariate(1 / 10)


def _scanner(choice: random.Random, numbers: _Numbers) -> Actor:
    while True:
        yield numbers.take(choice.randint(25, 125)), choice.expovariate(1 / 10)

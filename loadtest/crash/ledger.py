"""What a store has promised, as its clients know it: the truth that a crash is checked against.

A chain is *held* while a lease of ours is on it, and *released* afterwards. The store answered OK for
`committed` leading blocks of it.

Invariant: whatever happens to the store's process, the committed blocks of a held chain are found
again, because nothing that is leased may be evicted; those of a released chain are found or not; and
whatever is found has the bytes that follow from its key.
"""

import hashlib
import random
from enum import Enum, auto

import numpy as np

from common.transport.interface import LeaseToken

ROOT = hashlib.sha256(b"crash loop").digest()


class Promise(Enum):
    """What a store promises; its value says how it was broken."""

    RIGHT_BYTES = "wrong bytes"
    COMMITTED_STAYS = "lost blocks"
    BUDGET = "over budget"
    STARTS_AGAIN = "does not start"


class BrokenPromise(Exception):
    """The store broke a promise; the text says where."""

    def __init__(self, promise: Promise, where: str) -> None:
        super().__init__(f"{promise.value}: {where}")
        self.promise = promise


class Hold(Enum):
    HELD = auto()
    RELEASED = auto()


class Chain:
    """Blocks in order, and what the store said of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: list[bytes] = []
        self.committed = 0
        self.hold = Hold.HELD
        self.tokens: list[LeaseToken] = []

    def grow(self, life: str, blocks: int) -> list[bytes]:
        """Keys of blocks after the committed ones: new in every life, so that nobody has written them."""
        del self.keys[self.committed :]
        for i in range(blocks):
            parent = self.keys[-1] if self.keys else ROOT
            self.keys.append(hashlib.sha256(parent + f"{self.name}/{life}/{i}".encode()).digest())
        return self.keys[self.committed :]

    def parent(self) -> bytes:
        """Of the first block that is not committed."""
        return self.keys[self.committed - 1] if self.committed else ROOT


class Ledger:
    """All chains of one store."""

    def __init__(self, choice: random.Random) -> None:
        self.chains: list[Chain] = []
        self.doubtful: list[bytes] = []  # sent, but never answered: there or not, and right if there
        self._choice = choice

    def start(self) -> Chain:
        chain = Chain(f"chain {len(self.chains)}")
        self.chains.append(chain)
        return chain

    def held(self) -> list[Chain]:
        return [chain for chain in self.chains if chain.hold is Hold.HELD]

    @property
    def held_blocks(self) -> int:
        return sum(chain.committed for chain in self.held())

    def any_chain(self) -> Chain | None:
        """One with something committed; recent ones more often."""
        written = [chain for chain in self.chains[-200:] if chain.committed]
        return self._choice.choice(written) if written else None

    def some_released(self, count: int) -> list[Chain]:
        written = [chain for chain in self.chains if chain.hold is Hold.RELEASED and chain.committed]
        return self._choice.sample(written, min(count, len(written)))


def payload(key: bytes, length: int) -> bytes:
    """The bytes of a block: they follow from its key."""
    return np.random.default_rng(int.from_bytes(key[:16], "little")).bytes(length)

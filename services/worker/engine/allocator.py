"""Who holds each block of a pool (or slot of a stage), and which full blocks can be found again by their key.

A block is in one of three states:

    free   nobody holds it, and nothing in it is of use
    held   by one or more holders: sequences and claims
    idle   nobody holds it, but it is named: the KV of the block key it has is still there

    free --take--> held --release--> free, or idle when it is named
    idle --claim--> held             idle --take--> held, nameless: memory is worth more than what might be wanted again

A named block is never written again while it has that name. Idle blocks go least recently used first, and the
blocks of one sequence last to first: without its beginning the rest of a chain can't be used.

`claim` and `count` may be called from any thread; everything else belongs to the engine's.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from common.blocks import BlockKey


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


class BlockAllocator:
    """Bookkeeping over block numbers `[0, blocks)`."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the next to go comes first
        self._holders = [0] * blocks
        self._named: dict[BlockKey, int] = {}
        self._name_of: list[BlockKey | None] = [None] * blocks
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Blocks that `take` could give: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def named(self) -> int:
        """Blocks that can be claimed."""
        return len(self._named)

    def take(self, count: int, *, spare: int = 0) -> list[int] | None:
        """`count` blocks with one holder each, or None unless that leaves `spare` blocks."""
        with self._lock:
            if count + spare > self.free:
                return None
            taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
            for block in taken:
                self._holders[block] = 1
            return taken

    def claim(self, keys: Sequence[BlockKey]) -> list[int]:
        """One more holder for the blocks of the longest prefix of `keys` that is named."""
        with self._lock:
            claimed = []
            for key in keys:
                block = self._named.get(key)
                if block is None:
                    break
                self._idle.pop(block, None)
                self._holders[block] += 1
                claimed.append(block)
            return claimed

    def count(self, keys: Sequence[BlockKey]) -> int:
        """How many leading ones of `keys` are named now; nothing holds them. Any thread may call it."""
        with self._lock:
            return next((at for at, key in enumerate(keys) if key not in self._named), len(keys))

    def name(self, block: int, key: BlockKey) -> None:
        """A held block is full and holds the KV of `key`. The first block of a name keeps it."""
        with self._lock:
            assert self._holders[block] > 0, f"block {block} is free"
            assert self._name_of[block] in (None, key), f"block {block} has another name"
            if key not in self._named:
                self._named[key], self._name_of[block] = block, key

    def forget(self, blocks: Iterable[int]) -> list[int]:
        """Takes the names of held blocks away: what is in them can't be trusted. Those that have one holder only."""
        with self._lock:
            alone = []
            for block in blocks:
                self._unname(block)
                if self._holders[block] == 1:
                    alone.append(block)
            return alone

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less; `blocks` in the order of their sequence."""
        with self._lock:
            for block in reversed(blocks):
                assert self._holders[block] > 0, f"block {block} is free already"
                self._holders[block] -= 1
                if self._holders[block]:
                    continue
                if self._name_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._unname(block)
        return block

    def _unname(self, block: int) -> None:
        key = self._name_of[block]
        if key is not None:
            self._name_of[block] = None
            del self._named[key]

    def check_integrity(self, held: Iterable[int]) -> None:
        """`held` names every block once per holder; anything else is a leak or a double use."""
        expected = [0] * self.total
        for block in held:
            expected[block] += 1
        assert expected == self._holders, [
            (block, want, have) for block, (want, have) in enumerate(zip(expected, self._holders, strict=True)) if want != have
        ]
        unheld = [block for block, count in enumerate(self._holders) if not count]
        assert sorted((*self._free, *self._idle)) == unheld, "free and idle"
        assert all(self._name_of[block] is None for block in self._free), "a free block has a name"
        assert all(self._name_of[block] is not None for block in self._idle), "an idle block has none"
        assert self._named == {key: block for block, key in enumerate(self._name_of) if key is not None}, "names"

"""KV that was computed elsewhere, on its way into the pool's blocks of a sequence.

1. `admit`: what was there when the sequence was added, when it gets its blocks.
2. `meet`: what has been loaded since, as soon as compute has come to where it begins.
3. `name`: blocks that have become full, in whatever way, are found by their keys from then on.
"""

import time
from collections.abc import Sequence as Items

from services.worker.engine.pool import BlockPool
from services.worker.engine.sequence import Sequence
from services.worker.engine.types import LoadedKv


class Intake:
    """Into one pool; on the engine's thread. Whatever a copy raises is the sequence's end."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_tokens = pool.layout.block_tokens

    def admit(self, sequence: Sequence) -> None:
        """Copies the sequence's KV, if it has some, and gives its buffers back."""
        if sequence.kv is None:
            return
        began = time.perf_counter()
        sequence.count_loaded(self._copy(sequence, sequence.kv), time.perf_counter() - began)
        sequence.drop_kv()
        self.name(sequence)

    def meet(self, sequence: Sequence) -> None:
        """Copies what has been loaded up to where the sequence's compute has come."""
        blocks = sequence.meeting.loaded(sequence.computed) if sequence.meeting is not None else range(0)
        if not blocks or sequence.meeting is None:
            return
        began, tokens = time.perf_counter(), blocks.stop * self._block_tokens
        buffers = sequence.meeting.buffers[blocks.start : blocks.stop]
        self._pool.load(sequence.blocks[blocks.start : blocks.stop], buffers, tokens)
        sequence.computed = tokens
        sequence.count_loaded(buffers, time.perf_counter() - began)
        self.name(sequence)

    def name(self, sequence: Sequence) -> None:
        """Gives the blocks that became full their names."""
        full = sequence.computed // self._block_tokens
        if full > sequence.named:
            keys = sequence.keys(full, self._block_tokens)
            for block, key in zip(sequence.blocks[sequence.named : full], keys[sequence.named :], strict=False):
                self._pool.allocator.name(block, key)
            sequence.named = full

    def _copy(self, sequence: Sequence, kv: LoadedKv) -> Items[memoryview]:
        """Copies what isn't resident, blocks `[named, ...)`; what was copied."""
        skip = max(0, sequence.named - kv.first_block)
        buffers = kv.buffers[skip:]
        first = kv.first_block + skip
        if buffers:
            self._pool.load(sequence.blocks[first : first + len(buffers)], buffers, kv.tokens)
        return buffers

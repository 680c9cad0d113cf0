"""Blocks to store: one chain after another. Keys never repeat, bytes always do."""

import hashlib
import os
from collections.abc import Sequence

from common.blocks import KEY_BYTES, Namespace
from common.storage import BlockMeta
from common.transport.memory import checksums

NAMESPACE = Namespace("70" * 32)
ROOT = hashlib.sha256(b"bench-store").digest()


class Blocks:
    """Every block has the same random bytes, so memory that held one holds the next."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.payload = memoryview(os.urandom(block_bytes))
        self.checksums = checksums(self.payload)

    def chain(self, count: int) -> list[BlockMeta]:
        """The next `count` blocks, a chain of their own."""
        drawn = os.urandom(KEY_BYTES * count)
        keys = [drawn[at : at + KEY_BYTES] for at in range(0, len(drawn), KEY_BYTES)]
        return [BlockMeta(key, parent, self.block_bytes) for key, parent in zip(keys, [ROOT, *keys], strict=False)]


def keys(blocks: Sequence[BlockMeta]) -> list[bytes]:
    return [block.key for block in blocks]

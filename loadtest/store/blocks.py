"""Blocks to store: one chain after another, their bytes cut from one random piece."""

import hashlib
import os
from collections.abc import Sequence

from common.blocks import Namespace
from common.storage import BlockMeta
from common.transport.memory import crc32c

NAMESPACE = Namespace("70" * 32)
ROOT = hashlib.sha256(b"bench-store").digest()


class Blocks:
    """Keys never repeat. Block bytes are a window into random bytes that moves with every block."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._random = memoryview(os.urandom(2 * block_bytes))
        self._made = 0

    def chain(self, count: int) -> list[BlockMeta]:
        """The next `count` blocks, a chain of their own."""
        keys = [hashlib.sha256(ROOT + (self._made + i).to_bytes(8, "little")).digest() for i in range(count)]
        self._made += count
        return [BlockMeta(key, parent, self.block_bytes) for key, parent in zip(keys, [ROOT, *keys], strict=False)]

    def payload(self, block: BlockMeta) -> memoryview:
        """Its bytes; read-only to the caller."""
        start = int.from_bytes(block.key[:4], "little") % self.block_bytes
        return self._random[start : start + self.block_bytes]

    def check(self, block: BlockMeta, data: memoryview) -> bool:
        return crc32c(data) == crc32c(self.payload(block))


def keys(blocks: Sequence[BlockMeta]) -> list[bytes]:
    return [block.key for block in blocks]

"""The pool: KV memory paged in blocks.

`BlockPool` owns the tensor `[block, layer, k|v, token, kv_head, head_dim]`, so that one block is one contiguous
record: the block as it is sent, and as the codec `raw` stores it. allocator.py knows who holds each block.

The pool starts zeroed and never keeps a non-finite value past its sequence (`scrub`): attention masks
keys it must not see, but a masked NaN in `v` would still spread.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from common.codec import StoredLayout
from common.kv_layout import KvLayout
from common.machine import memory_bytes
from services.worker.codec import DTYPES, Codec
from services.worker.engine.allocator import BlockAllocator, blocks_for

# A worker shares its machine with three others and the page cache that serves the SSD.
MEMORY_SHARE = 1 / 8
ALIGNMENT = 64  # a cache line: aligned records are decoded past the caches
DECODED_AT_ONCE = 32  # blocks that take twice their memory on a device meanwhile


class BlockPool:
    """The tensor of all blocks, and copies between it and buffers in host memory, raw or encoded as their length says."""

    def __init__(self, stored: StoredLayout, blocks: int, device: torch.device | str = "cpu", *, touched_blocks: int = 0) -> None:
        layout = stored.raw
        shape = (blocks, layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
        self.codec = Codec(stored)
        self.layout = layout
        self.tensor = _zeros(shape, DTYPES[layout.dtype], torch.device(device), touched_blocks * layout.bytes_per_block)
        self.allocator = BlockAllocator(blocks)
        self._records = self.tensor.view(blocks, -1).view(torch.uint8)  # [block, bytes_per_block]
        assert self._records.shape[1] == layout.bytes_per_block
        self._host: np.ndarray | None = self._records.numpy() if self.tensor.device.type == "cpu" else None

    def load(self, block_ids: Sequence[int], buffers: Sequence[memoryview], tokens: int) -> None:
        """Copies or decodes buffers into blocks; what a partial last one holds past `tokens` is zeroed."""
        if self._host is None:
            self._upload(block_ids, buffers)
        else:
            self._copy(self._host, block_ids, buffers)
        tail = tokens % self.layout.block_tokens
        if tail:
            self.tensor[block_ids[-1], :, :, tail:] = 0

    def _copy(self, host: np.ndarray, block_ids: Sequence[int], buffers: Sequence[memoryview]) -> None:
        for block, buffer in zip(block_ids, buffers, strict=True):
            if self.codec.is_encoded(buffer):
                self.codec.decode(buffer, memoryview(host[block]))
            else:
                host[block] = np.frombuffer(buffer, dtype=np.uint8)

    def _upload(self, block_ids: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Bytes cross to the device as they are; encoded ones are decoded there. Returns when the buffers are no longer needed."""
        encoded: list[tuple[int, memoryview]] = []
        for block, buffer in zip(block_ids, buffers, strict=True):
            if self.codec.is_encoded(buffer):
                encoded.append((block, buffer))
            else:
                self._records[block].copy_(_bytes_of(buffer), non_blocking=True)
        for first in range(0, len(encoded), DECODED_AT_ONCE):
            batch = encoded[first : first + DECODED_AT_ONCE]
            there = self._records.new_empty((len(batch), self.codec.bytes_per_block))
            for row, (_, buffer) in zip(there, batch, strict=True):
                row.copy_(_bytes_of(buffer), non_blocking=True)
            blocks = torch.tensor([block for block, _ in batch], device=there.device)
            self.tensor.index_copy_(0, blocks, self.codec.decode_tensor(there))
        self._settle()

    def _settle(self) -> None:
        """All copies between the device and the host are done."""
        if self.tensor.is_cuda:
            torch.cuda.synchronize(self.tensor.device)

    def encode(self, block: int, out: memoryview) -> None:
        """A full block in its stored form. Raises `Internal` for values that the codec can't store."""
        if self._host is not None:
            self.codec.encode(memoryview(self._host[block]), out)
        else:
            _bytes_of(out).copy_(self.codec.encode_tensor(self.tensor[block]))

    def export(self, block_ids: Sequence[int], out: Sequence[memoryview], tokens: int) -> None:
        """Copies raw blocks out; `tokens` is how many they hold. The rest of a partial block leaves as zeros: it may
        hold another sequence's KV."""
        for block, record in zip(block_ids, out, strict=True):
            _bytes_of(record).copy_(self._records[block], non_blocking=True)
        self._settle()
        tail = tokens - (len(block_ids) - 1) * self.layout.block_tokens
        if block_ids and tail < self.layout.block_tokens:
            slices = np.frombuffer(out[-1], dtype=np.uint8).reshape(self.layout.layers, 2, self.layout.block_tokens, -1)
            slices[:, :, tail:] = 0

    def scrub(self, block_ids: Sequence[int]) -> None:
        """Zeroes blocks that may hold non-finite values."""
        if block_ids:
            self.tensor[torch.tensor(block_ids, device=self.tensor.device)] = 0


def _bytes_of(buffer: memoryview) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(buffer, dtype=np.uint8))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, touched_bytes: int) -> torch.Tensor:
    """Zeros; in host memory the kernel's own zero pages, so that only blocks that are used take memory.

    The first `touched_bytes` are made present now: the allocator hands out low block numbers first, and the first
    request should not pay for fresh pages (0.1-1 GB/s on virtual machines, docs/benchmarks.md).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    plain = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    plain = plain[-plain.ctypes.data % ALIGNMENT :][:size]
    plain[:touched_bytes] = 0
    return torch.from_numpy(plain).view(dtype).view(shape)


def pool_blocks(layout: KvLayout, pool_bytes: int, context_tokens: int, sequences_max: int, device: torch.device) -> int:
    """How many blocks fit `pool_bytes`; 0 chooses: a share of the memory, and no more than the batch can fill."""
    wanted = sequences_max * blocks_for(context_tokens, layout.block_tokens)
    if pool_bytes == 0:
        pool_bytes = int(_memory_bytes(device) * MEMORY_SHARE)
    else:
        wanted = pool_bytes // layout.bytes_per_block
    return max(1, min(wanted, pool_bytes // layout.bytes_per_block))


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # The pool takes most of what the weights left.
        return int(torch.cuda.mem_get_info(device)[0] * 0.85 / MEMORY_SHARE)
    return memory_bytes()

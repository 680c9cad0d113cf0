"""Blocks to and from their stored form.

Where each happens:

1. A block that fills is encoded out of the engine's pool on its way to the reservoir (writeback.py).
2. An encoded block lies at the start of a stage slot, which has room for a raw one.
3. It is decoded into the pool when its sequence is admitted (`BlockPool.load`), or in place in its slot where
   somebody else reads the slot (`decode_in_place`).

What one worker hands to another is raw. Nothing here keeps state: any thread may encode and decode.
"""

import numpy as np
import torch
from torch import Tensor

from common.codec import StoredLayout
from common.errors import Internal
from services.worker.kernels import codec_ops, codec_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Codec:
    """The arithmetic of one `StoredLayout`."""

    def __init__(self, stored: StoredLayout) -> None:
        raw = stored.raw
        self.stored = stored
        self.name = stored.codec
        self.bytes_per_block = stored.bytes_per_block
        self._dtype = DTYPES[raw.dtype]
        self._shape = (raw.block_tokens, raw.kv_heads, raw.head_dim)

    def layer_range(self, layer: int) -> tuple[int, int]:
        """Byte range `[start, end)` of one layer inside an encoded block."""
        return self.stored.layer_range(layer)

    def is_encoded(self, buffer: memoryview) -> bool:
        """Whether a buffer of this length holds an encoded block, not a raw one."""
        return self.name != "raw" and buffer.nbytes == self.bytes_per_block

    def encode(self, record: memoryview, out: memoryview) -> None:
        """Whole layers, or a whole block, of a raw record into their stored form.

        Raises:
            Internal: a head holds values that are not finite, or so large that decoding could overflow.
        """
        source, target = _bytes(record), _bytes(out)
        assert source.nbytes * self.bytes_per_block == target.nbytes * self.stored.raw.bytes_per_block, (
            source.nbytes,
            target.nbytes,
        )
        if self.name == "raw":
            np.copyto(target, source)
        else:
            self._refuse(codec_ops.encode(source, target, self.name, self._shape, self._dtype))

    def decode(self, data: memoryview, out: memoryview) -> None:
        """Whole layers, or a whole block, back to a raw record. `data` and `out` must not overlap."""
        source, target = _bytes(data), _bytes(out)
        assert source.nbytes * self.stored.raw.bytes_per_block == target.nbytes * self.bytes_per_block, (
            source.nbytes,
            target.nbytes,
        )
        if self.name == "raw":
            np.copyto(target, source)
        else:
            codec_ops.decode(source, target, self.name, self._shape, self._dtype)

    def decode_in_place(self, slot: memoryview) -> None:
        """Decodes the block at the start of `slot`, which is as long as a raw record, over itself.

        From the last layer to the first: what is written ends after what is still to be read begins only within a
        layer, which is copied aside.
        """
        assert slot.nbytes == self.stored.raw.bytes_per_block, slot.nbytes
        if self.name == "raw":
            return
        for layer in reversed(range(self.stored.raw.layers)):
            start, end = self.layer_range(layer)
            raw_start, raw_end = self.stored.raw.layer_range(layer)
            self.decode(memoryview(bytes(slot[start:end])), slot[raw_start:raw_end])

    def encode_tensor(self, block: Tensor) -> Tensor:
        """`[layer, k|v, token, head, dim]` on any device to uint8 `[bytes_per_block]` on the same. Raises as `encode` does."""
        if self.name == "raw":
            return block.contiguous().view(torch.uint8).flatten()
        encoded, unfit = codec_reference.encode(block, self.name)
        self._refuse(unfit)
        return encoded.flatten()

    def decode_tensor(self, data: Tensor) -> Tensor:
        """The reverse, of many: uint8 `[block, bytes_per_block]` to `[block, layer, k|v, token, head, dim]` in the KV dtype."""
        blocks, layers = data.shape[0], self.stored.raw.layers
        if self.name == "raw":
            return data.view(self._dtype).view(blocks, layers, 2, *self._shape)
        decoded = codec_reference.decode(data.view(blocks * layers, -1), self.name, self._shape, self._dtype)
        return decoded.view(blocks, layers, 2, *self._shape)

    def _refuse(self, plane: int | None) -> None:
        if plane is not None:
            which = "values" if plane % 2 else "keys"
            raise Internal(
                f"layer {plane // 2} has {which} that are not finite, or above 2^127: {self.name} can't store the block"
            )


def _bytes(buffer: memoryview) -> np.ndarray:
    return np.frombuffer(buffer, dtype=np.uint8)

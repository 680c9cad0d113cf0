"""What a stored block looks like: codecs and the sizes of what they write. docs/formats.md draws it byte by byte.

    encoded block  := layer{layers}
    layer          := scale{2 * kv_heads} k-values v-values      scale: float32, keys' heads before values'
    values         := code{block_tokens * kv_heads * head_dim}   in the order of a raw record

Each scale belongs to one (layer, k|v, head) of one block. `raw` has no scales: its layers are the record itself.
A layer is a sub-range of the encoded block, as it is of the raw one. The arithmetic is in `services/worker/codec.py`.
"""

from typing import Literal

import msgspec

from common.errors import SettingsError
from common.kv_layout import KvLayout

CodecName = Literal["raw", "fp8", "int8", "int4"]
CODE_BITS = {"fp8": 8, "int8": 8, "int4": 4}  # `raw` has none
SCALE_BYTES = 4


class StoredLayout(msgspec.Struct, frozen=True):
    """Sizes and ranges of blocks of `raw` as `codec` stores them.

    Invariant: unless the codec is `raw`, an encoded block is smaller than a raw one, so that a buffer's
    length says which of the two it holds.
    """

    raw: KvLayout
    codec: CodecName = "raw"

    def __post_init__(self) -> None:
        """Raises SettingsError where the codec doesn't fit the model."""
        if self.codec == "int4" and self.raw.head_dim % 2:
            raise SettingsError(f"codec = 'int4' packs pairs, and the model's head_dim = {self.raw.head_dim} is odd")
        if self.codec != "raw" and self.bytes_per_block >= self.raw.bytes_per_block:
            raise SettingsError(
                f"codec = {self.codec!r}: an encoded block of {self.bytes_per_block} bytes is not smaller than the raw "
                f"{self.raw.bytes_per_block}; expected raw, or more block_tokens"
            )

    @property
    def scale_bytes_per_layer(self) -> int:
        return 0 if self.codec == "raw" else 2 * self.raw.kv_heads * SCALE_BYTES

    @property
    def bytes_per_layer_slice(self) -> int:
        if self.codec == "raw":
            return self.raw.bytes_per_layer_slice
        values = 2 * self.raw.block_tokens * self.raw.kv_heads * self.raw.head_dim
        return self.scale_bytes_per_layer + values * CODE_BITS[self.codec] // 8

    @property
    def bytes_per_block(self) -> int:
        return self.raw.layers * self.bytes_per_layer_slice

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_per_block / self.raw.block_tokens

    def layer_range(self, layer: int) -> tuple[int, int]:
        """Byte range `[start, end)` of one layer inside an encoded block."""
        size = self.bytes_per_layer_slice
        return layer * size, (layer + 1) * size

"""The shape of KV bytes: `[layer][k|v][token][kv_head][head_dim]`, one byte order from SSD to device.

A full block is its layer slices laid end to end, so a layer slice is a sub-range of a block.
"""

import hashlib

import msgspec

from common.blocks import Namespace

LAYOUT_VERSION = 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KvLayout(msgspec.Struct, frozen=True):
    """Everything needed to size and slice a block.

    Attributes:
        layers, kv_heads, head_dim: uniform over the model's attention layers.
        dtype: element type of stored KV, a key of `DTYPE_BYTES`.
        block_tokens: tokens per block, a power of two.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int

    @property
    def bytes_per_layer_slice(self) -> int:
        return 2 * self.block_tokens * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.layers * self.bytes_per_layer_slice

    @property
    def bytes_per_token(self) -> int:
        return self.bytes_per_block // self.block_tokens

    def layer_range(self, layer: int) -> tuple[int, int]:
        """Byte range `[start, end)` of one layer's slice inside a block."""
        size = self.bytes_per_layer_slice
        return layer * size, (layer + 1) * size


def default_block_tokens(bytes_per_token: int) -> int:
    """The power of two in [16, 256] that brings a block nearest to 1 MiB from below.

    0.5-2.5 MB per record is where one disk read, one message and one copy each amortise their
    fixed cost (design section 5); small models get smaller records rather than blocks so long
    that short prompts never fill one.
    """
    tokens = 16
    while tokens < 256 and tokens * 2 * bytes_per_token <= 1 << 20:
        tokens *= 2
    return tokens


def namespace_of(layout: KvLayout, weights_digest: str, config_digest: str, codec: str = "raw") -> Namespace:
    """Digest of everything that makes KV bytes interchangeable."""
    facts = {
        "layout_version": LAYOUT_VERSION,
        "layout": msgspec.to_builtins(layout),
        "weights": weights_digest,
        "config": config_digest,
        "codec": codec,
    }
    return Namespace(hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest())

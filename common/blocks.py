"""Identity of KV blocks: the chain of block keys.

A block is `block_tokens` consecutive tokens of one sequence. Its key commits to everything that
makes its KV bytes what they are: the namespace (weights, architecture, dtype, codec, layout), the
tenant salt, the adapter, and every token up to and including the block's last one.

    root      = SHA-256("penstock-root-v1" | len(namespace) | namespace | len(salt) | salt | len(adapter) | adapter)
    key[0]    = SHA-256(root   | tokens[0 : B] as little-endian u32)
    key[i]    = SHA-256(key[i-1] | tokens[i*B : (i+1)*B] as little-endian u32)

Lengths are little-endian u32. Only full blocks have a key. Test vectors: docs/formats.md and
tests/common/test_blocks.py.
"""

import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NewType

import numpy as np

BlockKey = NewType("BlockKey", bytes)  # 32 bytes
ChainRoot = NewType("ChainRoot", bytes)  # 32 bytes
Namespace = NewType("Namespace", str)  # 64 hex digits

KEY_BYTES = 32
_ROOT_TAG = b"penstock-root-v1"


def chain_root(namespace: Namespace, tenant_salt: bytes = b"", adapter: bytes = b"") -> ChainRoot:
    """The parent of a chain's first block: one per (namespace, tenant, adapter)."""
    digest = sha256(_ROOT_TAG)
    for field in (bytes.fromhex(namespace), tenant_salt, adapter):
        digest.update(struct.pack("<I", len(field)))
        digest.update(field)
    return ChainRoot(digest.digest())


def block_key(parent: bytes, tokens: Sequence[int]) -> BlockKey:
    """Key of one full block under `parent` (a block key or a chain root)."""
    return BlockKey(sha256(parent + np.asarray(tokens, dtype="<u4").tobytes()).digest())


def block_keys(root: ChainRoot, tokens: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """Keys of every full block of `tokens`, in order; a partial tail has none."""
    return list(extend_keys(root, tokens, block_tokens))


def extend_keys(parent: bytes, tokens: Sequence[int], block_tokens: int) -> Iterator[BlockKey]:
    """Keys of the full blocks that follow `parent`, given the tokens that follow it."""
    data = np.asarray(tokens, dtype="<u4").tobytes()
    bytes_per_block = 4 * block_tokens
    for start in range(0, len(data) - bytes_per_block + 1, bytes_per_block):
        parent = sha256(parent + data[start : start + bytes_per_block]).digest()
        yield BlockKey(parent)


def reusable_blocks(prompt_tokens: int, block_tokens: int) -> int:
    """How many leading blocks of a prompt may come from storage.

    At least one prompt token is always computed, because the first output token is sampled from
    its logits.
    """
    return max(0, prompt_tokens - 1) // block_tokens

"""Block keys: the published vectors, and the properties a content-addressed chain needs."""

import struct
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.blocks import Namespace, block_keys, chain_root, extend_keys, reusable_blocks

NAMESPACE = Namespace("00" * 32)
tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def test_published_vectors() -> None:
    root = chain_root(NAMESPACE)
    assert root.hex() == "c33a1838f3c4f02a1621084c05e5e49b307ea8df7779a818d7ec3b7f505a7df8"
    assert [key.hex() for key in block_keys(root, range(40), 16)] == [
        "ca87fb58f8c0938c21cbfbb675e575c38e73835da9e6200a954c046f6dc47725",
        "eae0c70b7b3483d2928872eca0e7f936975d33fba10e8ce8c518404e26c996d2",
    ]


def test_a_key_is_the_hash_of_parent_and_little_endian_tokens() -> None:
    root = chain_root(NAMESPACE)
    assert block_keys(root, [1, 2, 3, 2**32 - 1], 4) == [sha256(root + struct.pack("<4I", 1, 2, 3, 2**32 - 1)).digest()]


def test_namespace_salt_and_adapter_each_change_the_root_and_cannot_run_into_each_other() -> None:
    roots = {
        chain_root(NAMESPACE),
        chain_root(Namespace("01" * 32)),
        chain_root(NAMESPACE, b"ab"),
        chain_root(NAMESPACE, b"a", b"b"),
        chain_root(NAMESPACE, b"", b"ab"),
    }
    assert len(roots) == 5


@given(tokens_lists, st.sampled_from([1, 4, 16]))
def test_only_full_blocks_have_keys(tokens: list[int], block_tokens: int) -> None:
    assert len(block_keys(chain_root(NAMESPACE), tokens, block_tokens)) == len(tokens) // block_tokens


@given(tokens_lists, tokens_lists, st.sampled_from([2, 8]))
def test_sequences_share_keys_exactly_as_long_as_they_share_blocks(a: list[int], b: list[int], block_tokens: int) -> None:
    root = chain_root(NAMESPACE)
    keys_a, keys_b = block_keys(root, a, block_tokens), block_keys(root, b, block_tokens)
    for i, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=False)):
        end = (i + 1) * block_tokens
        assert (key_a == key_b) == (a[:end] == b[:end])


@given(tokens_lists, st.integers(0, 10))
def test_a_chain_can_be_continued_from_any_key(tokens: list[int], cut: int) -> None:
    root = chain_root(NAMESPACE)
    keys = block_keys(root, tokens, 4)
    cut = min(cut, len(keys))
    parent = keys[cut - 1] if cut else root
    assert keys[:cut] + list(extend_keys(parent, tokens[4 * cut :], 4)) == keys


@pytest.mark.parametrize(("prompt", "blocks"), [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_at_least_one_prompt_token_is_always_computed(prompt: int, blocks: int) -> None:
    assert reusable_blocks(prompt, 16) == blocks

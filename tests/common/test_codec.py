"""Sizes of stored blocks, and what a codec refuses."""

import pytest

from common.codec import CODE_BITS, CodecName, StoredLayout
from common.errors import SettingsError
from common.kv_layout import KvLayout, namespace_of

DEMO = KvLayout(layers=8, kv_heads=2, head_dim=64, dtype="bfloat16", block_tokens=256)
CODECS: tuple[CodecName, ...] = ("raw", "fp8", "int8", "int4")


@pytest.mark.parametrize(
    ("codec", "dtype", "slice_bytes"),
    [
        ("raw", "bfloat16", 131_072),
        ("fp8", "bfloat16", 65_552),
        ("int8", "bfloat16", 65_552),
        ("int4", "bfloat16", 32_784),
        ("raw", "float32", 262_144),
        ("int8", "float32", 65_552),
    ],
)
def test_a_layer_is_its_scales_and_a_code_for_each_element(codec: CodecName, dtype: str, slice_bytes: int) -> None:
    stored = StoredLayout(KvLayout(8, 2, 64, dtype, 256), codec)
    assert stored.bytes_per_layer_slice == slice_bytes
    assert stored.bytes_per_block == 8 * slice_bytes
    assert stored.layer_range(3) == (3 * slice_bytes, 4 * slice_bytes)


@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_eight_bits_halve_a_sixteen_bit_block_to_a_thousandth(codec: CodecName) -> None:
    assert StoredLayout(DEMO, codec).bytes_per_block / DEMO.bytes_per_block == pytest.approx(0.5, abs=0.001)


def test_each_codec_has_a_namespace_of_its_own() -> None:
    assert len({namespace_of(DEMO, "weights", "config", codec) for codec in CODECS}) == len(CODECS)
    assert namespace_of(DEMO, "weights", "config") == namespace_of(DEMO, "weights", "config", "raw")


def test_int4_refuses_an_odd_head() -> None:
    with pytest.raises(SettingsError, match="head_dim = 5 is odd"):
        StoredLayout(KvLayout(1, 1, 5, "float32", 16), "int4")


@pytest.mark.parametrize("codec", CODE_BITS)
def test_a_codec_that_would_not_make_blocks_smaller_is_refused(codec: CodecName) -> None:
    with pytest.raises(SettingsError, match="not smaller than the raw"):
        StoredLayout(KvLayout(1, 1, 2, "bfloat16", 1), codec)

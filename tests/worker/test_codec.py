"""Codecs: the golden block of docs/formats.md, the bound on their error, and that the kernels write the reference's bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.codec import CodecName, StoredLayout
from common.errors import Internal
from common.kv_layout import KvLayout
from services.worker import kernels
from services.worker.codec import DTYPES, Codec
from services.worker.engine.pool import BlockPool
from services.worker.kernels import codec_ops
from services.worker.kernels import codec_reference as reference

LOSSY: tuple[CodecName, ...] = ("fp8", "int8", "int4")
HALF_STEP_OF_DTYPE = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative; float16 also 2^-25
SHAPES = [
    (2, 16, 2, 64),
    (3, 4, 3, 80),
    (1, 1, 1, 16),
    (2, 8, 5, 128),
    (2, 16, 2, 8),
    (1, 2, 3, 20),
]  # layers, tokens, heads, dim


def layout_of(shape: tuple[int, int, int, int], dtype: str) -> KvLayout:
    layers, tokens, heads, dim = shape
    return KvLayout(layers, heads, dim, dtype, tokens)


def as_bytes(block: Tensor) -> memoryview:
    return memoryview(bytearray(block.contiguous().view(torch.uint8).numpy().tobytes()))


def as_block(record: memoryview, layout: KvLayout) -> Tensor:
    data = torch.from_numpy(np.frombuffer(record, dtype=np.uint8).copy()).view(DTYPES[layout.dtype])
    return data.view(layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)


def at_offset(size: int, offset: int) -> memoryview:
    """Memory that lies so many bytes behind a cache line's start."""
    plain = np.zeros(size + 128, dtype=np.uint8)
    start = -plain.ctypes.data % 64 + offset
    return memoryview(plain[start : start + size])


def round_trip(codec: Codec, block: Tensor) -> Tensor:
    layout = codec.stored.raw
    encoded, back = memoryview(bytearray(codec.bytes_per_block)), memoryview(bytearray(layout.bytes_per_block))
    codec.encode(as_bytes(block), encoded)
    codec.decode(encoded, back)
    return as_block(back, layout)


def assert_bounded(codec: CodecName, dtype: str, block: Tensor, back: Tensor) -> None:
    """What docs/formats.md promises of each element."""
    x, y = block.double(), back.double()
    peak = x.abs().amax(dim=(2, 4), keepdim=True)
    scale = torch.where(peak < reference.PEAK_MIN, 0.0, peak / reference.LEVELS[codec])
    step = torch.maximum(x.abs() / 16, scale / 1024) if codec == "fp8" else scale / 2
    slack = peak * 2.0**-22 + peak * HALF_STEP_OF_DTYPE[dtype] + 2.0**-25 * (dtype == "float16") + reference.PEAK_MIN
    assert torch.all((x - y).abs() <= step + slack)


def storable(bits: bytes, dtype: str, shape: tuple[int, int, int, int]) -> Tensor:
    """Any bit patterns as a block, what can't be stored replaced by zero."""
    values = torch.frombuffer(bytearray(bits), dtype=DTYPES[dtype]).view(shape[0], 2, *shape[1:])
    return torch.where(values.float().abs() < reference.PEAK_END, values, torch.zeros_like(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LOSSY)
@given(data=st.data(), shift=st.integers(-20, 20))
@settings(max_examples=40, deadline=None)
def test_what_comes_back_is_within_the_bound(codec: CodecName, dtype: str, data: st.DataObject, shift: int) -> None:
    shape = (1, 2, 2, 16)
    bits = data.draw(st.binary(min_size=128 * DTYPES[dtype].itemsize, max_size=128 * DTYPES[dtype].itemsize))
    wild = storable(bits, dtype, shape)
    tame = (torch.frombuffer(bytearray(bits), dtype=torch.uint8)[:128].float().sub(128) * 2.0**shift).to(DTYPES[dtype])
    for block in (wild, storable(bytes(as_bytes(tame)), dtype, shape)):
        assert_bounded(codec, dtype, block, round_trip(Codec(StoredLayout(layout_of(shape, dtype), codec)), block))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("codec", LOSSY)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_storing_again_what_was_loaded_loses_nothing_more(codec: CodecName, dtype: str, data: st.DataObject) -> None:
    shape = (1, 2, 2, 16)
    block = storable(data.draw(st.binary(min_size=256, max_size=256)), dtype, shape)
    worker = Codec(StoredLayout(layout_of(shape, dtype), codec))
    once = round_trip(worker, block)
    assert torch.equal(round_trip(worker, once), once)


@pytest.mark.skipif(not kernels.available(), reason=kernels.BUILD.reason)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", LOSSY)
@given(seed=st.integers(0, 2**32 - 1), wild=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_kernels_write_and_read_the_reference_bit_for_bit(codec: CodecName, dtype: str, seed: int, wild: bool) -> None:
    for shape in SHAPES:
        rng = np.random.default_rng(seed)
        layout = layout_of(shape, dtype)
        if wild:
            block = storable(rng.bytes(layout.bytes_per_block), dtype, shape)
        else:
            normal = torch.from_numpy(rng.standard_normal((shape[0], 2, *shape[1:])))
            block = (normal * 2.0 ** rng.choice([*range(-30, 30), -99])).to(DTYPES[dtype])
        stored = StoredLayout(layout, codec)
        ours = memoryview(bytearray(stored.bytes_per_block))
        Codec(stored).encode(as_bytes(block), ours)
        encoded, unfit = reference.encode(block, codec)
        assert unfit is None
        assert bytes(ours) == encoded.numpy().tobytes()
        expected = reference.decode(encoded, codec, shape[1:], DTYPES[dtype])
        for offset in (0, 2):  # past the caches, and through them
            back = at_offset(layout.bytes_per_block, offset)
            Codec(stored).decode(ours, back)
            assert bytes(back) == bytes(as_bytes(expected))


@pytest.mark.skipif(not kernels.available(), reason=kernels.BUILD.reason)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_fp8_code_means_what_torch_says(dtype: str) -> None:
    codes = np.delete(np.arange(256, dtype=np.uint8), [127, 255])  # the two that mean NaN are never written
    stored = StoredLayout(KvLayout(1, 1, 16, dtype, 8), "fp8")
    assert codec_ops.compiled(DTYPES[dtype], 16)
    encoded = bytearray(np.array([1.0, 1.0], np.float32).tobytes() + codes.tobytes() + bytes(2))
    back = memoryview(bytearray(stored.raw.bytes_per_block))
    Codec(stored).decode(memoryview(encoded), back)
    expected = bytes(as_bytes(torch.from_numpy(codes).view(torch.float8_e4m3fn).to(DTYPES[dtype])))
    assert bytes(back)[: len(expected)] == expected


KEYS = [[127.0, -1.0, 0.0, 64.0], [0.4, 0.6, -127.0, 2.5]]
VALUES = [[2.0, 1.0, -1.0, 0.0], [0.25, -0.25, 0.5, -2.0]]
GOLDEN = {  # scales of keys and values, codes of the keys of two tokens, codes of their values
    "int8": "0000803f 0402813c 7fff0040 00018102 7f40c000 10f02081",
    "fp8": "9224913e 2549923b 7ec60076 3b40fe51 7e76f600 66e66efe",
    "int4": "92249141 2549923e 8fc88881 cf84791a",
}


def golden_block() -> Tensor:
    return torch.tensor([[KEYS, VALUES]]).view(1, 2, 2, 1, 4)


@pytest.mark.parametrize("codec", LOSSY)
def test_the_worked_example_of_the_format(codec: CodecName) -> None:
    stored = StoredLayout(KvLayout(layers=1, kv_heads=1, head_dim=4, dtype="float32", block_tokens=2), codec)
    out = memoryview(bytearray(stored.bytes_per_block))
    Codec(stored).encode(as_bytes(golden_block()), out)
    assert out.hex(" ", 4) == GOLDEN[codec]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LOSSY)
def test_a_head_of_zeros_stays_zeros_beside_others(codec: CodecName, dtype: str) -> None:
    block = torch.randn(2, 2, 16, 2, 64).to(DTYPES[dtype])
    block[1, 0, :, 1] = 0
    back = round_trip(Codec(StoredLayout(layout_of((2, 16, 2, 64), dtype), codec)), block)
    assert not back[1, 0, :, 1].any()
    assert back[1, 0, :, 0].any() and back[1, 1, :, 1].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2.0**127])
@pytest.mark.parametrize("head_dim", [64, 20], ids=["kernels", "reference"])
@pytest.mark.parametrize("codec", LOSSY)
def test_values_that_are_not_finite_are_refused_with_their_place(codec: CodecName, head_dim: int, value: float) -> None:
    block = torch.randn(2, 2, 16, 2, head_dim)
    block[1, 1, 7, 0, 5] = value
    stored = StoredLayout(layout_of((2, 16, 2, head_dim), "float32"), codec)
    with pytest.raises(Internal, match="layer 1 has values that are not finite"):
        Codec(stored).encode(as_bytes(block), memoryview(bytearray(stored.bytes_per_block)))
    with pytest.raises(Internal, match="layer 1 has values that are not finite"):
        Codec(stored).encode_tensor(block)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("head_dim", [64, 20], ids=["kernels", "reference"])
@pytest.mark.parametrize("codec", LOSSY)
def test_a_scale_that_was_never_written_shows(codec: CodecName, head_dim: int, scale: float) -> None:
    layout = layout_of((1, 2, 2, head_dim), "bfloat16")
    stored = StoredLayout(layout, codec)
    out, back = memoryview(bytearray(stored.bytes_per_block)), memoryview(bytearray(layout.bytes_per_block))
    Codec(stored).encode(as_bytes(torch.randn(1, 2, 2, 2, head_dim).bfloat16()), out)
    out[4:8] = np.float32(scale).tobytes()  # keys of head 1
    Codec(stored).decode(out, back)
    block = as_block(back, layout)
    assert block[0, 0, :, 1].isnan().all()
    assert block[0, 0, :, 0].isfinite().all() and block[0, 1].isfinite().all()


@pytest.mark.parametrize("codec", ["raw", *LOSSY])
def test_layers_encode_and_decode_one_at_a_time_or_in_place(codec: CodecName) -> None:
    layout = layout_of((5, 16, 2, 64), "bfloat16")
    worker, block = Codec(StoredLayout(layout, codec)), torch.randn(5, 2, 16, 2, 64).bfloat16()
    whole, record = memoryview(bytearray(worker.bytes_per_block)), as_bytes(block)
    worker.encode(record, whole)
    back = memoryview(bytearray(layout.bytes_per_block))
    worker.decode(whole, back)
    by_layer, encoded = memoryview(bytearray(layout.bytes_per_block)), memoryview(bytearray(worker.bytes_per_block))
    for layer in range(layout.layers):
        (start, end), (raw_start, raw_end) = worker.layer_range(layer), layout.layer_range(layer)
        worker.encode(record[raw_start:raw_end], encoded[start:end])
        worker.decode(whole[start:end], by_layer[raw_start:raw_end])
    assert encoded == whole and by_layer == back
    slot = memoryview(bytearray(layout.bytes_per_block))
    slot[: whole.nbytes] = whole
    worker.decode_in_place(slot)
    assert slot == back
    tensor = worker.encode_tensor(block)
    assert tensor.numpy().tobytes() == bytes(whole)
    assert bytes(as_bytes(worker.decode_tensor(tensor[None]))) == bytes(back)


@pytest.mark.parametrize("codec", ["raw", *LOSSY])
def test_a_pool_takes_raw_and_encoded_blocks_side_by_side(codec: CodecName) -> None:
    stored = StoredLayout(layout_of((2, 16, 2, 64), "bfloat16"), codec)
    pool = BlockPool(stored, 4)
    first, second = torch.randn(2, 2, 16, 2, 64).bfloat16(), torch.randn(2, 2, 16, 2, 64).bfloat16()
    encoded = memoryview(bytearray(stored.bytes_per_block))
    pool.load([3], [as_bytes(first)], 16)
    pool.encode(3, encoded)
    pool.load([0, 2], [encoded, as_bytes(second)], 32)
    assert torch.equal(pool.tensor[3], first) and torch.equal(pool.tensor[2], second)
    assert torch.equal(pool.tensor[0], round_trip(Codec(stored), first))
    assert not pool.tensor[1].any()

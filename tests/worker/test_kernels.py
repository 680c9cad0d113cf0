"""The compiled kernels against float64 and against the reference, over odd shapes and 1 to 3 threads."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from services.worker import kernels
from services.worker.kernels import ops, reference
from services.worker.kernels.patching import FEW_ROWS

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.BUILD.reason)

DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = {
    "plain": (None, None, False),
    "window": (40, None, False),
    "softcap": (None, 5.0, False),
    "sinks": (None, None, True),
    "everything": (17, 3.0, True),
}
# q_heads, kv_heads, head_dim, block_tokens
SHAPES = [(4, 4, 8, 4), (8, 2, 64, 16), (12, 4, 64, 32), (7, 1, 80, 16), (14, 2, 128, 64), (16, 1, 20, 16), (5, 5, 256, 8)]


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def linear_shapes() -> list[tuple[int, int, int]]:
    """Every row count up to past the change to packed panels, with odd widths."""
    rng = random.Random(7)
    edges = [(1, 1, 1), (1, 4096, 16), (6, 13, 2048), (47, 100, 256), (48, 100, 256), (200, 97, 513), (130, 300, 1000)]
    return edges + [(m, rng.randrange(1, 300), rng.randrange(1, 800)) for m in range(1, 60, 2)]


def bf16_steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable bfloat16 values lie between a and b."""
    ordered = [torch.where(bits < 0, -32768 - bits, bits) for bits in (t.view(torch.int16).int() for t in (a, b))]
    return (ordered[0] - ordered[1]).abs()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_the_float32_sum_rounded_once(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(1)
    for m, n, k in linear_shapes():
        x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
        got = ops.linear(x, w, bias)
        exact = x.double() @ w.double().T + bias.double()
        slack = (x.double().abs() @ w.double().abs().T + bias.double().abs()) * 1e-6  # of float32 sums
        if dtype == torch.bfloat16:
            low, high = (exact - slack).to(dtype), (exact + slack).to(dtype)
            assert torch.all((got >= low) & (got <= high)), (m, n, k)
            assert torch.all((bf16_steps_apart(got, exact.to(dtype)) <= 1) | (exact.abs() < slack * 1e4)), (m, n, k)
        else:
            assert torch.all((got.double() - exact).abs() <= slack), (m, n, k)


def test_linear_keeps_leading_dimensions_and_takes_no_rows() -> None:
    w = torch.randn(5, 32)
    assert ops.linear(torch.randn(2, 3, 32), w).shape == (2, 3, 5)
    assert ops.linear(torch.randn(0, 32), w).shape == (0, 5)
    strided = torch.randn(32, 4).T
    torch.testing.assert_close(ops.linear(strided, w), reference.linear(strided, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_carries_infinities_and_nans(dtype: torch.dtype) -> None:
    w = torch.ones(3, 20, dtype=dtype)
    for rows in (1, 50):
        x = torch.ones(rows, 20, dtype=dtype)
        x[0, 3] = float("inf")
        x[-1, 19] = float("nan")
        got, expected = ops.linear(x, w), reference.linear(x, w)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, w = torch.randn(9, 400).to(dtype), torch.randn(700, 400).to(dtype)
    pool, table, lengths = paged(4, 2, 64, 16, dtype)
    q = torch.randn(len(lengths), 4, 64).to(dtype)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        attended = ops.paged_attention_decode(q, pool[:, 0, 0], pool[:, 0, 1], table, lengths, 0.1)
        results.append((ops.linear(x, w), ops.linear(x.repeat(8, 1), w), attended))
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sequence_decodes_to_the_same_bits_alone_and_in_a_batch() -> None:
    torch.manual_seed(3)
    pool, table, lengths = paged(8, 2, 64, 16, torch.bfloat16)
    q = torch.randn(len(lengths), 8, 64).bfloat16()
    k, v = pool[:, 1, 0], pool[:, 1, 1]
    together = ops.paged_attention_decode(q, k, v, table, lengths, 0.1)
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        assert torch.equal(together[one], ops.paged_attention_decode(q[one], k, v, table[one], lengths[one], 0.1))


def paged(q_heads: int, kv_heads: int, head_dim: int, block_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A pool of two layers, a table that shares and scatters blocks, and lengths with padding, one and odd ones."""
    blocks = max(4, 1100 // block_tokens)
    pool = torch.randn(3 * blocks, 2, 2, block_tokens, kv_heads, head_dim).to(dtype)
    table = torch.randperm(3 * blocks).view(3, blocks).int()
    full = blocks * block_tokens
    lengths = torch.tensor([0, 1, min(full, 301), full], dtype=torch.int32)
    return pool, torch.cat([table, table[:1]]), lengths


def assert_near(got: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-5, 2e-6) if got.dtype == torch.float32 else (8e-3, 1e-4)  # of bfloat16: one rounding
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_decode_equals_the_reference(dtype: torch.dtype, variant: str, threads: int) -> None:
    window, softcap, with_sinks = VARIANTS[variant]
    torch.manual_seed(4)
    for q_heads, kv_heads, head_dim, block_tokens in SHAPES:
        pool, table, lengths = paged(q_heads, kv_heads, head_dim, block_tokens, dtype)
        q = torch.randn(len(lengths), q_heads, head_dim).to(dtype)
        sinks = torch.randn(q_heads) if with_sinks else None
        arguments = (q, pool[:, 1, 0], pool[:, 1, 1], table, lengths, head_dim**-0.5)
        got = ops.paged_attention_decode(*arguments, window=window, softcap=softcap, sinks=sinks)
        expected = reference.paged_attention_decode(*arguments, window=window, softcap=softcap, sinks=sinks)
        assert_near(got, expected)
        assert not got[0].any(), "a padding row is zeros"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_prefill_equals_the_reference(dtype: torch.dtype, variant: str, threads: int) -> None:
    window, softcap, with_sinks = VARIANTS[variant]
    torch.manual_seed(5)
    for q_heads, kv_heads, head_dim, block_tokens in SHAPES:
        pool, table, lengths = paged(q_heads, kv_heads, head_dim, block_tokens, dtype)
        full = int(lengths[-1])
        cu_seqlens = torch.tensor([0, 1, 1, 151, 201], dtype=torch.int32)  # one query, none, a late chunk, a fresh one
        start = max(0, full - 150)
        late = torch.arange(start, start + 150).clamp(max=full - 1)
        fresh = torch.arange(50).clamp(max=full - 1)
        positions = torch.cat([torch.tensor([5]), late, fresh, torch.zeros(3, dtype=torch.long)])
        q = torch.randn(len(positions), q_heads, head_dim).to(dtype)
        sinks = torch.randn(q_heads) if with_sinks else None
        arguments = (q, pool[:, 0, 0], pool[:, 0, 1], cu_seqlens, positions, table, head_dim**-0.5)
        got = ops.paged_attention_prefill(*arguments, window=window, softcap=softcap, sinks=sinks)
        expected = reference.paged_attention_prefill(*arguments, window=window, softcap=softcap, sinks=sinks)
        assert_near(got, expected)
        assert not got[201:].any(), "padding rows are zeros"


def test_queries_and_pool_may_differ_in_dtype_and_queries_may_be_strided() -> None:
    torch.manual_seed(6)
    pool, table, lengths = paged(8, 2, 40, 16, torch.bfloat16)
    q = torch.randn(8, len(lengths), 40).transpose(0, 1)
    arguments = (q, pool[:, 0, 0], pool[:, 0, 1], table, lengths, 0.2)
    got = ops.paged_attention_decode(*arguments)
    assert got.dtype == torch.float32
    assert_near(got, reference.paged_attention_decode(*arguments))


def test_patched_linears_give_the_same_results_and_keep_their_weights() -> None:
    torch.manual_seed(8)
    first = nn.Linear(48, 96)
    model = nn.Sequential(first, nn.SiLU(), nn.Sequential(nn.Linear(96, 20, bias=False)))
    x = torch.randn(7, 48)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(x)
        assert kernels.patch_linears(model) == ["0", "2.0"]
        torch.testing.assert_close(model(x), before)
        first.weight, first.bias = nn.Parameter(torch.zeros(96, 48)), nn.Parameter(torch.zeros(96))
        assert not model(x).any(), "a replaced weight is used"
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 64])
def test_a_patched_bfloat16_linear_agrees_with_torch_whoever_multiplies(rows: int) -> None:
    torch.manual_seed(10)
    layer = nn.Linear(256, 96).bfloat16()
    x = torch.randn(rows, 256).bfloat16()
    with torch.inference_mode():
        before = layer(x)
        assert kernels.patch_linears(layer) == [""]
        assert_near(layer(x), before)


def test_patched_linears_still_train() -> None:
    linear = nn.Linear(8, 4)
    kernels.patch_linears(linear)
    linear(torch.randn(3, 8)).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_where_eager_code_rounds(dtype: torch.dtype, unit_offset: bool, threads: int) -> None:
    torch.manual_seed(9)
    for rows, width in [(1, 16), (3, 768), (100, 2048), (5, 100)]:
        x, w = torch.randn(rows, width).mul(5).to(dtype), torch.randn(width).to(dtype)
        got = ops.rms_norm(x, w, 1e-6, unit_offset=unit_offset)
        expected = reference.rms_norm(x, w, 1e-6, unit_offset=unit_offset)
        torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
        assert dtype == torch.float32 or (got == expected).float().mean() > 0.99, "a different rounding would show everywhere"


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_equals_eager_code_over_the_whole_range(dtype: torch.dtype, threads: int) -> None:
    gate = torch.linspace(-120, 120, 64 * 1024).view(64, 1024).to(dtype)
    up = torch.randn(64, 1024).to(dtype)
    got, expected = ops.silu_mul(gate, up), reference.silu_mul(gate, up)
    torch.testing.assert_close(got, expected, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_norms_and_mlps_are_patched_only_where_the_result_stays_the_same() -> None:
    llama: Any = transformers.models.llama.modeling_llama
    gemma: Any = transformers.models.gemma2.modeling_gemma2
    model = nn.ModuleDict(
        {
            "llama_norm": llama.LlamaRMSNorm(64),
            "gemma_norm": gemma.Gemma2RMSNorm(64),
            "layer_norm": nn.LayerNorm(64),
            "llama_mlp": llama.LlamaMLP(transformers.LlamaConfig(hidden_size=64, intermediate_size=96)),
            "gemma_mlp": gemma.Gemma2MLP(transformers.Gemma2Config(hidden_size=64, intermediate_size=96)),  # gelu
        }
    ).bfloat16()
    for name in ("llama_norm", "gemma_norm"):
        nn.init.normal_(model[name].get_parameter("weight"))
    x = torch.randn(5, 64).bfloat16()
    with torch.inference_mode():
        before = {name: module(x) for name, module in model.items()}
        assert kernels.patch_norms(model) == ["llama_norm", "gemma_norm"]
        assert kernels.patch_mlps(model) == ["llama_mlp"]
        for name, module in model.items():
            torch.testing.assert_close(module(x), before[name])

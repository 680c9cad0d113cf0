"""Typed calls of the compiled kernels; shapes and meanings are documented in `reference`.

What the kernels can't take (another dtype, a tensor that wants a gradient, an odd stride) goes to the reference, so every call
has an answer. Wrong shapes are our bug and are asserted. Block ids and lengths are trusted: the kernels read where the
table points.
"""

import ctypes
from typing import Final

import torch
from torch import Tensor

from services.worker.kernels import build, reference

KIND: Final = {torch.float32: 0, torch.bfloat16: 1}  # simd.h: F32, BF16
HEAD_DIM_MAX = 1024  # simd.h: ZEROS
GROUP = 16  # simd.h


class _Attention(ctypes.Structure):
    """attention.h: Attention."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("sequences", "q_heads", "kv_heads", "head_dim", "q_stride")),
        *((name, ctypes.c_long) for name in ("block_tokens", "block_stride", "token_stride", "head_stride", "table_stride")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "table", "out", "sinks")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_long),
        *((name, ctypes.c_int) for name in ("q_kind", "kv_kind", "threads")),
    )


BUILD: Final = build.load()
_linear = _decode = _prefill = _rms_norm = _silu_mul = None
if BUILD.library is not None:
    _linear, _decode, _prefill = (getattr(BUILD.library, f"penstock_{name}") for name in ("linear", "decode", "prefill"))
    _linear.argtypes = (ctypes.c_int, *(ctypes.c_long,) * 3, *(ctypes.c_void_p,) * 4, ctypes.c_int)
    _decode.argtypes = (ctypes.POINTER(_Attention), ctypes.c_void_p)
    _prefill.argtypes = (ctypes.POINTER(_Attention), ctypes.c_void_p, ctypes.c_void_p)
    _rms_norm, _silu_mul = BUILD.library.penstock_rms_norm, BUILD.library.penstock_silu_mul
    _rms_norm.argtypes = (
        *(ctypes.c_int,) * 2,
        *(ctypes.c_long,) * 2,
        *(ctypes.c_void_p,) * 2,
        ctypes.c_float,
        ctypes.c_void_p,
        ctypes.c_int,
    )
    _silu_mul.argtypes = (ctypes.c_int, *(ctypes.c_long,) * 2, *(ctypes.c_void_p,) * 3, ctypes.c_int)
    _linear.restype = _decode.restype = _prefill.restype = _rms_norm.restype = _silu_mul.restype = None


_threads: int | None = None


def set_threads(count: int | None) -> None:
    """How many threads the kernels use, the caller's included; `None` follows `torch.get_num_threads()`.

    Where several processes share the cores, give torch one thread and the kernels all of them: a loop of torch's OpenMP pool
    ends when every thread has arrived, which costs a scheduler slice (8-20 ms) whenever one is not running; a loop of ours
    ends when the work is done.
    """
    global _threads
    assert count is None or count > 0, f"{count} threads"
    _threads = count


def threads() -> int:
    """How many threads the kernels use now."""
    return _threads or torch.get_num_threads()


def available() -> bool:
    """Whether the compiled kernels are loaded; `BUILD.reason` says why or from where."""
    return BUILD.library is not None


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`; bfloat16 results are the float32 sums rounded once."""
    kind = KIND.get(x.dtype)
    if _linear is None or kind is None or w.dtype != x.dtype or not w.is_contiguous() or _wants_grad(x, w):
        return reference.linear(x, w, bias)
    n, k = w.shape
    assert x.shape[-1] == k, f"x {tuple(x.shape)} against w {tuple(w.shape)}"
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    bias_at = None
    if bias is not None:
        assert bias.dtype == x.dtype and bias.shape == (n,) and bias.is_contiguous(), f"bias {tuple(bias.shape)} {bias.dtype}"
        bias_at = bias.data_ptr()
    m = x.numel() // k
    _linear(kind, m, n, k, x.data_ptr(), w.data_ptr(), bias_at, y.data_ptr(), threads())
    return y


def rms_norm(x: Tensor, w: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """`reference.rms_norm`; compiled for widths that are whole groups of 16."""
    kind, n = KIND.get(x.dtype), x.shape[-1]
    if _rms_norm is None or kind is None or w.dtype != x.dtype or n % GROUP or not x.is_contiguous() or _wants_grad(x, w):
        return reference.rms_norm(x, w, eps, unit_offset=unit_offset)
    assert w.shape == (n,) and w.is_contiguous(), f"weight {tuple(w.shape)} for rows of {n}"
    y = torch.empty_like(x)
    _rms_norm(kind, unit_offset, x.numel() // n, n, x.data_ptr(), w.data_ptr(), eps, y.data_ptr(), threads())
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.silu_mul`; compiled for widths that are whole groups of 16."""
    kind, n = KIND.get(gate.dtype), gate.shape[-1]
    whole = n % GROUP == 0 and gate.is_contiguous() and up.is_contiguous()
    if _silu_mul is None or kind is None or up.dtype != gate.dtype or not whole or _wants_grad(gate, up):
        return reference.silu_mul(gate, up)
    assert gate.shape == up.shape, f"gate {tuple(gate.shape)}, up {tuple(up.shape)}"
    y = torch.empty_like(gate)
    _silu_mul(kind, gate.numel() // n, n, gate.data_ptr(), up.data_ptr(), y.data_ptr(), threads())
    return y


def paged_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`reference.paged_attention_decode`."""
    if _decode is None or not _attends(q, k, v):
        return reference.paged_attention_decode(
            q, k, v, block_table, context_lens, scale, window=window, softcap=softcap, sinks=sinks
        )
    assert block_table.shape[0] == context_lens.shape[0] == q.shape[0], "one table row and one length for each query"
    assert context_lens.dtype == torch.int32 and context_lens.is_contiguous()
    q, out, sinks, call = _call(q, k, v, block_table, scale, window, softcap, sinks)
    _decode(call, context_lens.data_ptr())
    return out


def paged_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    block_table: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`reference.paged_attention_prefill`; rows past the last bound hold zeros."""
    if _prefill is None or not _attends(q, k, v):
        return reference.paged_attention_prefill(
            q, k, v, cu_seqlens, positions, block_table, scale, window=window, softcap=softcap, sinks=sinks
        )
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous() and cu_seqlens.shape == (block_table.shape[0] + 1,)
    assert positions.shape == (q.shape[0],), f"positions {tuple(positions.shape)} for {q.shape[0]} queries"
    positions = positions.to(torch.int64).contiguous()
    q, out, sinks, call = _call(q, k, v, block_table, scale, window, softcap, sinks)
    out[int(cu_seqlens[-1]) :].zero_()
    _prefill(call, cu_seqlens.data_ptr(), positions.data_ptr())
    return out


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.dtype in KIND
        and k.dtype in KIND
        and v.dtype == k.dtype
        and k.stride() == v.stride()
        and k.stride(3) == 1
        and q.shape[2] <= HEAD_DIM_MAX
        and not _wants_grad(q, k, v)
    )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, _Attention]:
    """The tensors the call points into, which must outlive it, and the call."""
    queries, q_heads, head_dim = q.shape
    _, block_tokens, kv_heads, k_dim = k.shape
    assert head_dim == k_dim and k.shape == v.shape, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert q_heads % kv_heads == 0, f"{q_heads} query heads over {kv_heads} KV heads"
    assert block_table.dtype == torch.int32 and (block_table.stride(1) == 1 or block_table.shape[1] == 1)
    assert window is None or window > 0, f"window {window}"
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    if sinks is not None:
        assert sinks.shape == (q_heads,), f"sinks {tuple(sinks.shape)} for {q_heads} heads"
        sinks = sinks.detach().to(torch.float32).contiguous()
    out = torch.empty((queries, q_heads, head_dim), dtype=q.dtype)
    call = _Attention(
        block_table.shape[0], q_heads, kv_heads, head_dim, q.stride(0),
        block_tokens, k.stride(0), k.stride(1), k.stride(2), block_table.stride(0),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), block_table.data_ptr(), out.data_ptr(), None if sinks is None else sinks.data_ptr(),
        scale, softcap or 0.0, window or 0, KIND[q.dtype], KIND[k.dtype], threads(),
    )  # fmt: skip
    return q, out, sinks, call

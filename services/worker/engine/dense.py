"""Attention over keys and values that lie together. Pure, torch operations only."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scoring(NamedTuple):
    """How a layer weighs the keys that a query sees.

    Attributes:
        scale: of the scores.
        window: how many keys a query sees at most, its own included; None: all up to its own.
        softcap: scores are squeezed into [-softcap, softcap]; None: they aren't.
        sinks: `[q_heads]`, one extra logit each that takes weight and gives no value; None: there are none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def causal_mask(start: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys `[0, end)` each query at `[start, end)` sees: `[queries, keys]` bool."""
    query = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(end, device=device)[None, :]
    return key <= query if window is None else (key <= query) & (key > query - window)


def attention(
    query: Tensor,  # [batch, q_heads, queries, head_dim]
    key: Tensor,  # [batch, kv_heads, keys, head_dim]
    value: Tensor,
    mask: Tensor | None,  # of the keys that are seen, broadcastable to [batch, heads, queries, keys]; None is causal
    scoring: Scoring,
) -> Tensor:
    if scoring.softcap is None and scoring.sinks is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=grouped
        )
    assert mask is not None
    batch, q_heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped_query = query.reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped_query @ key.transpose(-1, -2)).view(batch, q_heads, queries, -1).float()
    weights = _weights(scores, mask, scoring)
    out = weights.to(value.dtype).view(batch, kv_heads, -1, weights.shape[-1]) @ value
    return out.view(batch, q_heads, queries, head_dim)


def spread_attention(
    query: Tensor,  # [rows, q_heads, head_dim]
    key: Tensor,  # [rows, keys, kv_heads, head_dim]
    value: Tensor,
    mask: Tensor,  # [rows, keys] of the keys that are seen
    scoring: Scoring,
) -> Tensor:
    """One query of each row, `[rows, q_heads, head_dim]`; for devices that multiply faster than they read.

    A query lies in its KV head's place in a row of zeros that is as wide as all KV heads together: so every key and value is read once, as
    it lies. Taking the heads apart copies them, and `scaled_dot_product_attention` with a mask repeats them for every query head.
    """
    rows, q_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    own = torch.eye(kv_heads, dtype=query.dtype, device=query.device)[None, :, None, :, None]
    grouped = query.view(rows, kv_heads, -1, 1, head_dim)
    spread = (grouped * own).view(rows, q_heads, kv_heads * head_dim)
    scores = _product(spread, key.flatten(2).transpose(1, 2))
    weights = _weights(scores[:, :, None], mask[:, None, None], scoring)[:, :, 0].to(value.dtype)
    out = (weights @ value.flatten(2)).view(rows, kv_heads, -1, kv_heads, head_dim)
    return out.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(rows, q_heads, head_dim)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of two batches of matrices, float32; on CUDA without the rounding in between."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right).float()


def _weights(scores: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Of scores `[batch, q_heads, queries, keys]`, float32, that aren't scaled yet."""
    scores = scores * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if scoring.sinks is None:
        return scores.softmax(dim=-1)
    batch, q_heads, queries, _ = scores.shape
    extra = scoring.sinks.float().view(1, -1, 1, 1).expand(batch, q_heads, queries, 1)
    return torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]

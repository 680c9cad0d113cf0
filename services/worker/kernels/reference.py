"""Pure-torch meaning of every kernel: the fallback where no C compiler is found, and the tests' oracle.

Conventions shared by all attention operations here and in `ops`:

- `k`, `v`: one layer's views of the pool, each `[block, token, kv_head, head_dim]`, strided in `block`
  (`pool[:, layer, 0]` and `pool[:, layer, 1]`); the keys of the current step are already written.
- `block_table`: `[sequence, blocks_max]` int32; entry `i` holds keys `[i * block_tokens, (i + 1) * block_tokens)`.
  Entries past a sequence's last key are never read.
- A query at position `p` sees keys `[0, p]`, or `[p - window + 1, p]` with a window.
- Scores are `q.k * scale`, then `softcap * tanh(score / softcap)`; `sinks` is one extra logit for each query head
  that takes weight in the softmax and adds no value (GPT-OSS).
- Mathematics is float32 throughout; the result has the queries' dtype.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias`: x `[..., K]`, w `[N, K]`, bias `[N]` -> `[..., N]`, all of one dtype."""
    return F.linear(x, w, bias)


def rms_norm(x: Tensor, w: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm over the last dimension, rounded where transformers' modules round.

    `w * (x / rms)`, or with `unit_offset` Gemma's `(1 + w) * (x / rms)`.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + w.float())).to(x.dtype) if unit_offset else w * normed.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, the middle of a gated MLP."""
    return F.silu(gate) * up


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
    """One query for each sequence, at position `context_lens - 1`.

    Args:
        q: `[B, q_heads, head_dim]`.
        k, v, block_table: see the module; the table is `[B, blocks_max]`.
        context_lens: `[B]` int32, keys visible to each query, its own included; 0 marks a padding row.

    Returns:
        `[B, q_heads, head_dim]`; zeros for padding rows.
    """
    out = torch.zeros_like(q)
    for row, length in enumerate(context_lens.tolist()):
        if length:
            position = torch.tensor([length - 1])
            out[row] = _attend(q[row : row + 1], k, v, block_table[row], position, scale, window, softcap, sinks)[0]
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
    """A ragged batch of queries: sequence `s` owns rows `[cu_seqlens[s], cu_seqlens[s + 1])` of `q`.

    Args:
        q: `[T, q_heads, head_dim]`.
        k, v, block_table: see the module; the table is `[S, blocks_max]`.
        cu_seqlens: `[S + 1]` int32, from 0 to at most T; rows past the last bound are padding.
        positions: `[T]` int32, the position of every query in its own sequence.

    Returns:
        `[T, q_heads, head_dim]`; zeros for padding rows.
    """
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            out[start:end] = _attend(
                q[start:end], k, v, block_table[sequence], positions[start:end], scale, window, softcap, sinks
            )
    return out


def gather(pages: Tensor, block_ids: Tensor, tokens: int) -> Tensor:
    """The first `tokens` keys or values of one sequence, `[tokens, kv_head, head_dim]`, copied out of the pool."""
    blocks = -(-tokens // pages.shape[1])
    return pages[block_ids[:blocks].long()].flatten(0, 1)[:tokens]


def _attend(
    q: Tensor,  # [queries, q_heads, head_dim]
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,  # [blocks_max]
    positions: Tensor,  # [queries]
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    tokens = int(positions.max()) + 1
    keys, values = gather(k, block_ids, tokens).float(), gather(v, block_ids, tokens).float()
    query_index, key_index = positions.long()[:, None], torch.arange(tokens)[None, :]
    visible = key_index <= query_index
    if window is not None:
        visible &= key_index > query_index - window
    if softcap is None and sinks is None:
        return _sdpa(q, keys, values, visible, scale)
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink_logits = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
        weights = torch.cat([scores, sink_logits], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    queries, keys, values = (tensor.float().transpose(0, 1)[None] for tensor in (q, keys, values))
    grouped = queries.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1).to(q.dtype)

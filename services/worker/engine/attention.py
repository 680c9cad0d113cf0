"""The one attention function that all models call, over the paged pool.

`register()` makes it known to `transformers` as the attention implementation `penstock`. No mask
function is registered under that name, so models build no masks. A forward pass hands its `paging`
object down to every layer as a keyword argument; there the layer's keys and values are written to the
pool, then each row attends to the keys of its own sequence.

`TorchAttention` is the device-neutral way to do that: gather the pages, then attend to what lies together (dense.py).
`KernelAttention` calls the compiled kernels, which read the pages in place.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from services.worker.engine.batch import StepInput
from services.worker.engine.dense import Scoring, attention, causal_mask, spread_attention

NAME = "penstock"


class Paging(Protocol):
    """What `paging=` may be: the engine's step, or the probe that looks at a model when it is loaded."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """query `[1, q_heads, tokens, head_dim]`, key and value `[1, kv_heads, tokens, head_dim]` ->
        `[1, tokens, q_heads, head_dim]`."""
        ...


def register() -> None:
    AttentionInterface.register(NAME, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paging: Paging,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, sliding_window, softcap, s_aux)
    return paging.attend(module.layer_idx, query, key, value, scoring), None  # type: ignore[arg-type]


class PagedAttention(Paging, Protocol):
    """A way to attend over one pool."""

    def begin(self, step: StepInput) -> Paging:
        """The paging object of the next forward pass."""
        ...


def layers_of(pool: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer the pages of k and v, each `[block, token, kv_head, head_dim]`, strided in block."""
    return [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(pool.shape[1])]


def attention_over(pool: Tensor, kernels: bool) -> PagedAttention:
    """The way to attend over a pool `[block, layer, k|v, token, kv_head, head_dim]`, strided in block."""
    return KernelAttention(pool) if kernels else TorchAttention(pool)


class KernelAttention:
    """Writes a step's KV to the pool and attends with the compiled CPU kernels, which read the pages in place."""

    def __init__(self, pool: Tensor) -> None:
        # Imported where it is wanted: the import compiles.
        from services.worker.kernels import paged_attention_decode, paged_attention_prefill

        self._decode, self._prefill = paged_attention_decode, paged_attention_prefill
        self._layers = layers_of(pool)
        self._step: StepInput | None = None

    def begin(self, step: StepInput) -> "KernelAttention":
        self._step = step
        return self

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        step = self._step
        assert step is not None
        k, v = self._layers[layer]
        place = (step.block_ids, step.offsets)
        k.index_put_(place, key[0].transpose(0, 1))
        v.index_put_(place, value[0].transpose(0, 1))
        queries, decodes = query[0].transpose(0, 1), step.decodes
        scale, window, softcap, sinks = scoring
        out = []
        if decodes:
            tables, lengths = step.tables[:decodes], step.context_lens
            rows = queries[:decodes]
            out.append(self._decode(rows, k, v, tables, lengths, scale, window=window, softcap=softcap, sinks=sinks))
        if decodes < step.tokens:
            rows, tables, place = queries[decodes:], step.tables[decodes:], (step.cu_seqlens, step.positions)
            out.append(self._prefill(rows, k, v, *place, tables, scale, window=window, softcap=softcap, sinks=sinks))
        return (out[0] if len(out) == 1 else torch.cat(out))[None]


class TorchAttention:
    """Writes a step's KV to the pool and attends, with torch operations only."""

    def __init__(self, pool: Tensor) -> None:
        self._layers = layers_of(pool)
        self._step: StepInput | None = None
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def begin(self, step: StepInput) -> "TorchAttention":
        self._step = step
        self._masks = {}
        return self

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        step = self._step
        assert step is not None
        keys, values = self._layers[layer]
        place = (step.block_ids, step.offsets)
        keys.index_put_(place, key[0].transpose(0, 1))
        values.index_put_(place, value[0].transpose(0, 1))
        parts = []
        if step.decodes:
            parts.append(self._decode(step, query[0, :, : step.decodes], keys, values, scoring))
        for index, start in enumerate(step.starts):
            rows = slice(step.decodes + step.bounds[index], step.decodes + step.bounds[index + 1])
            own = (key[:, :, rows], value[:, :, rows]) if start == 0 else None
            parts.append(self._prefill(step, index, query[:, :, rows], keys, values, own, scoring))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _decode(
        self,
        step: StepInput,
        query: Tensor,  # [q_heads, rows, head_dim]
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        window = scoring.window
        tables = step.tables[: step.decodes]
        key, value = (pages[tables].flatten(1, 2) for pages in (keys, values))
        mask = self._masks.get((-1, window))
        if mask is None:
            index = torch.arange(key.shape[1], device=key.device)[None, :]
            lengths = step.context_lens[:, None]
            mask = index < lengths if window is None else (index < lengths) & (index >= lengths - window)
            self._masks[-1, window] = mask
        queries = query.transpose(0, 1)
        if query.is_cuda:
            return spread_attention(queries, key, value, mask, scoring)
        out = attention(queries[:, :, None], key.transpose(1, 2), value.transpose(1, 2), mask[:, None, None, :], scoring)
        return out[:, :, 0]

    def _prefill(
        self,
        step: StepInput,
        index: int,
        query: Tensor,  # [1, q_heads, rows, head_dim]
        keys: Tensor,
        values: Tensor,
        own: tuple[Tensor, Tensor] | None,
        scoring: Scoring,
    ) -> Tensor:
        start, rows = step.starts[index], query.shape[2]
        end = start + rows
        if own is None:
            table = step.tables[step.decodes + index, : -(-end // keys.shape[1])]
            key, value = (pages[table].flatten(0, 1)[:end].transpose(0, 1)[None] for pages in (keys, values))
        else:
            key, value = own
        windowed = scoring.window if scoring.window is not None and scoring.window < end else None
        plain = windowed is None and scoring.softcap is None and scoring.sinks is None
        mask: Tensor | None = None
        if start and query.is_cuda and plain:
            # Flash attention as it is: others would first look for a way through every new shape.
            mask = causal_lower_right(rows, end)
        elif start or not plain:
            mask = self._masks.get((index, windowed))
            if mask is None:
                mask = self._masks[index, windowed] = causal_mask(start, end, windowed, key.device)
        return attention(query, key, value, mask, scoring)[0].transpose(0, 1)

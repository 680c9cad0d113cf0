"""Attention over the stage, one layer at a time, with a gate before and after each layer.

`InPlace` is for a model in host memory (for others: ring.py): the stage is viewed as the pool `[slot, layer, k|v, token, kv_head, head_dim]`, strided in slot,
and the attention functions read and write it where it lies. Nothing is copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from services.worker.codec import DTYPES
from services.worker.engine.attention import PagedAttention, Paging, attention_over
from services.worker.engine.batch import StepInput
from services.worker.engine.dense import Scoring
from services.worker.model import LoadedModel
from services.worker.stage import Stage


class Gate(Protocol):
    """What a step does around each layer, on the engine's thread."""

    def before(self, layer: int) -> None:
        """Returns when the layer's KV of the step's prefixes is in the stage, as far as it will come."""
        ...

    def after(self, layer: int) -> None:
        """The layer's KV of the step's own tokens is in the stage."""
        ...


class Layerwise(PagedAttention, Protocol):
    """A way to attend over a stage."""

    def through(self, gate: Gate) -> AbstractContextManager[None]:
        """The next forward pass goes through this gate."""
        ...

    def scrub(self, slots: Sequence[int]) -> None:
        """Zeroes slots: they hold values that are not finite."""
        ...


def stage_tensor(stage: Stage, model: LoadedModel) -> Tensor:
    """All slots of a stage: `[slot, layer, k|v, token, kv_head, head_dim]` of the KV dtype, in host memory, shared."""
    layout = model.layout
    dtype = DTYPES[layout.dtype]
    flat = torch.frombuffer(stage.memory(), dtype=dtype)
    shape = (stage.slots_total, layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    inner = torch.empty(shape[1:], device="meta").stride()
    return flat.as_strided(shape, (stage.bytes_between_slots // dtype.itemsize, *inner))


class InPlace:
    """Attends where the stage lies, in host memory."""

    def __init__(self, stage: Stage, model: LoadedModel) -> None:
        self._slots = stage_tensor(stage, model)
        self._inner = attention_over(self._slots, model.kernels)
        self._paging: Paging | None = None
        self._gate: Gate | None = None

    @contextmanager
    def through(self, gate: Gate) -> Iterator[None]:
        self._gate = gate
        try:
            yield
        finally:
            self._gate, self._paging = None, None

    def begin(self, step: StepInput) -> Paging:
        self._paging = self._inner.begin(step)
        return self

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        assert self._gate is not None and self._paging is not None
        self._gate.before(layer)
        out = self._paging.attend(layer, query, key, value, scoring)
        self._gate.after(layer)
        return out

    def scrub(self, slots: Sequence[int]) -> None:
        self._slots[list(slots)] = 0

"""Attention on a device whose memory holds a few layers of a step's KV at a time; all layers lie in the stage, in host memory.

The model's layers are taken in groups. Two buffers on the device take turns, each `[block, layer of the group, k|v, token,
kv_head, head_dim]` for the blocks of the step, numbered anew from 0:

1. At a group's first layer: the group's layers of the prefixes are gathered from the stage, when they are there.
2. Each layer attends in the buffer, as it would in a pool.
3. After each layer: what was computed is scattered to the stage, and announced when it is there.

On CUDA the device reads and writes the stage itself, one launch for the blocks of a chunk: a copy for each would keep the host
busy for longer than the bytes take. That goes on in streams of its own beside the compute: the host runs ahead, so the next
group comes in and the last one leaves while this one is computed. A buffer is written again only when everything that was in
it has left.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.errors import Internal
from services.prefill.layerwise import Gate, stage_tensor
from services.worker.engine.attention import PagedAttention, Paging, attention_over
from services.worker.engine.batch import StepInput
from services.worker.engine.dense import Scoring
from services.worker.model import LoadedModel
from services.worker.pinned import pin
from services.worker.stage import Stage

LAYERS_PER_GROUP = 4
BUFFERS = 2

Piece = tuple[Tensor, Tensor, Tensor]  # what is written, what is read, and which slots of the stage it is about


class Ring:
    """`Layerwise` (services/prefill/layerwise.py) for a device that is not the host."""

    def __init__(self, stage: Stage, model: LoadedModel, *, layers_per_group: int = LAYERS_PER_GROUP) -> None:
        self._host = stage_tensor(stage, model)
        self._words = _words(self._host)  # as the device sees the stage
        self._kernels = model.kernels
        self._device = model.device
        self._layers = model.layout.layers
        self._group = min(layers_per_group, self._layers)
        self._copies = _Copies(model.device)
        if model.device.type == "cuda":
            pin(stage, self)
            self._words = _on_device(self._words, model.device)
        self._buffers: list[Tensor] = []
        self._inner: list[PagedAttention] = []
        self._paging: list[Paging] = []
        self._blocks: _Blocks | None = None
        self._gate: Gate | None = None

    @contextmanager
    def through(self, gate: Gate) -> Iterator[None]:
        self._gate = gate
        try:
            yield
            self._copies.told_all(gate.after)
        finally:
            self._copies.settle()
            self._gate, self._blocks = None, None

    def begin(self, step: StepInput) -> Paging:
        blocks = self._blocks = _Blocks(step)
        self._reserve(blocks.count)
        self._copies.follow()
        renumbered = blocks.renumbered(step)
        self._paging = [inner.begin(renumbered) for inner in self._inner]
        return self

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        assert self._gate is not None and self._blocks is not None
        turn = layer // self._group % BUFFERS
        place, buffer = layer % self._group, self._buffers[turn]
        if not place:
            last = min(layer + self._group, self._layers)
            self._gate.before(last - 1)
            self._copies.bring(turn, self._pieces_in(buffer, layer, last), [buffer[block] for block in self._blocks.partial])
        out = self._paging[turn].attend(place, query, key, value, scoring)
        self._copies.take_away(turn, layer, self._pieces_out(buffer, place, layer))
        self._copies.told(self._gate.after)
        return out

    def scrub(self, slots: Sequence[int]) -> None:
        self._host[list(slots)] = 0

    def _pieces_in(self, buffer: Tensor, first: int, last: int) -> Iterator[Piece]:
        """Into the buffer, from the stage, which blocks of it."""
        assert self._blocks is not None
        words = _words(buffer)
        for blocks, slots in self._blocks.prefixes:
            yield words[blocks, : last - first], self._words[:, first:last], slots

    def _pieces_out(self, buffer: Tensor, place: int, layer: int) -> Iterator[Piece]:
        """Into the stage, from the buffer, which blocks of the stage."""
        assert self._blocks is not None
        words = _words(buffer)
        for blocks, slots in self._blocks.own:
            yield self._words[:, layer], words[blocks, place], slots

    def _reserve(self, blocks: int) -> None:
        """Buffers for so many blocks; they only grow, between steps."""
        if self._buffers and self._buffers[0].shape[0] >= blocks:
            return
        self._buffers, self._inner = [], []  # given back before more is taken
        shape = (blocks, self._group, *self._host.shape[2:])
        try:
            self._buffers = [torch.zeros(shape, dtype=self._host.dtype, device=self._device) for _ in range(BUFFERS)]
        except torch.cuda.OutOfMemoryError as error:
            raise Internal(f"no device memory for {BUFFERS} x {self._group} layers of {blocks} blocks: {error}") from error
        self._inner = [attention_over(buffer, self._kernels) for buffer in self._buffers]


class _Blocks:
    """The blocks of a step, numbered from 0, those of each of its chunks in a row.

    Attributes:
        count: of them.
        prefixes, own: for each chunk, the numbers of blocks that are read, and of those that are computed, with their stage slots.
        partial: numbers of blocks that the step does not fill; past what it computes they leave as zeros.
    """

    def __init__(self, step: StepInput) -> None:
        block_tokens, device = step.block_tokens, step.tables.device
        self.count = 0
        self.prefixes: list[tuple[slice, Tensor]] = []
        self.own: list[tuple[slice, Tensor]] = []
        self.partial: list[int] = []
        self._tables = np.zeros(tuple(step.tables.shape), dtype=np.int32)
        block_ids: list[np.ndarray] = []
        for row, chunk in enumerate(step.chunks):
            base, first, last = self.count, chunk.start // block_tokens, -(-chunk.end // block_tokens)
            slots = torch.tensor(chunk.sequence.blocks[:last], dtype=torch.int64).to(device, non_blocking=True)
            self.count += last
            if first:
                self.prefixes.append((slice(base, base + first), slots[:first]))
            self.own.append((slice(base + first, base + last), slots[first:]))
            if chunk.end % block_tokens:
                self.partial.append(base + last - 1)
            self._tables[row, :last] = np.arange(base, base + last)
            block_ids.append(base + np.arange(chunk.start, chunk.end) // block_tokens)
        self._block_ids = np.concatenate(block_ids)

    def renumbered(self, step: StepInput) -> StepInput:
        """The step, over a buffer of just these blocks instead of the stage."""
        tables, block_ids = torch.from_numpy(self._tables), torch.from_numpy(self._block_ids)
        device = step.tables.device
        return replace(step, tables=tables.to(device, non_blocking=True), block_ids=block_ids.to(device, non_blocking=True))


class _Copies:
    """Copies between host and device beside the compute; on a device without streams they are done at once."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._in: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None
        self._out: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None
        self._left: list[torch.cuda.Event | None] = [None] * BUFFERS  # when what was last in a buffer has left it
        self._leaving: deque[tuple[torch.cuda.Event | None, int]] = deque()  # layers on their way out

    def follow(self) -> None:
        """What comes in from here on comes after all that was asked of the device so far."""
        if self._in is not None:
            self._in.wait_event(torch.cuda.current_stream().record_event())

    def bring(self, turn: int, pieces: Iterable[Piece], zeroed: Sequence[Tensor]) -> None:
        """Copies into a buffer; the compute that follows waits for it."""
        left = self._left[turn]
        with torch.cuda.stream(self._in) if self._in is not None else nullcontext():
            if self._in is not None and left is not None:
                self._in.wait_event(left)
            for into, stage, slots in pieces:
                torch.index_select(stage, 0, slots, out=into)
            for block in zeroed:
                block.zero_()
        if self._in is not None:
            torch.cuda.current_stream().wait_event(self._in.record_event())

    def take_away(self, turn: int, layer: int, pieces: Iterable[Piece]) -> None:
        """Copies a layer to the host, after the compute so far."""
        if self._out is not None:
            self._out.wait_event(torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self._out) if self._out is not None else nullcontext():
            for stage, source, slots in pieces:
                stage.index_copy_(0, slots, source)
        self._left[turn] = self._out.record_event() if self._out is not None else None
        self._leaving.append((self._left[turn], layer))

    def told(self, tell: Callable[[int], None]) -> None:
        """Tells of the layers that have left by now."""
        while self._leaving and (self._leaving[0][0] is None or self._leaving[0][0].query()):
            tell(self._leaving.popleft()[1])

    def told_all(self, tell: Callable[[int], None]) -> None:
        """Tells of each layer that is still leaving, when it has."""
        while self._leaving:
            event, layer = self._leaving.popleft()
            if event is not None:
                event.synchronize()
            tell(layer)

    def settle(self) -> None:
        """Nothing moves any more: the stage may be given back."""
        self._leaving.clear()
        for stream in (self._in, self._out):
            if stream is not None:
                stream.synchronize()


def _words(blocks: Tensor) -> Tensor:
    """Blocks `[block, layer, k|v, token, kv_head, head_dim]`, strided in block, as `[block, layer, words]`: what moves is no number."""
    return blocks.flatten(2).view(torch.int64)


class _Mapped:
    """Pinned host memory as the device addresses it, the same as the host does (CUDA's unified addressing)."""

    def __init__(self, words: Tensor) -> None:
        strides = tuple(stride * words.element_size() for stride in words.stride())
        self.__cuda_array_interface__ = {
            "data": (words.data_ptr(), False), "shape": tuple(words.shape), "strides": strides, "typestr": "<i8", "version": 3,
        }  # fmt: skip


def _on_device(words: Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(_Mapped(words), device=device)

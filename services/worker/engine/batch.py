"""One step's input: the tokens of all its sequences laid end to end, and where their KV lives.

Made once per step and shared by every layer. Sequences that bring one token come first (`decodes` of
them, a rectangular problem), longer chunks follow (a ragged one):

    rows      [0 .. decodes)          one token of one sequence each
    rows      [decodes .. tokens)     chunks; chunk i owns [bounds[i], bounds[i + 1]) counted from `decodes`
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.worker.engine.scheduler import Chunk
from services.worker.engine.sequence import Sequence

INDEX_DTYPE = torch.int32


@dataclass(slots=True)
class StepInput:
    """Attributes:
    chunks: in row order.
    input_ids, position_ids: `[1, tokens]` int64.
    block_ids, offsets: `[tokens]` int64, the pool block and the token inside it that takes each row's KV.
    tables: `[sequences, blocks_max]` int32, in row order; entries past a sequence's blocks are 0.
    context_lens: `[decodes]` int32, keys each decode row sees, its own included.
    bounds: chunk row bounds, starting at 0, on the host; `cu_seqlens` is the same as `[chunks + 1]` int32.
    starts: position of each chunk's first token, on the host.
    positions: `[tokens - decodes]` int64, of the chunks' rows.
    sample_rows: `[samples]` int64, rows whose logits are wanted; `sampling` are their sequences.
    """

    chunks: list[Chunk]
    decodes: int
    tokens: int
    input_ids: Tensor
    position_ids: Tensor
    block_ids: Tensor
    offsets: Tensor
    tables: Tensor
    context_lens: Tensor
    context_max: int
    bounds: list[int]
    starts: list[int]
    cu_seqlens: Tensor
    positions: Tensor
    sample_rows: Tensor
    sampling: list[Sequence]
    block_tokens: int


class StepTables:
    """Block tables of the running sequences, kept from step to step: one row each, extended as blocks are added."""

    def __init__(self, sequences_max: int, blocks_max: int, block_tokens: int, device: torch.device) -> None:
        self._tables = np.zeros((sequences_max, blocks_max), dtype=np.int32)
        self._free_rows = list(range(sequences_max - 1, -1, -1))
        self._block_tokens = block_tokens
        self._device = device

    def forget(self, sequence: Sequence) -> None:
        """The sequence left the batch."""
        if sequence.row is not None:
            self._free_rows.append(sequence.row)
            sequence.row, sequence.row_blocks = None, 0

    def build(self, chunks: list[Chunk]) -> StepInput:
        chunks = sorted(chunks, key=lambda chunk: chunk.end - chunk.start > 1)  # stable: decodes first
        rows = [self._row(chunk.sequence) for chunk in chunks]
        lengths = [chunk.end - chunk.start for chunk in chunks]
        decodes = sum(1 for length in lengths if length == 1)
        tokens = sum(lengths)
        ends = np.cumsum(lengths)
        context_max = max(chunk.end for chunk in chunks)
        ids = [token for chunk in chunks for token in chunk.sequence.tokens[chunk.start : chunk.end]]
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        blocks_max = -(-context_max // self._block_tokens)
        tables = self._tables[rows, :blocks_max]
        sequence_of_row = np.repeat(np.arange(len(chunks)), lengths)
        bounds = [0, *(int(end) - decodes for end in ends[decodes:])]
        return StepInput(
            chunks=chunks,
            decodes=decodes,
            tokens=tokens,
            input_ids=self._tensor(np.array([ids], dtype=np.int64)),
            position_ids=self._tensor(positions[None]),
            block_ids=self._tensor(tables[sequence_of_row, positions // self._block_tokens].astype(np.int64)),
            offsets=self._tensor(positions % self._block_tokens),
            tables=self._tensor(tables),
            context_lens=self._tensor((positions[:decodes] + 1).astype(np.int32)),
            context_max=context_max,
            bounds=bounds,
            starts=[chunk.start for chunk in chunks[decodes:]],
            cu_seqlens=self._tensor(np.array(bounds, dtype=np.int32)),
            positions=self._tensor(positions[decodes:]),
            sample_rows=self._tensor(np.array([ends[i] - 1 for i, c in enumerate(chunks) if c.samples], dtype=np.int64)),
            sampling=[chunk.sequence for chunk in chunks if chunk.samples],
            block_tokens=self._block_tokens,
        )

    def _row(self, sequence: Sequence) -> int:
        if sequence.row is None:
            sequence.row = self._free_rows.pop()
            self._tables[sequence.row] = 0
        if sequence.row_blocks < len(sequence.blocks):
            self._tables[sequence.row, sequence.row_blocks : len(sequence.blocks)] = sequence.blocks[sequence.row_blocks :]
            sequence.row_blocks = len(sequence.blocks)
        return sequence.row

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)

    def check_integrity(self, running: list[Sequence]) -> None:
        rows = [sequence.row for sequence in running if sequence.row is not None]
        assert len(set(rows)) == len(rows) and sorted(rows + self._free_rows) == list(range(len(self._tables)))

"""One forward pass over a step's tokens, and the samples it yields."""

from torch import Tensor

from services.worker.engine.attention import PagedAttention
from services.worker.engine.batch import StepInput, StepTables
from services.worker.engine.sampling import Sampled, sample
from services.worker.engine.scheduler import Chunk
from services.worker.engine.sequence import Sequence
from services.worker.model import LoadedModel


class Forward:
    """The model, the way it attends over the pool, and the block tables of the running sequences."""

    def __init__(self, model: LoadedModel, attention: PagedAttention, sequences_max: int, blocks_max: int) -> None:
        self._model = model.model
        self._attention = attention
        self._tables = StepTables(sequences_max, blocks_max, model.layout.block_tokens, model.device)

    def run(self, chunks: list[Chunk]) -> dict[str, Sampled]:
        """Computes the chunks' KV; the outcome for each sequence whose last token was among them, by id."""
        step = self._tables.build(chunks)
        if not step.sampling:
            self._fill(step)
            return {}
        sampled = sample(self._logits(step), step.sampling)
        return {sequence.id: row for sequence, row in zip(step.sampling, sampled, strict=True)}

    def _logits(self, step: StepInput) -> Tensor:
        """Logits of the step's `sample_rows`, `[samples, vocab]`."""
        logits: Tensor = self._model(
            input_ids=step.input_ids,
            position_ids=step.position_ids,
            use_cache=False,
            logits_to_keep=step.sample_rows,
            paging=self._attention.begin(step),
        ).logits
        return logits[0]

    def _fill(self, step: StepInput) -> None:
        """A step that only makes KV needs no logits."""
        self._model.base_model(
            input_ids=step.input_ids, position_ids=step.position_ids, use_cache=False, paging=self._attention.begin(step)
        )

    def forget(self, sequence: Sequence) -> None:
        """The sequence left the batch."""
        self._tables.forget(sequence)

    def check_integrity(self, running: list[Sequence]) -> None:
        self._tables.check_integrity(running)

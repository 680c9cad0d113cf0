"""Runs an engine to its end and collects what each sequence got."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from common.errors import PenstockError
from common.generation import FinishReason, Sampling, Token
from services.worker.engine.engine import Engine
from services.worker.engine.types import LoadedKv, NewSequence, SequenceStep, StepResult
from services.worker.model import LoadedModel
from tests.families import EOS

STEPS_MAX = 5000


@dataclass
class Outcome:
    tokens: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: PenstockError | None = None
    preemptions: int = 0
    steps: list[SequenceStep] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def take(self, step: SequenceStep) -> None:
        assert self.finish is None, f"{step.id}: a step after the finish"
        self.steps.append(step)
        self.tokens += step.tokens
        self.finish, self.stop_token, self.error = step.finish, step.stop_token, step.error
        self.preemptions += step.preempted


def make_engine(model: LoadedModel, *, pool_blocks: int = 0, **options: Any) -> Engine:
    return Engine(model, pool_bytes=pool_blocks * model.layout.bytes_per_block or 64 << 20, **options)


def greedy(max_tokens: int, **changes: Any) -> Sampling:
    return Sampling(**{"max_tokens": max_tokens, "temperature": 0.0, "eos_token_ids": (EOS,)} | changes)


def new(id: str, prompt: list[int], sampling: Sampling, **changes: Any) -> NewSequence:
    return NewSequence(id, prompt, sampling, **changes)


def collect(result: StepResult, outcomes: dict[str, Outcome]) -> None:
    for step in result.sequences:
        outcomes.setdefault(step.id, Outcome()).take(step)


def run(engine: Engine, sequences: Iterable[NewSequence] = (), *, check: bool = True) -> dict[str, Outcome]:
    """Adds sequences and steps until nothing is left; integrity is checked after every step."""
    for sequence in sequences:
        engine.add(sequence)
    outcomes: dict[str, Outcome] = {}
    for _ in range(STEPS_MAX):
        if engine.idle:
            break
        collect(engine.step(), outcomes)
        if check:
            engine.check_integrity()
    assert engine.idle, "the engine did not come to an end"
    return outcomes


def run_one(engine: Engine, prompt: list[int], sampling: Sampling, **changes: Any) -> Outcome:
    return run(engine, [new("one", prompt, sampling, **changes)])["one"]


def exported_kv(engine: Engine, sequence_id: str, tokens: int, copied: list[int] | None = None) -> LoadedKv:
    """KV of a sequence's leading tokens as records; `copied` counts the calls of `on_copied`."""
    layout = engine.layout
    blocks = -(-tokens // layout.block_tokens)
    buffers = [memoryview(bytearray(layout.bytes_per_block)) for _ in range(blocks)]
    engine.export(sequence_id, 0, blocks, buffers)
    return LoadedKv(tokens, buffers, lambda: copied.append(1) if copied is not None else None)

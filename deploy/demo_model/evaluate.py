"""Held-out loss, and samples: what the model card says of a trained model."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from deploy.demo_model import dataset as data

ROW_TOKENS = 2048
BATCH_TOKENS = 16_384
POSITIONS = (512, 1024, 2048, 4096, 8192)
REPEAT_TOKENS, REPEAT_PASSAGES_MAX = 1024, 16
PROMPTS = (
    'def add(a, b):\n    """Return the sum of a and b."""\n',
    "Write a Python function called `read_lines` that returns the lines of a text file.",
    'Implement this function:\n\ndef is_empty(self):\n    """Return True if the queue is empty, False otherwise."""\n',
    "Write a Python function `clamp(value, low, high)` that returns value limited to the range from low to high.",
    "Write a method of the class `Stack` `push(self, item)`: Add an item to the top of the stack.",
)


class Score(NamedTuple):
    tokens: int
    nats: float  # summed over the tokens
    bytes_per_token: float

    @property
    def loss(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token


def score(
    model: torch.nn.Module, dataset: data.Dataset, kind: int, autocast: AbstractContextManager[Any], rows_max: int = 1_000_000
) -> Score:
    """Loss over the held-out documents of one kind, packed as in training into rows of 2,048 tokens, always the same rows.

    Where there is not one row of them, a score of no tokens and no loss.
    """
    documents = dataset.select(held_out=True, kind=kind)
    packed = _first(data.rows(dataset, documents, ROW_TOKENS, Random(0)), rows_max)
    if not packed:
        return Score(0, 0.0, 1.0)
    losses = _token_losses(model, packed, autocast)
    bytes_per_token = sum(int(dataset.text_bytes[index]) for index in documents) / max(1, dataset.count_tokens(documents))
    return Score(losses.numel(), float(losses.sum()), bytes_per_token)


def loss_by_position(
    model: torch.nn.Module, dataset: data.Dataset, autocast: AbstractContextManager[Any]
) -> list[tuple[int, float]]:
    """(position bound, mean loss since the bound before) over held-out files at least as long as the whole context."""
    documents = [index for index in dataset.select(held_out=True) if len(dataset.document(index)) >= POSITIONS[-1]]
    packed = [dataset.document(index)[: POSITIONS[-1]] for index in documents if dataset.kinds[index] != data.CHAT]
    if not packed:
        return []
    losses = _token_losses(model, packed, autocast)  # [row, position]
    starts = (0, *POSITIONS[:-1])
    return [(end, float(losses[:, start:end].mean())) for start, end in zip(starts, POSITIONS, strict=True)]


def loss_of_a_repeat(
    model: torch.nn.Module, dataset: data.Dataset, autocast: AbstractContextManager[Any]
) -> tuple[float, float] | None:
    """Mean loss of held-out passages, and of the same passages when they come again right after: far less, if the model copies."""
    documents = [index for kind in (data.LIBRARY, data.TEST) for index in dataset.select(held_out=True, kind=kind)]
    long_enough = [dataset.document(index) for index in documents if len(dataset.document(index)) >= REPEAT_TOKENS]
    packed = [np.tile(document[:REPEAT_TOKENS], 2) for document in long_enough[:REPEAT_PASSAGES_MAX]]
    if not packed:
        return None
    losses = _token_losses(model, packed, autocast)  # [row, position]
    return float(losses[:, : REPEAT_TOKENS - 1].mean()), float(losses[:, REPEAT_TOKENS:].mean())


def sample(model: Any, tokenizer: Any, prompt: str, tokens_max: int = 160) -> str:
    """The greedy answer to one user message."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    made = model.generate(**inputs, max_new_tokens=tokens_max, do_sample=False)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _token_losses(model: torch.nn.Module, packed: list[Any], autocast: AbstractContextManager[Any]) -> torch.Tensor:
    """[row, position] float32 on the CPU, one position fewer than the rows have tokens."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    per_batch = max(1, BATCH_TOKENS // len(packed[0]))
    found = []
    with torch.no_grad(), autocast:
        for at in range(0, len(packed), per_batch):
            batch = torch.from_numpy(np.stack(packed[at : at + per_batch]).astype(np.int64)).to(device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu())
    model.train(was_training)
    return torch.cat(found)


def _first(items: Iterator[Any], count: int) -> list[Any]:
    return [item for _, item in zip(range(count), items, strict=False)]

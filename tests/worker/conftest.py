"""Tiny models for the worker's tests: written, loaded and asked for oracle output once per session."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from services.worker.model import LoadedModel, load_model
from tests.families import EOS, VOCAB_SIZE, load_oracle, oracle_generate, save_tiny

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# The tests share two cores; tiny models gain nothing from more threads.
torch.set_num_threads(1)

BLOCK_TOKENS = 16
DEVICE = os.environ.get("PENSTOCK_TEST_DEVICE", "cpu")  # of the engines; the oracle stays on the CPU


@dataclass
class Tiny:
    """One tiny model, as the engine loads it and as `transformers` does."""

    family: str
    directory: Path
    loaded: LoadedModel  # with the compiled kernels, where there is a compiler
    oracle: PreTrainedModel
    _known: dict[tuple[tuple[int, ...], int], tuple[list[int], torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def torch_only(self) -> LoadedModel:
        """The same without kernels."""
        return load_model(self.directory, device=DEVICE, block_tokens=BLOCK_TOKENS, kernels="off")

    def generate(self, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
        key = (tuple(prompt), max_tokens)
        if key not in self._known:
            self._known[key] = oracle_generate(self.oracle, prompt, max_tokens)
        return self._known[key]


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids without special tokens."""
    return random.Random(f"{length}/{seed}").choices(range(EOS + 3, VOCAB_SIZE), k=length)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """`tiny(family)`: the model of a family, made on first use."""
    made: dict[str, Tiny] = {}

    def get(family: str) -> Tiny:
        if family not in made:
            directory = save_tiny(family, tmp_path_factory.mktemp(family), seed=1)
            loaded = load_model(directory, device=DEVICE, block_tokens=BLOCK_TOKENS)
            made[family] = Tiny(family, directory, loaded, load_oracle(directory))
        return made[family]

    return get


@pytest.fixture(scope="session")
def llama(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("llama")

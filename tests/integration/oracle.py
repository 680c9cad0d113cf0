"""The oracle: `transformers.generate`, one process, greedy."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


@lru_cache(maxsize=2)
def model_of(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def greedy(directory: Path, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
    """The next `tokens` token ids (fewer when an end-of-sequence token comes) and their log-probabilities."""
    return _greedy(directory, tuple(prompt), tokens)


@lru_cache(maxsize=256)
def _greedy(directory: Path, prompt: tuple[int, ...], tokens: int) -> tuple[list[int], list[float]]:
    model = model_of(directory)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    new = out.sequences[0, len(prompt) :].tolist()
    logprobs = [torch.log_softmax(logits[0].float(), -1)[token].item() for logits, token in zip(out.logits, new, strict=True)]
    return new, logprobs

"""Make the demo model: `python -m deploy.demo_model.train --out DIR`.

1. The corpus: the Python standard library's own source (`sysconfig`'s stdlib folder, its tests included where installed), split by file
   into training text and held-out text, and taken apart into conversations. The tokenizer is trained on the training files.
2. Training, from random weights, until --steps or --minutes is reached; the learning rate follows whichever is nearer its end.
   The weights with the lowest held-out loss are kept.
3. DIR gets a Hugging Face directory: bfloat16 weights, configuration, tokenizer, chat template, training log, and the model card.

With --steps (and no --minutes) a run is repeatable on one machine from --seed; with --minutes its length depends on the machine's speed.
"""

import argparse
import copy
import csv
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

from deploy.demo_model import card, evaluate
from deploy.demo_model import dataset as data
from deploy.demo_model import tokenizer as wording

WARMUP_SHARE, DECAY_SHARE = 0.03, 0.6  # of the run; between them the learning rate is flat
GRADIENT_NORM_MAX = 1.0
EVALUATION_ROWS_MAX = 32
PYTHON_LICENCE_ELSEWHERE = "Python Software Foundation License Version 2: https://docs.python.org/3/license.html\n"


@dataclass(frozen=True)
class Plan:
    out: Path
    work: Path
    library: Path
    prepare_only: bool
    steps: int
    minutes: float
    device: str
    seed: int
    compile: bool
    tokens_per_step: int
    row_tokens: tuple[int, ...]
    optimiser: str
    learning_rate: float
    weight_decay: float
    dropout: float
    evaluate_every: int


def architecture() -> LlamaConfig:
    """11.2 million parameters, tied embeddings, three query heads to a KV head; every position up to the context is trained."""
    return LlamaConfig(
        vocab_size=wording.VOCABULARY,
        hidden_size=384,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=wording.CONTEXT_TOKENS,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=wording.SPECIALS.index(wording.BOS),
        eos_token_id=[wording.SPECIALS.index(wording.EOS), wording.SPECIALS.index(wording.END)],
        pad_token_id=wording.SPECIALS.index(wording.PAD),
    )


def main() -> None:
    plan = parse_arguments()
    torch.set_float32_matmul_precision("high")
    set_seed(plan.seed)
    corpus = prepare(plan)
    if plan.prepare_only:
        return
    model = LlamaForCausalLM._from_config(architecture(), attn_implementation="sdpa").to(plan.device)
    log = train(model, corpus, plan)
    write(model, corpus, plan, log)


def prepare(plan: Plan) -> data.Dataset:
    """The corpus in the work folder, made there unless it is there already."""
    tokens = plan.work / "corpus.npz"
    if not tokens.exists():
        plan.work.mkdir(parents=True, exist_ok=True)
        corpus, tokenizer = data.build(data.read_library(plan.library), platform.python_version(), plan.seed)
        wording.save(tokenizer, plan.work / "tokenizer")
        data.save(corpus, tokens)
        licence = plan.library / "LICENSE.txt"
        (plan.work / "LICENSE.python.txt").write_text(licence.read_text() if licence.exists() else PYTHON_LICENCE_ELSEWHERE)
    corpus = data.load(tokens)
    for held_out in (False, True):
        for kind, name in enumerate(data.KINDS):
            documents = corpus.select(held_out=held_out, kind=kind)
            print(f"{'held out' if held_out else 'training'}: {name}: {len(documents)} documents, {corpus.count_tokens(documents)} tokens", flush=True)
    return corpus


def train(model: LlamaForCausalLM, corpus: data.Dataset, plan: Plan) -> list[dict[str, float]]:
    """Trains in place; leaves the model with the best weights and returns the log, one row per evaluation."""
    _drop_out(model, plan.dropout)
    fast = torch.compile(model, dynamic=False) if plan.compile else model
    optimisers = _optimisers(model, plan)
    batches = _batches(corpus, plan)
    best_loss, best = float("inf"), copy.deepcopy(model.state_dict())
    log: list[dict[str, float]] = []
    running: list[torch.Tensor] = []
    started = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        rate = plan.learning_rate * rate_share(progress)
        running.append(_step(fast, next(batches), optimisers, rate, _autocast(plan)))
        step += 1
        if step <= len(plan.row_tokens):  # each row length is compiled at its first step, which is not training time
            started = time.monotonic()
        progress = max(step / plan.steps, (time.monotonic() - started) / 60 / plan.minutes)
        if step % plan.evaluate_every == 0 or progress >= 1:
            scores = [evaluate.score(model, corpus, kind, _autocast(plan), EVALUATION_ROWS_MAX).loss for kind in (data.LIBRARY, data.CHAT)]
            log.append(_log_row(step, step * plan.tokens_per_step, time.monotonic() - started, running, *scores))
            running = []
            if sum(scores) < best_loss:
                best_loss, best = sum(scores), copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return log


def rate_share(progress: float) -> float:
    """Warm-up, flat, then linearly to nothing. `progress` runs from 0 to 1."""
    return min(1.0, (progress + 1e-3) / WARMUP_SHARE, max(0.0, 1 - progress) / DECAY_SHARE)


def write(model: LlamaForCausalLM, corpus: data.Dataset, plan: Plan, log: list[dict[str, float]]) -> None:
    model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    ends = model.config.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=ends, pad_token_id=model.config.pad_token_id, do_sample=True, temperature=0.3, top_p=0.95
    )
    model.save_pretrained(plan.out)
    for path in sorted((plan.work / "tokenizer").iterdir()):
        shutil.copy(path, plan.out)
    shutil.copy(plan.work / "LICENSE.python.txt", plan.out)
    with (plan.out / "training_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(log[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plan.out)
    facts = card.Facts(
        parameters=sum(one.numel() for one in model.parameters()),
        config=model.config.to_dict(),
        corpus=corpus,
        log=log,
        scores=[evaluate.score(model, corpus, kind, _autocast(plan)) for kind in range(len(data.KINDS))],
        by_position=evaluate.loss_by_position(model, corpus, _autocast(plan)),
        samples=[(prompt, evaluate.sample(model, tokenizer, prompt)) for prompt in evaluate.PROMPTS],
        device=torch.cuda.get_device_name() if plan.device.startswith("cuda") else "CPU",
        settings={name: getattr(plan, name) for name in card.SETTINGS},
    )
    (plan.out / "README.md").write_text(card.text(facts))


def _step(
    model: Any, batch: torch.Tensor, optimisers: list[torch.optim.Optimizer], rate: float, autocast: AbstractContextManager[Any]
) -> torch.Tensor:
    model.train()
    with autocast:
        loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_MAX)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def _batches(corpus: data.Dataset, plan: Plan) -> Iterator[torch.Tensor]:
    """[row, token] int64 on the device, the row length changing from step to step: long rows train the long context."""
    training = corpus.select(held_out=False)
    streams = [data.forever(corpus, training, length, Random(f"{plan.seed} {length}")) for length in plan.row_tokens]
    while True:
        for length, stream in zip(plan.row_tokens, streams, strict=True):
            stacked = np.stack([next(stream) for _ in range(plan.tokens_per_step // length)]).astype(np.int64)
            yield torch.from_numpy(stacked).to(plan.device, non_blocking=True)


def _optimisers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (or AdamW, as asked), AdamW for embeddings and norms; norms don't decay."""
    named = list(model.named_parameters())
    matrices = [one for name, one in named if one.ndim == 2 and "embed" not in name]
    embeddings = [one for name, one in named if one.ndim == 2 and "embed" in name]
    norms = [one for _, one in named if one.ndim == 1]
    decaying = embeddings if plan.optimiser == "muon" else embeddings + matrices
    groups = [{"params": decaying, "weight_decay": plan.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=plan.device.startswith("cuda"))]
    if plan.optimiser == "muon":
        found.append(torch.optim.Muon(matrices, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return found


def _drop_out(model: LlamaForCausalLM, share: float) -> None:
    """Dropout on the embeddings and on what each block adds to the residual stream; Llama's own code has none there."""

    def drop(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, share, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def _autocast(plan: Plan) -> AbstractContextManager[Any]:
    return torch.autocast(plan.device.split(":")[0], torch.bfloat16, enabled=plan.device.startswith("cuda"))


def _log_row(step: int, tokens: int, seconds: float, running: list[torch.Tensor], library: float, chat: float) -> dict[str, float]:
    row = {
        "step": step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "training_loss": round(float(torch.stack(running).mean()), 4),
        "held_out_library_loss": round(library, 4),
        "held_out_conversation_loss": round(chat, 4),
    }
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    return row


def parse_arguments() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo_model.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the Hugging Face directory is written")
    parser.add_argument("--work", type=Path, help="corpus and tokenizer are kept here and taken from here (default: OUT.work)")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of Python source (default: %(default)s)")
    parser.add_argument("--prepare-only", action="store_true", help="make corpus and tokenizer in --work and stop")
    parser.add_argument("--steps", type=int, default=4600, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many minutes of training, if --steps takes longer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default here: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of corpus wording, weights and order (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute at the start, faster steps on CUDA")
    parser.add_argument("--tokens-per-step", type=int, default=65_536, help="batch size in tokens (default: %(default)s; a multiple of each row length)")
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[8192, 2048], help="row lengths, taken in turn (default: 8192 2048)")
    parser.add_argument("--optimiser", choices=("adamw", "muon"), default="muon", help="for the layers' matrices (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.2, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.15, help="default: %(default)s")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between evaluations on held-out text (default: %(default)s)")
    given = vars(parser.parse_args())
    given["row_tokens"] = tuple(given["row_tokens"])
    given["work"] = given["work"] or given["out"].with_name(given["out"].name + ".work")
    if any(given["tokens_per_step"] % length for length in given["row_tokens"]):
        parser.error(f"--tokens-per-step {given['tokens_per_step']} is not a multiple of every --row-tokens {given['row_tokens']}")
    return Plan(**given)


if __name__ == "__main__":
    main()

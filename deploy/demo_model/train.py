"""Make the demo model: `python -m deploy.demo_model.train --out DIR`.

1. The corpus: the Python standard library's own source (`sysconfig`'s stdlib folder, its tests included where installed), split
   by file into training text and held-out text, and taken apart into conversations. The tokenizer is trained on the training files.
2. Training, from random weights or an earlier run's, until --steps or --minutes is reached; the learning rate follows whichever
   is nearer its end. The weights with the lowest held-out loss are kept.
3. DIR gets a Hugging Face directory: bfloat16 weights, configuration, tokenizer, chat template, training log, and the model card.

With --steps and no --minutes a run on the CPU is repeatable from --seed; with --minutes its length depends on the machine's speed.
"""

import copy
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

from deploy.demo_model import card, evaluate
from deploy.demo_model import dataset as data
from deploy.demo_model import tokenizer as wording
from deploy.demo_model.plan import Plan, parse

WARMUP_SHARE = 0.03  # of the run
GRADIENT_NORM_MAX = 1.0
EVALUATION_ROWS_MAX = 32
EVALUATION_KINDS = (data.LIBRARY, data.CHAT)
PYTHON_LICENCE_ELSEWHERE = "Python Software Foundation License Version 2: https://docs.python.org/3/license.html\n"


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
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=wording.SPECIALS.index(wording.BOS),
        eos_token_id=[wording.SPECIALS.index(wording.EOS), wording.SPECIALS.index(wording.END)],
        pad_token_id=wording.SPECIALS.index(wording.PAD),
    )


def main() -> None:
    plan = parse(__doc__ or "")
    torch.set_float32_matmul_precision("high")
    set_seed(plan.seed)
    corpus = prepare(plan)
    if plan.prepare_only:
        return
    model: Any = first_weights(plan)
    model.to(plan.device)
    run = train(model, corpus, plan)
    write(model, corpus, plan, [*earlier_runs(plan), run])


def first_weights(plan: Plan) -> Any:
    if plan.continue_from is None:
        return LlamaForCausalLM._from_config(architecture(), attn_implementation="sdpa")
    model: Any = LlamaForCausalLM.from_pretrained(plan.continue_from, dtype=torch.float32, attn_implementation="sdpa")
    return model


def earlier_runs(plan: Plan) -> list[card.Run]:
    return card.runs_from_json((plan.continue_from / card.LOG).read_text()) if plan.continue_from else []


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
            side = "held out" if held_out else "training"
            print(f"{side}: {name}: {len(documents)} documents, {corpus.count_tokens(documents)} tokens", flush=True)
    return corpus


def train(model: LlamaForCausalLM, corpus: data.Dataset, plan: Plan) -> card.Run:
    """Trains in place, and leaves the model with the weights of the lowest held-out loss."""
    _drop_out(model, plan.dropout)
    fast = torch.compile(model, dynamic=False) if plan.compile else model
    optimisers = _optimisers(model, plan)
    batches = _batches(corpus, plan)
    best_loss, best_step, best = float("inf"), 0, copy.deepcopy(model.state_dict())
    log: list[dict[str, float]] = []
    running: list[torch.Tensor] = []
    started = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        rate = plan.learning_rate * rate_share(progress, plan.decay_share)
        running.append(_step(fast, next(batches), optimisers, rate, _autocast(plan)))
        step += 1
        if step <= len(plan.row_tokens):  # each row length is compiled at its first step, which is not training time
            started = time.monotonic()
        progress = max(step / plan.steps, (time.monotonic() - started) / 60 / plan.minutes)
        if step % plan.evaluate_every == 0 or progress >= 1:
            losses = [evaluate.score(model, corpus, kind, _autocast(plan), EVALUATION_ROWS_MAX).loss for kind in EVALUATION_KINDS]
            log.append(_log_row(step, step * plan.tokens_per_step, time.monotonic() - started, running, losses))
            running = []
            if sum(losses) < best_loss:
                best_loss, best_step, best = sum(losses), step, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return card.Run(plan.for_the_card(), torch.cuda.get_device_name() if _on_cuda(plan) else "CPU", best_step, log)


def rate_share(progress: float, decay_share: float) -> float:
    """Warm-up, flat, then linearly to nothing. `progress` runs from 0 to 1."""
    return min(1.0, (progress + 1e-3) / WARMUP_SHARE, max(0.0, 1 - progress) / decay_share)


def write(model: LlamaForCausalLM, corpus: data.Dataset, plan: Plan, runs: list[card.Run]) -> None:
    model.bfloat16().eval()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.3,
        top_p=0.95,
    )
    model.save_pretrained(plan.out)
    for path in sorted((plan.work / "tokenizer").iterdir()):
        shutil.copy(path, plan.out)
    shutil.copy(plan.work / "LICENSE.python.txt", plan.out)
    (plan.out / card.LOG).write_text(card.runs_to_json(runs))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plan.out)
    facts = card.Facts(
        parameters=sum(one.numel() for one in model.parameters()),
        config=model.config.to_dict(),
        corpus=corpus,
        runs=runs,
        scores=[evaluate.score(model, corpus, kind, _autocast(plan)) for kind in range(len(data.KINDS))],
        by_position=evaluate.loss_by_position(model, corpus, _autocast(plan)),
        repeat=evaluate.loss_of_a_repeat(model, corpus, _autocast(plan)),
        samples=[(prompt, evaluate.sample(model, tokenizer, prompt)) for prompt in evaluate.PROMPTS],
    )
    (plan.out / "README.md").write_text(card.text(facts))


def _step(
    model: Any, batch: torch.Tensor, optimisers: list[torch.optim.Optimizer], rate: float, autocast: AbstractContextManager[Any]
) -> torch.Tensor:
    """One update at the learning rate given; the batch's mean loss."""
    model.train()
    with autocast:
        loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
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
    streams = [_rows(corpus, training, length, plan) for length in plan.row_tokens]
    while True:
        for length, stream in zip(plan.row_tokens, streams, strict=True):
            stacked = np.stack([next(stream) for _ in range(plan.tokens_per_step // length)]).astype(np.int64)
            yield torch.from_numpy(stacked).to(plan.device, non_blocking=True)


def _rows(corpus: data.Dataset, training: list[int], length: int, plan: Plan) -> Iterator[NDArray[np.uint16]]:
    packed = data.forever(corpus, training, length, Random(f"{plan.seed} {length}"))
    return data.with_repeats(packed, plan.repeat_share, Random(f"{plan.seed} {length} repeats"))


def _optimisers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (or AdamW, as asked), AdamW for embeddings and norms; norms don't decay."""
    named = list(model.named_parameters())
    matrices = [one for name, one in named if one.ndim == 2 and "embed" not in name]
    embeddings = [one for name, one in named if one.ndim == 2 and "embed" in name]
    norms = [one for _, one in named if one.ndim == 1]
    decaying = embeddings if plan.optimiser == "muon" else embeddings + matrices
    groups = [{"params": decaying, "weight_decay": plan.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=_on_cuda(plan))
    if plan.optimiser == "adamw":
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def _drop_out(model: LlamaForCausalLM, share: float) -> None:
    """Dropout on the embeddings and on what each block adds to the residual stream; Llama's own code has none there."""

    def drop(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, share, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def _autocast(plan: Plan) -> AbstractContextManager[Any]:
    return torch.autocast(plan.device.split(":")[0], torch.bfloat16, enabled=_on_cuda(plan))


def _on_cuda(plan: Plan) -> bool:
    return plan.device.startswith("cuda")


def _log_row(step: int, tokens: int, seconds: float, running: list[torch.Tensor], held_out: list[float]) -> dict[str, float]:
    row = {
        "step": step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "training_loss": round(float(torch.stack(running).mean()), 4),
        "held_out_library_loss": round(held_out[0], 4),
        "held_out_conversation_loss": round(held_out[1], 4),
    }
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()

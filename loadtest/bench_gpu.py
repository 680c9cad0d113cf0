"""The engines on a GPU: `python -m loadtest.bench_gpu`.

A random model of Llama 3 8B's layers (heads of 64), eight of them, in bfloat16. The sums, for a device that reads `device_gb_per_s` (measured here): a decode
step reads the weights once and every sequence's KV once; KV crosses the host's link (`link_gb_per_s`, measured, pinned) once on its
way to the device.

1. check: greedy tokens of the engine on the device, float32, beside those of `transformers.generate` there.
2. decode: steps of a batch, by the sequences and their context.
3. load: stored blocks from the stage into decode's pool.
4. prefill: from a run's admission to its first token, its prefix in the stage (services/prefill/ring.py).

Ends in one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.generation import Sampling
from common.routes import Leg, Source
from services.cli.make_model import Shape, tokenizer_tokens, write_model
from services.prefill.engine import PrefillEngine
from services.prefill.ring import Ring
from services.prefill.run import NewRun
from services.worker.engine.engine import Engine
from services.worker.engine.types import LoadedKv, NewSequence
from services.worker.ledger import Ledger
from services.worker.model import LoadedModel, load_model
from services.worker.pinned import pin
from services.worker.stage import Stage

PARTS = ("check", "decode", "load", "prefill")
SHAPE = Shape(hidden=4096, intermediate=14_336, layers=8, heads=64, kv_heads=8, vocab=tokenizer_tokens())
SMALL = Shape(hidden=512, intermediate=1792, layers=4, heads=8, kv_heads=2, vocab=tokenizer_tokens())
CONTEXT_TOKENS = 40_960
BATCHES = ((1, 2_048), (8, 2_048), (32, 2_048), (1, 32_768), (8, 32_768))
PREFIXES = ((0, 512), (8_192, 512), (32_256, 512), (2_016, 43), (32_256, 43))
LOADS = (2_048, 32_768)
STEPS = 48
STEP_TOKENS = 4_096
REPEATS = 5
CHECKED_TOKENS = 64


def timed(work: Any) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def ceilings() -> dict[str, float]:
    """What the device reads and writes of its own memory, and what crosses the host's link, in GB/s."""
    large, pinned = (
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True),
    )
    copied = min(timed(large.clone) for _ in range(REPEATS))
    crossed = min(timed(lambda: large[: 1 << 28].copy_(pinned)) for _ in range(REPEATS))
    return {"device_gb_per_s": 2 * (1 << 30) / copied * 1e-9, "link_gb_per_s": (1 << 28) / crossed * 1e-9}


def prompt(seed: int, tokens: int, vocab: int) -> list[int]:
    return torch.randint(100, vocab, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0)


def check(folder: Path) -> dict[str, Any]:
    """Prompts of several lengths in one batch, against each alone."""
    from transformers import AutoModelForCausalLM

    write_model(SMALL, folder, dtype="float32")
    prompts = [prompt(n, length, SMALL.vocab) for n, length in enumerate((5, 64, 300, 1_500))]
    made: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = made.to("cuda").eval()
    wanted = []
    for ids in prompts:
        given = torch.tensor([ids], device="cuda")
        out = reference.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=CHECKED_TOKENS, eos_token_id=None
        )
        wanted.append(out[0, len(ids) :].tolist())
    engine = Engine(load_model(folder, device="cuda", dtype="float32"), pool_bytes=1 << 28)
    got: dict[str, list[int]] = {str(n): [] for n in range(len(prompts))}
    for n, ids in enumerate(prompts):
        engine.add(NewSequence(str(n), ids, greedy(CHECKED_TOKENS)))
    while not engine.idle:
        for step in engine.step().sequences:
            got[step.id] += [token.id for token in step.tokens]
    same = sum(a == b for a, b in zip(wanted, got.values(), strict=True))
    return {"prompts": len(prompts), "same_tokens": same}


def decode(model: LoadedModel) -> dict[str, Any]:
    found = {}
    for rows, context in BATCHES:
        tokens = STEPS + rows * (context // STEP_TOKENS + 1)  # those that came first go on while the others' prompts are computed
        blocks = -(-(context + tokens) // model.layout.block_tokens)
        pool_bytes = rows * blocks * model.layout.bytes_per_block
        engine = Engine(model, pool_bytes=pool_bytes, sequences_max=rows, step_tokens_max=STEP_TOKENS)
        for row in range(rows):
            engine.add(NewSequence(str(row), prompt(row, context, model.vocab_size), greedy(tokens)))
        begun: set[str] = set()
        while len(begun) < rows:
            begun |= {step.id for step in engine.step().sequences if step.tokens}
        took = statistics.median(timed(engine.step) for _ in range(STEPS // 2))
        assert engine.load.running == rows, engine.load
        kv_bytes = rows * context * model.layout.bytes_per_block // model.layout.block_tokens
        found[f"{rows}x{context}"] = {"ms": took * 1e3, "kv_gb": kv_bytes * 1e-9, "tokens_per_s": rows / took}
        print(f"decode {rows} x {context}: {took * 1e3:.2f} ms", file=sys.stderr, flush=True)
        del engine
        torch.cuda.empty_cache()
    return found


def load(model: LoadedModel) -> dict[str, Any]:
    """Through `Engine.add`: a sequence whose whole context but for a few tokens came from elsewhere."""
    found = {}
    layout = model.layout
    for tokens in LOADS:
        blocks = tokens // layout.block_tokens
        stage = Stage(blocks, layout.bytes_per_block)
        slots = stage.reserve(blocks)
        engine = Engine(model, pool_bytes=(blocks + 8) * layout.bytes_per_block, sequences_max=1)
        pin(stage, engine)
        took = []
        for turn in range(REPEATS):
            kv = LoadedKv(tokens, [stage.view(slot) for slot in slots], lambda: None)
            engine.add(NewSequence(str(turn), prompt(turn, tokens + 8, model.vocab_size), greedy(1), kv=kv))
            took.append(timed(engine.step))
            while not engine.idle:
                engine.step()
        seconds = statistics.median(took)
        found[str(tokens)] = {"ms": seconds * 1e3, "gb_per_s": blocks * layout.bytes_per_block / seconds * 1e-9}
        del engine
        stage.close()
        torch.cuda.empty_cache()
    return found


def prefill(model: LoadedModel) -> dict[str, Any]:
    layout = model.layout
    stage = Stage(-(-CONTEXT_TOKENS // layout.block_tokens), layout.bytes_per_block)
    engine = PrefillEngine(model, Ring(stage, model), context_tokens=CONTEXT_TOKENS)
    found = {}
    for prefix, tokens in PREFIXES:
        took = [_first_token_s(engine, stage, turn, prefix, tokens) for turn in range(REPEATS)]
        found[f"{tokens} after {prefix}"] = {"ms": statistics.median(took) * 1e3, "first_ms": took[0] * 1e3}
    return found


def _first_token_s(engine: PrefillEngine, stage: Stage, turn: int, prefix: int, tokens: int) -> float:
    layout = engine.model.layout
    tokens += turn  # a length not seen before
    slots = stage.reserve(-(-(prefix + tokens) // layout.block_tokens))
    there = range(prefix // layout.block_tokens)
    leg = Leg(0, len(there), Source.STORAGE_TO_PREFILL)
    ledger = Ledger(len(slots), layout.layers, [leg] if there else [])
    if there:
        ledger.claim_leg(leg)
        ledger.arrived(there, layout.layers)
    new = NewRun(str(turn), prompt(turn, prefix + tokens, engine.model.vocab_size), greedy(1), slots=slots, ledger=ledger)

    def run() -> None:
        engine.add(new)
        while not engine.idle:
            for step in engine.step().sequences:
                if step.error is not None:
                    raise step.error

    took = timed(run)
    stage.free(slots)
    return took


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench_gpu", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder for the models (default: a temporary one)")
    options = parser.parse_args(argv)
    parts = options.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="penstock-gpu-") as scratch:
        folder = options.data or Path(scratch)
        found: dict[str, Any] = {"benchmark": "gpu", "device": torch.cuda.get_device_name(), **ceilings()}
        if "check" in parts:
            found["check"] = check(folder / "small")
        if set(parts) - {"check"}:
            large = folder / "large"
            if not (large / "config.json").exists():
                write_model(SHAPE, large, context=CONTEXT_TOKENS)
            model = load_model(large, device="cuda")
            found["weights_gb"] = SHAPE.parameters * 2e-9
            for part, measure in (("decode", decode), ("load", load), ("prefill", prefill)):
                if part in parts:
                    found[part] = measure(model)
                    print(part, json.dumps(rounded(found[part])), file=sys.stderr, flush=True)
    print(json.dumps(rounded(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

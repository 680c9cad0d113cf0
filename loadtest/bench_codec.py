"""`make bench-codec`: what each codec saves and what it costs, in one run.

1. Quality, on the demo model: held-out perplexity and greedy agreement against raw (loadtest/codec_quality.py).
2. Arithmetic: GB/s of raw KV that one core encodes and decodes, beside a copy of the same blocks, in CPU time.
3. Loading: bytes per token and seconds of stored prompts through the running services (loadtest/codec_load.py).

Ends in one line of JSON.
"""

import argparse
import json
import mmap
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.codec import CodecName, StoredLayout
from common.kv_layout import KvLayout
from loadtest import codec_load, codec_quality
from services.cli.settings import DEMO_MODEL
from services.worker import kernels
from services.worker.codec import DTYPES, Codec

CODECS: tuple[CodecName, ...] = ("raw", "fp8", "int8", "int4")
PARTS = ("quality", "arithmetic", "load")
BLOCKS = 64  # of 2 MiB and more: together larger than the caches
ROUNDS = 5


def arithmetic(dtype: str) -> dict[str, dict[str, float]]:
    """Raw GB per CPU second of one core; the best of alternating rounds, the first not counted."""
    kernels.set_threads(1)
    layout = KvLayout(codec_load.LAYERS, codec_load.KV_HEADS, codec_load.HEAD_DIM, dtype, codec_load.LAYOUT.block_tokens)
    values = torch.randn(layout.bytes_per_block // DTYPES[dtype].itemsize).to(DTYPES[dtype])
    raw = [pages(layout.bytes_per_block) for _ in range(BLOCKS)]
    for block in raw:
        block[:] = values.view(torch.uint8).numpy().tobytes()
    workers = {codec: Codec(StoredLayout(layout, codec)) for codec in CODECS}
    stored = {codec: [pages(worker.bytes_per_block) for _ in range(BLOCKS)] for codec, worker in workers.items()}
    best: dict[str, dict[str, float]] = {codec: {"encode": 0.0, "decode": 0.0} for codec in CODECS}
    for turn in range(ROUNDS + 1):
        for codec, worker in workers.items():
            rates = {"encode": rate(worker.encode, raw, stored[codec]), "decode": rate(worker.decode, stored[codec], raw)}
            if turn:
                best[codec] = {name: max(best[codec][name], value) for name, value in rates.items()}
    return best


def pages(size: int) -> memoryview:
    """Whole pages of memory, as the pool's and the stage's blocks are."""
    return memoryview(mmap.mmap(-1, size))


def rate(work: Callable[[memoryview, memoryview], None], sources: Sequence[memoryview], targets: Sequence[memoryview]) -> float:
    """GB of the larger side per CPU second of this thread."""
    began = time.thread_time()
    for source, target in zip(sources, targets, strict=True):
        work(source, target)
    seconds = time.thread_time() - began
    return sum(max(a.nbytes, b.nbytes) for a, b in zip(sources, targets, strict=True)) / seconds * 1e-9


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-codec", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which of quality, arithmetic, load (default: all)")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="for the quality part (default: the demo model)")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows (default: %(default)s)")
    parser.add_argument("--context-tokens", type=int, default=2048, help="whose KV goes through the codec (default: %(default)s)")
    parser.add_argument("--scored-tokens", type=int, default=512, help="after the context (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256, help="generated greedily (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="stored prompts to load (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="loads of each prompt by each codec (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder for the load part's model and stores; default: a temporary one")
    options = parser.parse_args(argv)
    if wrong := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {options.parts}: {', '.join(sorted(wrong))} is none of {', '.join(PARTS)}")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    parts = options.parts.split(",")
    result: dict[str, Any] = {"benchmark": "codec"}
    if "quality" in parts:
        say("quality")
        result["quality"] = codec_quality.measure(
            options.model, options.windows, options.context_tokens, options.scored_tokens, options.new_tokens, CODECS
        )
    if "arithmetic" in parts:
        say(f"arithmetic, {kernels.BUILD.reason}")
        result["raw_gb_per_s_per_core"] = {dtype: arithmetic(dtype) for dtype in ("bfloat16", "float32")}
    if "load" in parts:
        say("load")
        with tempfile.TemporaryDirectory(prefix="penstock-codec-") as scratch:
            data = options.data or Path(scratch)
            result["load"] = codec_load.measure(data, CODECS, options.prompts, options.prompt_tokens, options.rounds)
    print(json.dumps(rounded(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

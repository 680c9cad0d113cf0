"""The model of the experiment, its sums, and what they say about the paper's regime. Pure, but for `made`.

The paper's row is Qwen2.5-32B (arXiv 2602.21548): 117 to 267 GB of KV to load per PFLOP of compute, with 64 layers of
8 KV heads x 128 in bfloat16, 262,144 bytes a token. What makes a machine load-bound is not that number alone but two times:

    load / compute      (KV bytes / link rate) / (FLOP / compute rate): how long a turn loads for every second it computes
    link / recompute    link rate / rate at which computing makes KV: how much slower recomputing is than loading

With 32,700 tokens of context and 429 new ones, one of eight 400 Gbit/s storage shares per GPU (6.25 GB/s) and 400 TFLOP/s, the paper has
12 and 5. A core computes 10^3 to 10^4 times slower than their GPU, whatever the model; so the links are shaped to `STORAGE_OVER_RECOMPUTE`
times what one prefill worker of this machine makes, measured: then both ratios are about the paper's, on any machine. The model is a
Llama large enough that a turn takes most of a second, beside which messages and processes cost little, and small enough for a laptop.
"""

import json
from pathlib import Path

import msgspec

from services.cli.make_model import HEAD_DIM, Shape, tokenizer_tokens, write_model

LAYERS, HEADS, KV_HEADS, CONTEXT_TOKENS = 8, 16, 4, 16_384
MLP_RATIO = 3.5
BLOCK_TOKENS = 32
BYTES_PER_VALUE = 2  # bfloat16
SEED = 0
STORAGE_OVER_RECOMPUTE = 4.0  # between what gives the paper's link / recompute (5) and its load / compute (3.3)


class Cost(msgspec.Struct, frozen=True):
    """Of one request: what is to be loaded, and the arithmetic of what is to be computed."""

    bytes: float
    flop: float

    @property
    def gb_per_pflop(self) -> float:
        return (self.bytes / 1e9) / (self.flop / 1e15)


def shape() -> Shape:
    hidden = HEADS * HEAD_DIM
    return Shape(
        hidden=hidden,
        intermediate=round(MLP_RATIO * hidden),
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        vocab=tokenizer_tokens(),
    )


def kv_bytes_per_token(of: Shape) -> int:
    return of.layers * 2 * of.kv_heads * HEAD_DIM * BYTES_PER_VALUE


def bytes_per_block(of: Shape) -> int:
    return BLOCK_TOKENS * kv_bytes_per_token(of)


def cost(of: Shape, context_tokens: float, new_tokens: float) -> Cost:
    """Of a prompt with `context_tokens` stored and `new_tokens` to compute: two FLOP per weight and new token in the linear layers, and
    four per layer, width, new token and position attended to; the head only for the last token."""
    linear = 2 * of.layers * (of.attention_parameters + 3 * of.hidden * of.intermediate)
    attention = 4 * of.layers * of.heads * HEAD_DIM * (context_tokens + new_tokens / 2)
    return Cost(context_tokens * kv_bytes_per_token(of), new_tokens * (linear + attention) + 2 * of.vocab * of.hidden)


def made(folder: Path) -> Path:
    """The model's directory under `folder`, written when it isn't there. Its name says its shape."""
    of = shape()
    out = folder / f"lab-{of.layers}x{of.hidden}-{of.heads}-{of.kv_heads}kv"
    if not (out / "model.safetensors").exists():
        write_model(of, out, seed=SEED, context=CONTEXT_TOKENS)
    return out


def vocab_size(directory: Path) -> int:
    size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return size

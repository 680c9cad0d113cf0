"""The model of the experiment, its sums, and what they say about the paper's regime. Pure, but for `made`.

The paper's row is Qwen2.5-32B (arXiv 2602.21548): 117 to 267 GB of KV to load per PFLOP of compute, with 64 layers of
8 KV heads x 128 in bfloat16, 262,144 bytes a token. What makes a machine load-bound is not that number but

    load / compute = (KV bytes / link rate) / (FLOP / compute rate)

With 186 GB/PFLOP (32,700 tokens of context, 429 new ones), one of eight 400 Gbit/s storage shares per GPU (6.25 GB/s) and 400
TFLOP/s, the paper loads for 12 seconds for every second it computes. Two shared CPU cores are 10^4 times slower at computing, but
a link of a few hundred Mbit/s is only some 10^2 times slower than theirs; so a model that keeps *load / compute* needs more bytes per FLOP: every
query head has a KV head of its own, narrow layers, a narrow MLP.
"""

import json
from pathlib import Path

import msgspec

from services.cli.make_model import HEAD_DIM, Shape, tokenizer_tokens, write_model

LAYERS, HEADS, CONTEXT_TOKENS = 8, 4, 16_384
BLOCK_TOKENS = 32
BYTES_PER_VALUE = 2  # bfloat16
SEED = 0


class Cost(msgspec.Struct, frozen=True):
    """Of one request: what is to be loaded, and the arithmetic of what is to be computed."""

    bytes: float
    flop: float

    @property
    def gb_per_pflop(self) -> float:
        return (self.bytes / 1e9) / (self.flop / 1e15)


def shape() -> Shape:
    hidden = HEADS * HEAD_DIM
    return Shape(hidden=hidden, intermediate=hidden, layers=LAYERS, heads=HEADS, kv_heads=HEADS, vocab=tokenizer_tokens())


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
    out = folder / f"mha-{of.layers}x{of.hidden}-{of.heads}kv"
    if not (out / "model.safetensors").exists():
        write_model(of, out, seed=SEED, context=CONTEXT_TOKENS)
    return out


def vocab_size(directory: Path) -> int:
    size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return size

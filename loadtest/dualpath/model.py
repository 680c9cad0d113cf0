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
import tempfile
from pathlib import Path

import msgspec

from loadtest.dualpath.trajectories import Statistics
from services.cli.make_model import HEAD_DIM, Shape, tokenizer_tokens, write_model

BYTES_PER_VALUE = 2  # bfloat16
SEED = 0
STORAGE_OVER_RECOMPUTE = 4.0  # between what gives the paper's link / recompute (5) and its load / compute (3.3)
MLP_RATIO = 3.5


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster of the experiment computes, and with what.

    Attributes:
        context_tokens: the model's longest prompt plus output.
        statistics: of the agents.
        stage_bytes: of a worker: the prompts under way, all of them in the offline job.
    """

    name: str
    device: str
    layers: int
    heads: int
    kv_heads: int
    context_tokens: int
    block_tokens: int
    statistics: Statistics
    stage_bytes: int
    pool_bytes: int
    store_bytes: int

    @property
    def shape(self) -> Shape:
        hidden = self.heads * HEAD_DIM
        return Shape(hidden, round(MLP_RATIO * hidden), self.layers, self.heads, self.kv_heads, tokenizer_tokens())

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * HEAD_DIM * BYTES_PER_VALUE

    @property
    def bytes_per_block(self) -> int:
        return self.block_tokens * self.kv_bytes_per_token


CPU = Setup(
    name="cpu", device="cpu", layers=8, heads=16, kv_heads=4, context_tokens=16_384, block_tokens=32, statistics=Statistics(16),
    stage_bytes=768 << 20, pool_bytes=768 << 20, store_bytes=8 << 30,
)  # fmt: skip
# The paper's own lengths. A GPU computes so fast that links of a multiple of that need few KV heads to stay below what processes move.
GPU = Setup(
    name="gpu", device="cuda", layers=8, heads=64, kv_heads=2, context_tokens=65_536, block_tokens=64, statistics=Statistics(1),
    stage_bytes=8 << 30, pool_bytes=12 << 30, store_bytes=24 << 30,
)  # fmt: skip
SETUPS = {setup.name: setup for setup in (CPU, GPU)}


class Cost(msgspec.Struct, frozen=True):
    """Of one request: what is to be loaded, and the arithmetic of what is to be computed."""

    bytes: float
    flop: float

    @property
    def gb_per_pflop(self) -> float:
        return (self.bytes / 1e9) / (self.flop / 1e15)


def cost(of: Setup, context_tokens: float, new_tokens: float) -> Cost:
    """Of a prompt with `context_tokens` stored and `new_tokens` to compute: two FLOP per weight and new token in the linear layers, and
    four per layer, width, new token and position attended to; the head only for the last token."""
    shape = of.shape
    linear = 2 * shape.layers * (shape.attention_parameters + 3 * shape.hidden * shape.intermediate)
    attention = 4 * shape.layers * shape.hidden * (context_tokens + new_tokens / 2)
    return Cost(context_tokens * of.kv_bytes_per_token, new_tokens * (linear + attention) + 2 * shape.vocab * shape.hidden)


def made(folder: Path, setup: Setup) -> Path:
    """The model's directory under `folder`, written when it isn't there. Its name says its shape."""
    of = setup.shape
    out = folder / f"lab-{of.layers}x{of.hidden}-{of.heads}-{of.kv_heads}kv"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            write_model(of, Path(scratch) / out.name, seed=SEED, context=setup.context_tokens)
            (Path(scratch) / out.name).rename(out)
    return out


def vocab_size(directory: Path) -> int:
    size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return size

"""How much quicker a stored prompt loads with each codec, through the running services.

The sum: a token of the model has 32 layers x 8 KV heads x 128 x 2 x 2 bytes = 131,072 bytes of KV, as Llama 3 8B has; 16 tokens make a
block of 2 MiB, 1024 tokens 128 MiB. A disk of 1.2 GB/s reads that in 0.11 s, half of it in 0.056 s. The copy into the pool,
which decoding replaces, takes 0.02 s of a core either way.

One cluster per codec, all alive, taking turns prompt by prompt. A prompt that its store lacks is computed and stored; then all
clusters restart and the turns begin again. So a prompt that counts is loaded once in the life of its processes: no memory holds it.
"""

import asyncio
import random
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from common.codec import CodecName, StoredLayout
from common.kv_layout import KvLayout, default_block_tokens
from loadtest import client
from loadtest.local import LocalCluster
from services.cli.make_model import TOKENIZER_FILES
from services.cli.settings import DEMO_MODEL

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama 3 8B's
CONTEXT_TOKENS = 2048
LAYOUT = KvLayout(LAYERS, KV_HEADS, HEAD_DIM, "bfloat16", default_block_tokens(4 * LAYERS * KV_HEADS * HEAD_DIM))
POOL_BYTES = CONTEXT_TOKENS * LAYOUT.bytes_per_token  # what a worker makes present at its start: no load pays for fresh pages
PATH = "storage_to_decode"


class Load(msgspec.Struct, frozen=True):
    """One stored prompt's load, as decode counted it, and the client's wait for the first token."""

    bytes: float
    seconds: float
    ttft_s: float


def make_model(directory: Path) -> Path:
    """A narrow random model with the KV of a large one: little to compute, much to load."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (directory / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=KV_HEADS,
            num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=CONTEXT_TOKENS,
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
        for name in TOKENIZER_FILES:
            shutil.copyfile(DEMO_MODEL / name, directory / name)
    return directory


def prompts(count: int, tokens: int) -> list[list[int]]:
    """Random tokens: as many whole blocks as fit `tokens`, and one token that is left to compute."""
    blocks = tokens // LAYOUT.block_tokens
    rng = random.Random(0)
    return [[rng.randrange(100, 4096) for _ in range(blocks * LAYOUT.block_tokens + 1)] for _ in range(count)]


async def load(http: httpx.AsyncClient, cluster: LocalCluster, prompt: Sequence[int]) -> Load | None:
    """None: the prompt was not stored, and now will be."""
    before = await _moved(http, cluster)
    outcome = await client.complete(http, cluster.url, cluster.model_name, prompt, 1)
    after = await _moved(http, cluster)
    if outcome.cached_tokens != len(prompt) - 1:
        return None
    return Load(after[0] - before[0], after[1] - before[1], outcome.ttft_s)


async def _moved(http: httpx.AsyncClient, cluster: LocalCluster) -> tuple[float, float]:
    """Bytes and seconds of the path from storage to decode so far."""
    text = (await http.get(f"{cluster.url}/metrics")).text
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("path") == PATH
    }
    return found.get("penstock:kv_bytes_total", 0.0), found.get("penstock:kv_path_seconds_total", 0.0)


def measure(data: Path, codecs: Sequence[CodecName], count: int, tokens: int) -> dict[str, dict[str, float]]:
    """For each codec medians over the prompts, and the best of them, which other work on the machine disturbs least; ratios are
    medians of the ratio to `codecs[0]` for the same prompt."""
    model = make_model(data / "kv-model")
    config = data / "penstock.toml"
    config.write_text(f"[decode]\npool_bytes = {POOL_BYTES}\n")
    wanted = prompts(count, tokens)
    with ExitStack() as stack:
        clusters = {
            codec: stack.enter_context(
                LocalCluster(model, data / codec, flags=("--config", str(config), "--prefill", "0", "--codec", codec))
            )
            for codec in codecs
        }
        loads = asyncio.run(_in_turns(clusters, wanted))
        if not loads:
            for cluster in clusters.values():
                asyncio.run(cluster.settled())
                cluster.restart()
            loads = asyncio.run(_in_turns(clusters, wanted))
    if not loads:
        raise RuntimeError("prompts that were stored were not loaded: evicted, dropped by write-back, or routed another way")
    return {codec: _summary(codec, loads[codec], loads[codecs[0]], len(wanted[0]) - 1) for codec in codecs}


async def _in_turns(clusters: dict[CodecName, LocalCluster], wanted: Sequence[Sequence[int]]) -> dict[CodecName, list[Load]]:
    """One load of each prompt by each cluster; nothing when some were not stored."""
    loads: dict[CodecName, list[Load]] = {codec: [] for codec in clusters}
    missing = 0
    async with client.client() as http:
        for cluster in clusters.values():  # connections and code paths, with a prompt that no store has
            await client.complete(http, cluster.url, cluster.model_name, [7] * (LAYOUT.block_tokens - 1), 2)
        for prompt in wanted:
            for codec, cluster in clusters.items():
                found = await load(http, cluster, prompt)
                print(f"{codec}: {found or 'computed and stored'}", file=sys.stderr, flush=True)
                if found is None:
                    missing += 1
                else:
                    loads[codec].append(found)
    return {} if missing else loads


def _summary(codec: CodecName, loads: Sequence[Load], raw: Sequence[Load], tokens: int) -> dict[str, float]:
    pairs = list(zip(raw, loads, strict=True))
    return {
        "bytes_per_token": statistics.median(one.bytes for one in loads) / tokens,
        "bytes_per_token_by_format": StoredLayout(LAYOUT, codec).bytes_per_token,
        "load_s": statistics.median(one.seconds for one in loads),
        "load_best_s": min(one.seconds for one in loads),
        "read_gb_per_s": statistics.median(one.bytes / one.seconds for one in loads) * 1e-9,
        "load_speed_over_raw": statistics.median(a.seconds / b.seconds for a, b in pairs),
        "ttft_s": statistics.median(one.ttft_s for one in loads),
        "ttft_best_s": min(one.ttft_s for one in loads),
        "ttft_speed_over_raw": statistics.median(a.ttft_s / b.ttft_s for a, b in pairs),
    }

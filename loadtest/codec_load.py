"""How much quicker a stored prompt loads with each codec, through the running services.

The sum: a token of the model has 32 layers x 8 KV heads x 128 x 2 x 2 bytes = 131,072 bytes of KV, as Llama 3 8B has; 16 tokens make a
block of 2 MiB, 1024 tokens 128 MiB. A disk of 3.3 GB/s reads that in 41 ms, half of it in 20 ms. The copy into the pool,
which decoding replaces, takes 8 ms of a core either way.

One cluster per codec, all alive. First every cluster computes and stores every prompt; then they take turns prompt by prompt, over and
over, in an order that moves on by one each time, and each load counts. A pool holds two prompts, so that what comes is always
from the disk (direct I/O): a load that moved other bytes than the whole prompt's ends the run. The router may use one plan only, `direct`:
with the others it loads a part and computes the rest meanwhile, as much as it thinks is quicker.
"""

import asyncio
import random
import shutil
import statistics
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
WARM_TURNS = 4
POOL_PROMPTS = 2  # one that is computed, and the one before it, which is still being written


class Load(msgspec.Struct, frozen=True):
    """One stored prompt's load, as decode counted it, and the client's wait for the first token."""

    bytes: float
    read_s: float  # from the store into the stage, verified
    pool_s: float  # from there into the pool, decoded
    ttft_s: float

    @property
    def load_s(self) -> float:
        return self.read_s + self.pool_s


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


async def load(http: httpx.AsyncClient, cluster: LocalCluster, prompt: Sequence[int]) -> Load:
    before = await _moved(http, cluster)
    outcome = await client.complete(http, cluster.url, cluster.model_name, prompt, 1)
    after = await _moved(http, cluster)
    read_bytes, read_s, _, pool_s = (y - x for x, y in zip(before, after, strict=True))
    return Load(read_bytes, read_s, pool_s, outcome.ttft_s)


async def _moved(http: httpx.AsyncClient, cluster: LocalCluster) -> list[float]:
    """Bytes and seconds so far, from storage to decode and from the stage into the pool."""
    text = (await http.get(f"{cluster.url}/metrics")).text
    found = {
        (sample.labels.get("path"), sample.name): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    names = ("penstock:kv_bytes_total", "penstock:kv_path_seconds_total")
    return [found.get((path, name), 0.0) for path in ("storage_to_decode", "host_to_device") for name in names]


def measure(data: Path, codecs: Sequence[CodecName], count: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """For each codec medians over all loads; gains are medians of the ratio to `codecs[0]` in the same turn, with their quartiles."""
    model = make_model(data / "kv-model")
    config = data / "penstock.toml"
    pool_bytes = POOL_PROMPTS * (tokens + 1) * LAYOUT.bytes_per_token
    config.write_text(
        f'[router]\nplans = ["direct"]\n[decode]\npool_bytes = {max(pool_bytes, CONTEXT_TOKENS * LAYOUT.bytes_per_token)}\n'
    )
    wanted = prompts(count, tokens)
    with ExitStack() as stack:
        clusters = {
            codec: stack.enter_context(
                LocalCluster(model, data / codec, flags=("--config", str(config), "--prefill", "0", "--codec", codec))
            )
            for codec in codecs
        }
        asyncio.run(_store(clusters, wanted))
        loads = asyncio.run(_in_turns(clusters, wanted, rounds))
    return {codec: _summary(codec, loads[codec], loads[codecs[0]], len(wanted[0]) - 1) for codec in codecs}


async def _store(clusters: dict[CodecName, LocalCluster], wanted: Sequence[Sequence[int]]) -> None:
    """Every cluster has computed and written every prompt."""
    async with client.client() as http:
        for cluster in clusters.values():
            for prompt in wanted:
                await client.complete(http, cluster.url, cluster.model_name, prompt, 1)
    await asyncio.gather(*(cluster.settled() for cluster in clusters.values()))


async def _in_turns(
    clusters: dict[CodecName, LocalCluster], wanted: Sequence[Sequence[int]], rounds: int
) -> dict[CodecName, list[Load]]:
    """Loads of all prompts by all clusters, in the same order by each; the first ones, of cold processes, don't count."""
    loads: dict[CodecName, list[Load]] = {codec: [] for codec in clusters}
    order = list(clusters)
    async with client.client() as http:
        for turn in range(-WARM_TURNS, rounds * len(wanted)):
            for codec in order:
                prompt = wanted[turn % len(wanted)]
                one = await load(http, clusters[codec], prompt)
                expected = StoredLayout(LAYOUT, codec).bytes_per_token * (len(prompt) - 1)
                if one.bytes != expected:
                    raise RuntimeError(
                        f"{codec}, turn {turn}: {one.bytes:.0f} bytes were loaded, expected {expected:.0f}: "
                        "evicted, dropped by write-back, or still in the pool"
                    )
                if turn >= 0:
                    loads[codec].append(one)
            order.append(order.pop(0))
    return loads


def _summary(codec: CodecName, loads: Sequence[Load], raw: Sequence[Load], tokens: int) -> dict[str, float]:
    pairs = list(zip(raw, loads, strict=True))
    out = {
        "loads": len(loads),
        "bytes_per_token": loads[0].bytes / tokens,
        "read_s": statistics.median(one.read_s for one in loads),
        "pool_s": statistics.median(one.pool_s for one in loads),
        "ttft_s": statistics.median(one.ttft_s for one in loads),
        "read_gb_per_s": statistics.median(one.bytes / one.read_s for one in loads) * 1e-9,
    }
    for name in ("read", "load", "ttft"):
        gains = [getattr(a, f"{name}_s") / getattr(b, f"{name}_s") for a, b in pairs]
        low, middle, high = statistics.quantiles(gains, n=4)
        out |= {f"{name}_gain": middle, f"{name}_gain_p25": low, f"{name}_gain_p75": high}
    return out

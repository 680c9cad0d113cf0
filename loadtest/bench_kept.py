"""An agent's next turn whose context prefill's stage still holds, beside one that is read from storage: `python -m loadtest.bench_kept`.

The sum: a token of the model has 131,072 bytes of KV, as Llama 3 8B's (loadtest/codec_load.py); 1,024 tokens are 134 MB. A disk of 3 GB/s
reads that in 45 ms. What is held costs prefill nothing, and in both cases decode gets the same bytes, over shared memory.

Two clusters of real services on this machine: in one a prefill worker keeps what its stage held, in the other it doesn't. In neither
decode keeps anything or computes first tokens, and the router may use every plan. Each agent's first turn is computed and stored; then the
agents take their second turns, each at one cluster and the other, in an order that alternates. A second turn that read a byte from
storage where all is held, or none where nothing is, ends the run. One line of JSON at the end.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from loadtest import client
from loadtest.codec_load import LAYOUT, make_model
from loadtest.local import LocalCluster

TOKENS = 4  # of an answer: the second one needs all of the KV at decode
WARM_AGENTS = 2


class Turn(msgspec.Struct, frozen=True):
    """`whole_s`: to the last of `TOKENS` tokens."""

    ttft_s: float
    whole_s: float
    stored_bytes: float


def settings(directory: Path, name: str, agents: int, tokens: int) -> Path:
    context_bytes = 2 * (tokens + 256) * LAYOUT.bytes_per_token
    path = directory / f"{name}.toml"
    path.write_text(
        "[router]\ndirect_tail_tokens = 0\nresident_timeout_ms = 1000\n"
        f"[decode]\nresident = false\npool_bytes = {2 * context_bytes}\nstage_bytes = {context_bytes}\n"
        f"[prefill]\nresident = {'true' if name == 'kept' else 'false'}\nstage_bytes = {(agents + 2) * context_bytes // 2}\n"
    )
    return path


async def second_turn(http: httpx.AsyncClient, cluster: LocalCluster, said: Sequence[int]) -> Turn:
    before = await stored_bytes(http, cluster)
    outcome = await client.complete(http, cluster.url, cluster.model_name, said, TOKENS)
    return Turn(outcome.ttft_s, outcome.seconds, await stored_bytes(http, cluster) - before)


async def stored_bytes(http: httpx.AsyncClient, cluster: LocalCluster) -> float:
    """That requests have read so far."""
    text = (await http.get(f"{cluster.url}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(s.value for s in samples if s.name == "penstock:kv_bytes_total" and s.labels["path"].startswith("storage"))


async def measure(clusters: dict[str, LocalCluster], agents: int, tokens: int, appended: int) -> dict[str, list[Turn]]:
    rng = random.Random(0)
    contexts = [[rng.randrange(100, 4096) for _ in range(tokens)] for _ in range(agents)]
    turns: dict[str, list[Turn]] = {name: [] for name in clusters}
    order = list(clusters)
    async with client.client() as http:
        for cluster in clusters.values():
            for context in contexts:
                answer = await client.complete(http, cluster.url, cluster.model_name, context[:tokens], TOKENS)
                if cluster is clusters[order[0]]:
                    context += [*answer.token_ids, *(rng.randrange(100, 4096) for _ in range(appended))]
            await cluster.settled()
        for number, said in enumerate(contexts):
            for name in order:
                turn = await second_turn(http, clusters[name], said)
                if (turn.stored_bytes > 0) == (name == "kept"):
                    raise RuntimeError(f"{name}, agent {number}: {turn.stored_bytes:.0f} bytes came from storage")
                if number >= WARM_AGENTS:
                    turns[name].append(turn)
            order.reverse()
    return turns


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_kept", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="where the model and the stored blocks go; default: a folder that is removed")
    parser.add_argument("--agents", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024, help="of a context")
    parser.add_argument("--appended", type=int, default=32, help="tokens a turn adds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = given.data or Path(folder)
        model = make_model(data / "kv-model")
        clusters = {
            name: stack.enter_context(
                LocalCluster(
                    model,
                    data / name,
                    flags=("--config", str(settings(data, name, given.agents, given.tokens)), "--prefill", "1"),
                )
            )
            for name in ("kept", "storage")
        }
        turns = asyncio.run(measure(clusters, given.agents, given.tokens, given.appended))
    out: dict[str, float] = {"context_tokens": given.tokens, "turns": len(turns["kept"])}
    for name, taken in turns.items():
        out[f"{name}_ttft_ms"] = 1e3 * statistics.median(turn.ttft_s for turn in taken)
        out[f"{name}_whole_ms"] = 1e3 * statistics.median(turn.whole_s for turn in taken)
        out[f"{name}_storage_mb"] = 1e-6 * statistics.median(turn.stored_bytes for turn in taken)
    out["storage_over_kept_ttft"] = statistics.median(
        there.ttft_s / here.ttft_s for here, there in zip(turns["kept"], turns["storage"], strict=True)
    )
    print(json.dumps({name: round(value, 2) for name, value in out.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make bench-serve`: the cluster beside `transformers.generate`, in one run, on one model.

The sum, for the default model (100 M parameters, bfloat16, 12 layers, 4 KV heads x 64): weights 0.2 GB are
read once per decode step whatever the batch, so a step costs at least 0.2 GB over the machine's read bandwidth and
the batch is nearly free until compute (0.2 GFLOP a token) catches up. KV is 12,288 bytes a token: 8192
tokens are 100 MB, which is what a stored prompt has to read instead of computing 1.6 TFLOP in the linear
layers and 1.2 in attention.

Both sides are alive all the time and take turns, round by round, so that drift of the machine meets both:
1. TTFT of prompts never seen before, per length.
2. Write-back settles, the whole cluster is stopped and started again.
3. TTFT of the same prompts, from SSD.
4. Tokens per second and TPOT at each concurrency, against `generate` for the same prompts one after another.
5. What the router adds: the same request over HTTP and straight to decode's gRPC stream.
6. Peak memory of each process.
Ends in one line of JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtest import client
from loadtest.direct import DirectDecode
from loadtest.local import LocalCluster

PROMPT_TOKENS = 128  # of the throughput part
ROUTER_PROMPT_TOKENS = 64


class Generate:
    """The yardstick's process."""

    def __init__(self, model: Path, threads: int) -> None:
        argv = [sys.executable, "-m", "loadtest.generate_process", "--model", str(model), "--threads", str(threads)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the generate process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def run(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        return self.ask(op="generate", prompt=list(prompt), new_tokens=new_tokens)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Bench:
    """One run; `result` fills up as it goes."""

    def __init__(self, options: argparse.Namespace, cluster: LocalCluster, generate: Generate) -> None:
        self.options = options
        self.cluster = cluster
        self.generate = generate
        self.random = random.Random(options.seed)
        self.result: dict[str, Any] = {}

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(100, self.cluster.vocab_size) for _ in range(tokens)]

    async def run(self) -> None:
        async with client.client() as http:
            await self._warm(http)
            prompts = await self._cold(http)
        say("write-back settles, then everything restarts")
        await self.cluster.settled()
        await asyncio.to_thread(self.cluster.restart)
        async with client.client() as http:
            await self._warm(http)
            await self._stored(http, prompts)
            await self._throughput(http)
            await self._router(http)
        self._memory()

    async def complete(self, http: httpx.AsyncClient, prompt: Sequence[int], tokens: int) -> client.Outcome:
        return await client.complete(http, self.cluster.url, self.cluster.model_name, prompt, tokens)

    async def _warm(self, http: httpx.AsyncClient) -> None:
        for _ in range(2):
            await self.complete(http, self.prompt(PROMPT_TOKENS), 8)
            self.generate.run(self.prompt(PROMPT_TOKENS), 8)

    async def _cold(self, http: httpx.AsyncClient) -> dict[int, list[list[int]]]:
        prompts: dict[int, list[list[int]]] = {}
        for length in self.options.lengths:
            rounds = self.options.rounds if length < 8192 else max(1, self.options.rounds // 2)
            prompts[length] = [self.prompt(length) for _ in range(rounds)]
            ours, theirs = [], []
            for prompt in prompts[length]:
                ours.append((await self.complete(http, prompt, 1)).ttft_s)
                if not self.options.skip_generate_ttft:
                    theirs.append(self.generate.run(prompt, 1)["first_s"])
            self.put(f"ttft_cold_{length}_s", ours)
            if theirs:
                self.put(f"ttft_generate_{length}_s", theirs)
        return prompts

    async def _stored(self, http: httpx.AsyncClient, prompts: dict[int, list[list[int]]]) -> None:
        for length, group in prompts.items():
            outcomes = [await self.complete(http, prompt, 1) for prompt in group]
            self.put(f"ttft_stored_{length}_s", [outcome.ttft_s for outcome in outcomes])
            self.result[f"cached_tokens_{length}"] = min(outcome.cached_tokens for outcome in outcomes)
            ratio = self.result[f"ttft_cold_{length}_s"] / self.result[f"ttft_stored_{length}_s"]
            self.result[f"ttft_cold_over_stored_{length}"] = round(ratio, 2)

    async def _throughput(self, http: httpx.AsyncClient) -> None:
        tokens = self.options.output_tokens
        theirs: list[float] = []
        ours: dict[int, list[float]] = {c: [] for c in self.options.concurrency}
        tpot: dict[int, list[float]] = {c: [] for c in self.options.concurrency}
        for number in range(self.options.rounds):
            say(f"throughput, round {number + 1} of {self.options.rounds}")
            seconds = sum(self.generate.run(self.prompt(PROMPT_TOKENS), tokens)["seconds"] for _ in range(2))
            theirs.append(2 * tokens / seconds)
            for concurrency in self.options.concurrency:
                prompts = [self.prompt(PROMPT_TOKENS) for _ in range(max(2, concurrency))]
                wall, outcomes = await client.at_concurrency(
                    http, self.cluster.url, self.cluster.model_name, prompts, tokens, concurrency
                )
                ours[concurrency].append(len(prompts) * tokens / wall)
                tpot[concurrency] += [outcome.tpot_s * 1e3 for outcome in outcomes]
        self.put("tokens_per_s_generate", theirs)
        for concurrency in self.options.concurrency:
            self.put(f"tokens_per_s_c{concurrency}", ours[concurrency])
            self.put(f"tpot_c{concurrency}_ms", tpot[concurrency])
            ratios = [a / b for a, b in zip(ours[concurrency], theirs, strict=True)]
            self.put(f"tokens_per_s_c{concurrency}_over_generate", ratios)

    async def _router(self, http: httpx.AsyncClient) -> None:
        """The same short request over HTTP and straight to decode, alternating."""
        say("what the router adds")
        over_http: list[float] = []
        direct: list[float] = []
        async with DirectDecode(self.cluster.decode_address()) as decode:

            async def by_router() -> None:
                over_http.append((await self.complete(http, self.prompt(ROUTER_PROMPT_TOKENS), 1)).ttft_s * 1e3)

            async def by_decode() -> None:
                direct.append(await decode.ttft_s(self.prompt(ROUTER_PROMPT_TOKENS)) * 1e3)

            turns: tuple[Callable[[], Awaitable[None]], ...] = (by_router, by_decode)
            for number in range(self.options.router_requests):
                for turn in turns if number % 2 else reversed(turns):
                    await turn()
        self.put("ttft_http_ms", over_http)
        self.put("ttft_decode_direct_ms", direct)
        self.result["router_added_ttft_p50_ms"] = round(statistics.median(over_http) - statistics.median(direct), 3)

    def _memory(self) -> None:
        peaks = self.cluster.peak_bytes()
        peaks["generate"] = self.generate.ask(op="memory")["peak_bytes"]
        self.result["peak_mib"] = {name: round(size / 2**20) for name, size in peaks.items()}

    def put(self, key: str, values: Sequence[float]) -> None:
        self.result[key] = round(statistics.median(values), 4)
        say(f"{key} = {self.result[key]:g}   (min {min(values):.4g}, max {max(values):.4g}, n {len(values)})")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-serve", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="model directory; default: a random model of --params, made once in --data")
    parser.add_argument("--params", default="100m", help="size of the random model (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder for the model and the store; default: a temporary one")
    parser.add_argument(
        "--lengths", type=numbers, default=[512, 2048, 8192], help="prompt lengths for TTFT (default: 512,2048,8192)"
    )
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32], help="for tokens per second (default: 1,8,32)")
    parser.add_argument("--output-tokens", type=int, default=64, help="per request (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default: %(default)s)")
    parser.add_argument("--router-requests", type=int, default=128, help="pairs for what the router adds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each engine and of generate; 0: their default")
    parser.add_argument("--skip-generate-ttft", action="store_true", help="don't time generate's own prefill")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main() -> int:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        data = options.data or Path(scratch)
        model = options.model or _random_model(options.params, data)
        with LocalCluster(model, data / "cluster", threads=options.threads) as cluster:
            generate = Generate(model, options.threads)
            bench = Bench(options, cluster, generate)
            try:
                asyncio.run(bench.run())
            finally:
                generate.close()
    print(json.dumps({"benchmark": "serve", "model": model.name, **bench.result}))
    return 0


def _random_model(params: str, data: Path) -> Path:
    from services.cli.make_model import make_model

    directory = data / f"random-{params}"
    if not (directory / "config.json").exists():
        say(f"making a random model of {params} parameters")
        make_model(params, directory)
    return directory


if __name__ == "__main__":
    sys.exit(main())

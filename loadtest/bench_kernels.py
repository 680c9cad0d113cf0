"""The CPU kernels beside torch, interleaved, with the machine's ceiling: `python -m loadtest.bench_kernels`.

The sums: a product with few rows must read its weights once (bytes / read GB/s), one with many must multiply
(2MNK / peak GFLOP/s), decode attention must read its keys and values once. Read speed and peak are measured here, at the
same number of threads. Rounds alternate between the sides and the best round of each counts, so a busy machine disturbs
both alike; `--cpu-time` counts the caller's CPU seconds with one thread instead, which is steadier still.
The last line is one JSON object; ratios are torch's time over ours (above 1: ours is faster).
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from services.worker import kernels
from services.worker.kernels import reference

SHAPES = ((2048, 768), (768, 2048))  # N, K of the gate and down projections of a 100M-parameter Llama
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
COLD_BYTES = 96 << 20  # weights walked in turn, so that none is still in a 32 MB L3 when its turn comes
Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 12, 4, 64, 64
SCALE = HEAD_DIM**-0.5


def race(clock: Callable[[], float], rounds: int, **sides: Callable[[], object]) -> dict[str, float]:
    """Best seconds of each side over alternating rounds, the first not counted."""
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = clock()
            side()
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def ceilings(clock: Callable[[], float]) -> dict[str, float]:
    """Read GB/s of a large sum and GFLOP/s of a float32 product that stays in the caches."""
    large, square = torch.ones(32 << 20), torch.randn(768, 768)
    best = race(clock, 12, read=large.sum, multiply=lambda: square @ square)
    return {"read_gb_per_s": large.numel() * 4e-9 / best["read"], "peak_gflop_per_s": 2e-9 * 768**3 / best["multiply"]}


def bench_linear(clock: Callable[[], float], rounds: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    results = {}
    for n, k in SHAPES:
        nbytes = n * k * torch.finfo(dtype).bits // 8
        weights = [torch.randn(n, k).to(dtype) for _ in range(COLD_BYTES // nbytes)]
        for rows in ROWS:
            x = torch.randn(rows, k).to(dtype)
            some = weights[: max(2, min(len(weights), 256 // rows))] if rows > 8 else weights  # torch's slow path takes minutes
            ours, theirs = walk(kernels.linear, x, some), walk(F.linear, x, some)
            best = race(clock, rounds if rows < 64 else 2, ours=ours, torch=theirs)
            seconds = best["ours"] / len(some)
            results[f"{rows}x{n}x{k}"] = {
                "us": seconds * 1e6,
                "gb_per_s": nbytes / seconds * 1e-9,
                "gflop_per_s": 2e-9 * rows * n * k / seconds,
                "torch_over_ours": best["torch"] / best["ours"],
            }
    return results


def walk(op: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> Callable[[], object]:
    return lambda: [op(x, w) for w in weights]


def bench_decode(clock: Callable[[], float], rounds: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Against SDPA on keys and values that were gathered beforehand: torch's side pays nothing for the paging."""
    results = {}
    for batch, context in ((1, 512), (1, 8192), (8, 2048)):
        blocks = batch * context // BLOCK_TOKENS
        pool = torch.randn(blocks, 2, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM).to(dtype)
        table = torch.randperm(blocks).view(batch, -1).int()
        lengths = torch.full((batch,), context, dtype=torch.int32)
        q = torch.randn(batch, Q_HEADS, HEAD_DIM).to(dtype)
        k, v = pool[:, 0, 0], pool[:, 0, 1]
        dense_k, dense_v = (
            torch.stack([reference.gather(p, row, context) for row in table]).transpose(1, 2).contiguous() for p in (k, v)
        )
        best = race(
            clock,
            rounds,
            ours=partial(kernels.paged_attention_decode, q, k, v, table, lengths, SCALE),
            torch=partial(F.scaled_dot_product_attention, q[:, :, None], dense_k, dense_v, scale=SCALE, enable_gqa=True),
        )
        nbytes = 2 * batch * context * KV_HEADS * HEAD_DIM * torch.finfo(dtype).bits // 8
        results[f"{batch}x{context}"] = {
            "us": best["ours"] * 1e6,
            "gb_per_s": nbytes / best["ours"] * 1e-9,
            "torch_over_ours": best["torch"] / best["ours"],
        }
    return results


def bench_prefill(clock: Callable[[], float], rounds: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Against gathering to float32 and SDPA, what the engine would do without the kernel."""
    results = {}
    for queries, context in ((512, 512), (512, 2048), (512, 8192), (2048, 8192)):
        blocks = context // BLOCK_TOKENS
        pool = torch.randn(blocks, 2, 2, BLOCK_TOKENS, KV_HEADS, HEAD_DIM).to(dtype)
        q = torch.randn(queries, Q_HEADS, HEAD_DIM).to(dtype)
        cu_seqlens = torch.tensor([0, queries], dtype=torch.int32)
        positions, table = torch.arange(context - queries, context), torch.randperm(blocks).view(1, -1).int()
        arguments = (q, pool[:, 0, 0], pool[:, 0, 1], cu_seqlens, positions, table, SCALE)
        best = race(
            clock,
            max(2, rounds // 3),
            ours=partial(kernels.paged_attention_prefill, *arguments),
            torch=partial(reference.paged_attention_prefill, *arguments),
        )
        flop = 4 * queries * (context - queries / 2) * Q_HEADS * HEAD_DIM
        results[f"{queries}of{context}"] = {
            "ms": best["ours"] * 1e3,
            "gflop_per_s": flop / best["ours"] * 1e-9,
            "torch_over_ours": best["torch"] / best["ours"],
        }
    return results


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 2) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU kernels beside torch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread instead of wall time")
    options = parser.parse_args()
    threads = 1 if options.cpu_time else options.threads
    torch.set_num_threads(threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    dtype = getattr(torch, options.dtype)
    print(kernels.BUILD.reason)
    report: dict[str, object] = {"threads": threads, "dtype": options.dtype, "clock": "cpu" if options.cpu_time else "wall"}
    report["ceiling"] = ceilings(clock)
    print(report)
    for name, bench in (("linear", bench_linear), ("decode", bench_decode), ("prefill", bench_prefill)):
        report[name] = results = bench(clock, options.rounds, dtype)
        for shape, figures in results.items():
            print(f"{name:8} {shape:>14}", *(f"{key} {value:9.2f}" for key, value in figures.items()), flush=True)
    print(json.dumps(rounded(report)))


if __name__ == "__main__":
    with torch.inference_mode():
        main()

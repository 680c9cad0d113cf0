"""Which eviction policy finds the most blocks: the store's own and others, on synthetic traces, beside the best possible.

    python -m loadtest.bench_eviction [--requests 4000] [--seeds 2] [--sizes 0.05,0.15,0.4]

The index is the store's own, and so is what happens to it: a request looks its chain up, uses what it finds, and stores
the rest, tail last. A size is a share of the trace's distinct blocks. The hit ratio is blocks found over blocks asked for.
`best` knows the future (Belady's MIN, which may also refuse a block): of the blocks in reach it keeps those that are used
again soonest. An ancestor is used no later than what hangs on it, so the best is prefix-closed, and no policy can do better.

The last line is JSON: hit ratios in percent, the mean over the seeds.
"""

import argparse
import heapq
import itertools
import json
from collections.abc import Sequence

from loadtest.block_traces import MIXES, trace
from loadtest.eviction_policies import Lfu, Lru, S3Fifo, S3FifoLineage, TwoQueues
from services.kvstore.eviction import NewcomersFirst
from services.kvstore.index import Index

POLICIES: dict[str, type[NewcomersFirst]] = {
    "newcomers first": NewcomersFirst,
    "LRU": Lru,
    "LFU": Lfu,
    "2Q": TwoQueues,
    "S3-FIFO": S3Fifo,
    "S3-FIFO, lineage": S3FifoLineage,
}
ROOT = b"r" * 32
NEVER = 1 << 60


def hit_ratio(kind: type[NewcomersFirst], chains: Sequence[Sequence[int]], slots: int) -> float:
    policy = kind()
    index = Index(policy, itertools.count(1), slots)
    index.grow(slots)
    free = list(range(slots))
    found = asked = 0
    for chain in chains:
        keys = [block.to_bytes(8, "little") + bytes(24) for block in chain]
        held = index.prefix(keys)
        found += len(held)
        asked += len(chain)
        if len(held):
            index.touch(held)
        store(index, policy, chain, keys, len(held), int(held[-1]) if len(held) else None, free)
    return found / asked


def store(
    index: Index, policy: NewcomersFirst, chain: Sequence[int], keys: list[bytes], start: int, last: int | None, free: list[int]
) -> None:
    """Stores blocks `[start, …)` of a chain, each pinned until the next one hangs on it."""
    if last is not None:
        index.offers.pin(last)
    for i in range(start, len(keys)):
        slot = free.pop() if free else index.evict()
        if slot is None:
            break
        if isinstance(policy, S3Fifo):
            policy.note(slot, chain[i])
        index.insert(slot, keys[i], keys[i - 1] if i else ROOT, 0, 0)
        index.offers.pin(slot)
        if last is not None:
            index.offers.unpin(last)
        last = slot
    if last is not None:
        index.offers.unpin(last)


def best_hit_ratio(chains: Sequence[Sequence[int]], slots: int) -> float:
    """Of Belady's MIN with bypass."""
    upcoming: dict[int, int] = {}
    following: list[list[int]] = []  # per request, when each of its blocks is asked for next
    for time in range(len(chains) - 1, -1, -1):
        following.append([upcoming.get(block, NEVER) for block in chains[time]])
        upcoming |= dict.fromkeys(chains[time], time)
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    found = asked = 0
    for chain, uses in zip(chains, reversed(following), strict=True):
        asked += len(chain)
        for block, use in zip(chain, uses, strict=True):
            found += held.pop(block, None) is not None
            if use != NEVER:
                held[block] = use
                heapq.heappush(farthest, (-use, -block))
        while len(held) > slots:
            use, block = heapq.heappop(farthest)
            if held.get(-block) == -use:
                del held[-block]
    return found / asked


def measure(requests: int, seeds: int, sizes: Sequence[float]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for mix, size in itertools.product(MIXES, sizes):
        rows: list[dict[str, float]] = []
        for seed in range(seeds):
            chains = trace(mix, seed, requests)
            slots = round(size * len({block for chain in chains for block in chain}))
            row = {name: hit_ratio(kind, chains, slots) for name, kind in POLICIES.items()}
            rows.append(row | {"best": best_hit_ratio(chains, slots)})
        means = {name: round(100 * sum(row[name] for row in rows) / seeds, 1) for name in rows[0]}
        out[f"{mix.name} {size:g}"] = means
        print(f"{mix.name:12} {size:5g}  " + "  ".join(f"{name} {value:.1f}" for name, value in means.items()), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sizes", default="0.05,0.15,0.4")
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen.requests, chosen.seeds, [float(size) for size in chosen.sizes.split(",")])))


if __name__ == "__main__":
    main()

"""Memory and time of the kvstore's index, beside a plain dict from key to slot.

    python -m loadtest.bench_index [--blocks 1000000] [--chain 4096] [--rounds 50]

The sum, per slot: 32 bytes of key, 1.6 table entries of 8, checksum 4, sequence 8, pins 4, state 1, four links of
4, two queue links of 4 and a queue number, last use 8. What the store holds beside (leases, buffers) doesn't grow with
blocks. The index is filled a request (64 blocks, or a whole chain if shorter) at a time, as a store fills up. Memory is what the process
grew by, so it holds whatever Python and numpy add. Lookups are of whole chains that are stored, in random order, and of
chains of which nothing is stored; the dict is asked the same.

The last line is JSON.
"""

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from services.kvstore.entries import ENTRY
from services.kvstore.eviction import NewcomersFirst
from services.kvstore.index import Index
from services.kvstore.key_table import words

KEY_BYTES = 32
SEGMENT_SLOTS = 32_768  # 256 MiB of 4 KiB blocks with their header pages
GROUP = 64  # blocks that are put in, or evicted, together
ROOT = b"r" * KEY_BYTES
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def chain_keys(seed: int, length: int) -> list[bytes]:
    """Keys like digests; the same for the same seed, so that they needn't be kept."""
    packed = random.Random(seed).randbytes(KEY_BYTES * length)
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def fill(index: Index, chains: int, length: int) -> None:
    slot = 0
    for seed in range(chains):
        keys = chain_keys(seed, length)
        for first in range(0, length, GROUP):
            group = keys[first : first + GROUP]
            slots = range(slot, slot + len(group))
            index.grow(grown(slots.stop))
            index.insert_many(slots, group, [keys[first - 1] if first else ROOT, *group[:-1]], slots, slots)
            slot = slots.stop


def grown(slots: int) -> int:
    """`slots` in whole segments."""
    return -(-slots // SEGMENT_SLOTS) * SEGMENT_SLOTS


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(blocks: int, length: int, rounds: int) -> dict[str, float]:
    chains = max(1, blocks // length)
    blocks = chains * length
    out: dict[str, float] = {"blocks": blocks, "chain": length}
    before = resident_bytes()
    index = Index(NewcomersFirst(), itertools.count(1), blocks)
    filling = seconds(lambda: fill(index, chains, length))
    out["bytes_per_block"] = (resident_bytes() - before) / blocks
    making = seconds(lambda: [chain_keys(seed, length) for seed in range(chains)])
    out["insert_us"] = (filling - making) / blocks * 1e6
    out |= lookups(index, chains, length, rounds)
    before = resident_bytes()
    plain = {key: slot for slot, key in enumerate(key for seed in range(chains) for key in chain_keys(seed, length))}
    out["dict_bytes_per_block"] = (resident_bytes() - before) / blocks
    times = [seconds(partial(list, map(plain.get, keys))) for keys in some_chains(chains, length, rounds)]
    out["dict_lookup_us_p50"] = statistics.median(times) * 1e6
    plain.clear()
    groups = max(1, blocks // 10 // GROUP)
    out["evict_us"] = seconds(lambda: [index.evict_many(GROUP) for _ in range(groups)]) / (groups * GROUP) * 1e6
    return out | restore(chains, length)


def some_chains(chains: int, length: int, rounds: int) -> list[list[bytes]]:
    choice = random.Random(0)
    return [chain_keys(choice.randrange(chains), length) for _ in range(rounds)]


def lookups(index: Index, chains: int, length: int, rounds: int) -> dict[str, float]:
    stored = some_chains(chains, length, rounds)
    absent = [chain_keys(chains + i, length) for i in range(rounds)]
    assert all(len(index.prefix(keys)) == length for keys in stored)
    found = sorted(seconds(partial(index.prefix, keys)) for keys in stored)
    missed = sorted(seconds(partial(index.prefix, keys)) for keys in absent)
    return {
        "lookup_us_p50": statistics.median(found) * 1e6,
        "lookup_us_p99": found[int(0.99 * (rounds - 1))] * 1e6,
        "miss_us_p50": statistics.median(missed) * 1e6,
    }


def restore(chains: int, length: int) -> dict[str, float]:
    """Taking all blocks in at once, as a restart does."""
    packed = b"".join(random.Random(seed).randbytes(KEY_BYTES * length) for seed in range(chains))
    entries = np.zeros(chains * length, ENTRY)
    entries["key"] = words(packed)
    entries["parent"] = np.roll(entries["key"], 1, axis=0)
    entries["parent"][::length] = words(ROOT)
    entries["tick"] = entries["sequence"] = np.arange(len(entries))
    index = Index(NewcomersFirst(), itertools.count(1), len(entries))

    def work() -> None:
        index.grow(len(entries))
        index.insert_all(np.arange(len(entries), dtype=np.int32), entries)

    return {"restore_s": seconds(work)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--chain", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    print(json.dumps({name: round(value, 3) for name, value in measure(options.blocks, options.chain, options.rounds).items()}))


if __name__ == "__main__":
    main()

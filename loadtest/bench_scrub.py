"""What the background scrub costs reads: their latency and bandwidth with it and without, in turns.

    python -m loadtest.bench_scrub [--data DIR] [--blocks 512] [--block-bytes 524288] [--depth 8] [--pause-ms 5] [--rounds 5]

Two loads: readers that never pause (`busy`), and readers that pause after each read (`paused`), as most stores are used. The sum: at 16 MiB/s
the scrub takes 0.4 % of a disk that reads 4 GB/s, one block at a time, and waits while reads are queued. So beside busy readers it gets
one block a second; beside pausing ones its 16 MiB/s, and a read that comes while it reads a block of 512 KiB waits for 0.13 ms of the disk. `--bytes-per-s` lets it loose.

The last line is JSON: ratios of the medians over rounds, with the scrub over without.
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.blocks import Namespace
from common.storage import BlockMeta
from common.transport.interface import Part, PartStatus
from common.transport.memory import checksums
from services.kvstore.area import StoreArea
from services.kvstore.options import StoreOptions
from services.kvstore.scrub import Scrub
from services.kvstore.store import Store

NAMESPACE = Namespace("5c" * 32)
BATCH = 16  # blocks written at once
ROUND_S = 3.0


async def fill(store: Store, area: StoreArea, keys: Sequence[bytes], length: int) -> None:
    """Writes a chain."""
    payload = random.Random(1).randbytes(length)
    known = checksums(payload)
    for first in range(0, len(keys), BATCH):
        batch = keys[first : first + BATCH]
        before = [keys[first - 1] if first else bytes(32), *batch[:-1]]
        offers = [BlockMeta(key, parent, length) for key, parent in zip(batch, before, strict=True)]
        reserved = await store.reserve(NAMESPACE, offers, None)
        assert reserved.token is not None
        parts = [Part(i, 0, length) for i in range(len(batch))]
        places = [place for place in area.write_buffers(reserved.token, parts) if isinstance(place, memoryview)]
        assert len(places) == len(batch)
        for place in places:
            place[:] = payload
        statuses = await area.commit(reserved.token, parts, places, [known] * len(batch))
        assert set(statuses) == {PartStatus.OK}
        store.release(reserved.token)


async def read_for_a_while(
    store: Store, area: StoreArea, keys: Sequence[bytes], length: int, depth: int, pause_s: float
) -> list[float]:
    """Single blocks at random, by `depth` readers that pause after each, half to one and a half times `pause_s`; seconds of each."""
    found = store.lookup(NAMESPACE, keys, None, lease=True)
    assert found.token is not None and found.blocks == len(keys)
    token, took, until = found.token, list[float](), time.perf_counter() + ROUND_S
    choice = random.Random(2)

    async def reader() -> None:
        while (began := time.perf_counter()) < until:
            part = Part(choice.randrange(len(keys)), 0, length)
            ((status, view, _),) = await area.read(token, [part], None)
            assert status is PartStatus.OK and view is not None
            area.done_reading(token, [view])
            took.append(time.perf_counter() - began)
            if pause_s:
                await asyncio.sleep(pause_s * (0.5 + choice.random()))

    await asyncio.gather(*(reader() for _ in range(depth)))
    store.release(token)
    return took


async def measure(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    room = 2 * given.blocks * (given.block_bytes + 8192) + (64 << 20)
    store = Store.open(folder, StoreOptions(budget_bytes=room, segment_bytes=32 << 20))
    area = StoreArea(store, read_buffer_bytes=256 << 20, write_buffer_bytes=256 << 20, read_deadline_s=30.0)
    keys = [hashlib.sha256(i.to_bytes(8, "little")).digest() for i in range(given.blocks)]
    loads = {"busy": 0.0, "paused": given.pause_ms / 1e3}
    results: dict[str, dict[str, list[list[float]]]] = {load: {"without": [], "with": []} for load in loads}
    scrubbed = dict.fromkeys(loads, 0)
    try:
        await fill(store, area, keys, given.block_bytes)
        for turn in range(2 * given.rounds):
            for load, pause_s in loads.items():
                name = ("without", "with")[turn % 2]
                scrub = Scrub(store, bytes_per_s=given.bytes_per_s, every_s=0)
                running = asyncio.create_task(scrub.run())
                if name == "with":
                    scrub.start()
                took = await read_for_a_while(store, area, keys, given.block_bytes, given.depth, pause_s)
                results[load][name].append(took)
                running.cancel()
                await asyncio.wait([running])
                scrubbed[load] += scrub.progress.bytes_done
        await store.settle()
    finally:
        store.close()
    return {
        f"{load}_{name}": value
        for load in loads
        for name, value in summary(results[load], given.block_bytes, scrubbed[load]).items()
    }


def summary(results: dict[str, list[list[float]]], length: int, scrubbed: int) -> dict[str, float]:
    """Medians over the rounds, and their ratios."""
    out: dict[str, float] = {"scrub_mib_per_s": scrubbed / (len(results["with"]) * ROUND_S) / (1 << 20)}
    for name, rounds in results.items():
        out[f"{name}_gb_per_s"] = statistics.median(len(took) * length / ROUND_S for took in rounds) / 1e9
        for share, label in ((0.5, "p50"), (0.99, "p99")):
            out[f"{name}_{label}_ms"] = 1e3 * statistics.median(sorted(took)[int(share * len(took))] for took in rounds)
    for label in ("gb_per_s", "p50_ms", "p99_ms"):
        out[f"{label}_ratio"] = out[f"with_{label}"] / out[f"without_{label}"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_scrub", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder on the disk to measure; default: a temporary one here")
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--block-bytes", type=int, default=512 << 10)
    parser.add_argument("--depth", type=int, default=8, help="readers")
    parser.add_argument("--rounds", type=int, default=5, help="of 3 s, each with and without, by each load")
    parser.add_argument("--pause-ms", type=float, default=5.0, help="of the pausing readers, after each read, on average")
    parser.add_argument("--bytes-per-s", type=int, default=16 << 20, help="the scrub's cap")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-scrub-", dir=given.data or Path.cwd()) as folder:
        found = asyncio.run(measure(given, Path(folder)))
    for name, value in found.items():
        print(f"{name:<28}{value:>10.3f}")
    print(json.dumps({"bench": "scrub", "depth": given.depth} | {name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()

"""How long a kvstore of many small blocks takes from start to ready, and how much memory it then has.

    python -m loadtest.bench_restart [--blocks 1000000] [--payload-bytes 4096] [--folder DIR]

Segment files are laid out as a store writes them, chains of 64 blocks. Then stores are opened on them, each in
a process of its own, with the pages dropped from the page cache before: after a crash (no checkpoints: every
header page is read), and after a clean end (checkpoints: none is). Each process also looks up chains, to show
that they are found. The ceiling of the first is what the disk reads: segments of small blocks are read whole.

The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import heap
from common.blocks import Namespace
from common.disk.pages import huge
from common.transport.memory import crc32c
from loadtest.bench_index import ROOT, chain_keys, resident_bytes
from services.kvstore.files import Files
from services.kvstore.header_scan import READ_BYTES
from services.kvstore.options import StoreOptions
from services.kvstore.record import PAGE_BYTES, Geometry, SegmentHeader, SlotHeader, encode_slot
from services.kvstore.segment import create
from services.kvstore.store import Store

NAMESPACE = Namespace("ab" * 32)
CHAIN = 64
SEGMENT_BYTES = 256 << 20
LOOKUPS = 100


def lay_out(folder: Path, blocks: int, payload_bytes: int) -> Geometry:
    """Writes the segments of a store that holds `blocks` blocks; all have one payload."""
    slots = (SEGMENT_BYTES - PAGE_BYTES) // Geometry(payload_bytes, 1).slot_bytes
    geometry = Geometry(payload_bytes, slots)
    payload = os.urandom(payload_bytes)
    body = payload.ljust(geometry.padded_bytes, b"\0")
    where = folder / "namespaces" / NAMESPACE
    where.mkdir(parents=True)
    namespace, checksum = bytes.fromhex(NAMESPACE), crc32c(payload)
    keys: list[bytes] = []
    parent = ROOT
    for number in range(-(-blocks // slots)):
        create(Files(), where, SegmentHeader(namespace, geometry, number), direct=False).close()
        with open(where / f"{number:08d}.seg", "r+b", buffering=1 << 22) as file:
            file.seek(PAGE_BYTES)
            for slot in range(min(slots, blocks - number * slots)):
                block = number * slots + slot
                if block % CHAIN == 0:
                    keys, parent = chain_keys(block // CHAIN, CHAIN), ROOT
                key = keys[block % CHAIN]
                header = SlotHeader(namespace, key, parent, block + 1, payload_bytes, checksum, slot, number)
                file.write(encode_slot(header))
                file.write(body)
                parent = key
    return geometry


def forget_pages(folder: Path) -> None:
    """Writes back and drops from the page cache what lies in a folder."""
    os.sync()
    for path in folder.rglob("*.*"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def options(blocks: int, payload_bytes: int) -> StoreOptions:
    budget = 2 * SEGMENT_BYTES + blocks * Geometry(payload_bytes, 1).slot_bytes
    return StoreOptions(budget_bytes=budget, segment_bytes=SEGMENT_BYTES)


def open_once(folder: Path, blocks: int, payload_bytes: int) -> dict[str, float]:
    """What one start costs; for a process of its own. Ends cleanly, so that the next finds checkpoints."""
    before = resident_bytes()
    started = time.perf_counter()
    store = Store.open(folder, options(blocks, payload_bytes))
    heap.settle()  # as the service does
    ready_s = time.perf_counter() - started
    held = resident_bytes() - before
    choice = random.Random(1)
    for _ in range(LOOKUPS):
        keys = chain_keys(choice.randrange(blocks // CHAIN), CHAIN)
        assert store.lookup(NAMESPACE, keys, None, lease=False).blocks == CHAIN
    stored = store.blocks
    ending = time.perf_counter()
    asyncio.run(store.drain(10.0))
    store.close()
    return {
        "ready_s": ready_s,
        "blocks": stored,
        "resident_bytes_per_block": held / stored,
        "index_bytes_per_block": sum(shelf.index.nbytes for shelf in store.space.shelves.values()) / stored,
        "peak_bytes_per_block": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / stored,
        "end_s": time.perf_counter() - ending,
    }


def measure(folder: Path, blocks: int, payload_bytes: int) -> dict[str, float]:
    geometry = lay_out(folder, blocks, payload_bytes)
    out: dict[str, float] = {"blocks": blocks, "payload_bytes": payload_bytes}
    forget_pages(folder)
    started = time.perf_counter()
    read = read_raw(folder)
    out["disk_read_gb_per_s"] = read / (time.perf_counter() - started) / 1e9
    for name in ("crash", "clean"):
        forget_pages(folder)
        command = [sys.executable, "-m", "loadtest.bench_restart", "--open", str(folder)]
        command += ["--blocks", str(blocks), "--payload-bytes", str(payload_bytes)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(said.splitlines()[-1])
        assert result["blocks"] == blocks, f"{result['blocks']} of {blocks} blocks were found after a {name} end"
        out |= {f"{name}_{key}": value for key, value in result.items() if key != "blocks"}
    out["crash_over_disk"] = blocks * geometry.slot_bytes / out["crash_ready_s"] / 1e9 / out["disk_read_gb_per_s"]
    return out


def read_raw(folder: Path) -> int:
    """Reads a few segments in 4 MiB pieces past the page cache: what the disk gives to one reader. Bytes."""
    piece, total = huge(READ_BYTES), 0
    for path in sorted(folder.rglob("*.seg"))[:8]:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        for offset in range(0, path.stat().st_size, READ_BYTES):
            total += os.preadv(fd, [piece], offset)
        os.close(fd)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--payload-bytes", type=int, default=4096)
    parser.add_argument("--folder", default=None, help="where to put the store; default: the temporary folder")
    parser.add_argument("--open", default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.open:
        result = open_once(Path(chosen.open), chosen.blocks, chosen.payload_bytes)
    else:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            result = measure(Path(folder), chosen.blocks // CHAIN * CHAIN, chosen.payload_bytes)
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()

"""`make bench-store`: the kvstore's disk I/O beside fio, and its service path beside fio and a plain socket.

    python -m loadtest.bench_store [--folder data] [--rounds 3] [--ramp-s 0.2] [--slice-s 0.3] [--sizes 131072,524288,2097152] [--depths 1,8,32]

fio (Debian's package; nothing is installed here) uses the engine that the kvstore chose, the same block size and
depth, O_DIRECT, on a file beside the store's. The sides take turns within each round, in changing order, and the
disk rests as long before the store's slice as it does while fio starts. A ratio is the median over the rounds.
Before each slice the same load runs uncounted (the ramp): virtual disks let a burst through after a rest, and it is
what they sustain that is compared. `--ramp-s 0` compares bursts.

- `read`: random blocks, `depth` at the kernel, more queued behind, each verified and in the caller's memory.
- `read_closed`: `depth` requests of a block each, the next when one has ended: latencies are of these (loadtest/store/local.py).
- `write`: durable, from the store's buffers. Both overwrite 512 MiB again and again, in order. fio issues an fdatasync for every
  8 MiB, among the writes, and goes on; it covers what has ended by then. The store answers each request of 8 MiB when syncs of its
  segments that began after its writes have ended; requests may share one, and others' writes go on meanwhile. `depth` is what the
  disk has at once: of fio's, blocks; of the store's, runs of neighbouring slots of up to 1 MiB, 8 MiB in all, so with blocks of
  128 KiB at depth 8 the disk has up to 8 MiB of the store's and 1 MiB of fio's. What waits behind, waits at the kernel. The store
  reserves and evicts; the bytes have come, and the carrier has checked them, which gives the checksums of their chunks too.
- `write_scattered`: the same where no two slots of a request are neighbours but by chance; fio writes its blocks at random. So the
  disk has as many bytes of the one as of the other. fio syncs one file, the store its eight segments.
- `service_write`: as `write`, from another process' memory, over gRPC and shm: copied and checksummed on the way.
- `extent`, `shm`, `tcp`: another process asks over gRPC and gets the blocks in its stage, at the deepest depth only: at the disk
  at once, while as many requests as a worker's are in flight (loadtest/store/service.py).

The sum: the disk's bandwidth is the ceiling of all rows but tcp's, whose ceiling is the lower of disk and plain socket.
Reading costs a checksum (0.1-0.2 CPU s/GiB), writing none, service_write two and a copy, tcp two and two copies.

The last line is JSON: the worst ratio over the sizes at depth >= 8 for each path, then every row.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import uvloop

from common.disk.engine import EngineChoice, Machine, open_engine
from loadtest.store.blocks import NAMESPACE, Blocks
from loadtest.store.fio import READS_IN_FLIGHT, Fio, Sample, blocks_per_read, require_fio
from loadtest.store.local import LocalStore
from loadtest.store.plain import PlainSocket
from loadtest.store.service import CARRIERS, Service
from services.kvstore.files import direct_io_works

TOTAL_BYTES = 512 << 20  # of each store, and of fio's file
FULL_BYTES = TOTAL_BYTES + TOTAL_BYTES // 8  # a budget that TOTAL_BYTES fill: header pages are 3 % at most
DEEP = 8  # the depth from which a disk can be kept busy
Way = Callable[[float, float], Awaitable[Sample]]  # ramp and slice, in seconds


class Row(msgspec.Struct, frozen=True):
    """One path at one size and depth: its median, its yardstick's, and the median ratio of rounds."""

    path: str
    block_bytes: int
    depth: int
    gb_per_s: float
    fio_gb_per_s: float
    over_fio: float
    p50_over_fio: float | None  # of `read_closed`: elsewhere an end is another thing than fio's
    p99_over_fio: float | None
    cpu_s_per_gib: float
    fio_cpu_s_per_gib: float


class Bench:
    """Takes turns between ways and fio."""

    def __init__(self, fio: Fio, rounds: int, ramp_s: float, slice_s: float) -> None:
        self.rows: list[Row] = []
        self.fio, self.rounds, self.ramp_s, self.slice_s = fio, rounds, ramp_s, slice_s

    async def compare(
        self, yardstick: Callable[[float, float], Sample], ways: Mapping[str, Way], block_bytes: int, depth: int
    ) -> None:
        """Adds a row for each way."""
        samples: dict[str, list[Sample]] = {name: [] for name in (*ways, "fio")}
        for turn in range(self.rounds):
            names = ["fio", *ways]
            for name in reversed(names) if turn % 2 else names:
                if name == "fio":
                    samples[name].append(yardstick(self.ramp_s, self.slice_s))
                    continue
                await asyncio.sleep(self.fio.overhead_s)
                samples[name].append(await ways[name](self.ramp_s, self.slice_s))
        for name in ways:
            self.rows.append(_row(name, block_bytes, depth, samples[name], samples["fio"]))
            print(self.rows[-1], file=sys.stderr)

    def worst(self, path: str) -> float:
        """Over the sizes, at depths that keep a disk busy."""
        return min(row.over_fio for row in self.rows if row.path == path and row.depth >= min(DEEP, self.deepest))

    @property
    def deepest(self) -> int:
        return max(row.depth for row in self.rows)


def _row(path: str, block_bytes: int, depth: int, ours: list[Sample], fio: list[Sample]) -> Row:
    def ratio(name: str) -> float:
        pairs = zip(ours, fio, strict=True)
        ratios: list[float] = [getattr(one, name) / getattr(other, name) for one, other in pairs]
        return round(statistics.median(ratios), 3)

    def median(samples: list[Sample], name: str) -> float:
        values: list[float] = [getattr(sample, name) for sample in samples]
        return statistics.median(values)

    return Row(
        path,
        block_bytes,
        depth,
        round(median(ours, "bytes_per_s") / 1e9, 2),
        round(median(fio, "bytes_per_s") / 1e9, 2),
        ratio("bytes_per_s"),
        ratio("p50_s") if path == "read_closed" else None,
        ratio("p99_s") if path == "read_closed" else None,
        round(median(ours, "cpu_s_per_gib"), 3),
        round(median(fio, "cpu_s_per_gib"), 3),
    )


async def local_rows(bench: Bench, folder: Path, sizes: list[int], depths: list[int], io: EngineChoice) -> None:
    fio = bench.fio
    for size in sizes:
        for depth in depths:
            place = folder / f"local-{size}-{depth}"  # each fills a store of its own: what was read before would be kept
            store = LocalStore(place, size, TOTAL_BYTES, depth, io)
            await store.fill()
            await bench.compare(partial(fio.write, size, depth), {"write": store.write}, size, depth)
            if depth >= min(DEEP, max(depths)):
                await store.fill_scattered()
                await bench.compare(partial(fio.write_scattered, size, depth), {"write_scattered": store.write}, size, depth)
            await store.fill()
            ways: dict[str, Way] = {"read": store.read, "read_closed": store.read_closed}
            await bench.compare(partial(fio.read, size, depth), ways, size, depth)  # last: what a read found would stay
            await store.close()
            shutil.rmtree(place)


async def service_rows(bench: Bench, folder: Path, sizes: list[int], depth: int, io: str) -> float:
    """Adds the service's rows; the plain socket's bytes per second."""
    fio, plain, received = bench.fio, PlainSocket(), []
    for size in sizes:
        # A full store for each size: what is written evicts and overwrites.
        place, blocks = folder / f"service-{size}", Blocks(size)
        region_bytes = max(8 << 20, READS_IN_FLIGHT * blocks_per_read(size) * size)
        service = await Service.start(place, region_bytes, FULL_BYTES, io, depth)
        stored = await service.fill(NAMESPACE, blocks, TOTAL_BYTES // size)
        ways: dict[str, Way] = {carrier: partial(service.read, stored, carrier, size) for carrier in CARRIERS}
        await bench.compare(partial(fio.read, size, depth), ways, size, depth)
        received.append(plain.receive(bench.slice_s).bytes_per_s)
        await service.client.release(stored.token)
        writing: dict[str, Way] = {"service_write": partial(service.write, NAMESPACE, blocks, depth)}
        await bench.compare(partial(fio.write, size, depth), writing, size, depth)
        await service.close()
        shutil.rmtree(place)
    plain.close()
    return statistics.median(received)


async def measure(args: argparse.Namespace, folder: Path, engine: EngineChoice) -> dict[str, object]:
    fio = Fio(folder / "fio", TOTAL_BYTES, engine)
    fio.lay_out()
    bench = Bench(fio, args.rounds, args.ramp_s, args.slice_s)
    await local_rows(bench, folder, args.sizes, args.depths, engine)
    socket_bytes_per_s = await service_rows(bench, folder, args.sizes, max(args.depths), engine)
    tcp = [row for row in bench.rows if row.path == "tcp"]
    return {
        "read_over_fio": bench.worst("read"),
        "read_closed_over_fio": bench.worst("read_closed"),
        "write_over_fio": bench.worst("write"),
        "write_scattered_over_fio": bench.worst("write_scattered"),
        "service_write_over_fio": bench.worst("service_write"),
        "service_read_over_fio": bench.worst("extent"),
        "service_shm_over_fio": bench.worst("shm"),
        "service_tcp_over_fio": bench.worst("tcp"),
        "service_tcp_over_socket": min(round(row.gb_per_s * 1e9 / socket_bytes_per_s, 3) for row in tcp),
        "service_tcp_over_ceiling": min(
            round(row.gb_per_s * 1e9 / min(socket_bytes_per_s, row.fio_gb_per_s * 1e9), 3) for row in tcp
        ),
        "socket_gb_per_s": round(socket_bytes_per_s / 1e9, 2),
        "rows": [msgspec.to_builtins(row) for row in bench.rows],
    }


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("data"), help="a folder on the SSD in question")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slice-s", type=float, default=0.3)
    parser.add_argument("--ramp-s", type=float, default=0.2, help="load before each slice, not counted")
    parser.add_argument("--sizes", type=_numbers, default=[128 << 10, 512 << 10, 2 << 20])
    parser.add_argument("--depths", type=_numbers, default=[1, 8, 32])
    args = parser.parse_args()
    version = require_fio()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not direct_io_works(args.folder):
        raise SystemExit(f"{args.folder} takes no O_DIRECT: name a folder on an SSD (--folder)")
    probe = open_engine(Machine(), "auto", label="bench", depth=1, pending_max=1)
    probe.close()
    engine: EngineChoice = "io_uring" if probe.name == "io_uring" else "threads"
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-store-") as folder:
        result = uvloop.run(measure(args, Path(folder), engine))
    print(json.dumps({"bench": "store", "fio": version, "engine": engine, **result}))


if __name__ == "__main__":
    main()

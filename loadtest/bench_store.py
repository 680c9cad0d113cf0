"""`make bench-store`: the kvstore's disk I/O beside fio, and its service path beside fio and a plain socket.

    python -m loadtest.bench_store [--folder data] [--rounds 3] [--ramp-s 0.3] [--slice-s 0.4] [--sizes 131072,524288,2097152] [--depths 1,8,32]

fio (Debian's package; nothing is installed here) uses the engine that the kvstore chose, the same block size and
depth, O_DIRECT, on a file beside the store's. The sides take turns within each round, in changing order, and the
disk rests as long before the store's slice as it does while fio starts. A ratio is the median over the rounds.
Before each slice the same load runs uncounted (the ramp): virtual disks let a burst through after a rest, and it is
what they sustain that is compared. `--ramp-s 0` compares bursts.

- `read`: random blocks, `depth` in flight, each verified and in the caller's memory (loadtest/store/local.py).
- `write`: durable, from the store's buffers. fio syncs (fdatasync) after every 8 MiB; the store answers each request of
  8 MiB when a sync that began after its writes has ended, so requests may share one. Both overwrite. The store
  reserves, evicts, and checksums the chunks; the bytes have come and their checksum is known.
- `service_write`: the same from another process' memory, over gRPC and shm: copied and checksummed on the way.
- `extent`, `shm`, `tcp`: another process asks over gRPC and gets the blocks in its stage (loadtest/store/service.py).

The sum: the disk's bandwidth is the ceiling of all rows but tcp's, whose ceiling is the lower of disk and plain socket.
Reading costs a checksum (0.1-0.2 CPU s/GiB), writing one (of the chunks), service_write three and a copy, tcp two and two copies.

The last line is JSON: the worst ratio over the sizes at depth >= 8 for each path, then every row.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import uvloop

from common.blocks import Namespace
from common.disk.engine import Machine, open_engine
from loadtest.store.blocks import NAMESPACE, Blocks
from loadtest.store.fio import Fio, Sample, require_fio
from loadtest.store.local import LocalStore
from loadtest.store.plain import PlainSocket
from loadtest.store.service import CARRIERS, Service
from services.kvstore.files import direct_io_works

TOTAL_BYTES = 512 << 20  # of each store, and of fio's file
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
    p50_over_fio: float | None  # of writes there is none: fio's end before they are durable
    p99_over_fio: float | None
    cpu_s_per_gib: float
    fio_cpu_s_per_gib: float


class Bench:
    """Takes turns between ways and fio."""

    def __init__(self, fio: Fio, rounds: int, ramp_s: float, slice_s: float) -> None:
        self.rows: list[Row] = []
        self.fio, self.rounds, self.ramp_s, self.slice_s = fio, rounds, ramp_s, slice_s

    async def compare(
        self, yardstick: Callable[[float, float], Sample], ways: dict[str, Way], block_bytes: int, depth: int
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
        None if "write" in path else ratio("p50_s"),
        None if "write" in path else ratio("p99_s"),
        round(median(ours, "cpu_s_per_gib"), 3),
        round(median(fio, "cpu_s_per_gib"), 3),
    )


async def local_rows(bench: Bench, folder: Path, sizes: list[int], depths: list[int], io: str) -> None:
    for size in sizes:
        for depth in depths:
            store = LocalStore(folder / f"local-{size}", size, TOTAL_BYTES, depth, io)  # type: ignore[arg-type]
            await store.fill()
            await bench.compare(lambda r, s, b=size, d=depth: bench.fio.read(b, d, r, s), {"read": store.read}, size, depth)  # type: ignore[misc]
            await bench.compare(lambda r, s, b=size, d=depth: bench.fio.write(b, d, r, s), {"write": store.write}, size, depth)  # type: ignore[misc]
            await store.close()


async def service_rows(bench: Bench, folder: Path, sizes: list[int], depths: list[int], io: str) -> float:
    """Adds the service's rows; the plain socket's bytes per second."""
    budget_bytes = 3 * len(sizes) * TOTAL_BYTES
    service = await Service.start(folder / "service", max(8 << 20, max(sizes) * max(depths)), budget_bytes, io)
    plain, received = PlainSocket(), []
    for number, size in enumerate(sizes):
        namespace = Namespace(f"{number:02x}{NAMESPACE[2:]}")
        blocks = Blocks(size)
        stored = await service.fill(namespace, blocks, TOTAL_BYTES // size)
        for depth in (depth for depth in depths if depth >= DEEP):
            ways: dict[str, Way] = {
                carrier: lambda r, s, c=carrier, k=stored, b=size, d=depth: service.read(k, c, b, d, r, s)  # type: ignore[misc]
                for carrier in CARRIERS
            }
            await bench.compare(lambda r, s, b=size, d=depth: bench.fio.read(b, d, r, s), ways, size, depth)  # type: ignore[misc]
            received.append(plain.receive(bench.slice_s).bytes_per_s)
        await service.client.release(stored.token)
        for depth in (depth for depth in depths if depth >= DEEP):

            async def write(r: float, s: float, n: Namespace = namespace, k: Blocks = blocks, d: int = depth) -> Sample:
                return await service.write(n, k, d, r, s)

            await bench.compare(lambda r, s, b=size, d=depth: bench.fio.write(b, d, r, s), {"service_write": write}, size, depth)  # type: ignore[misc]
    plain.close()
    await service.close()
    return statistics.median(received)


async def measure(args: argparse.Namespace, folder: Path, engine: str) -> dict[str, object]:
    fio = Fio(folder / "fio", TOTAL_BYTES, engine)
    fio.lay_out()
    bench = Bench(fio, args.rounds, args.ramp_s, args.slice_s)
    await local_rows(bench, folder, args.sizes, args.depths, engine)
    socket_bytes_per_s = await service_rows(bench, folder, args.sizes, args.depths, engine)
    tcp = [row for row in bench.rows if row.path == "tcp"]
    return {
        "read_over_fio": bench.worst("read"),
        "write_over_fio": bench.worst("write"),
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
    parser.add_argument("--slice-s", type=float, default=0.4)
    parser.add_argument("--ramp-s", type=float, default=0.3, help="load before each slice, not counted")
    parser.add_argument("--sizes", type=_numbers, default=[128 << 10, 512 << 10, 2 << 20])
    parser.add_argument("--depths", type=_numbers, default=[1, 8, 32])
    args = parser.parse_args()
    version = require_fio()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not direct_io_works(args.folder):
        raise SystemExit(f"{args.folder} takes no O_DIRECT: name a folder on an SSD (--folder)")
    probe = open_engine(Machine(), "auto", label="bench", depth=1, pending_max=1)
    probe.close()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-store-") as folder:
        result = uvloop.run(measure(args, Path(folder), probe.name))
    print(json.dumps({"bench": "store", "fio": version, "engine": probe.name, **result}))


if __name__ == "__main__":
    main()

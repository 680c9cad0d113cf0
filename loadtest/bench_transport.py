"""How fast bytes move between two processes of one host, per carrier, beside what the machine allows.

    python -m loadtest.bench_transport [--blocks 64] [--block-bytes 1048576] [--rounds 5]

One server process owns a stage, this process a region; every way moves the same blocks there and back.
The ways take turns within each round, so that a busy machine slows all of them alike, and the medians
are compared. Ceilings: `memcpy` (into pre-faulted memory), `crc32c`, and `socket` (blocking, one
connection, `recv_into` a preallocated buffer, no checks, no frames).

The sum: a byte over tcp is copied twice by the kernel and checksummed twice (by its sender and its
receiver); over shm it is copied once and checksummed twice; over grpc it is copied about four times more.

The last line is JSON: GB/s and CPU seconds per GiB (both processes) per way, and the ratios.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

import grpc.aio
import numpy as np
import uvloop

from common.transport.client import connect
from common.transport.connection import Connection
from common.transport.grpc_carrier import BytesServicer
from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus, Span
from common.transport.memory import crc32c
from common.transport.reception import Reception
from common.transport.region import Region
from common.transport.server import serve_bytes
from services.worker.lease import Right
from services.worker.stage import Stage

GIB = 1 << 30
DEADLINE_S = 60.0
CARRIERS = ("tcp", "shm", "grpc")
Way = Callable[[], Awaitable[None]]


async def serve(blocks: int, block_bytes: int, shm_path: str) -> None:
    """The server process: prints its endpoints and leases, then grants a new write lease per line it reads."""
    stage = Stage(2 * blocks, block_bytes)
    reception = Reception(stage)
    server = await serve_bytes(stage, tcp=("127.0.0.1", 0), shm_path=shm_path, reception=reception)
    grpc_server = grpc.aio.server()
    BytesServicer(stage, reception=reception).add_to(grpc_server)
    grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    readable, writable = stage.reserve(blocks), stage.reserve(blocks)
    for slot in readable:
        stage.view(slot)[:] = os.urandom(block_bytes)
    reading = stage.grant(readable, Right.READ, 3600)
    source = stage.region.view(Span(0, blocks * block_bytes))
    with socket.create_server(("127.0.0.1", 0)) as plain:
        sending = asyncio.create_task(asyncio.to_thread(send_plainly, plain, source))
        print(
            server.endpoint.shm,
            server.endpoint.tcp,
            f"127.0.0.1:{grpc_port}",
            plain.getsockname()[1],
            reading.token.hex(),
            flush=True,
        )
        writing = None
        while await asyncio.to_thread(sys.stdin.readline):
            if writing:
                stage.release(writing.token)
            writing = stage.grant(writable, Right.WRITE, 3600)
            print(writing.token.hex(), flush=True)
        await sending
    await server.close()
    await grpc_server.stop(0)


def send_plainly(listener: socket.socket, source: memoryview) -> None:
    """Sends `source` once per byte received, on one connection."""
    peer, _ = listener.accept()
    with peer:
        while peer.recv(1):
            peer.sendall(source)


class Bench:
    """This process' side."""

    def __init__(self, blocks: int, block_bytes: int, server: asyncio.subprocess.Process) -> None:
        self.blocks, self.block_bytes, self.server = blocks, block_bytes, server
        self.region = Region(blocks * block_bytes)
        self.parts = [Part(item, 0, block_bytes) for item in range(blocks)]
        self.spans = [Span(item * block_bytes, block_bytes) for item in range(blocks)]
        self.other = np.ones(blocks * block_bytes, np.uint8)

    async def ask(self) -> str:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(b"lease\n")
        return (await self.server.stdout.readline()).decode().strip()

    def read(self, transport: Connection, token: LeaseToken) -> Way:
        async def way() -> None:
            statuses = await transport.read(token, self.parts, self.spans, deadline_s=DEADLINE_S)
            assert set(statuses) == {PartStatus.OK}, statuses

        return way

    def write(self, transport: Connection, token: LeaseToken) -> Way:
        async def way() -> None:
            statuses = await transport.write(token, self.parts, self.spans, deadline_s=DEADLINE_S)
            assert set(statuses) == {PartStatus.OK}, statuses

        return way

    async def copy(self) -> None:
        into = np.frombuffer(self.region.view(Span(0, self.region.size)), np.uint8)
        for start in range(0, self.region.size, self.block_bytes):
            into[start : start + self.block_bytes] = self.other[start : start + self.block_bytes]

    async def check(self) -> None:
        for span in self.spans:
            crc32c(self.region.view(span))

    def plain(self, sock: socket.socket) -> Way:
        async def way() -> None:
            sock.sendall(b"x")
            for span in self.spans:
                into, got = self.region.view(span), 0
                while got < span.length:
                    got += sock.recv_into(into[got:])

        return way

    def cpu_s(self) -> float:
        """Of both processes."""
        with open(f"/proc/{self.server.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        theirs = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return theirs + time.process_time()

    async def timed(self, way: Way) -> tuple[float, float]:
        """Seconds, and CPU seconds."""
        cpu, start = self.cpu_s(), time.perf_counter()
        await way()
        return time.perf_counter() - start, self.cpu_s() - cpu


async def measure(blocks: int, block_bytes: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            "-m",
            "loadtest.bench_transport",
            "--serve",
            f"{folder}/s",
            "--blocks",
            str(blocks),
            "--block-bytes",
            str(block_bytes),
        ]
        pipe = asyncio.subprocess.PIPE
        server = await asyncio.create_subprocess_exec(sys.executable, *argv, stdin=pipe, stdout=pipe)
        bench = Bench(blocks, block_bytes, server)
        assert server.stdin and server.stdout
        shm, tcp, grpc_address, port, token = (await server.stdout.readline()).decode().split()
        endpoint, reading = Endpoint(shm, tcp, grpc_address), LeaseToken(bytes.fromhex(token))
        transports = {carrier: await connect(endpoint, bench.region, prefer=carrier) for carrier in CARRIERS}  # type: ignore[arg-type]
        samples: dict[str, list[tuple[float, float]]] = {}
        with socket.create_connection(("127.0.0.1", int(port))) as plain:
            for turn in range(rounds + 1):
                ways: dict[str, Way] = {"memcpy": bench.copy, "crc32c": bench.check, "socket": bench.plain(plain)}
                for carrier, transport in transports.items():
                    ways[f"{carrier}_read"] = bench.read(transport, reading)
                for name, way in ways.items():
                    samples.setdefault(name, []).append(await bench.timed(way))
                for carrier, transport in transports.items():
                    lease = LeaseToken(bytes.fromhex(await bench.ask()))
                    samples.setdefault(f"{carrier}_write", []).append(await bench.timed(bench.write(transport, lease)))
                print(f"round {turn}{' (warm-up)' if not turn else ''}", file=sys.stderr)
        for transport in transports.values():
            await transport.close()
        server.stdin.close()
        await server.wait()
        bench.region.close()
    return summary(samples, blocks * block_bytes)


def summary(samples: dict[str, list[tuple[float, float]]], size: int) -> dict[str, float]:
    """Medians over the rounds after the first, which warms up."""
    out: dict[str, float] = {}
    for name, pairs in samples.items():
        out[f"{name}_gb_per_s"] = round(size / statistics.median(seconds for seconds, _ in pairs[1:]) / 1e9, 2)
        out[f"{name}_cpu_s_per_gib"] = round(sum(cpu for _, cpu in pairs[1:]) / (len(pairs) - 1) / size * GIB, 3)
    for carrier in CARRIERS:
        for way in ("read", "write"):
            out[f"{carrier}_{way}_over_socket"] = round(out[f"{carrier}_{way}_gb_per_s"] / out["socket_gb_per_s"], 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block-bytes", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", metavar="SOCKET", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.blocks, args.block_bytes, args.serve))
        return
    result = uvloop.run(measure(args.blocks, args.block_bytes, args.rounds))
    print(json.dumps({"bench": "transport", "blocks": args.blocks, "block_bytes": args.block_bytes, **result}))


if __name__ == "__main__":
    main()

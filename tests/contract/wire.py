"""What the transport tests put between and behind the two ends: a proxy, areas with faults, another process."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import grpc.aio
import msgspec

from common.transport.grpc_carrier import BytesServicer
from common.transport.interface import Area, Endpoint, LeaseToken, Part, PartStatus
from common.transport.memory import Checksums, crc32c
from common.transport.reception import Limits, Reception
from common.transport.server import BytesServer, serve_bytes

MARK = b"\xaa" * 64  # what `Proxy` looks for in the payload


async def until(condition: Callable[[], object]) -> None:
    """Gives others their turn until it holds."""
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


class Served:
    """An area served by all three carriers, from one reception."""

    def __init__(self, server: BytesServer, servicer: BytesServicer, grpc_server: grpc.aio.Server, endpoint: Endpoint) -> None:
        self.server, self.servicer, self.endpoint = server, servicer, endpoint
        self.reception = server.reception
        self._grpc_server = grpc_server

    async def close(self) -> None:
        await self.server.close()
        await self._grpc_server.stop(0)
        self.reception.check_integrity()


async def serve(area: Area, shm_path: str, limits: Limits | None = None) -> Served:
    reception = Reception(area, limits)
    server = await serve_bytes(area, tcp=("127.0.0.1", 0), shm_path=shm_path, reception=reception)
    servicer = BytesServicer(area, reception=reception)
    grpc_server = grpc.aio.server()
    servicer.add_to(grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    return Served(server, servicer, grpc_server, msgspec.structs.replace(server.endpoint, grpc=f"127.0.0.1:{port}"))


class Proxy:
    """Forwards a tcp port. On seeing MARK it may flip a bit, or stop in the middle of it until `go_on` is set."""

    def __init__(self, *, flip: bool = False, hold: bool = False) -> None:
        self.address = ""
        self.holding = asyncio.Event()
        self.go_on = asyncio.Event()
        self._flip, self._hold = flip, hold
        self._target = ("", 0)
        self._pumps: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def before(self, target: str) -> AsyncIterator["Proxy"]:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for pump in self._pumps:
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        for pump in (self._pump(reader, back), self._pump(there, writer)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                at = data.find(MARK)
                if at >= 0 and self._flip:
                    self._flip = False
                    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                if at >= 0 and self._hold:
                    self._hold = False
                    writer.write(data[: at + 32])
                    data = data[at + 32 :]
                    self.holding.set()
                    await self.go_on.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


class GatedArea:
    """Serves one pattern; its reads wait at a gate, and write into a client's memory only after it."""

    def __init__(self, fill: int = 0x55, *, checksum_error: int = 0) -> None:
        self.gate = asyncio.Event()
        self.entered = asyncio.Semaphore(0)
        self.reading = self.reading_max = self.not_done = 0
        self._fill, self._checksum_error = fill, checksum_error

    async def read(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[memoryview] | None
    ) -> list[tuple[PartStatus, memoryview | None, int]]:
        self.reading += 1
        self.reading_max = max(self.reading, self.reading_max)
        self.entered.release()
        await self.gate.wait()
        self.reading -= 1
        results: list[tuple[PartStatus, memoryview | None, int]] = []
        for index, part in enumerate(parts):
            view = memoryview(bytearray(part.length)) if into is None else into[index]
            view[:] = bytes([self._fill]) * part.length
            results.append((PartStatus.OK, view, crc32c(view) ^ self._checksum_error))
        if into is None:
            self.not_done += len(parts)
        return results

    def done_reading(self, token: LeaseToken, views: Sequence[memoryview]) -> None:
        self.not_done -= len(views)

    def write_buffers(self, token: LeaseToken, parts: Sequence[Part]) -> list[memoryview | PartStatus]:
        raise RuntimeError("this area has a fault")

    async def commit(
        self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview], checksums: Sequence[Checksums]
    ) -> list[PartStatus]:
        raise AssertionError("nothing was given out")

    def abort(self, token: LeaseToken, parts: Sequence[Part], buffers: Sequence[memoryview]) -> None:
        raise AssertionError("nothing was given out")


@asynccontextmanager
async def other_process(code: str, *argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs Python code in a process of its own; killed at the end if it is still there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()

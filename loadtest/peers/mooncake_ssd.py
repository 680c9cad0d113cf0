"""Mooncake Store with SSD offload: a master process, and the real client embedded here (its fastest form).

A put returns when the block is in Mooncake's memory segment (two rounds large, so that older rounds
are on SSD only); the client writes it to SSD at its next heartbeat (1 s, the shortest). `stored_s` is
when the bytes of all accepted blocks are in the files. A put that is refused for want of space is
tried again. Reads are `get_into` block by block and `batch_get_into`, into registered memory.

Everything else is Mooncake's default, but for flags of the master that the command line adds.
"""

import ctypes
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest.peers.worker import Got, Put, Shape, bytes_in, serve, sync, until

PUT_DEADLINE_S = 30.0
STORED_DEADLINE_S = 20.0
START_DEADLINE_S = 30.0
BATCH = 16  # blocks per put and per try
DISK_BYTES = 64 << 30
LOCAL_BUFFER_BYTES = 512 << 20
ON_EVICT = "--offload_on_evict=true"


class MooncakeSsd:
    """A master, an embedded client, and one round of registered memory."""

    def __init__(self, folder: Path, shape: Shape, flags: list[str]) -> None:
        self._folder = folder
        self._shape = shape
        self._on_evict = ON_EVICT in flags
        self.how = " ".join(["embedded client, tcp", *flags])
        os.environ |= {
            "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH": str(folder),
            "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR": "bucket_storage_backend",
            "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",
            "MOONCAKE_OFFLOAD_BUCKET_MAX_TOTAL_SIZE": str(DISK_BYTES),
            "MC_STORE_CLIENT_METRIC": "0",
            "MC_LOG_LEVEL": "ERROR",
        }
        import mooncake  # reads its environment when it is imported

        port, metrics_port = _free_port(), _free_port()
        quiet = ["--enable_metric_reporting=false", "--minloglevel=2", f"--metrics_port={metrics_port}"]
        self._master = subprocess.Popen(
            [
                str(Path(str(mooncake.__file__)).parent / "mooncake_master"),
                f"--rpc_port={port}",
                "--enable_offload=true",
                *quiet,
                *flags,
            ],
            stdout=sys.stderr,
        )
        try:
            self._start(port)
        except BaseException:
            self.close()
            raise

    def _start(self, port: int) -> None:
        from mooncake.store import MooncakeDistributedStore

        if until(lambda: _listens(port), time.perf_counter(), START_DEADLINE_S) is None:
            raise RuntimeError(f"mooncake_master does not listen on port {port} after {START_DEADLINE_S:g} s")
        self._store = MooncakeDistributedStore()
        round_bytes = self._shape.blocks * self._shape.block_bytes
        place = ("127.0.0.1", "P2PHANDSHAKE", 2 * round_bytes, LOCAL_BUFFER_BYTES, "tcp", "")
        status = self._store.setup(*place, f"127.0.0.1:{port}", None, True, str(self._folder))
        if status:
            raise RuntimeError(f"MooncakeDistributedStore.setup answered {status}")
        self._memory = mmap.mmap(-1, round_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if self._store.register_buffer(self._address, round_bytes):
            raise RuntimeError("MooncakeDistributedStore.register_buffer refused the memory")

    def forget(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def put(self, round_: int, blocks: Sequence[bytes]) -> Put:
        size = self._shape.block_bytes
        for i, block in enumerate(blocks):
            self._memory[i * size : (i + 1) * size] = block
        before_bytes = bytes_in(self._folder)
        began_s = time.perf_counter()
        accepted: list[int] = []
        for first in range(0, len(blocks), BATCH):
            accepted += self._put_some(round_, list(range(first, min(first + BATCH, len(blocks)))), began_s)
        accepted_s = time.perf_counter() - began_s
        stored_s = durable_s = None
        if not self._on_evict:
            wanted_bytes = before_bytes + len(accepted) * size
            stored_s = until(lambda: bytes_in(self._folder) >= wanted_bytes, began_s, STORED_DEADLINE_S)
        if stored_s is not None:
            sync([path for path in self._folder.rglob("*") if path.is_file()])
            durable_s = time.perf_counter() - began_s
        return Put(accepted, accepted_s, stored_s, durable_s)

    def _put_some(self, round_: int, indices: list[int], began_s: float) -> list[int]:
        """Tries until all are taken or the time is up; those that were taken."""
        accepted: list[int] = []
        while True:
            statuses = self._store.batch_put_from(*self._places(round_, indices))
            accepted += [i for i, status in zip(indices, statuses, strict=True) if status == 0]
            indices = [i for i, status in zip(indices, statuses, strict=True) if status != 0]
            if not indices or time.perf_counter() - began_s > PUT_DEADLINE_S:
                return accepted
            time.sleep(0.01)

    def get(self, round_: int, indices: Sequence[int]) -> Got:
        calls = list(zip(*self._places(round_, indices), strict=True))
        began_s = time.perf_counter()
        lengths = [self._store.get_into(*call) for call in calls]
        return self._got(time.perf_counter() - began_s, indices, lengths)

    def batched_get(self, round_: int, indices: Sequence[int]) -> Got:
        places = self._places(round_, indices)
        began_s = time.perf_counter()
        lengths = self._store.batch_get_into(*places)
        return self._got(time.perf_counter() - began_s, indices, lengths)

    def close(self) -> None:
        self._master.kill()
        self._master.wait()

    def _got(self, seconds: float, indices: Sequence[int], lengths: Sequence[int]) -> Got:
        size = self._shape.block_bytes
        whole = memoryview(self._memory)
        views = zip(indices, lengths, strict=True)
        return Got(seconds, [whole[i * size : (i + 1) * size] if length == size else None for i, length in views])

    def _places(self, round_: int, indices: Sequence[int]) -> tuple[list[str], list[int], list[int]]:
        size = self._shape.block_bytes
        return [f"{round_}/{i}" for i in indices], [self._address + i * size for i in indices], [size] * len(indices)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    serve(MooncakeSsd)
    os._exit(0)  # its threads outlive it, and its exit handlers may crash

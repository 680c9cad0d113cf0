"""LMCache's disk backend with O_DIRECT, as its engine uses it: in the process that wants the blocks.

`put` waits for the completion of every write; LMCache doesn't sync: that is done here, and timed apart. `get` is `get_blocking` key by
key, `batched_get` is `batched_get_blocking`. Eight I/O threads instead of its default of four.
"""

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "LMCACHE_LOG_LEVEL": "ERROR"}

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

from loadtest.peers.worker import Got, Put, Shape, serve, sync

PUT_DEADLINE_S = 60.0
DISK_GIB = 64
THREADS = 8


class LMCacheDisk:
    """A disk backend over a CPU pool of two rounds."""

    how = f"O_DIRECT, {THREADS} threads"

    def __init__(self, folder: Path, shape: Shape, flags: list[str]) -> None:
        self._shape = shape
        config = LMCacheEngineConfig.from_defaults(
            local_cpu=False,
            max_local_cpu_size=2 * shape.blocks * shape.block_bytes / 2**30 + 0.25,
            local_disk=f"file://{folder}/",
            max_local_disk_size=DISK_GIB,
            extra_config={"use_odirect": True, "disk_io_threads": THREADS},
        )
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(1, 2, 1, 1, shape.block_bytes // 4),
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._pool = LocalCPUBackend(config, metadata, dst_device="cpu")
        self._disk = LocalDiskBackend(config, self._loop, self._pool, dst_device="cpu", metadata=metadata)
        self._held: list[Any] = []

    def put(self, round_: int, blocks: Sequence[bytes]) -> Put:
        shape = torch.Size((1, 2, 1, self._shape.block_bytes // 4))
        held = [self._pool.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD) for _ in blocks]
        for one, block in zip(held, blocks, strict=True):
            memoryview(one.byte_array).cast("B")[:] = block
        keys = [self._key(round_, i) for i in range(len(blocks))]
        written = threading.Semaphore(0)
        began_s = time.perf_counter()
        self._disk.batched_submit_put_task(keys, held, on_complete_callback=lambda key: written.release())
        accepted_s = time.perf_counter() - began_s
        for _ in keys:
            written.acquire(timeout=PUT_DEADLINE_S)
        stored_s = time.perf_counter() - began_s
        sync([Path(self._disk._key_to_path(key)) for key in keys])
        durable_s = time.perf_counter() - began_s
        for one in held:
            one.ref_count_down()
        return Put([i for i, key in enumerate(keys) if self._disk.contains(key)], accepted_s, stored_s, durable_s)

    def get(self, round_: int, indices: Sequence[int]) -> Got:
        began_s = time.perf_counter()
        held = [self._disk.get_blocking(self._key(round_, i)) for i in indices]
        return self._got(time.perf_counter() - began_s, held)

    def batched_get(self, round_: int, indices: Sequence[int]) -> Got:
        began_s = time.perf_counter()
        held = self._disk.batched_get_blocking([self._key(round_, i) for i in indices])
        return self._got(time.perf_counter() - began_s, held)

    def close(self) -> None:
        self._disk.close()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _got(self, seconds: float, held: list[Any]) -> Got:
        self._held = held
        return Got(seconds, [None if one is None else memoryview(one.byte_array).cast("B") for one in held])

    def forget(self) -> None:
        for one in self._held:
            if one is not None:
                one.ref_count_down()
        self._held = []

    def _key(self, round_: int, index: int) -> CacheEngineKey:
        return CacheEngineKey("bench", 1, 0, (round_ << 32) + index + 1, torch.bfloat16)


if __name__ == "__main__":
    serve(LMCacheDisk)
    os._exit(0)  # its non-daemon threads would keep the process

"""The yardstick: fio (Debian's package) on a file beside the store's, one run at a time."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

GIB = 1 << 30
READS_IN_FLIGHT = 3  # as a worker's
SYNCING = 8  # requests of BATCH_BYTES: 4 to 9 ms of syncing, at 2 GB/s or more
BATCH_BYTES = 8 << 20  # between two fdatasyncs: what one request of the byte plane brings


def blocks_per_read(block_bytes: int) -> int:
    """Of one request, as a worker reads."""
    return max(16, min(64, (4 << 20) // block_bytes))


def requests_in_flight(block_bytes: int, depth: int) -> int:
    """Enough requests of BATCH_BYTES that `depth` writes are at the kernel while others wait for their sync."""
    return -(-depth * block_bytes // BATCH_BYTES) + SYNCING


class Sample(msgspec.Struct, frozen=True):
    """One slice of a run. Latencies are of a whole block; CPU seconds are of all processes that are ours."""

    bytes_per_s: float
    p50_s: float
    p99_s: float
    cpu_s_per_gib: float


class Fio:
    """fio on one file. `engine` is what the store uses: io_uring, or as many blocking threads."""

    def __init__(self, file: Path, file_bytes: int, engine: str) -> None:
        self.overhead_s = 0.0  # of starting it: the other side pauses as long, so that the disk rests alike
        self._file, self._file_bytes, self._engine = file, file_bytes, engine

    def lay_out(self) -> None:
        """Writes the whole file, so that what is measured overwrites, as a store that is full does."""
        self._run("write", 2 << 20, 8, ["--end_fsync=1"])

    def read(self, block_bytes: int, depth: int, ramp_s: float, seconds: float) -> Sample:
        return self._sample("randread", block_bytes, depth, ramp_s, seconds, [])

    def write(self, block_bytes: int, depth: int, ramp_s: float, seconds: float) -> Sample:
        """In order, durable: one fdatasync for every BATCH_BYTES, at the same depth as the writes."""
        return self._write("write", block_bytes, depth, ramp_s, seconds)

    def write_scattered(self, block_bytes: int, depth: int, ramp_s: float, seconds: float) -> Sample:
        """`write` of blocks at random."""
        return self._write("randwrite", block_bytes, depth, ramp_s, seconds)

    def _write(self, pattern: str, block_bytes: int, depth: int, ramp_s: float, seconds: float) -> Sample:
        every = max(1, BATCH_BYTES // block_bytes)
        return self._sample(pattern, block_bytes, depth, ramp_s, seconds, [f"--fdatasync={every}"])

    def _sample(self, pattern: str, block_bytes: int, depth: int, ramp_s: float, seconds: float, more: list[str]) -> Sample:
        began = time.perf_counter()
        timed = ["--time_based", f"--runtime={round(1000 * seconds)}ms", f"--ramp_time={round(1000 * ramp_s)}ms"]
        job = self._run(pattern, block_bytes, depth, [*timed, *more])
        self.overhead_s = max(0.0, time.perf_counter() - began - ramp_s - seconds)
        side = job["read" if "read" in pattern else "write"]
        moved_gib = side["io_bytes"] / GIB
        cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        percentiles = side["clat_ns"]["percentile"]
        return Sample(side["bw_bytes"], percentiles["50.000000"] / 1e9, percentiles["99.000000"] / 1e9, cpu_s / moved_gib)

    def _run(self, pattern: str, block_bytes: int, depth: int, more: list[str]) -> dict[str, Any]:
        at_depth = [f"--iodepth={depth}"] if self._engine == "io_uring" else [f"--numjobs={depth}", "--thread"]
        argv = ["fio", "--name=bench", f"--filename={self._file}", f"--size={self._file_bytes}", f"--rw={pattern}"]
        argv += [f"--bs={block_bytes}", "--direct=1", f"--ioengine={'io_uring' if self._engine == 'io_uring' else 'psync'}"]
        argv += [*at_depth, "--group_reporting", "--randrepeat=0", "--output-format=json", *more]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
        job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        return job


def require_fio() -> str:
    """fio's version. Ends the program, saying how to get it, where there is none."""
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed, and this benchmark is nothing without it. Debian, Ubuntu: apt-get install fio")
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()

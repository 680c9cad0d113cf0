"""Runs one job against a cluster and notes everything that is measured beside it: links by the kernel's counters, CPU by /proc."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from common.errors import Unavailable
from loadtest.dualpath.cluster import Cluster
from loadtest.dualpath.jobs import Done, Job, Measured, Tick
from loadtest.dualpath.links import CONTROL
from loadtest.dualpath.namespaces import Lab
from loadtest.dualpath.processes import REPOSITORY, guarded

TICK_S = 0.5


class Ticker:
    """Reads the links' counters in a thread of its own while it is entered, once at either end in any case."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticker")
        self.ticks: list[Tick] = []

    def __enter__(self) -> "Ticker":
        self._tick()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tick()

    def _run(self) -> None:
        while not self._stop.wait(TICK_S):
            self._tick()

    def _tick(self) -> None:
        counted = self._lab.counters()
        self.ticks.append(Tick(round(time.monotonic() - self._began, 4), counted))


def measure(
    lab: Lab, cluster: Cluster, job: Job, *, part: str, mode: str, step: float = 0.0, tpot_alone_s: float = 0.0
) -> Measured:
    """Runs the job in the control namespace. Raises Unavailable when its process fails."""
    busy, cores = machine_cpu()
    cpu = cluster.cpu_s()
    with Ticker(lab) as ticker:
        done = drive(lab, job)
    used = {name: round(now - cpu[name], 2) for name, now in cluster.cpu_s().items()}
    busy_s = round(machine_cpu()[0] - busy, 2)
    return Measured(part=part, topology=str(lab.topology), mode=mode, step=step, rates=lab.rates, done=done, ticks=ticker.ticks,
                    cpu_s=used, machine_cpu_s=busy_s, cores=cores, tpot_alone_s=tpot_alone_s, setup=cluster.setup.name)  # fmt: skip


def drive(lab: Lab, job: Job) -> Done:
    """The job, carried out by a process of its own."""
    argv = guarded([*lab.inside(CONTROL), sys.executable, "-P", "-m", "loadtest.dualpath.drive"])
    environ = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ.get("PATH", os.defpath)}
    given = msgspec.json.encode(job)
    done = subprocess.run(
        argv, input=given, capture_output=True, env=environ, cwd=REPOSITORY, start_new_session=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"the agents' process ended with status {done.returncode}: {done.stderr.decode()[-2000:]}")
    return msgspec.json.decode(done.stdout, type=Done)


def machine_cpu() -> tuple[float, int]:
    """(busy CPU seconds of the whole machine since it started, cores)."""
    lines = Path("/proc/stat").read_text().splitlines()
    user, nice, system, _, _, irq, softirq, *_ = (int(field) for field in lines[0].split()[1:])
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return (user + nice + system + irq + softirq) / 100, cores  # USER_HZ is 100 on every Linux that matters

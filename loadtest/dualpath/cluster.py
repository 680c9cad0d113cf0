"""A real cluster in the namespaces of a `Lab`: NATS, kvstore, workers and router, each where its links are.

Workers reach each other's gRPC and the store's over the control network, and move KV over the storage and the compute network:
`bytes_host` says which. Nothing shares a `run_dir`, so every byte crosses a link. Ports are fixed: each namespace has all of them.

Life: `start`, `add_router` for every further mode, `stop`. A new cluster on the same data starts from the store as it was left.
"""

import json
import shutil
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import Unavailable
from loadtest.dualpath import links
from loadtest.dualpath.links import CONTROL, STORE, Network
from loadtest.dualpath.model import Setup
from loadtest.dualpath.modes import Mode
from loadtest.dualpath.namespaces import Lab
from loadtest.dualpath.processes import Process
from services.cli import nats_binary
from services.cli.settings import LOCAL

GRPC_PORT, BYTES_PORT, HTTP_PORT, NATS_PORT = 7000, 7001, 8080, 4222
STOP_ORDER = ("router", "decode", "prefill", "store", "nats")


class Cluster:
    """One cluster, begun for one mode. `folder` gets the logs; `data` holds the blocks."""

    def __init__(self, lab: Lab, setup: Setup, model_directory: Path, data: Path, folder: Path, mode: Mode) -> None:
        self.setup = setup
        self._lab = lab
        self._model = model_directory
        self._data = data
        self._folder = folder
        self._mode = mode
        self.processes: dict[str, Process] = {}
        self.urls: dict[str, str] = {}  # of each mode's router

    @property
    def model_name(self) -> str:
        return self._model.name

    def start(self) -> None:
        """Returns when every process says that it is ready. Raises Unavailable."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._start_nats()
        self._spawn("store", STORE, "kvstore", [
            "--data", str(self._data), "--bytes-host", self._address(STORE, Network.STORAGE),
            "--budget-bytes", str(self.setup.store_bytes), *self._where(STORE),
        ])  # fmt: skip
        setup = self.setup
        for number, worker in enumerate(self._lab.topology.workers):
            self._spawn(worker, worker, worker.partition("-")[0], [
                "--model", str(self._model), "--bytes-host", self._address(worker, Network.COMPUTE), "--transport", "tcp",
                "--block-tokens", str(setup.block_tokens), "--device", device(setup, number), "--threads", "1",
                "--pool-bytes", str(setup.pool_bytes), "--stage-bytes", str(setup.stage_bytes), *self._where(worker), *self._mode.workers,
                # What workers still hold of an earlier turn would come over no link, and the links are what is measured.
                "--no-resident",
            ])  # fmt: skip
        self._start_router(self._mode)
        for name in [name for name in self.processes if name != "nats"]:
            self.processes[name].ready()

    def add_router(self, mode: Mode) -> None:
        """Another policy in front of the same workers, beside those that are there."""
        self._start_router(mode).ready()

    def stop(self) -> None:
        """Drains and ends every process. Raises Unavailable when one did not end well."""
        bad = []
        for role in STOP_ORDER:
            those = [name for name in self.processes if name.partition("-")[0] == role]
            for name in those:
                self.processes[name].terminate()
            bad += [name for name in those if self.processes[name].stop() not in (0, 1 if name == "nats" else 0)]
        if bad:
            raise Unavailable(f"did not drain: {', '.join(bad)}; logs in {self._folder}")
        self.processes.clear()

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()
        self.processes.clear()

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of each process so far."""
        return {name: process.cpu_s() for name, process in self.processes.items()}

    def _start_router(self, mode: Mode) -> Process:
        port = HTTP_PORT + len(self.urls)
        self.urls[mode.name] = f"http://{self._address(CONTROL)}:{port}"
        peers = {"kvstore": [STORE], "prefill": [], "decode": []}
        for worker in self._lab.topology.workers:
            peers[worker.partition("-")[0]].append(worker)
        named = [
            part
            for role, members in peers.items()
            for part in (f"--{role}", ",".join(f"{self._address(member)}:{GRPC_PORT}" for member in members))
        ]
        flags = ["--model", str(self._model), "--host", self._address(CONTROL), "--port", str(port), "--log-level", "debug",
                 "--nats", self._nats_url, *named, *mode.router]  # fmt: skip
        return self._launch(f"router-{mode.name}", CONTROL, [sys.executable, "-P", "-m", "services.router", *flags])

    def _start_nats(self) -> None:
        store = self._folder / "jetstream"
        store.mkdir(exist_ok=True)
        text = string.Template((LOCAL / "nats.conf.template").read_text()).substitute(
            port=NATS_PORT, store=json.dumps(str(store))
        )
        config = self._folder / "nats.conf"
        config.write_text(text.replace("127.0.0.1", self._address(CONTROL)))
        self._launch("nats", CONTROL, [nats_binary.find(), "-c", str(config)])

    def _spawn(self, name: str, member: str, service: str, flags: Sequence[str]) -> None:
        common = ["--id", name, "--nats", self._nats_url]
        self._launch(name, member, [sys.executable, "-P", "-m", f"services.{service}", *common, *flags])

    def _launch(self, name: str, member: str, argv: Sequence[str]) -> Process:
        process = self.processes[name] = Process(name, [*self._lab.inside(member), *argv], self._folder / f"{name}.log")
        return process

    def _where(self, member: str) -> list[str]:
        return ["--host", self._address(member), "--port", str(GRPC_PORT), "--bytes-port", str(BYTES_PORT)]

    @property
    def _nats_url(self) -> str:
        return f"nats://{self._address(CONTROL)}:{NATS_PORT}"

    def _address(self, member: str, network: Network = Network.CONTROL) -> str:
        return links.address(self._lab.topology, member, network)


def device(setup: Setup, worker: int) -> str:
    """Each worker's own, as far as there are so many GPUs."""
    if setup.device == "cpu":
        return "cpu"
    import torch

    return f"{setup.device}:{worker % torch.cuda.device_count()}"


def no_gpu() -> str:
    """Why workers can't be on GPUs here; empty: they can."""
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def copy_store(origin: Path, copy: Path) -> None:
    """A store's folder as it is at rest, so that every mode starts from the same blocks."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("LOCK"))

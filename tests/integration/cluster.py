"""A real cluster for tests: kvstore, prefill, decode and router as processes on loopback, with static peers.

Every port is 0 and every service says its addresses in its `ready` event. Nothing outlives `stop`.
"""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.integration.forks import Fork

REPOSITORY = Path(__file__).resolve().parents[2]
START_DEADLINE_S = 90.0
STOP_DEADLINE_S = 30.0
FORKED = ("services.router", "services.decode", "services.prefill")  # those that import much


def _started(module: str, flags: Sequence[str], environ: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environ,
        cwd=REPOSITORY,
    )


class Service:
    """One process, its log as events, and what it said."""

    def __init__(self, name: str, module: str, flags: Sequence[str], environ: dict[str, str] | None = None) -> None:
        self.name = name
        self.lines: list[str] = []
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        env = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
        env |= {"PYTHONPATH": str(REPOSITORY), "PENSTOCK_UP_PARENT": str(os.getpid())} | (environ or {})
        self.process = Fork(module, flags, env) if module in FORKED else _started(module, flags, env)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            try:
                event = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue
            if isinstance(event, dict):
                self._events.put(event)
        self._events.put(None)

    def wait_event(self, name: str, deadline_s: float = START_DEADLINE_S, **fields: Any) -> dict[str, Any]:
        """The next event of that name (and with these fields) that nobody has waited for yet."""
        until = time.monotonic() + deadline_s
        while True:
            try:
                event = self._events.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{self.name}: no event {name!r} within {deadline_s} s; its log:\n{self.tail()}") from None
            if event is None:
                raise AssertionError(
                    f"{self.name} ended ({self.process.wait()}) before the event {name!r}; its log:\n{self.tail()}"
                )
            self.seen.append(event)
            if event.get("event") == name and all(event.get(key) == value for key, value in fields.items()):
                return event

    def events(self, name: str) -> list[dict[str, Any]]:
        """All events of that name so far."""
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                break
            if event is not None:
                self.seen.append(event)
        return [event for event in self.seen if event.get("event") == name]

    def tail(self) -> str:
        return "".join(self.lines[-60:])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the process; its exit status. A service that doesn't end in time fails the test."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not end within {STOP_DEADLINE_S} s; its log:\n{self.tail()}") from None
        self._thread.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return status

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


class Cluster:
    """Services around one model directory and one data directory."""

    def __init__(
        self,
        model: Path,
        data: Path,
        *,
        prefills: int = 1,
        decodes: int = 1,
        transport: str = "auto",
        worker_flags: Sequence[str] = (),
        router_flags: Sequence[str] = (),
        kvstore_flags: Sequence[str] = (),
        kvstore_module: str = "services.kvstore",
        dtype: str = "float32",
        block_tokens: int = 16,
        resident: Collection[str] = (),
    ) -> None:
        self.model = model
        self.data = data
        self.counts = {"prefill": prefills, "decode": decodes}
        self.transport = transport
        self.resident = resident  # roles whose workers keep KV; where none does, what is used again comes from the kvstore
        self.worker_flags = [*worker_flags, "--dtype", dtype, "--block-tokens", str(block_tokens), "--threads", "1"]
        # Routes by rule, however slow the machine: what is stored is loaded, by decode for short tails, else by prefill.
        self.router_flags = ["--scheduler", "paper", "--plans", "direct,storage_to_prefill,recompute", *router_flags]
        self.kvstore_flags = list(kvstore_flags)
        self.kvstore_module = kvstore_module
        self.services: dict[str, Service] = {}
        self.addresses: dict[str, str] = {}
        self.url = ""
        self._killed: set[str] = set()
        self._run: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()
        if self._run is not None:
            left = set(os.listdir(self._run.name)) - self._killed
            self._run.cleanup()
            assert kind is not None or not left, f"left in the run folder: {left}"

    def start(self) -> None:
        self.start_kvstore()
        for role, count in self.counts.items():
            for number in range(count):
                self.start_worker(role, number)
        for role, count in self.counts.items():
            for number in range(count):
                self.addresses[f"{role}-{number}"] = self.services[f"{role}-{number}"].wait_event("ready")["grpc"]
        self.start_router()

    def start_kvstore(self) -> None:
        flags = [
            "--id",
            "kvstore",
            "--data",
            str(self.data / "kv"),
            "--run-dir",
            self._run_dir(),
            "--budget-bytes",
            str(64 << 20),
            *self.kvstore_flags,
        ]
        self._spawn("kvstore", self.kvstore_module, flags)
        self.addresses["kvstore"] = self.services["kvstore"].wait_event("ready")["grpc"]

    def start_worker(self, role: str, number: int) -> None:
        flags = [
            "--model",
            str(self.model),
            "--run-dir",
            self._run_dir(),
            "--transport",
            self.transport,
            "--id",
            f"{role}-{number}",
        ]
        if role not in self.resident:
            flags.append("--no-resident")
        self._spawn(f"{role}-{number}", f"services.{role}", [*flags, *self.worker_flags])

    def start_router(self) -> None:
        peers = {role: [self.addresses[f"{role}-{n}"] for n in range(count)] for role, count in self.counts.items()}
        flags = ["--model", str(self.model), "--port", "0", "--kvstore", self.addresses["kvstore"]]
        for role, addresses in peers.items():
            if addresses:
                flags += [f"--{role}", ",".join(addresses)]
        self._spawn("router", "services.router", [*flags, *self.router_flags])
        ready = self.services["router"].wait_event("ready")
        self.url, self.addresses["router"] = ready["http"], ready["grpc"]

    def restart(self, *, transport: str = "") -> None:
        """Stops every process and starts it anew on the same data, over another transport if one is named."""
        self.stop()
        self.transport = transport or self.transport
        self.start()

    def kill_one(self, name: str) -> None:
        """kill -9; its socket stays behind until a successor of that name replaces it."""
        self.services.pop(name).kill()
        self._killed.add(f"{name}.sock")

    def stop(self) -> None:
        for name in self._stop_order():
            status = self.services[name].stop()
            assert status == 0, f"{name} ended with {status}; its log:\n{self.services[name].tail()}"
        self.services.clear()

    def kill(self) -> None:
        for service in self.services.values():
            service.kill()
        self.services.clear()

    def _stop_order(self) -> list[str]:
        order = ["router", *(n for n in self.services if n.startswith(("decode", "prefill"))), "kvstore"]
        return [name for name in order if name in self.services]

    def _spawn(self, name: str, module: str, flags: Sequence[str]) -> None:
        self.services[name] = Service(name, module, flags)

    def _run_dir(self) -> str:
        """A short path: a unix socket's may have 107 bytes."""
        if self._run is None:
            self._run = tempfile.TemporaryDirectory(prefix="pn-")
        return self._run.name

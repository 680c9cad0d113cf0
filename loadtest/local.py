"""A cluster on this machine for a benchmark: `penstock up --detach`, `down`, and what its processes used."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx

from services.cli import state

SETTLE_DEADLINE_S = 120.0
COMMAND_DEADLINE_S = 600.0


class LocalCluster:
    """Runs as long as the `with` block. Its folder keeps the stored blocks over `restart`."""

    def __init__(self, model: Path, data: Path, *, threads: int = 0, flags: tuple[str, ...] = ()) -> None:
        self.model = model
        self.data = data
        self.flags = ["--port", "0", *(["--threads", str(threads)] if threads else []), *flags]
        self.vocab_size: int = json.loads((model / "config.json").read_text())["vocab_size"]
        self.model_name = model.resolve().name
        self.url = ""
        self._peaks: dict[str, int] = {}

    def __enter__(self) -> "LocalCluster":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        self._penstock("up", "--detach", "--model", str(self.model), *self.flags)
        self.url = self._state().url

    def stop(self) -> None:
        self._penstock("down")

    def restart(self) -> None:
        self._note_peaks()
        self.stop()
        self.start()

    async def settled(self) -> None:
        """Waits until the kvstores have stopped growing: write-back has nothing left."""
        async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(SETTLE_DEADLINE_S):
            before, quiet = -1, 0
            while quiet < 3:
                await asyncio.sleep(1.5)  # members are asked about once a second
                status = (await http.get(f"{self.url}/v1/penstock/status")).json()
                blocks = sum((member.get("store") or {}).get("blocks", 0) for member in status["members"])
                quiet = quiet + 1 if blocks == before else 0
                before = blocks

    def decode_address(self) -> str:
        return next(service.addresses["grpc"] for service in self._state().services if service.kind == "decode")

    def peak_bytes(self) -> dict[str, int]:
        """Highest resident memory of each service since the cluster first started, by name."""
        self._note_peaks()
        return dict(self._peaks)

    def _note_peaks(self) -> None:
        for service in self._state().services:
            if service.process is None:
                continue
            status = Path(f"/proc/{service.process.pid}/status").read_text()
            kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
            self._peaks[service.name] = max(self._peaks.get(service.name, 0), kib * 1024)

    def _state(self) -> state.ClusterState:
        found = state.read(self.data)
        if found is None:
            raise RuntimeError(f"no cluster in {self.data}")
        return found

    def _penstock(self, command: str, *flags: str) -> None:
        argv = [sys.executable, "-m", "services.cli", command, "--data", str(self.data), *flags]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False)
        if done.returncode:
            raise RuntimeError(f"penstock {command} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

"""A child process of the experiment: its log in a file, its readiness as an event of that log, its CPU time from /proc.

It is started through the launcher's `guard.py`, so the kernel ends it with its parent, however that ends. Start it on the main thread.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from common.errors import Unavailable
from services.cli import guard

REPOSITORY = Path(__file__).resolve().parents[2]
READY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
POLL_S = 0.05
LOG_SHOWN_CHARACTERS = 3000


class Process:
    """Life: runs from the start, `ready`, `stop`. `returncode` is None while it runs."""

    def __init__(self, name: str, argv: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._asked = False
        environ = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
        environ["PYTHONPATH"] = str(REPOSITORY)
        with log.open("wb") as sink:
            self._popen = subprocess.Popen(
                guarded(argv),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environ,
                cwd=REPOSITORY,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ready(self) -> dict[str, Any]:
        """Waits for the `ready` event of its log. Raises Unavailable with the log's end when it doesn't come."""
        until = time.monotonic() + READY_DEADLINE_S
        while time.monotonic() < until:
            for line in self.log.read_bytes().splitlines():
                if b'"ready"' in line and (event := _event(line)).get("event") == "ready":
                    return event
            if self._popen.poll() is not None:
                raise Unavailable(f"{self.name} ended with status {self._popen.returncode}; its log ends with:\n{self.tail()}")
            time.sleep(POLL_S)
        raise Unavailable(f"{self.name} was not ready within {READY_DEADLINE_S:g} s; its log ends with:\n{self.tail()}")

    def cpu_s(self) -> float:
        """User and system seconds so far, of all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self) -> None:
        """Asks it to drain. Once only: a second SIGTERM would mean at once."""
        if not self._asked and self._popen.poll() is None:
            self._asked = True
            self._popen.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Drains and ends it, by force after a while; its exit status."""
        self.terminate()
        try:
            return self._popen.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        self._popen.kill()
        return self._popen.wait()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_SHOWN_CHARACTERS:]


def guarded(argv: Sequence[str]) -> list[str]:
    """The command line that ends with this process."""
    return [sys.executable, "-I", "-S", str(guard.__file__), str(os.getpid()), *argv]


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return {}
    return event if isinstance(event, dict) else {}

"""A launcher under test: `fake_up.py` in a process of its own, its output read line by line."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.cli import state

FAKE_UP = Path(__file__).with_name("fake_up.py")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Launcher:
    """Starts a cluster of fakes. Every process it has, and theirs, carries `mark` in its environment."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.mark = uuid.uuid4().hex
        self.environ = {**os.environ, "FAKE_CLUSTER": self.mark, "PYTHONPATH": str(Path.cwd()), "PYTHONUNBUFFERED": "1"}
        self.seen: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._out = -1

    def command(self, *behaviours: str) -> list[str]:
        return [sys.executable, str(FAKE_UP), str(self.data), *behaviours]

    def start(self, *behaviours: str, tty: bool = False) -> "Launcher":
        if tty:  # as in a terminal: Ctrl-C written to the other end reaches its foreground process group
            self._out, inner = pty.openpty()
            preparation = "import os,fcntl,termios,sys; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
            command = [sys.executable, "-c", preparation, *self.command(*behaviours)]
            self.process = subprocess.Popen(
                command, env=self.environ, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
            )
        else:
            self._out, inner = os.pipe()
            self.process = subprocess.Popen(self.command(*behaviours), env=self.environ, stdout=inner, stderr=inner)
        os.close(inner)
        return self

    def until(self, text: str) -> str:
        """Reads on until a line holds `text`."""
        while line := self._line():
            if text in line:
                return line
        raise AssertionError(f"ended without {text!r}:\n" + "".join(self.seen))

    def end(self) -> int:
        """Reads to the end; the exit status."""
        assert self.process is not None
        while self._line():
            pass
        return self.process.wait()

    def until_piece(self, text: str) -> None:
        """Reads on until `text` has come, in mid-line too."""
        read = ""
        while text not in read:
            piece = os.read(self._out, 1)
            assert piece, f"ended without {text!r}: {read}"
            read += piece.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._out, text.encode())

    def press_ctrl_c(self) -> None:
        os.write(self._out, b"\x03")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def state(self) -> state.ClusterState:
        found = state.read(self.data)
        assert found is not None
        return found

    def pid(self, name: str) -> int:
        process = next(service.process for service in self.state().services if service.name == name)
        assert process is not None
        return process.pid

    def left(self) -> list[psutil.Process]:
        """Processes of this cluster that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("FAKE_CLUSTER") == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def close(self) -> None:
        for process in self.left():
            process.kill()
        if self.process is not None:
            self.process.wait()
        if self._out >= 0:
            os.close(self._out)
        if found := state.read(self.data):
            shutil.rmtree(found.run_dir, ignore_errors=True)

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            try:
                byte = os.read(self._out, 1)
            except OSError:  # a pty whose other end is closed
                byte = b""
            if not byte:
                break
            line += byte
        text = _ANSI.sub("", line.decode(errors="replace")).replace("\r", "")
        self.seen.append(text)
        return text or ("\n" if line else "")


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path / "data")
    yield made
    made.close()

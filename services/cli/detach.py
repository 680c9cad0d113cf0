"""`penstock up --detach`: a daemon runs the launch and tells us over a pipe how it goes.

1. The daemon starts in a session of its own, its output in DATA/logs/launcher.log.
2. Its messages come over the pipe and are shown here as if it ran here.
3. `Ready` lets us return 0; `Failed`, or an end without `Ready`, is 1 and says why.
4. Ctrl-C while waiting is passed on: once to drain, twice to stop at once.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from services.cli.logfile import last_lines, rotate
from services.cli.messages import Failed, Message, Note, Ready, Show, decode, encode

_LAST_LINES = 12


def detach(daemon: Sequence[str], data: Path, show: Show) -> int:
    """Starts `daemon` (which gets the pipe's number as its last argument); returns when it is ready or gone."""
    log = data / "logs" / "launcher.log"
    rotate(log)
    reading, writing = os.pipe()
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [*daemon, f"--report-fd={writing}"],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, pass_fds=[writing], start_new_session=True,
        )  # fmt: skip
    os.close(writing)
    failed = False
    for message in _messages(reading, process):
        show(message)
        if isinstance(message, Ready):
            show(Note(f"It runs in the background. Stop it with: penstock down --data {data}"))
            return 0
        failed = failed or isinstance(message, Failed)
    process.wait()
    if not failed and process.returncode != 130:
        why = f"the launcher ended with status {process.returncode}"
        show(Failed(reason=why, lines=list(last_lines(log, _LAST_LINES)), log=str(log)))
    return process.returncode or 1


def _messages(reading: int, process: "subprocess.Popen[bytes]") -> Iterator[Message]:
    """What the daemon tells, until it closes the pipe. Ctrl-C goes to the daemon, which then ends it."""
    with os.fdopen(reading, "rb") as pipe:
        while True:
            try:
                line = pipe.readline()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                continue
            if not line:
                return
            yield decode(line)


class Reporter:
    """The daemon's end: sends messages until nobody listens any more, and never after `Ready`."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def show(self, message: Message) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, encode(message) + b"\n")
        except OSError:
            self._close()
            return
        if isinstance(message, Ready):
            self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

"""A child process of the launcher: its own session, its log in a file, its end as an awaitable.

1. `spawn(argv, ...)` starts it through `guard.py`, so that it can't outlive the launcher.
2. `ended()` waits; then whatever is left of its process group is killed, and only then is it
   reaped, so that neither its pid nor its group's can belong to anyone else before.
3. `terminate()` asks it to drain; `kill()` ends its whole group. Both may be called at any time.

Call `spawn` on the main thread: the kernel ties the child to the thread that started it.
stderr and stdout go straight to the file, not through the launcher: a launcher that is suspended
or slow never holds a service up.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_GUARD = Path(__file__).with_name("guard.py")


class Child:
    """A started process. `returncode` is None until `ended()` has returned."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def __repr__(self) -> str:
        return f"Child(pid={self.pid}, returncode={self.returncode})"

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        return self._popen.returncode

    async def ended(self) -> int:
        """Its exit status, negative for a signal, once nothing of its group is left running."""
        await asyncio.shield(self._over)
        return int(self._popen.returncode)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # not reaped yet, so the group is still its own
        self._popen.wait()
        if not self._over.done():
            self._over.set_result(None)


def spawn(argv: Sequence[str], log: Path, environ: Mapping[str, str]) -> Child:
    """Starts `argv` with its output appended to `log`.

    Raises:
        OSError: the guard can't be started. A bad `argv[0]` shows as an early end of the child.
    """
    guarded = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), *argv]
    with log.open("ab") as sink:
        popen = subprocess.Popen(
            guarded, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=dict(environ), start_new_session=True
        )
    return Child(popen)


def how_it_ended(returncode: int) -> str:
    """An exit status in words."""
    if returncode >= 0:
        return f"exit status {returncode}"
    names = {number.value: number.name for number in signal.Signals}
    hint = " (out of memory?)" if -returncode == signal.SIGKILL else ""
    return f"ended by {names.get(-returncode, f'signal {-returncode}')}{hint}"

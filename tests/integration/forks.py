"""Services that do not import torch and transformers anew: forked from a process which has done so once.

Each is a process of its own, with its own sockets, memory and exit status, and runs the service's own `__main__`. Shared is only what
comes before that: six seconds of a slow core for each of some two hundred workers that these tests start, two for a router. That they
also start by `python -m`, and a router without torch, is for tests/cli, tests/router and tests/docker to show.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from common.process import PARENT_VARIABLE

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "services.decode.worker",
        "services.prefill.worker",
        "services.worker.node",
        "services.router.router",
        "transformers.models.auto.tokenization_auto",
        "transformers.tokenization_utils_tokenizers",
    ]
)


class Fork:
    """What `subprocess.Popen([python, "-m", module, *flags], env=environ, stderr=PIPE, text=True)` is to a `Service`."""

    def __init__(self, module: str, flags: Sequence[str], environ: Mapping[str, str]) -> None:
        read, write = _forks.Pipe(duplex=False)
        with read, write:
            self._process = _forks.Process(target=_run, args=(module, list(flags), dict(environ), write), name=module)
            self._process.start()
            self.stderr = os.fdopen(os.dup(read.fileno()))

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(module: str, flags: list[str], environ: dict[str, str], stderr: Connection) -> None:
    with stderr:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ |= environ | {PARENT_VARIABLE: str(os.getppid())}
    sys.argv[1:] = flags
    runpy.run_module(module, run_name="__main__", alter_sys=True)

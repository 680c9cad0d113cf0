"""The outside of a service process: settings errors, event loop, signals.

1. `start` reads the settings, sets up the log, and runs `serve(settings, stop)` on uvloop.
2. The first SIGTERM or SIGINT sets `stop`: the service drains and returns.
3. The second one ends the process at once (exit status 130).
4. A `PenstockError` out of `serve` is logged as one line and gives exit status 1 (2 for settings).
5. With PENSTOCK_UP_PARENT set (the launcher does), the process ends when that parent does, however
   it does: the kernel sends SIGTERM (PR_SET_PDEATHSIG), so no orphan outlives a killed launcher.
   The signal follows the parent's *thread* that spawned us: launch from the main thread.
"""

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import msgspec
import uvloop

from common import heap, logs, settings
from common.errors import PenstockError, SettingsError
from common.logs import Log

log = Log("process")
S = TypeVar("S", bound=msgspec.Struct)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT_VARIABLE = "PENSTOCK_UP_PARENT"


def start(
    section: str, kind: type[S], about: str, serve: Callable[[S, asyncio.Event], Coroutine[Any, Any, None]]
) -> int:  # fmt: skip
    """The whole of a service's `__main__`: its exit status, to `leave` with.

    Args:
        section: the service's name and its table in the settings file.
        kind: its settings; they have `log_level` and `log_format`.
        about: one sentence for `--help`.
    """
    try:
        chosen = settings.load(kind, section, sys.argv[1:], about=about)
    except SettingsError as error:
        print(f"{section}: {error.message}", file=sys.stderr)  # noqa: T201
        return 2
    logs.setup(section, getattr(chosen, "log_level", "info"), getattr(chosen, "log_format", "json"))
    return run(lambda stop: serve(chosen, stop))


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> int:
    """Runs a service until it returns; the exit status. It calls `heap.settle` when it has started."""
    follow_parent()
    heap.hold()
    try:
        uvloop.run(_supervised(main))
    except PenstockError as error:
        log.error("failed", reason=error.message)
        return 2 if isinstance(error, SettingsError) else 1
    except BaseExceptionGroup as group:
        first = _first_cause(group)
        if not isinstance(first, PenstockError):
            raise
        log.error("failed", reason=first.message)
        return 1
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process when all is closed. The interpreter's own end takes seconds once torch is loaded."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


async def _supervised(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        log.event("draining")
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await main(stop)
    assert heap.settled(), "a service settles its heap when it has started"
    log.event("stopped")


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def follow_parent() -> None:
    """Asks the kernel to end this process with its parent, when a launcher says that it is one."""
    expected = os.environ.get(PARENT_VARIABLE)
    if expected is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(expected):  # it died before we asked
        os._exit(1)

"""`penstock down`: stops the cluster of a data folder and returns when nothing of it is left.

1. The launcher gets SIGTERM and drains; we wait for as long as it may take.
2. Ctrl-C here asks it to stop at once. A launcher that still does not end is killed.
3. Services that a dead launcher left (there should be none: see `guard`) are killed too.
"""

import argparse
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from common.errors import PenstockError
from services.cli import state
from services.cli.state import ClusterState, ProcessId

_MARGIN_S = 10.0  # on top of what the launcher may take for draining
_KILLED_S = 10.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="penstock down", description="Stops the cluster of a data folder.", allow_abbrev=False)
    parser.add_argument("--data", default="data", metavar="DIR", help="the folder given to up (default: data)")
    data = Path(parser.parse_args(argv).data).expanduser().resolve()
    if not data.is_dir():
        raise PenstockError(f"data = {str(data)!r}: no such folder; name the one that was given to up (--data DIR)")
    cluster = state.read(data)
    if cluster is None:
        print(f"No cluster runs on {data}.")
        return 0
    _stop_launcher(cluster)
    _end_leftovers(cluster)
    shutil.rmtree(cluster.run_dir, ignore_errors=True)
    state.forget(data)
    print("Stopped.")
    return 0


def _stop_launcher(cluster: ClusterState) -> None:
    launcher = cluster.launcher
    if not state.send(launcher, signal.SIGTERM):
        return
    print(f"Stopping the cluster at {cluster.url or '(still starting)'} (launcher pid {launcher.pid}) ...", flush=True)
    if not _wait(launcher, cluster.stop_s + _MARGIN_S):
        print("It does not end; killing it.", flush=True)
        state.send(launcher, signal.SIGKILL)
        state.wait_gone(launcher, _KILLED_S)


def _wait(launcher: ProcessId, timeout_s: float) -> bool:
    try:
        return state.wait_gone(launcher, timeout_s)
    except KeyboardInterrupt:
        print("Stopping at once.", flush=True)
        state.send(launcher, signal.SIGTERM)
        return state.wait_gone(launcher, _KILLED_S)


def _end_leftovers(cluster: ClusterState) -> None:
    for service in cluster.services:
        process = service.process
        if process is not None and state.send(process, signal.SIGKILL, group=True):
            print(f"Ended {service.name} (pid {process.pid}), which its launcher had left.")
            state.wait_gone(process, _KILLED_S)

"""`penstock up`: settings, checks, then one `Launch`; or with --detach, a daemon that runs it.

Everything that can be known beforehand is checked before the first process starts: the model
directory, the port, that no other cluster uses the data folder, that there is a NATS server.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.settings import load
from services.cli import model_directory, nats_binary, plan, ports, state
from services.cli.detach import detach
from services.cli.launch import Cluster, Launch
from services.cli.messages import Note, Show
from services.cli.plan import Layout
from services.cli.screen import screen
from services.cli.settings import LOCAL, UpSettings

ABOUT = "Starts NATS, KV stores, prefill and decode workers and the router on this machine, and serves a model."


def main(argv: Sequence[str]) -> int:
    config = config_file(argv)
    settings = read_settings(argv, config)
    out = screen()
    try:
        if settings.detach:
            preflight(settings)
            os.close(state.take_lock(data_of(settings)))
            daemon = [sys.executable, "-P", "-m", "services.cli.daemon", *argv]
            return detach(daemon, data_of(settings), out.show)
        return run(settings, config, out.show)
    finally:
        out.close()


def run(settings: UpSettings, config: Path | None, show: Show) -> int:
    """Runs a cluster to its end in this process."""
    data = data_of(settings)
    model, binary = preflight(settings)
    lock = state.take_lock(data)
    try:
        sweep(data, show)
        layout = Layout(data=data, run=Path(tempfile.mkdtemp(prefix="penstock-", dir=_run_parent())))
        environ = plan.child_environ(os.environ, config)
        cluster = Cluster(
            layout=layout,
            model=str(model),
            served_name=model.name,
            host=settings.host,
            ready_s=settings.ready_s,
            drain_s=settings.drain_s,
            nats=settings.nats or plan.nats(binary, layout, environ),
            services=lambda url: plan.services(settings, model, layout, url, environ),
            curl=lambda url: model_directory.example_request(model, model.name, url),
        )
        return run_cluster(cluster, show)
    finally:
        os.close(lock)


def preflight(settings: UpSettings) -> tuple[Path, str]:
    """The model directory and the NATS binary ("" where a running server is named), once the port is known to be free."""
    model = model_directory.resolve(settings.model)
    ports.check_free(settings.host, settings.port)
    return model, "" if settings.nats else nats_binary.find()


def run_cluster(cluster: Cluster, show: Show) -> int:
    async def main() -> int:
        return await Launch(cluster, show).run()

    return asyncio.run(main())


def sweep(data: Path, show: Show) -> None:
    """Ends what a launcher that was killed may have left; we hold the lock, so it is gone."""
    left = state.read(data)
    if left is None:
        return
    for service in left.services:
        if service.process is not None and state.send(service.process, signal.SIGKILL, group=True):
            show(Note(f"ended {service.name} (pid {service.process.pid}), left by an earlier launcher", bad=True))
    shutil.rmtree(left.run_dir, ignore_errors=True)
    state.forget(data)


def read_settings(argv: Sequence[str], config: Path | None) -> UpSettings:
    environ = dict(os.environ) | ({"PENSTOCK_CONFIG": str(config)} if config else {})
    return load(UpSettings, "up", argv, environ, about=ABOUT)


def config_file(argv: Sequence[str]) -> Path | None:
    """The settings file all services share: --config, else PENSTOCK_CONFIG, else deploy/local/penstock.toml."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    given = finder.parse_known_args(list(argv))[0].config or os.environ.get("PENSTOCK_CONFIG")
    default = LOCAL / "penstock.toml"
    if given:
        return Path(given).expanduser().resolve()
    return default if default.is_file() else None


def data_of(settings: UpSettings) -> Path:
    return Path(settings.data).expanduser().resolve()


def _run_parent() -> str | None:
    """Where sockets go: the user's runtime folder; None leaves it to the system's temporary one."""
    found = os.environ.get("XDG_RUNTIME_DIR", "")
    return found if found and os.access(found, os.W_OK) and len(found) < 60 else None

"""Runs one cluster from the first process to the last: start, prove ready, watch, drain, clean up.

1. NATS starts; then everything else at once. A service that ends now fails the start.
2. Ready means proven: every service has reported, and the router's /ready says 200.
3. Until a signal comes, ended services are restarted and finished requests are shown.
4. The first SIGINT, SIGTERM or SIGHUP drains, callers before those they call; the second kills.
5. Nothing is left: no process, no socket folder, no state file. The exit status says how it went.
"""

import asyncio
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from common.errors import PenstockError
from services.cli import served, state, web
from services.cli.logfile import Record
from services.cli.messages import Failed, Note, Progress, Ready, Row, Show, Stopped
from services.cli.plan import AT_ONCE, STOP_WAVES, Layout, nats_config
from services.cli.supervisor import Service, Spec, StartFailed, Supervisor

_PROBE_EVERY_S = 0.1
_PROBE_TIMEOUT_S = 5.0
_ABORT_S = 5.0  # for services that have served nothing yet


class Cluster(msgspec.Struct, frozen=True):
    """What to run."""

    layout: Layout
    model: str
    served_name: str
    host: str  # of the HTTP API
    ready_s: float
    drain_s: float
    nats: Spec | str  # to be started, or the URL of one that runs
    services: Callable[[str], list[Spec]]  # given the NATS URL
    curl: Callable[[str], str]  # a request to try, given the URL


class Launch:
    """One run of one cluster. `run` returns the exit status."""

    def __init__(self, cluster: Cluster, show: Show) -> None:
        self._cluster = cluster
        self._show = show
        self._supervisor = Supervisor(self._on_change, self._on_record)
        self._began = time.monotonic()
        self._started_at = time.time()
        self._url = ""
        self._ready = False
        self._ending = False
        self._why_not = ""
        self._saved: object = None

    async def run(self) -> int:
        signals: asyncio.Queue[None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, signals.put_nowait, None)
        self._save()
        try:
            status = await self._serve(signals)
        finally:
            status_of_stop = await self._tear_down(signals)
        return status_of_stop or status

    async def _serve(self, signals: "asyncio.Queue[None]") -> int:
        """Until a signal (0; 130 when it came before readiness) or an error (1)."""
        asked = asyncio.create_task(signals.get())
        fatal = asyncio.create_task(self._supervisor.fatal())
        start = asyncio.create_task(self._start())
        try:
            await asyncio.wait({asked, fatal, start}, timeout=self._cluster.ready_s, return_when=asyncio.FIRST_COMPLETED)
            if start.done() and not fatal.done():
                start.result()
                await asyncio.wait({asked, fatal}, return_when=asyncio.FIRST_COMPLETED)
            if fatal.done():
                self._tell(fatal.result())
                return 1
            if not asked.done():
                self._tell(PenstockError(f"not ready within {self._cluster.ready_s:g} s: {self._what_is_missing()}"))
                return 1
            return 0 if self._ready else 130
        except PenstockError as error:
            self._tell(error)
            return 1
        finally:
            for task in (asked, fatal, start):
                task.cancel()

    async def _start(self) -> None:
        nats = self._cluster.nats
        if isinstance(nats, Spec):
            url = await self._start_nats(nats)
        else:
            url = nats
        specs = self._cluster.services(url)
        self._supervisor.start(specs)
        await self._supervisor.ready(spec.name for spec in specs if spec.kind != "router")
        await self._proven()
        self._supervisor.settled()
        self._ready = True
        self._save()
        seconds = time.monotonic() - self._began
        ready = Ready(url=self._url, model=self._cluster.served_name, curl=self._cluster.curl(self._url), seconds=seconds)
        self._show(Progress(self._rows()))
        self._show(ready)

    async def _start_nats(self, spec: Spec) -> str:
        """Its URL. The port is free at first and pinned then, so that a restarted NATS is found again."""
        layout = self._cluster.layout
        shutil.rmtree(layout.nats_store, ignore_errors=True)  # members of an earlier run: none lives
        layout.nats_store.mkdir(parents=True)
        layout.nats_config.write_text(nats_config(layout, port=-1))
        self._supervisor.start([spec])
        await self._supervisor.ready([spec.name])
        url = self._supervisor.services[spec.name].addresses["nats"]
        layout.nats_config.write_text(nats_config(layout, port=int(url.rpartition(":")[2])))
        return url

    async def _proven(self) -> None:
        """Returns when the router says that the cluster serves."""
        while True:
            address = self._supervisor.services["router"].addresses.get("http")
            if address:
                self._url = web.base_url(self._cluster.host, address)
                answer = await asyncio.to_thread(web.get, self._url + "/ready", _PROBE_TIMEOUT_S)
                if answer is not None and answer.status == 200:
                    return
                self._why_not = web.reason_in(answer)
                self._on_change(self._supervisor.services["router"])
            await asyncio.sleep(_PROBE_EVERY_S)

    async def _tear_down(self, signals: "asyncio.Queue[None]") -> int:
        """0, or 130 when a second signal cut it short."""
        self._ending = True
        if self._ready:
            self._show(Note("Stopping: requests in flight are finished first. Ctrl-C again stops at once."))
        waves, drain_s = (STOP_WAVES, self._cluster.drain_s) if self._ready else (AT_ONCE, _ABORT_S)
        draining = asyncio.create_task(self._supervisor.stop(waves, drain_s))
        again = asyncio.create_task(signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        cut_short = not draining.done()
        if cut_short:
            draining.cancel()
            self._supervisor.kill()
            await self._supervisor.gone()
        elif self._ready and draining.result():
            self._show(Note(f"did not stop within {drain_s:g} s and was killed: {', '.join(draining.result())}", bad=True))
        again.cancel()
        shutil.rmtree(self._cluster.layout.run, ignore_errors=True)
        state.forget(self._cluster.layout.data)
        self._show(Stopped(clean=not cut_short))
        return 130 if cut_short else 0

    def _tell(self, error: PenstockError) -> None:
        lines, log = (list(error.lines), str(error.log)) if isinstance(error, StartFailed) else ([], "")
        self._show(Failed(reason=error.message, lines=lines, log=log))

    def _what_is_missing(self) -> str:
        late = [f"{s.spec.name} is {s.stage}" for s in self._supervisor.services.values() if not s.ready.is_set()]
        return "; ".join(filter(None, [*late, self._why_not])) or "nothing has started"

    def _on_record(self, service: Service, record: Record) -> None:
        if not self._ready or service.spec.kind != "router":
            return
        if record.event == served.EVENT:
            self._show(served.line(record, time.strftime("%H:%M:%S")))
        elif record.event == "not_ready" and not self._ending:
            self._show(Note(f"{service.spec.name}: not ready: {record.fields.get('reason', '')}", bad=True))

    def _on_change(self, service: Service) -> None:
        self._save()
        if self._ending:
            return
        if not self._ready:
            self._show(Progress(self._rows()))
        elif service.state in ("backoff", "failed"):
            self._show(Note(f"{service.spec.name}: {service.stage}", bad=True))
        elif service.state == "ready" and service.restarts:
            self._show(Note(f"{service.spec.name}: ready again after restart {service.restarts}"))

    def _rows(self) -> list[Row]:
        rows = []
        for service in self._supervisor.services.values():
            unproven = service.spec.kind == "router" and not self._ready and service.addresses.get("http") and self._why_not
            shown_state = "starting" if unproven else service.state
            stage = self._why_not if unproven else service.stage
            rows.append(Row(name=service.spec.name, state=shown_state, stage=stage))
        return rows

    def _save(self) -> None:
        """Writes the state file when anything in it has changed."""
        current = self._state()
        if current != self._saved:
            self._saved = current
            state.write(self._cluster.layout.data, current)

    def _state(self) -> state.ClusterState:
        cluster = self._cluster
        return state.ClusterState(
            launcher=state.myself(),
            model=cluster.model,
            served_name=cluster.served_name,
            url=self._url,
            run_dir=str(cluster.layout.run),
            ready=self._ready,
            stop_s=len(STOP_WAVES) * cluster.drain_s,
            started_at=self._started_at,
            services=[_service_state(service) for service in self._supervisor.services.values()],
        )


def _service_state(service: Service) -> state.ServiceState:
    running = service.child is not None and service.child.returncode is None
    return state.ServiceState(
        name=service.spec.name,
        kind=service.spec.kind,
        state=service.state,
        stage=service.stage,
        restarts=service.restarts,
        addresses=dict(service.addresses),
        process=state.identify(service.child.pid) if running and service.child else None,
        log=str(Path(service.spec.log)),
    )

"""Keeps a set of services running: starts them, follows their logs, restarts them, stops them in order.

Life of one service (`NEXT`; a missing entry is our bug):

    starting ──ready──► ready
    starting, ready ──ended──► backoff ──retry──► starting      after the cluster was ready once
                               backoff ──give_up──► failed      more than RESTARTS_MAX in RESTART_WINDOW_S
    any of these ──stop──► stopping ──ended──► stopped

Before `settled()` has been called a service that ends fails the start (`StartFailed`): a wrong
model directory is not mended by trying again. What is shown, written or decided on a change is
the caller's: it passes two callbacks, for changes and for log records.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from common.errors import PenstockError
from services.cli.logfile import Record, Tail, last_lines, read_line, reason_in, rotate
from services.cli.spawn import Child, how_it_ended, spawn

RESTARTS_MAX = 5
RESTART_WINDOW_S = 300.0
_BACKOFF_FIRST_S = 0.5
_BACKOFF_MAX_S = 15.0
_POLL_S = 0.05  # how often logs are looked at; bounds what the launcher adds to noticing "ready"
_LAST_LINES = 12

State = Literal["starting", "ready", "backoff", "failed", "stopping", "stopped"]
NEXT: dict[State, dict[str, State]] = {
    "starting": {"ready": "ready", "ended": "backoff", "stop": "stopping"},
    "ready": {"ready": "ready", "ended": "backoff", "stop": "stopping"},
    "backoff": {"retry": "starting", "give_up": "failed", "stop": "stopped"},
    "failed": {"stop": "stopped"},
    "stopping": {"ready": "stopping", "ended": "stopped", "stop": "stopping"},
    "stopped": {"stop": "stopped"},
}


class Spec(msgspec.Struct, frozen=True):
    """A service to run."""

    name: str  # unique; the log is <name>.log
    kind: str  # router, decode, prefill, kvstore, nats
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    log: Path


class StartFailed(PenstockError):
    """A service ended before the cluster was ready."""

    def __init__(self, name: str, reason: str, lines: Sequence[str], log: Path) -> None:
        super().__init__(f"{name} did not start: {reason}")
        self.lines = lines
        self.log = log


class Service:
    """One supervised service and what is known about it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.state: State = "starting"
        self.stage = "starting"  # in words, from its log
        self.addresses: dict[str, str] = {}
        self.restarts = 0
        self.child: Child | None = None
        self.ready = asyncio.Event()
        self.ends: list[float] = []  # recent ends it was not asked for
        self.log_start = 0

    def __repr__(self) -> str:
        return f"Service({self.spec.name} {self.state} pid={self.child.pid if self.child else None})"

    def on(self, event: str) -> State:
        self.state = NEXT[self.state][event]
        return self.state


class Supervisor:
    """All services of one cluster. Use within one event loop, on the main thread."""

    def __init__(self, on_change: Callable[[Service], None], on_record: Callable[[Service, Record], None]) -> None:
        self.services: dict[str, Service] = {}
        self._on_change = on_change
        self._on_record = on_record
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._settled = False
        self._fatal: asyncio.Future[PenstockError] = asyncio.get_running_loop().create_future()

    def start(self, specs: Iterable[Spec]) -> None:
        """Starts services and keeps them running until `stop` or `kill`."""
        for spec in specs:
            rotate(spec.log)
            service = self.services[spec.name] = Service(spec)
            self._tasks[spec.name] = asyncio.create_task(self._keep(service), name=spec.name)

    async def ready(self, names: Iterable[str]) -> None:
        """Returns when all of `names` have reported ready once."""
        for name in names:
            await self.services[name].ready.wait()

    def settled(self) -> None:
        """From now on a service that ends is restarted."""
        self._settled = True

    def replace(self, spec: Spec) -> None:
        """The command for the next start of a service that runs."""
        self.services[spec.name].spec = spec

    async def fatal(self) -> PenstockError:
        """Returns the error that the cluster can't go on after."""
        return await asyncio.shield(self._fatal)

    async def stop(self, waves: Sequence[Sequence[str]], drain_s: float) -> list[str]:
        """Drains the kinds of one wave after the other; what overstays is killed. Returns the names of those."""
        overstayed = []
        for kinds in waves:
            members = [service for service in self.services.values() if service.spec.kind in kinds]
            for service in members:
                self._ask_to_stop(service)
            pending = [self._tasks[service.spec.name] for service in members]
            if pending:
                _, late = await asyncio.wait(pending, timeout=drain_s)
                overstayed += [task.get_name() for task in late]
                self.kill(task.get_name() for task in late)
                await asyncio.gather(*late, return_exceptions=True)
        return overstayed

    def kill(self, names: Iterable[str] | None = None) -> None:
        """Ends services at once."""
        for name in list(self.services if names is None else names):
            service = self.services[name]
            self._expect_end(service)
            if service.child is not None:
                service.child.kill()

    async def gone(self) -> None:
        """Returns when no service is left; none may be running unasked."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _ask_to_stop(self, service: Service) -> None:
        asked = service.state == "stopping"
        self._expect_end(service)
        if service.child is not None and not asked:
            service.child.terminate()

    def _expect_end(self, service: Service) -> None:
        if service.state in ("backoff", "failed"):
            self._tasks[service.spec.name].cancel()
        service.on("stop")
        self._on_change(service)

    async def _keep(self, service: Service) -> None:
        """Runs one service, again and again, until it is asked to stop or given up."""
        tail = Tail(service.spec.log)
        try:
            while service.state == "starting":
                returncode = await self._run_once(service, tail)
                after = service.on("ended")
                if after == "backoff" and not self._settled:
                    self._fail(_start_failed(service, returncode))
                    return
                if after == "backoff":
                    await self._back_off(service, returncode)
            if service.state == "stopping":  # asked to before it was started
                service.on("ended")
            self._on_change(service)
        except OSError as error:
            self._fail(PenstockError(f"{service.spec.name}: {error}"))
        finally:
            tail.close()

    async def _run_once(self, service: Service, tail: Tail) -> int:
        service.log_start = service.spec.log.stat().st_size
        service.child = child = spawn(service.spec.argv, service.spec.log, service.spec.environ)
        self._on_change(service)
        ended = asyncio.ensure_future(child.ended())
        while not ended.done():
            await asyncio.wait({ended}, timeout=_POLL_S)
            self._follow(service, tail)
        return ended.result()

    def _follow(self, service: Service, tail: Tail) -> None:
        for line in tail.read():
            record = read_line(line)
            service.addresses |= {key: str(record.fields[key]) for key in ("grpc", "http", "nats") if key in record.fields}
            if record.event == "ready":
                news = service.state != "ready"
                service.on("ready")
                service.stage = "ready"
                service.ready.set()
                if news:
                    self._on_change(service)
            elif record.event and service.state == "starting":
                service.stage = _stage(record)
                self._on_change(service)
            self._on_record(service, record)

    async def _back_off(self, service: Service, returncode: int) -> None:
        """Waits before the next start, or gives the service up."""
        now = time.monotonic()
        service.ends = [*(end for end in service.ends if now - end < RESTART_WINDOW_S), now]
        why = reason_in(service.spec.log, service.log_start) or how_it_ended(returncode)
        if len(service.ends) > RESTARTS_MAX:
            service.on("give_up")
            service.stage = f"given up after {RESTARTS_MAX} restarts: {why}"
            self._give_up(service)
            return
        delay_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2 ** (len(service.ends) - 1))
        service.stage = f"{why}; restarting in {delay_s:g} s"
        self._on_change(service)
        await asyncio.sleep(delay_s)
        service.on("retry")
        service.stage = "starting"
        service.restarts += 1

    def _give_up(self, service: Service) -> None:
        """The cluster goes on without a service, but not without its router or its last decode worker."""
        rest = [other for other in self.services.values() if other.spec.kind == service.spec.kind and other.state != "failed"]
        if service.spec.kind in ("router", "decode") and not rest:
            self._fail(PenstockError(f"{service.spec.name}: {service.stage}; see {service.spec.log}"))

    def _fail(self, error: PenstockError) -> None:
        if not self._fatal.done():
            self._fatal.set_result(error)


def _start_failed(service: Service, returncode: int) -> StartFailed:
    log, start = service.spec.log, service.log_start
    reason = reason_in(log, start) or how_it_ended(returncode)
    return StartFailed(service.spec.name, reason, last_lines(log, _LAST_LINES, start), log)


def _stage(record: Record) -> str:
    """What a starting service does, for people: the event, how far it is, what it waits for."""
    words = record.event.replace("_", " ")
    percent, reason = record.fields.get("percent"), record.fields.get("reason")
    return f"{words} {percent:.0f} %" if isinstance(percent, int | float) else f"{words}: {reason}" if reason else words

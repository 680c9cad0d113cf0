"""One life of a kvstore process: started, checked against the ledger, put under load, killed."""

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.clients.kvstore import KvStoreClient
from common.errors import PenstockError
from common.process import PARENT_VARIABLE
from loadtest.crash.ledger import BrokenPromise, Ledger, Promise
from loadtest.crash.plan import Death, Plan
from loadtest.crash.traffic import Traffic

WATCH_S = 0.02  # between two looks at the folder
READY_DEADLINE_S = 120.0
EXIT_DEADLINE_S = 60.0
LOG_LINES = 5


class Store:
    """A store's folder, and the process that has it at the moment."""

    def __init__(self, folder: Path, budget_bytes: int, flags: Sequence[str] = ()) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.budget_bytes = budget_bytes
        self.flags = flags  # of the kvstore, beside those that follow from the folder
        self.peak_bytes = 0
        self._child: asyncio.subprocess.Process | None = None

    async def start(self, plan: Plan) -> None:
        own = {"data": self.data, "run-dir": self.folder, "budget-bytes": self.budget_bytes, "id": "store", "drain-s": 0}
        flags = [part for name, value in own.items() for part in (f"--{name}", str(value))]
        forgetful = ["loadtest.crash.forgetful", plan.seed, "--"]
        module = forgetful if plan.death is Death.POWER else ["services.kvstore"]
        self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *module,
            *flags,
            *self.flags,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
        )

    async def ready(self) -> str:
        """The address, once it serves."""
        assert self._child is not None and self._child.stderr is not None
        lines: list[str] = []
        async with asyncio.timeout(READY_DEADLINE_S):
            async for raw in self._child.stderr:
                lines.append(raw.decode())
                event = json.loads(raw) if raw.startswith(b"{") else {}
                if event.get("event") == "ready":
                    self._draining = asyncio.create_task(self._child.stderr.read())
                    return str(event["grpc"])
        raise BrokenPromise(Promise.STARTS_AGAIN, "".join(lines[-LOG_LINES:]))

    async def kill(self, warning_s: float | None = None) -> bool:
        """SIGKILL, after a warning if there is to be one; whether the process was still there."""
        assert self._child is not None
        if warning_s is not None:
            self._child.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._child.wait(), warning_s)
        hit = self._child.returncode is None
        if hit:
            self._child.send_signal(signal.SIGKILL)
        async with asyncio.timeout(EXIT_DEADLINE_S):
            await self._child.wait()
        return hit

    async def end(self) -> None:
        if self._child is not None and self._child.returncode is None:
            await self.kill()

    def measure(self) -> None:
        """The bytes that the folder takes on disk now. Raises `BrokenPromise` when they are over the budget."""
        used = disk_bytes(self.data)
        self.peak_bytes = max(self.peak_bytes, used)
        if used > self.budget_bytes:
            raise BrokenPromise(Promise.BUDGET, f"{used} bytes on disk of {self.budget_bytes}")


def disk_bytes(folder: Path) -> int:
    """As `du` counts: blocks of all files, whatever they are called."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
    return total


async def live(store: Store, ledger: Ledger, plan: Plan, counts: Counter[str]) -> bool:
    """One life from start to end; whether it was killed, or ended before. Raises `BrokenPromise`."""
    choice = random.Random(plan.seed)
    await store.start(plan)
    try:
        if plan.while_starting:
            await asyncio.sleep(plan.kill_after_s)
            return await store.kill()
        address = await store.ready()
        store.measure()
        client = KvStoreClient(address, deadline_s=60.0)
        try:
            traffic = Traffic(client, ledger, choice, plan, counts)
            await traffic.check()
            hit = await _under_load(store, traffic, plan)
        finally:
            await client.close()
        store.measure()
        return hit
    finally:
        await store.end()


async def _under_load(store: Store, traffic: Traffic, plan: Plan) -> bool:
    """Traffic until the kill; what fails because of it is expected, what fails before it is not."""
    tasks = [asyncio.create_task(one()) for one in (*traffic.jobs(), _watching(store))]
    try:
        done, _ = await asyncio.wait(tasks, timeout=plan.kill_after_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # nothing ends by itself: this raises
        traffic.dying = True
        return await store.kill(plan.warning_s)
    finally:
        await _ended(tasks)
        await traffic.close()


def _watching(store: Store) -> Callable[[], Coroutine[Any, Any, None]]:
    async def watch() -> None:
        while True:
            store.measure()
            await asyncio.sleep(WATCH_S)

    return watch


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    """Ends the tasks; raises what is wrong with the store, and nothing that its death caused."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, (asyncio.CancelledError, PenstockError)):
            raise result

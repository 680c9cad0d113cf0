"""What all requests of a router share: its parts, how many are in flight, and threads for what takes long."""

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from common.clients.decode import Report
from common.errors import ContextExceeded, Overloaded, Unavailable
from services.router.cluster import Cluster
from services.router.decisions import Decision, Decisions
from services.router.metrics import Metrics
from services.router.model import Model
from services.router.settings import RouterSettings
from services.router.stores import LeaseKeeper

INLINE_CHARS_MAX = 4096  # shorter texts are tokenised in place: a thread hop costs more
T = TypeVar("T")


class Generator:
    """What all generations share."""

    def __init__(self, settings: RouterSettings, model: Model, cluster: Cluster, keeper: LeaseKeeper, metrics: Metrics) -> None:
        self.settings = settings
        self.model = model
        self.cluster = cluster
        self.keeper = keeper
        self.metrics = metrics
        self.in_flight = 0
        self.draining = False
        self.idle = asyncio.Event()  # nothing is in flight
        self.idle.set()
        self.serials = itertools.count()
        self.turns = itertools.count()  # of routing decisions
        self.policy = settings.policy()
        self.decisions = Decisions(settings.decisions_max)
        self._threads = ThreadPoolExecutor(2, "tokenise")

    def refuse_when_full(self, sequences: int) -> None:
        """Raises `Overloaded` when so many more would be too many."""
        if self.draining:
            raise Unavailable("the router is shutting down", retry_after_s=1.0)
        limit = self.settings.requests_max
        if sequences > limit:
            raise ContextExceeded(f"the request makes {sequences} sequences: at most {limit}", param="n")
        if self.in_flight + sequences > limit:
            raise Overloaded(f"{self.in_flight} sequences are in flight and requests_max = {limit}: try again", retry_after_s=1.0)

    def learn(self, decision: Decision | None, report: Report | None) -> None:
        """Tokens came, with a report or without. A decision's first report tells how good its estimate was, if its route was carried out."""
        if decision is None or not decision.came(report) or report is None or report.fallback or report.prefill_retries:
            return
        modelled_s, plan = decision.modelled_s, decision.plan
        if plan is None or modelled_s is None or decision.first_token_s is None:
            return
        self.cluster.corrections.observe(plan, modelled_s, decision.first_token_s, time.monotonic())
        self.metrics.estimated(plan, decision.ratio)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        return await self.off_loop(len(text) > INLINE_CHARS_MAX, lambda: self.model.encode(text, special=special))

    async def off_loop(self, big: bool, work: Callable[[], T]) -> T:
        """Runs `work` in place, or in a thread when it is big enough to hold up others."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work) if big else work()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

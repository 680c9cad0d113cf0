"""The last routing decisions, kept so that each can be explained: inputs, candidates, choice, and what then happened.

Life of a decision: made -> first token (unless it was refused or failed before) -> ended. A request has one per
choice and per move. The ledger keeps the last so many; older ones are forgotten.
"""

import time
from collections import deque
from typing import Any

import msgspec

from common.clients.decode import Report
from common.generation import FinishReason
from common.routes import PATHS, Plan
from services.router.placement import Route
from services.router.policy.estimates import Estimate
from services.router.policy.view import ClusterView, DecodeView, Query, WorkerView
from services.router.policy.workers import Refusal

SUMMARY_CANDIDATES_MAX = 12  # of a header: proxies take 4 to 8 KiB in all


class Decision(msgspec.Struct):
    """One placement of one choice.

    Attributes:
        workers: as the policy saw them, those that candidates name.
        made_at: monotonic seconds; `at` is for people, seconds since 1970.
        report: of the worker, as of now.
    """

    request_id: str
    choice: int
    move: int
    query: Query
    decided: Route | Refusal
    workers: tuple[WorkerView, ...]
    made_at: float
    at: float
    first_token_s: float | None = None
    report: Report | None = None
    ended: str = ""  # how; "left": moved away from, cancelled or failed; empty: it runs

    @property
    def plan(self) -> Plan | None:
        return self.decided.plan if isinstance(self.decided, Route) else None

    @property
    def modelled_s(self) -> float | None:
        """What the model said of the first token, without correction."""
        if isinstance(self.decided, Refusal):
            return None
        return self.decided.estimate.first_token_s / self.decided.estimate.correction

    @property
    def ratio(self) -> float:
        """Actual over estimated, of the first token; 0: not known."""
        if isinstance(self.decided, Refusal) or self.first_token_s is None:
            return 0.0
        return self.first_token_s / max(1e-6, self.decided.estimate.first_token_s)

    def came(self, report: Report | None) -> bool:
        """Tokens came, and perhaps the worker's report; whether that is the first one. A token that prefill samples comes before it."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.made_at
        known, self.report = self.report is not None, report or self.report
        return not known and report is not None

    def end(self, finish: FinishReason | None, report: Report | None) -> None:
        self.ended = str(finish) if finish is not None else "left"
        self.report = report or self.report

    def explained(self) -> dict[str, Any]:
        """All of it, for /v1/penstock/explain."""
        out: dict[str, Any] = {
            "request_id": self.request_id,
            "choice": self.choice,
            "move": self.move,
            "at": self.at,
            "query": msgspec.to_builtins(self.query) | {"avoid": sorted(self.query.avoid)},
            "workers": [msgspec.to_builtins(worker) | {"role": _role(worker)} for worker in self.workers],
            "reason": self.decided.reason,
        }
        if isinstance(self.decided, Refusal):
            return out | {"refused": str(self.decided.why), "candidates": []}
        chosen = self.decided.estimate
        listed = sorted(self.decided.candidates, key=lambda e: e.finish_s)
        out["candidates"] = [msgspec.to_builtins(e) | {"chosen": e is chosen} for e in listed]
        return out | {"alternates": list(self.decided.alternates), "took": self._took()}

    def summary(self) -> dict[str, Any]:
        """The gist of it, for a header."""
        if isinstance(self.decided, Refusal):
            return {"refused": str(self.decided.why), "reason": self.decided.reason}
        chosen, names = self.decided.estimate, {worker.address: worker.id for worker in self.workers}
        listed = sorted(self.decided.candidates, key=lambda e: e.finish_s)[:SUMMARY_CANDIDATES_MAX]
        return {
            "plan": chosen.plan,
            "decode": names.get(chosen.decode, chosen.decode),
            "prefill": names.get(chosen.prefill, chosen.prefill),
            "legs": [[leg.first_block, leg.last_block, leg.source] for leg in chosen.legs],
            "estimate_s": round(chosen.first_token_s, 4),
            "error": chosen.error,
            "took_s": None if self.first_token_s is None else round(self.first_token_s, 4),
            "carried_out": self.report.plan if self.report else None,
            "reason": self.decided.reason,
            "candidates": [[e.plan, names.get(e.decode, ""), names.get(e.prefill, ""), round(e.finish_s, 4)] for e in listed],
        }

    def _took(self) -> dict[str, Any] | None:
        """What then happened; None: nothing yet."""
        report = self.report
        if self.first_token_s is None and report is None:
            return None
        took: dict[str, Any] = {"first_token_s": self.first_token_s, "over_estimate": self.ratio, "ended": self.ended}
        if report is not None:
            facts = {name: value for name, value in msgspec.to_builtins(report).items() if name not in PATHS}
            took |= facts | {"paths": {path: msgspec.to_builtins(getattr(report, path)) for path in PATHS}}
        return took


class Decisions:
    """The last `decisions_max` decisions."""

    def __init__(self, decisions_max: int) -> None:
        self._kept: deque[Decision] = deque(maxlen=decisions_max)

    def made(
        self, request_id: str, choice: int, move: int, query: Query, view: ClusterView, decided: Route | Refusal
    ) -> Decision:
        """Takes a decision in."""
        named = _named(decided.candidates) if isinstance(decided, Route) else set()
        workers = tuple(w for w in (*view.decodes, *view.prefills) if w.address in named)
        decision = Decision(request_id, choice, move, query, decided, workers, time.monotonic(), time.time())
        self._kept.append(decision)
        return decision

    def of(self, request_id: str) -> list[Decision]:
        """In the order they were made; none: unknown or forgotten."""
        return [decision for decision in self._kept if decision.request_id == request_id]

    @property
    def last(self) -> str:
        """Id of the request placed last; empty: none was."""
        return self._kept[-1].request_id if self._kept else ""


def _named(candidates: tuple[Estimate, ...]) -> set[str]:
    return {address for e in candidates for address in (e.decode, e.prefill)}


def _role(worker: WorkerView) -> str:
    return "decode" if isinstance(worker, DecodeView) else "prefill"

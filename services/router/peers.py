"""One peer of the router: what it says of itself, and what the router has sent it since.

Life: UNKNOWN -> CONNECTED <-> LOST. Facts come from `Describe` over gRPC, loads from whichever of
`Describe` and NATS spoke last; what the router sent after that report is added, so that a burst
between two reports is seen.
"""

import time
from typing import Any

import msgspec

from common.clients.decode import DecodeConnection
from common.clients.kvstore import KvStoreClient, StoreInfo
from common.clients.prefill import PrefillConnection
from common.membership import MemberLoad, Seen
from common.pb import worker_pb2
from common.runs import QueuedRun
from services.router.account import Account
from services.router.backlog import Backlog
from services.router.policy.view import DecodeView, Link, PrefillView

NATS_FRESH_S = 2.5  # two refreshes and a half: newer than that, a load over NATS spares the poll


class PeerInfo(msgspec.Struct, frozen=True):
    """A Describe reply."""

    role: str
    id: str
    epoch: str
    namespace: str = ""
    model: str = ""
    block_tokens: int = 0
    bytes_per_block: int = 0
    stored_bytes_per_block: int = 0
    context_tokens: int = 0
    vocab_size: int = 0
    draining: bool = False
    load: MemberLoad = MemberLoad()
    store: dict[str, int] = {}  # a kvstore's counters, for status


class Peer:
    """A decode worker, prefill worker or kvstore at one address."""

    def __init__(self, role: str, address: str, static: bool) -> None:
        self.role = role
        self.address = address
        self.static = static
        self.connected = False
        self.problem = "not reached yet"  # why it can't be used; empty: it can
        self.info: PeerInfo | None = None
        self.connection: DecodeConnection | None = None
        self.prefill: PrefillConnection | None = None
        self.store: KvStoreClient | None = None
        self.seen: Seen | None = None
        self.full_until = 0.0
        self.account = Account()
        self._heard_nats_at = 0.0

    def __repr__(self) -> str:
        state = "connected" if self.connected else f"lost ({self.problem})"
        return f"<Peer {self.role} {self.address} {state} live={self.account.sequences_live}>"

    @property
    def id(self) -> str:
        return self.info.id if self.info else self.seen.record.id if self.seen else self.address

    @property
    def usable(self) -> bool:
        return self.connected and not self.problem and self.info is not None

    @property
    def holder(self) -> DecodeConnection | PrefillConnection | None:
        """Whom to ask what it still holds of a prompt; None: nobody is connected."""
        return self.connection or self.prefill

    @property
    def gone(self) -> bool:
        """Not in the settings, and not (or no more) among the announced members."""
        return not self.static and (self.seen is None or self.seen.gone)

    def described(self, info: PeerInfo, problem: str) -> None:
        """A Describe reply came."""
        self.info = info
        self.problem = problem
        self.connected = True
        self.account.report(info.load, time.monotonic())

    def heard(self, seen: Seen) -> None:
        """An announcement came over NATS. It counts as a load report only from the incarnation we are connected to."""
        self.seen = seen
        if self.info is None or seen.gone or seen.record.epoch != self.info.epoch:
            return
        self.info = msgspec.structs.replace(self.info, load=seen.record.load, draining=seen.record.draining)
        self._heard_nats_at = time.monotonic()
        self.account.report(seen.record.load, self._heard_nats_at)

    def lost(self, reason: str) -> None:
        self.connected = False
        self.problem = reason
        self.connection = None
        self.full_until = 0.0

    def nats_fresh(self, now: float) -> bool:
        return now - self._heard_nats_at < NATS_FRESH_S

    def decode_view(self, now: float, routed_at: float) -> DecodeView:
        assert self.info is not None
        return DecodeView(
            sequences=self.account.sequences,
            pool_tokens=self.info.load.pool_blocks_total * self.info.block_tokens,
            full_until=self.full_until,
            **self._facts(self.info, now, routed_at),
        )

    def prefill_view(self, now: float, routed_at: float) -> PrefillView:
        assert self.info is not None
        return PrefillView(queued_runs=self.account.runs(now), **self._facts(self.info, now, routed_at))

    def _facts(self, info: PeerInfo, now: float, routed_at: float) -> dict[str, Any]:
        """What the views of both roles share. `routed_at`: when the router last routed bytes over any link."""

        def link(backlog: Backlog) -> Link:
            return Link(backlog.per_s, backlog.left(now), max(0.0, routed_at - backlog.used_at), backlog.moved)

        return {
            "address": self.address,
            "id": info.id,
            "namespace": info.namespace,
            "tokens": self.account.tokens,
            "queued_tokens": self.account.compute.left(now),
            "prefill_tokens_per_s": info.load.prefill_tokens_per_s,
            "prefill_step_s": info.load.prefill_step_s,
            **{name: link(backlog) for name, backlog in self.account.links.items()},
            "stage_slots_free": info.load.stage_slots_free,
            "stage_slots_total": info.load.stage_slots_total,
            "connected": self.usable,
            "draining": info.draining,
        }

    def detail(self) -> str:
        """Its load in words."""
        if self.problem:
            return self.problem
        assert self.info is not None
        words = "draining, " if self.info.draining else ""
        if self.role == "kvstore":
            counts = self.info.store
            return f"{words}{counts['blocks']} blocks, {counts['used_bytes'] / 1e6:.0f} of {counts['budget_bytes'] / 1e6:.0f} MB"
        load = self.info.load
        return (
            f"{words}{load.running} running, {load.waiting} waiting, {load.tokens} tokens, "
            f"{load.pool_blocks_total - load.pool_blocks_free} of {load.pool_blocks_total} blocks"
        )


def worker_info(message: worker_pb2.WorkerInfo) -> PeerInfo:
    load = message.load
    runs = tuple(QueuedRun(run.tokens, run.due_s) for run in load.queued_runs)
    return PeerInfo(
        role=message.role,
        id=message.id,
        epoch=message.epoch.hex(),
        namespace=message.namespace,
        model=message.model,
        block_tokens=message.block_tokens,
        bytes_per_block=message.bytes_per_block,
        stored_bytes_per_block=message.stored_bytes_per_block or message.bytes_per_block,
        context_tokens=message.context_tokens,
        vocab_size=message.vocab_size,
        draining=message.draining,
        load=MemberLoad(**{name: getattr(load, name) for name in MemberLoad.__struct_fields__} | {"queued_runs": runs}),
    )


def store_info(info: StoreInfo) -> PeerInfo:
    values = msgspec.structs.asdict(info)
    counters = {name: value for name, value in values.items() if type(value) is int}
    counters["disks_failed"] = sum(disk.state != "serving" for disk in info.disks)
    return PeerInfo(role="kvstore", id=info.id, epoch=info.epoch.hex(), draining=info.draining, store=counters)

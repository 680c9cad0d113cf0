"""The router's connections to its peers, and the view that placement decides on.

Peers come from the settings (static, kept for ever) and from NATS (kept until their entry is gone
*and* their gRPC connection is down). Each peer has one task: a session (sessions.py), of which each Describe reply is checked
for role and model -> lost -> wait -> the next session.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from common.errors import Internal, PenstockError
from common.logs import Log
from common.membership import Seen, Watcher
from services.router.account import Stay
from services.router.peers import Peer, PeerInfo
from services.router.placement import cluster_namespace
from services.router.policy.corrections import Corrections
from services.router.policy.estimates import Estimate
from services.router.policy.view import ClusterView
from services.router.sessions import session

RECONNECT_S = (0.1, 1.0)
RESIDENT_ASKED_MAX = 8  # workers of a role asked what they hold, per request: a call each
ROLES = ("decode", "prefill", "kvstore")

log = Log("cluster")


class Basis(NamedTuple):
    """What a prompt's block keys and its kvstores depend on. No `block_tokens`: no decode worker serves."""

    namespace: str
    block_tokens: int
    kvstores: tuple[str, ...]


class Cluster:
    """Peers by (role, address). `run` follows them until cancelled."""

    def __init__(self, model_name: str, static: dict[str, tuple[str, ...]], nats: str = "") -> None:
        self._model_name = model_name
        self._tasks: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()
        self._nats = nats
        self.watcher = Watcher(nats, self._heard)
        self.namespace = ""
        self.corrections = Corrections()
        self.routed_at = time.monotonic()  # when bytes were last routed over any link
        self.peers: dict[tuple[str, str], Peer] = {}
        for role in ROLES:
            for address in static.get(role, ()):
                self.peers[role, address] = Peer(role, address, static=True)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for peer in self.peers.values():
                tasks.create_task(self._follow(peer), name=f"follow-{peer.role}-{peer.address}")
            await self.watcher.run()
            await asyncio.Event().wait()  # no NATS: the static peers' tasks go on

    def of(self, role: str) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.role == role]

    def peer(self, role: str, address: str) -> Peer | None:
        return self.peers.get((role, address))

    def serving(self, role: str = "decode") -> list[Peer]:
        """Workers of the cluster's namespace that are connected."""
        return [p for p in self.of(role) if p.usable and p.info is not None and p.info.namespace == self.namespace]

    def basis(self) -> Basis:
        infos = [p.info for p in self.serving() if p.info is not None]
        return Basis(self.namespace, infos[0].block_tokens if infos else 0, self._kvstores())

    def _kvstores(self) -> tuple[str, ...]:
        return tuple(p.address for p in self.of("kvstore") if p.usable and p.info is not None and not p.info.draining)

    async def resident(self, keys: Sequence[bytes], deadline_s: float) -> dict[str, int]:
        """How many leading blocks of a chain each worker still holds, by its address; those that hold none, or don't answer in
        time, are left out. Of many workers of a role, those with the fewest sequences are asked."""
        if not deadline_s:
            return {}
        asked = [peer.holder for role in ("decode", "prefill") for peer in self._least_busy(role)]
        holders = [holder for holder in asked if holder is not None]
        counts = await asyncio.gather(*(holder.resident(keys, deadline_s) for holder in holders), return_exceptions=True)
        for holder, count in zip(holders, counts, strict=True):
            if isinstance(count, BaseException) and not isinstance(count, PenstockError):
                raise count
            if isinstance(count, PenstockError):
                log.debug("resident_unknown", worker=holder.address, reason=count.message)
        return {h.address: count for h, count in zip(holders, counts, strict=True) if isinstance(count, int) and count}

    def _least_busy(self, role: str) -> list[Peer]:
        return sorted(self.serving(role), key=lambda peer: peer.account.sequences)[:RESIDENT_ASKED_MAX]

    def view(self) -> ClusterView:
        now = time.monotonic()
        infos = [p.info for p in self.serving() if p.info is not None]
        return ClusterView(
            namespace=self.namespace,
            block_tokens=infos[0].block_tokens if infos else 0,
            decodes=tuple(p.decode_view(now, self.routed_at) for p in self.of("decode") if p.usable),
            prefills=tuple(p.prefill_view(now, self.routed_at) for p in self.of("prefill") if p.usable),
            kvstores=self._kvstores(),
            bytes_per_block=infos[0].bytes_per_block if infos else 0,
            stored_bytes_per_block=infos[0].stored_bytes_per_block if infos else 0,
            corrections=self.corrections.factors(now),
        )

    def send(self, estimate: Estimate, decode: Peer, prefill: Peer | None, tokens: int) -> tuple[Stay, Stay | None]:
        """Counts a request of so many tokens, which was sent on its way, at its workers and on their links."""
        now = time.monotonic()
        if estimate.legs:
            self.routed_at = now
        at_prefill = self.send_on(estimate, prefill)
        return decode.account.send(estimate.of_decode(tokens), now), at_prefill

    def send_on(self, estimate: Estimate, prefill: Peer | None) -> Stay | None:
        """Counts a request at a prefill worker: the route's, or the alternate that decode asks instead."""
        return prefill.account.send(estimate.of_prefill(), time.monotonic()) if prefill is not None else None

    def context_tokens(self, own: int) -> int:
        """The longest prompt plus output that every serving decode worker takes."""
        limits = [p.info.context_tokens for p in self.serving() if p.info is not None and p.info.context_tokens]
        return min(limits, default=own)

    def not_ready(self, needs_kvstore: bool) -> str:
        """Why the cluster can't serve; empty when it can, proven by handshakes."""
        if not self.of("decode"):
            return "no decode worker is known: none in the settings and none announced over NATS"
        if not self.serving():
            reasons = "; ".join(f"{p.address}: {p.problem or 'of another namespace'}" for p in self.of("decode"))
            return f"no decode worker is connected ({reasons})"
        for role in ("prefill", "kvstore") if needs_kvstore else ("prefill",):
            unreached = [p for p in self.of(role) if p.static and not p.usable]
            if unreached:
                return f"{role} {unreached[0].address}: {unreached[0].problem}"
        foreign = [p for p in self.peers.values() if p.usable and p.info and p.info.namespace not in ("", self.namespace)]
        if foreign:
            other = foreign[0]
            return f"{other.role} {other.id} has another namespace than decode: other weights, dtype or block_tokens"
        if needs_kvstore and not any(p.usable for p in self.of("kvstore")):
            return "no kvstore is connected; --no-ready-needs-kvstore serves without one"
        return ""

    async def changed(self) -> None:
        """Waits for the next connection, loss or Describe reply."""
        await self._changed.wait()

    def _notify(self) -> None:
        usable = [p.info.namespace for p in self.of("decode") if p.usable and p.info is not None]
        chosen = cluster_namespace(usable, self.namespace)
        if chosen != self.namespace:
            log.event("namespace", namespace=chosen[:16], before=self.namespace[:16])
            self.namespace = chosen
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    def _heard(self, seen: Seen) -> None:
        record = seen.record
        if record.role not in ROLES:
            return
        key = (record.role, record.address)
        peer = self.peers.get(key)
        if peer is None:
            if seen.gone or self._tasks is None:
                return
            peer = self.peers[key] = Peer(record.role, record.address, static=False)
            self._tasks.create_task(self._follow(peer), name=f"follow-{record.role}-{record.address}")
        if peer.seen is not None and seen.gone and seen.record.epoch != peer.seen.record.epoch:
            return  # an older incarnation's entry went, not this one's
        peer.heard(seen)

    async def _follow(self, peer: Peer) -> None:
        wait_s = RECONNECT_S[0]
        silent = False
        while True:
            try:
                await session(peer, self._described)
                raise Internal("a session ended without saying why")
            except Exception as error:
                was_connected = peer.connected
                silent = self._lost(peer, error, silent and not was_connected)
                wait_s = RECONNECT_S[0] if was_connected else min(2 * wait_s, RECONNECT_S[1])
            self._notify()
            if peer.gone:
                del self.peers[peer.role, peer.address]
                if peer.seen is not None:
                    self.watcher.forget(peer.seen.record)
                log.event("peer_forgotten", role=peer.role, address=peer.address)
                return
            await asyncio.sleep(wait_s)

    def _lost(self, peer: Peer, error: Exception, silent: bool) -> bool:
        """Notes a loss; one that repeats is logged once."""
        what = "peer_lost" if peer.connected else "peer_unreachable"
        peer.lost(error.message if isinstance(error, PenstockError) else f"internal error: {error!r}")
        if not isinstance(error, PenstockError):
            log.exception("session_failed", role=peer.role, address=peer.address)
        elif not silent:
            log.warning(what, role=peer.role, address=peer.address, reason=error.message)
        return True

    def _described(self, peer: Peer, info: PeerInfo) -> None:
        problem = self._problem(peer, info)
        if not peer.connected or problem != peer.problem:
            level = log.warning if problem else log.event
            level("peer_connected", role=peer.role, address=peer.address, id=info.id, epoch=info.epoch[:8], problem=problem)
        peer.described(info, problem)
        self._notify()

    def _problem(self, peer: Peer, info: PeerInfo) -> str:
        """Why a peer that answers can't be used."""
        if info.role != peer.role:
            return f"it is a {info.role}, not a {peer.role}"
        if peer.role != "kvstore" and info.model != self._model_name:
            return f"it serves {info.model!r}, not {self._model_name!r}"
        return ""

"""What the router says of itself and its cluster: readiness, the model card, /v1/penstock/status."""

import re
import time
from typing import Any

import msgspec

from common.errors import NotFound
from services.router.cluster import Cluster
from services.router.generator import Generator
from services.router.peers import Peer

_ANSWER_PREFIX = re.compile("^(chat)?cmpl-")  # of the ids in answers


class Facts:
    """Read-only answers; every call looks afresh."""

    def __init__(self, generator: Generator, cluster: Cluster, model_name: str, model_root: str) -> None:
        self._g = generator
        self._cluster = cluster
        self.model_name = model_name
        self._root = model_root
        self._created = int(time.time())

    def not_ready(self) -> str:
        """Why requests can't be served now; empty when they can."""
        if self._g.draining:
            return "the router is shutting down"
        return self._cluster.not_ready(self._g.settings.ready_needs_kvstore)

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "penstock",
            "root": self._root,
            "parent": None,
            "max_model_len": self._cluster.context_tokens(self._g.model.context_tokens),
        }

    def status(self) -> dict[str, Any]:
        reason = self.not_ready()
        view = self._cluster.view()
        return {
            "ready": not reason,
            "reason": reason,
            "model": self.model_card(),
            "namespace": self._cluster.namespace,
            "block_tokens": view.block_tokens,
            "in_flight": self._g.in_flight,
            "requests_max": self._g.settings.requests_max,
            "leases_held": self._g.keeper.held,
            "nats": {"url": self._g.settings.nats, "connected": self._cluster.watcher.connected},
            "members": [member(peer) for peer in self._cluster.peers.values()],
        }

    def explained(self, asked: str | None) -> dict[str, Any]:
        """The routing decisions for a request, by its id or its answer's; None: for the request placed last.

        Raises:
            NotFound: unknown, or forgotten since.
        """
        decisions = self._g.decisions
        name = decisions.last if asked is None else asked
        kept = decisions.of(name) or decisions.of(_ANSWER_PREFIX.sub("", name))
        if not kept:
            limit = self._g.settings.decisions_max
            raise NotFound(f"no decision is known for request {name!r}: the router keeps the last {limit} (decisions_max)")
        return {"request_id": kept[0].request_id, "decisions": [decision.explained() for decision in kept]}


def member(peer: Peer) -> dict[str, Any]:
    out: dict[str, Any] = {
        "role": peer.role,
        "id": peer.id,
        "address": peer.address,
        "static": peer.static,
        "connected": peer.connected,
        "usable": peer.usable,
        "detail": peer.detail(),
        "sequences_live": peer.account.sequences_live,
    }
    if peer.info is not None:
        out |= {"epoch": peer.info.epoch, "namespace": peer.info.namespace, "draining": peer.info.draining}
        out |= {"store": peer.info.store} if peer.role == "kvstore" else {"load": msgspec.to_builtins(peer.info.load)}
    return out

"""What the policy sees: one moment of the cluster, and what it needs to know of a request."""

import math

import msgspec

from common.routes import Plan
from common.runs import QueuedRun


class Link(msgspec.Struct, frozen=True):
    """One direction of a worker's traffic.

    Attributes:
        bytes_per_s: EWMA of what was measured; 0: never measured.
        queue_bytes: asked for and not there yet, what was just sent there included.
        idle_s: since this router last routed bytes over it, while it routed bytes over others.
        moved_bytes: over it so far, as this router knows: what the measurement rests on.
    """

    bytes_per_s: float = 0.0
    queue_bytes: float = 0.0
    idle_s: float = 0.0
    moved_bytes: float = math.inf


LINKS = ("storage", "peer_read", "peer_write")  # fields of a WorkerView


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as far as the router knows. Counts include what was just sent there.

    Attributes:
        tokens: held by all its sequences.
        queued_tokens: that wait to be computed.
        prefill_tokens_per_s: 0: not measured. `prefill_step_s`: what a step takes beside its tokens.
        storage: what it reads from storage.
        peer_read: what prefill workers read out of a decode worker's stage: its outgoing side, or prefill's incoming one.
        peer_write: what prefill workers write into a decode worker's stage, likewise.
        stage_slots_free, stage_slots_total: a total of 0: not known.
    """

    address: str
    id: str
    namespace: str
    tokens: int = 0
    queued_tokens: float = 0.0
    prefill_tokens_per_s: float = 0.0
    prefill_step_s: float = 0.0
    storage: Link = Link()
    peer_read: Link = Link()
    peer_write: Link = Link()
    stage_slots_free: int = 0
    stage_slots_total: int = 0
    connected: bool = True
    draining: bool = False


class DecodeView(WorkerView, frozen=True, kw_only=True):
    """A decode worker.

    Attributes:
        pool_tokens: what its pool holds in all; 0: not known.
        full_until: it refused a request and asked to be left alone until then.
    """

    sequences: int = 0
    pool_tokens: int = 0
    full_until: float = 0.0


class PrefillView(WorkerView, frozen=True, kw_only=True):
    """A prefill worker.

    Attributes:
        queued_runs: `queued_tokens` by when they are due, from now on; of those that it leaves out nothing is known.
    """

    queued_runs: tuple[QueuedRun, ...] = ()


class ClusterView(msgspec.Struct, frozen=True):
    """One moment of the cluster.

    Attributes:
        bytes_per_block: of one full block as workers compute with it. `stored_bytes_per_block`: as it is stored.
        kvstores: the addresses of those that answer.
        corrections: per plan, what finished requests took over what was estimated (`corrections.py`); empty: nothing yet.
    """

    namespace: str
    block_tokens: int
    decodes: tuple[DecodeView, ...] = ()
    prefills: tuple[PrefillView, ...] = ()
    kvstores: tuple[str, ...] = ()
    bytes_per_block: int = 0
    stored_bytes_per_block: int = 0
    corrections: dict[Plan, float] = {}

    def usable(self, worker: WorkerView) -> bool:
        return worker.connected and not worker.draining and worker.namespace == self.namespace


class Query(msgspec.Struct, frozen=True):
    """What the policy needs of a request.

    Attributes:
        prompt_tokens: everything whose KV must be there before the next token: prompt, and the output of a moved request.
        stored_blocks: leading blocks that are stored and leased.
        kvstore: address of the store that holds them, and takes the new ones; empty: none.
        avoid: decode workers that failed this request; taken only when there is no other.
        resident: leading blocks that a worker still holds, by its address: a decode worker's pool, a prefill worker's stage.
        turn: number of the request at this router, for `round_robin`.
        moved: another worker began the answer, so decode must compute what is missing itself.
    """

    prompt_tokens: int
    stored_blocks: int = 0
    kvstore: str = ""
    avoid: frozenset[str] = frozenset()
    resident: dict[str, int] = {}
    turn: int = 0
    moved: bool = False

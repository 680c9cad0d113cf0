"""What a worker is asked to do, in the domain's terms."""

import msgspec

from common.blocks import ChainRoot
from common.errors import PenstockError
from common.generation import FinishReason, Sampling, Token
from common.routes import Leg, Order, Plan
from common.transport.interface import Endpoint, LeaseToken
from services.worker.loading import Stored

HEARTBEAT_S = 1.0  # a prefill run says at least so often how far it is, while its engine works


class Route(msgspec.Struct, frozen=True):
    """The router's decision. `prefill` and `kvstore` are host:port, empty for none; no leg covers: computed.

    New blocks go to `kvstore` and to the `replicas`, which all hold the first `replicated_blocks` blocks already.
    When `prefill` fails and more than `tail_tokens` are left to compute, the `alternates` are asked, each once.
    """

    legs: tuple[Leg, ...] = ()
    order: Order = Order.FORWARD
    stored: Stored | None = None
    prefill: str = ""
    kvstore: str = ""
    replicas: tuple[str, ...] = ()
    replicated_blocks: int = 0
    alternates: tuple[str, ...] = ()
    tail_tokens: int = 0


class StageLease(msgspec.Struct, frozen=True):
    """The right to share a peer's stage: item i is block i of the prompt."""

    token: LeaseToken
    endpoint: Endpoint
    ttl_s: float


class DecodeRequest(msgspec.Struct, frozen=True):
    """One request, whole. `output` was emitted by a worker that is gone."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    route: Route
    deadline_s: float
    chain_root: ChainRoot
    output: tuple[int, ...] = ()
    traceparent: str = ""


class PrefillRequest(msgspec.Struct, frozen=True):
    """Fill `stage` with the prompt's KV and sample the first token.

    `chain_root`: parent of the first block's key, under which blocks are found in the worker's stage, and kept there; None: they aren't.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stage: StageLease
    legs: tuple[Leg, ...]
    order: Order
    stored: Stored | None
    deadline_s: float
    chain_root: ChainRoot | None = None
    traceparent: str = ""


class Flow(msgspec.Struct, frozen=True):
    """What one path moved; `seconds` in which at least one transfer was under way."""

    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Flow") -> "Flow":
        return Flow(self.bytes + other.bytes, self.seconds + other.seconds)


class Report(msgspec.Struct):
    """What really happened, filled in as it happens. Times in seconds.

    Of prefill workers, it is the last one's doing that is told: `prefill`, its times, and what its stage still held. But what moved
    is of all of them: of one that failed, as far as it had told.
    """

    plan: Plan = Plan.RECOMPUTE
    cached_tokens: int = 0
    computed_tokens: int = 0
    prefill: str = ""
    carrier: str = ""
    storage_to_decode: Flow = msgspec.field(default_factory=Flow)
    storage_to_prefill: Flow = msgspec.field(default_factory=Flow)
    decode_to_prefill: Flow = msgspec.field(default_factory=Flow)
    prefill_to_decode: Flow = msgspec.field(default_factory=Flow)
    host_to_device: Flow = msgspec.field(default_factory=Flow)
    queue_s: float = 0.0
    prefill_s: float = 0.0
    preemptions: int = 0
    fallback: str = ""
    prefill_retries: int = 0
    kept_tokens: int = 0


class RequestStep(msgspec.Struct, frozen=True):
    """One message's worth of news of a request, for the router."""

    id: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: PenstockError | None = None
    report: Report | None = None


class PrefillProgress(msgspec.Struct, frozen=True):
    """News of a prefill run.

    `first`, with `finish` and `stop_token`, comes once, `report` with the last one. `pull_from`: per leg from
    decode, in order, the block that decode may pull from on (order MEET). The flows: so far.
    """

    computed_blocks: int
    pull_from: tuple[int, ...] = ()
    first: Token | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    report: Report | None = None
    storage_to_prefill: Flow = Flow()
    decode_to_prefill: Flow = Flow()
    prefill_to_decode: Flow = Flow()

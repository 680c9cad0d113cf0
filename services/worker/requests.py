"""What a worker is asked to do, in the domain's terms."""

from enum import StrEnum

import msgspec

from common.blocks import ChainRoot
from common.errors import PenstockError
from common.generation import FinishReason, Sampling, Token
from common.transport.interface import Endpoint, LeaseToken
from services.worker.loading import Stored


class Source(StrEnum):
    """Where a prompt's KV comes from (worker.proto Source)."""

    DIRECT = "direct"
    STORAGE_TO_PREFILL = "storage_to_prefill"
    RECOMPUTE = "recompute"


class Route(msgspec.Struct, frozen=True):
    """The router's decision. `prefill` and `kvstore` are host:port, empty for none."""

    source: Source
    stored: Stored | None = None
    prefill: str = ""
    kvstore: str = ""


class StageLease(msgspec.Struct, frozen=True):
    """The right to fill a peer's stage: item i is block i of the prompt."""

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
    """Fill `stage` with the prompt's KV and sample the first token."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stage: StageLease
    stored: Stored | None
    present_blocks: int
    deadline_s: float
    traceparent: str = ""


class Report(msgspec.Struct):
    """What really happened, filled in as it happens. Times in seconds, sizes in bytes."""

    source: Source = Source.RECOMPUTE
    cached_tokens: int = 0
    prefill: str = ""
    carrier: str = ""
    bytes_storage_to_decode: int = 0
    bytes_storage_to_prefill: int = 0
    bytes_prefill_to_decode: int = 0
    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    preemptions: int = 0
    fallback: str = ""


class RequestStep(msgspec.Struct, frozen=True):
    """One message's worth of news of a request, for the router."""

    id: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: PenstockError | None = None
    report: Report | None = None


class PrefillProgress(msgspec.Struct, frozen=True):
    """News of a prefill run. Blocks are in the stage, verified, before they are counted.

    `first`, `finish`, `stop_token` and `report` come with the last one.
    """

    blocks_filled: int
    first: Token | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    report: Report | None = None

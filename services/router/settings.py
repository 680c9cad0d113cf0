"""Settings of the router."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.routes import Plan
from services.router.policy.plans import PLANS
from services.router.policy.settings import PolicySettings, Scheduler


class RouterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One router. Addresses are host:port; port 0 takes a free one and reports it."""

    model: Annotated[str, Meta(description="model directory (Hugging Face format): tokenizer, chat template, config")]
    served_name: Annotated[str, Meta(description="name the model is served under; empty: the directory's name")] = ""
    id: Annotated[str, Meta(description="name of this router; empty: made from its port")] = ""
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="HTTP port")] = 8080
    grpc_port: Annotated[int, Meta(ge=0, le=65535, description="gRPC port")] = 0
    nats: Annotated[str, Meta(description="NATS URL; empty: no event plane, peers are static")] = ""
    decode: Annotated[tuple[str, ...], Meta(description="static decode workers, host:port")] = ()
    prefill: Annotated[tuple[str, ...], Meta(description="static prefill workers, host:port")] = ()
    kvstore: Annotated[tuple[str, ...], Meta(description="static kvstores, host:port")] = ()
    api_key: Annotated[tuple[str, ...], Meta(description="accepted API keys; prefer the file or the variable to the flag")] = ()
    api_keys_file: Annotated[
        str, Meta(description="file with one accepted API key a line; empty and no api_key: open to all")
    ] = ""
    requests_max: Annotated[int, Meta(ge=1, description="sequences in flight; more are refused at once (429)")] = 512
    sequences_per_request_max: Annotated[int, Meta(ge=1, description="prompts times n of one request")] = 64
    body_bytes_max: Annotated[int, Meta(ge=1024, description="largest request body")] = 32 << 20
    request_timeout_s: Annotated[float, Meta(gt=0, description="time a request may take in all")] = 1800.0
    lookup_timeout_ms: Annotated[int, Meta(ge=1, description="how long to wait for the kvstore before treating it as a miss")] = (
        200
    )
    resident_timeout_ms: Annotated[
        int,
        Meta(ge=0, description="how long to wait for workers to say what they still hold of a prompt; 0: they aren't asked"),
    ] = 50
    replicas: Annotated[
        int, Meta(ge=1, le=8, description="kvstores that keep each chain; more than 1 outlives the loss of a store's disks")
    ] = 1
    lease_s: Annotated[float, Meta(ge=1, le=3600, description="life of a lookup's lease between renewals")] = 30.0
    plans: Annotated[
        tuple[Plan, ...], Meta(description="plans that requests may take (docs/dualpath.md); recompute always may be")
    ] = PLANS
    layerwise: Annotated[
        bool, Meta(description="load, compute and hand over layer by layer; --no-layerwise: one after the other, for comparisons")
    ] = True
    scheduler: Annotated[
        Scheduler, Meta(description="earliest_finish, or for comparisons: paper (DualPath's rules), round_robin")
    ] = Scheduler.EARLIEST_FINISH
    prefill_backlog_s: Annotated[
        float, Meta(gt=0, description="beta: prefill workers with more compute queued are passed over while others have less")
    ] = 5.0
    read_backlog_s: Annotated[
        float, Meta(gt=0, description="alpha: prefill workers with more reading queued come after the others")
    ] = 3.0
    direct_tail_tokens: (
        Annotated[
            int,
            Meta(ge=0, description="tokens that decode computes in its own batch for first tokens at most; unset: direct_tail_s"),
        ]
        | None
    ) = None
    direct_tail_s: Annotated[
        float, Meta(ge=0, description="the same in seconds of decode's measured speed: what running requests may be held up")
    ] = 0.25
    serve_backlog_s: Annotated[
        float, Meta(ge=0, description="decode workers with more queued for prefill to read are not read from")
    ] = 1.0
    error_band: Annotated[
        float, Meta(ge=0, le=1, description="estimates that differ by less are equal: then the least computing wins")
    ] = 0.05
    decisions_max: Annotated[int, Meta(ge=1, description="routing decisions kept for `penstock explain`")] = 512
    failover_wait_s: Annotated[float, Meta(ge=0, description="how long a request whose decode worker died waits for another")] = (
        15.0
    )
    ready_needs_kvstore: Annotated[
        bool, Meta(description="not ready until a kvstore answers; --no-ready-needs-kvstore serves without one")
    ] = True
    drain_s: Annotated[float, Meta(ge=0, description="how long a drain waits for running requests")] = 20.0
    otlp_endpoint: Annotated[str, Meta(description="OpenTelemetry collector (http://host:port); empty: no traces")] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="log level")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="log format")] = "json"

    def policy(self) -> PolicySettings:
        """The policy's part."""
        names = PolicySettings.__struct_fields__
        return PolicySettings(**{name: getattr(self, name) for name in names})

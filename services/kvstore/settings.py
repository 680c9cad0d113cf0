"""Settings of the kvstore."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class KvStoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kvstore. Addresses are host:port; port 0 takes a free one and reports it."""

    data: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(min_length=1, max_length=64, description="folder of the blocks; once for each SSD; one process owns it"),
    ]
    id: Annotated[str, Meta(description="name of this kvstore; empty: made from its epoch")] = ""
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="gRPC port")] = 0
    bytes_port: Annotated[int, Meta(ge=0, le=65535, description="byte-plane tcp port")] = 0
    advertise_host: Annotated[str, Meta(description="host that peers reach this kvstore by; empty: host")] = ""
    bytes_host: Annotated[
        str, Meta(description="address of the byte plane where it has a network of its own; empty: as host and advertise_host")
    ] = ""
    metrics_port: Annotated[int, Meta(ge=0, le=65535, description="Prometheus port; 0: no metrics server")] = 0
    nats: Annotated[str, Meta(description="NATS URL; empty: no event plane, routers name this kvstore statically")] = ""
    run_dir: Annotated[
        str,
        Meta(description="folder for unix sockets; peers on this host that share it move bytes by shared memory; empty: none"),
    ] = ""
    budget_bytes: Annotated[
        int,
        Meta(
            ge=1 << 20,
            description="bytes of all files of the store at most, over all folders; never more than 80 % of what is free on each disk",
        ),
    ] = 20 << 30
    segment_bytes: Annotated[
        int, Meta(ge=1 << 16, description="size of a new segment file; at most an eighth of a disk's budget")
    ] = 256 << 20
    durable: Annotated[bool, Meta(description="sync before a block counts as stored; --no-durable trades that for speed")] = True
    direct: Annotated[bool, Meta(description="bypass the page cache where the file system can")] = True
    io: Annotated[
        Literal["auto", "io_uring", "threads"],
        Meta(description="how disk I/O is done; auto: io_uring where kernel and container allow it, else threads"),
    ] = "auto"
    read_depth: Annotated[int, Meta(ge=1, le=256, description="reads at once on each disk")] = 32
    write_depth: Annotated[int, Meta(ge=1, le=256, description="writes at once on each disk")] = 16
    pending_reads_max: Annotated[int, Meta(ge=1, description="disk reads that may queue; more fail at once")] = 65_536
    reserved_bytes_max: Annotated[
        int, Meta(ge=1 << 20, description="space reserved and not yet written, of all writers; more is dropped")
    ] = 1 << 30
    read_buffer_bytes: Annotated[int, Meta(ge=96 << 20, description="memory for reads that leave by a socket; more wait")] = (
        128 << 20
    )
    block_ttl_s: Annotated[
        int,
        Meta(ge=0, le=1_000_000_000, description="how long a block is kept after it was written or offered again; 0: for ever"),
    ] = 0
    tenant_quota_bytes: Annotated[
        int, Meta(ge=0, description="space that the blocks of one tenant may take; beyond it evicts its own; 0: no quotas")
    ] = 0
    admission: Annotated[
        Literal["all", "second_touch"],
        Meta(
            description="second_touch: a block is written when it is offered for the second time, or continues one that was read"
        ),
    ] = "all"
    write_buffer_bytes: Annotated[
        int, Meta(ge=128 << 20, description="memory for blocks on their way to the disk; half of it is the byte plane's bound")
    ] = 256 << 20
    read_deadline_s: Annotated[float, Meta(gt=0, le=3600, description="a disk read that takes longer has failed")] = 10.0
    lease_s: Annotated[float, Meta(gt=0, le=3600, description="life of a lease whose holder asks for no time")] = 30.0
    lease_s_max: Annotated[float, Meta(gt=0, le=86_400, description="longest life of a lease between renewals")] = 600.0
    leases_max: Annotated[int, Meta(ge=1, description="leases at once; more are refused")] = 10_000
    scrub_bytes_per_s: Annotated[
        int, Meta(ge=0, description="what the background scrub may read; 0: no scrub, not even when asked for")
    ] = 16 << 20
    scrub_every_s: Annotated[
        float, Meta(ge=0, description="time between two passes of the scrub over all blocks; 0: only when asked for")
    ] = 86_400.0
    drain_s: Annotated[float, Meta(ge=0, description="how long a drain waits for leases to end")] = 5.0
    otlp_endpoint: Annotated[str, Meta(description="OpenTelemetry collector (http://host:port); empty: no traces")] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="log level")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="log format")] = "json"

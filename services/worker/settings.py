"""Settings that prefill and decode workers share."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common.codec import CodecName


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One worker. Addresses are host:port; port 0 takes a free one and reports it."""

    model: Annotated[str, Meta(description="model directory (Hugging Face format)")]
    served_name: Annotated[str, Meta(description="name the model is served under; empty: the directory's name")] = ""
    id: Annotated[str, Meta(description="name of this worker; empty: made from role and port")] = ""
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="gRPC port")] = 0
    bytes_port: Annotated[int, Meta(ge=0, le=65535, description="byte-plane tcp port")] = 0
    advertise_host: Annotated[str, Meta(description="host that peers reach this worker by; empty: host")] = ""
    bytes_host: Annotated[
        str, Meta(description="address of the byte plane where it has a network of its own; empty: as host and advertise_host")
    ] = ""
    metrics_port: Annotated[int, Meta(ge=0, le=65535, description="Prometheus port; 0: no metrics server")] = 0
    nats: Annotated[str, Meta(description="NATS URL; empty: no event plane, peers are static")] = ""
    run_dir: Annotated[
        str,
        Meta(
            description="folder for unix sockets; peers on this host that share it move bytes by shared memory; empty: tcp only"
        ),
    ] = ""
    transport: Annotated[
        Literal["auto", "extent", "shm", "tcp", "grpc"],
        Meta(description="carrier used to reach peers; auto: on this host extents of the SSD and shm, else tcp or grpc"),
    ] = "auto"
    device: Annotated[str, Meta(description="torch device: cpu, cuda, cuda:N, or auto")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Meta(description="dtype of weights and KV; auto: the checkpoint's")
    ] = "auto"
    threads: Annotated[int, Meta(ge=0, description="CPU threads of the engine; 0: torch's default")] = 0
    kernels: Annotated[
        Literal["auto", "off", "require"],
        Meta(description="CPU kernels compiled with the machine's C compiler: auto, off, require"),
    ] = "auto"
    block_tokens: Annotated[
        int, Meta(ge=0, le=1024, description="tokens per KV block, a power of two; 0: chosen from the model")
    ] = 0
    codec: Annotated[
        CodecName, Meta(description="how the reservoir keeps KV: raw (exact), fp8, int8 or int4 (smaller, with a measured loss)")
    ] = "raw"
    context_tokens: Annotated[int, Meta(ge=0, description="longest prompt plus output; 0: the model's own limit")] = 0
    pool_bytes: Annotated[int, Meta(ge=0, description="KV memory of the engine; 0: chosen from the machine")] = 0
    stage_bytes: Annotated[int, Meta(ge=0, description="shared-memory stage for transfers; 0: chosen from the machine")] = 0
    resident: Annotated[
        bool,
        Meta(
            description="keep the KV of what has ended, in decode's pool or prefill's stage, while nobody needs the memory, and use it again"
        ),
    ] = True
    sequences_max: Annotated[int, Meta(ge=1, description="sequences in one batch")] = 64
    waiting_max: Annotated[int, Meta(ge=0, description="requests that may queue; more are refused at once")] = 256
    step_tokens_max: Annotated[int, Meta(ge=16, description="token budget of one engine step (chunked prefill)")] = 1024
    lease_s: Annotated[float, Meta(gt=0, le=3600, description="life of a transfer lease between heartbeats")] = 30.0
    simulate_free_loads: Annotated[
        bool, Meta(description="for experiments: blocks count as loaded and nothing is read, so that answers are wrong")
    ] = False
    drain_s: Annotated[float, Meta(ge=0, description="how long a drain waits for running requests")] = 20.0
    otlp_endpoint: Annotated[str, Meta(description="OpenTelemetry collector (http://host:port); empty: no traces")] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="log level")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="log format")] = "json"

"""Settings of `penstock up`: how many of each service, where they listen, what they serve.

What belongs to one service alone (pool sizes, budgets, thresholds) is a key of that service's
table in the same TOML file; the launcher passes the file on. Keys left unset here are left to it.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DEMO_MODEL = REPOSITORY / "deploy" / "demo_model" / "penstock-demo"
LOCAL = REPOSITORY / "deploy" / "local"


class UpSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One cluster on one machine."""

    model: Annotated[str, Meta(description="model directory (Hugging Face format); empty: the demo model")] = ""
    prefill: Annotated[int, Meta(ge=0, le=64, description="prefill workers")] = 1
    decode: Annotated[int, Meta(ge=1, le=64, description="decode workers")] = 1
    kvstore: Annotated[int, Meta(ge=0, le=64, description="KV stores; each keeps its blocks in a folder under data")] = 1
    data: Annotated[str, Meta(min_length=1, description="folder for stored KV, logs and the state of this cluster")] = "data"
    host: Annotated[str, Meta(min_length=1, description="address of the HTTP API")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port of the HTTP API; 0 takes a free one")] = 8080
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        Meta(description="dtype of weights and KV: auto, float32, bfloat16 or float16; unset: left to the workers"),
    ] = None
    block_tokens: Annotated[int, Meta(ge=0, description="tokens per KV block; unset: chosen from the model")] | None = None
    context_tokens: Annotated[int, Meta(ge=0, description="longest prompt plus output; unset: the model's limit")] | None = None
    codec: Annotated[
        Literal["raw", "fp8", "int8", "int4"] | None,
        Meta(description="how the reservoir keeps KV: raw, fp8, int8 or int4; unset: left to the workers"),
    ] = None
    device: Annotated[str | None, Meta(description="torch device of the workers; unset: left to the workers")] = None
    threads: Annotated[int, Meta(ge=0, description="CPU threads of each worker; unset: left to the workers")] | None = None
    transport: Annotated[
        Literal["auto", "extent", "shm", "tcp", "grpc"] | None,
        Meta(description="carrier of KV bytes: auto, extent, shm, tcp or grpc"),
    ] = None
    nats: Annotated[str, Meta(description="URL of a NATS server that already runs; empty: start one")] = ""
    otlp_endpoint: Annotated[str, Meta(description="OpenTelemetry collector (http://host:port); empty: no traces")] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, Meta(description="log level of the services; unset: theirs")
    ] = None
    detach: Annotated[bool, Meta(description="return when the cluster is ready and leave it running")] = False
    ready_s: Annotated[float, Meta(gt=0, description="how long the start may take")] = 300.0
    drain_s: Annotated[float, Meta(ge=0, description="how long a stop waits for each kind of service")] = 30.0

"""The body of a worker process: model, engine, stage, byte plane, gRPC, event plane.

Life of a node (`serve_worker`):
1. The model is loaded and the engine's thread runs.
2. The stage is mapped, the byte plane listens, and gRPC listens with the role's service, NOT_SERVING.
3. Health says SERVING, the worker is announced, and a `ready` event is logged with its addresses.
4. `stop` is set: the worker announces that it drains, refuses new work, and finishes what runs.
5. Everything is closed in reverse. Drained means that no request and no lease is left.
"""

import asyncio
import secrets
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import grpc.aio
import msgspec
from prometheus_client import start_http_server
from transformers.utils import logging as transformers_logging

from common import heap, rpc, tracing
from common.logs import Log
from common.machine import memory_bytes
from common.membership import Announcer, MemberLoad, MemberRecord
from common.pb import worker_pb2 as pb
from common.runs import by_class
from common.settings import shown
from common.transport.grpc_carrier import BytesServicer
from common.transport.interface import Endpoint
from common.transport.pool import TransportPool
from common.transport.reception import Reception
from common.transport.server import serve_bytes
from common.wire import endpoint_to_pb
from services.worker.codec import Codec
from services.worker.engine.loop import EngineLoop, Steppable
from services.worker.engine.types import StepResult
from services.worker.links import Link
from services.worker.loading import KvStores, Reader
from services.worker.memory import StageSize, stage_slots
from services.worker.model import LoadedModel, load_model
from services.worker.settings import WorkerSettings
from services.worker.slots import SlotPool
from services.worker.stage import Stage

log = Log("node")
E = TypeVar("E", bound=Steppable)
STALLED_S = 60.0  # a step longer than this is a stuck engine: health says so


class Kind(Protocol):
    """What makes the two kinds of worker differ before there is one.

    `send_slots`: stage slots set aside for what leaves. `stage_size`: of the stage, when no setting says.
    """

    send_slots: int
    stage_size: StageSize

    def context_tokens(self, settings: WorkerSettings, model: LoadedModel) -> int:
        """Longest prompt plus output that it is made for."""
        ...

    def engine(self, settings: WorkerSettings, model: LoadedModel, stage: Stage, context_tokens: int) -> Steppable: ...

    def role(self, node: "Node[Any]") -> "Role": ...


class Role(Protocol):
    """What a worker does with its node."""

    def on_step(self, result: StepResult) -> None: ...

    def register(self, server: grpc.aio.Server) -> None: ...

    @property
    def in_flight(self) -> int: ...

    def links(self) -> Mapping[str, Link]:
        """Its links to peers, by the name they have in the load: "peer_read", "peer_write"."""
        ...

    async def drain(self, deadline_s: float) -> None:
        """Refuses new work and waits for what runs, at most so long; then ends it."""
        ...


class Node(Generic[E]):
    """What both roles are made of. Belongs to the event loop's thread."""

    def __init__(self, role: str, settings: WorkerSettings, model: LoadedModel, kind: Kind) -> None:
        self.role = role
        self.settings = settings
        self.model = model
        self.epoch = secrets.token_bytes(16)
        self.id = settings.id or f"{role}-{self.epoch[:4].hex()}"
        self.endpoint = Endpoint()
        self.address = ""  # host:port of gRPC, as peers reach it
        self.draining = False
        self.context_tokens = kind.context_tokens(settings, model)
        slots = stage_slots(
            model.layout, self.context_tokens, memory_bytes(), settings.stage_bytes, kind.send_slots, kind.stage_size
        )
        self.stage = Stage(slots, model.layout.bytes_per_block)
        self.send_slots = SlotPool(self.stage.reserve(kind.send_slots))
        self.engine: EngineLoop[E] = EngineLoop(
            cast(E, kind.engine(settings, model, self.stage, self.context_tokens)), self._on_step, name=f"{role}-engine"
        )
        self.transports = TransportPool(self.stage.region, prefer=settings.transport)
        self.stores = KvStores()
        self.codec = Codec(model.stored)
        self.reader = Reader(
            self.stage, self.transports, self.stores, self.codec, simulate_free_loads=settings.simulate_free_loads
        )
        self.worker: Role | None = None

    def _on_step(self, result: StepResult) -> None:
        if self.worker is not None:
            self.worker.on_step(result)

    @property
    def requests_max(self) -> int:
        return self.settings.sequences_max + self.settings.waiting_max

    @property
    def model_name(self) -> str:
        return self.settings.served_name or Path(self.settings.model).resolve().name

    def load(self) -> MemberLoad:
        load = self.engine.load
        links = self.worker.links() if self.worker is not None else {}
        rates: dict[str, Any] = {f"{name}_bytes_per_s": link.bytes_per_s for name, link in links.items()}
        rates |= {f"{name}_queue_bytes": link.queued_bytes for name, link in links.items()}
        return MemberLoad(
            running=load.running,
            waiting=load.waiting,
            tokens=load.tokens,
            pool_blocks_free=load.pool_blocks_free,
            pool_blocks_total=load.pool_blocks_total,
            stage_slots_free=self.stage.slots_free,
            stage_slots_total=self.stage.slots_total,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            prefill_step_s=load.prefill_step_s,
            read_bytes_per_s=self.reader.link.bytes_per_s,
            read_queue_bytes=self.reader.link.queued_bytes,
            queued_tokens=load.queued_tokens,
            queued_runs=by_class(load.queued_runs, time.monotonic()),
            **rates,
        )

    def record(self) -> MemberRecord:
        """What the event plane says of this worker."""
        return MemberRecord(
            role=self.role,
            id=self.id,
            epoch=self.epoch.hex(),
            address=self.address,
            namespace=self.model.namespace,
            model=self.model_name,
            block_tokens=self.model.layout.block_tokens,
            draining=self.draining,
            load=self.load(),
        )

    def info(self) -> pb.WorkerInfo:
        """What the control plane says of it."""
        layout = self.model.layout
        return pb.WorkerInfo(
            role=self.role,
            id=self.id,
            epoch=self.epoch,
            model=self.model_name,
            namespace=self.model.namespace,
            block_tokens=layout.block_tokens,
            bytes_per_block=layout.bytes_per_block,
            context_tokens=self.context_tokens,
            vocab_size=self.model.vocab_size,
            draining=self.draining,
            load=pb.Load(**msgspec.to_builtins(self.load())),
            bytes_endpoint=endpoint_to_pb(self.endpoint),
            codec=self.model.stored.codec,
            stored_bytes_per_block=self.model.stored.bytes_per_block,
        )


async def serve_worker(role: str, settings: WorkerSettings, stop: asyncio.Event, kind: Kind) -> None:
    """Runs a worker until `stop` is set and everything is drained."""
    log.event("starting", role=role, settings=shown(settings))
    loading = asyncio.to_thread(_load, settings)
    model = await loading
    async with AsyncExitStack() as stack:
        node: Node[Any] = Node(role, settings, model, kind)
        log.event("model_loaded", namespace=model.namespace, layout=msgspec.to_builtins(model.layout), codec=model.stored.codec, context_tokens=node.context_tokens,
                  dtype=str(model.dtype), device=str(model.device), kernels=model.kernels)  # fmt: skip
        tracing.setup(role, node.id, settings.otlp_endpoint)
        stack.callback(tracing.shutdown)
        stack.callback(node.stage.close)
        stack.push_async_callback(node.stores.close)
        stack.push_async_callback(node.transports.close)
        node.engine.start()
        stack.push_async_callback(node.engine.stop)
        node.worker = worker = kind.role(node)
        server = await _listen(node, worker, stack)
        if settings.metrics_port:
            start_http_server(settings.metrics_port, settings.host)
        announcer = Announcer(settings.nats, node.record)
        announcing = asyncio.create_task(announcer.run())
        stack.callback(announcing.cancel)
        heap.settle()
        await server.set_serving(True)
        log.event("ready", role=role, id=node.id, grpc=node.address, endpoint=msgspec.to_builtins(node.endpoint))
        await _until(stop, node)
        node.draining = True
        await server.set_serving(False)
        announcer.changed()
        await worker.drain(settings.drain_s)
        await announcer.withdraw()
        await server.stop(1.0)


def _load(settings: WorkerSettings) -> LoadedModel:
    transformers_logging.disable_progress_bar()  # ours are events of the log
    shown_percent = -1

    def on_progress(done: int, total: int) -> None:
        nonlocal shown_percent
        percent = 100 * done // max(total, 1)
        if percent >= shown_percent + 5:
            shown_percent = percent
            log.event("loading", percent=percent, bytes=done)

    return load_model(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        block_tokens=settings.block_tokens,
        codec=settings.codec,
        context_tokens=settings.context_tokens,
        kernels=settings.kernels,
        threads=settings.threads,
        on_progress=on_progress,
    )


async def _listen(node: Node[Any], worker: Role, stack: AsyncExitStack) -> rpc.Server:
    settings = node.settings
    shm_path = Path(settings.run_dir) / f"{node.id}.sock" if settings.run_dir else None
    reception = Reception(node.stage, None)
    by_grpc = BytesServicer(node.stage, reception=reception)
    bytes_server = await serve_bytes(
        node.stage,
        tcp=(settings.bytes_host or settings.host, settings.bytes_port),
        shm_path=shm_path,
        advertise_host=settings.bytes_host or settings.advertise_host,
        reception=reception,
    )
    stack.push_async_callback(bytes_server.close)

    def register(server: grpc.aio.Server) -> None:
        worker.register(server)
        by_grpc.add_to(server)

    name = f"penstock.worker.v1.{node.role.capitalize()}"
    server = await rpc.serve(settings.host, settings.port, [name, "penstock.bytes.v1.Bytes"], register)
    stack.push_async_callback(server.stop, 0)
    node.address = _address(settings, server.address)
    node.endpoint = Endpoint(bytes_server.endpoint.shm, bytes_server.endpoint.tcp, node.address)
    return server


def _address(settings: WorkerSettings, bound: str) -> str:
    """The address peers reach: as bound, unless another host is advertised."""
    host, _, port = bound.rpartition(":")
    return f"{settings.advertise_host or host}:{port}"


async def _until(stop: asyncio.Event, node: Node[Any]) -> None:
    """Waits for `stop`; meanwhile sweeps expired leases and fails when the engine's thread has died."""
    while not stop.is_set():
        try:
            async with asyncio.timeout(1.0):
                await stop.wait()
        except TimeoutError:
            node.stage.sweep()
            if node.engine.failure is not None:
                raise node.engine.failure from None
            if node.engine.stalled_s() > STALLED_S:
                log.error("engine_stalled", seconds=round(node.engine.stalled_s()))

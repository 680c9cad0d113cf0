"""The body of the kvstore process: store, byte plane, gRPC, event plane, metrics.

1. The folders are locked, scanned, and the index rebuilt.
2. The byte plane and gRPC listen, NOT_SERVING; then health says SERVING, the store is announced, and
   a `ready` event with its addresses is logged.
3. `stop` is set: it announces that it drains, refuses new leases, waits for those that are out.
4. Everything is closed in reverse. Drained means that no lease is left.
"""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import msgspec
from prometheus_client import start_http_server

from common import heap, rpc, tracing
from common.aio import first_of
from common.errors import SettingsError, Unavailable
from common.logs import Log
from common.membership import Announcer, MemberRecord
from common.pb import kvstore_pb2_grpc
from common.settings import shown
from common.transport.grpc_carrier import SERVICE as BYTES_SERVICE
from common.transport.grpc_carrier import BytesServicer
from common.transport.interface import Endpoint
from common.transport.reception import Limits, Reception
from common.transport.server import serve_bytes
from services.kvstore.admin import SERVICE as ADMIN_SERVICE
from services.kvstore.admin import AdminService
from services.kvstore.area import StoreArea
from services.kvstore.gauges import DiskCollector, gauges
from services.kvstore.options import StoreOptions
from services.kvstore.scrub import Scrub
from services.kvstore.service import SERVICE, KvStoreService
from services.kvstore.settings import KvStoreSettings
from services.kvstore.store import Store

log = Log("kvstore")
SWEEP_S = 0.5


async def serve(settings: KvStoreSettings, stop: asyncio.Event) -> None:
    """Runs a kvstore until `stop` is set and everything is drained."""
    log.event("starting", settings=shown(settings))
    async with AsyncExitStack() as stack:
        store = await asyncio.to_thread(open_store, settings)
        stack.push_async_callback(asyncio.to_thread, store.close)
        area = StoreArea(
            store,
            read_buffer_bytes=settings.read_buffer_bytes,
            write_buffer_bytes=settings.write_buffer_bytes,
            read_deadline_s=settings.read_deadline_s,
        )
        stack.push_async_callback(store.settle)
        stack.push_async_callback(area.settle)
        id_ = settings.id or f"kvstore-{store.epoch[:4].hex()}"
        tracing.setup("kvstore", id_, settings.otlp_endpoint)
        stack.callback(tracing.shutdown)
        scrub = Scrub(store, bytes_per_s=settings.scrub_bytes_per_s, every_s=settings.scrub_every_s)
        server, endpoint = await _listen(settings, store, scrub, area, id_, stack)
        _publish(settings, store, area, stack)

        def record() -> MemberRecord:
            return MemberRecord("kvstore", id_, store.epoch.hex(), endpoint.grpc, draining=store.draining)

        announcer = Announcer(settings.nats, record)
        announcing = asyncio.create_task(announcer.run())
        stack.callback(announcing.cancel)
        await server.set_serving(True)
        log.event("ready", role="kvstore", id=id_, grpc=endpoint.grpc, endpoint=msgspec.to_builtins(endpoint))
        upkeep = [_sweep(store), *([scrub.run()] if settings.scrub_bytes_per_s else [])]
        await first_of(stop.wait(), *upkeep)
        store.draining = True
        announcer.changed()
        await server.set_serving(False)
        clean = await store.drain(settings.drain_s)
        log.event("drained", clean=clean)
        await announcer.withdraw()


def open_store(settings: KvStoreSettings) -> Store:
    """Locks and scans the folders. Blocking. Raises `SettingsError` when none can be used."""
    folders = [Path(folder) for folder in settings.data]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SettingsError(f"[kvstore] data = {list(settings.data)!r}: expected each folder once")
    chosen = {name: getattr(settings, name) for name in StoreOptions.__struct_fields__}
    try:
        store = Store.open(folders, StoreOptions(**chosen))
    except OSError as error:
        shown = repr(settings.data[0] if len(folders) == 1 else list(settings.data))
        raise SettingsError(f"[kvstore] data = {shown}: {error.strerror or error}; expected a folder to write to") from error
    if store.space.budget_bytes < settings.budget_bytes:
        log.warning(
            "budget_lowered",
            asked_bytes=settings.budget_bytes,
            budget_bytes=store.space.budget_bytes,
            reason="80 % of what is free on each disk",
        )
    heap.settle()
    return store


async def _listen(
    settings: KvStoreSettings, store: Store, scrub: Scrub, area: StoreArea, id_: str, stack: AsyncExitStack
) -> tuple[rpc.Server, Endpoint]:
    host = settings.advertise_host or settings.host
    reception = Reception(area, Limits(bytes_total_max=settings.write_buffer_bytes // 2))
    by_grpc = BytesServicer(area, reception=reception)
    endpoint = Endpoint()
    service = KvStoreService(store, id_, lambda: endpoint)

    def register(server: grpc.aio.Server) -> None:
        kvstore_pb2_grpc.add_KvStoreServicer_to_server(service, server)
        kvstore_pb2_grpc.add_AdminServicer_to_server(AdminService(store, scrub, service), server)
        by_grpc.add_to(server)

    bytes_server = await serve_bytes(
        area,
        tcp=(settings.bytes_host or settings.host, settings.bytes_port),
        shm_path=Path(settings.run_dir) / f"{id_}.sock" if settings.run_dir else None,
        advertise_host=settings.bytes_host or settings.advertise_host,
        reception=reception,
    )
    stack.push_async_callback(bytes_server.close)
    server = await rpc.serve(settings.host, settings.port, [SERVICE, ADMIN_SERVICE, BYTES_SERVICE], register)
    stack.push_async_callback(server.stop, 1.0)
    address = f"{host}:{server.address.rpartition(':')[2]}"
    endpoint = Endpoint(shm=bytes_server.endpoint.shm, tcp=bytes_server.endpoint.tcp, grpc=address)
    return server, endpoint


def _publish(settings: KvStoreSettings, store: Store, area: StoreArea, stack: AsyncExitStack) -> None:
    store.metrics.publish(lambda: gauges(store, area))
    store.metrics.registry.register(DiskCollector(store.disks))
    if not settings.metrics_port:
        return
    try:
        http, thread = start_http_server(settings.metrics_port, settings.host, store.metrics.registry)
    except OSError as error:
        raise Unavailable(
            f"can't listen on {settings.host}:{settings.metrics_port}: {error.strerror}", param="metrics_port"
        ) from error
    log.event("metrics", address=f"{settings.host}:{http.server_port}")

    def close() -> None:
        http.shutdown()
        http.server_close()
        thread.join()

    stack.callback(close)


async def _sweep(store: Store) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        store.sweep()

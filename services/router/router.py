"""The router as a whole: wires model, cluster, generator and both servers, and drains them.

Life: bound -> serving (health says so; ready once the handshakes prove it) -> draining -> stopped.
"""

import asyncio

from common import heap, rpc
from common.logs import Log
from common.pb import router_pb2_grpc
from services.router.cluster import Cluster
from services.router.generator import Generator
from services.router.grpc_api import SERVICE_NAMES, PenstockService
from services.router.http_api import Api
from services.router.metrics import Metrics
from services.router.model import load
from services.router.settings import RouterSettings
from services.router.status import Facts
from services.router.stores import LeaseKeeper
from services.router.web import Web

log = Log("router")


class Router:
    """Made by `open`; `run` serves until told to stop."""

    def __init__(self, config: RouterSettings, generator: Generator, facts: Facts, web: Web, grpc_server: rpc.Server) -> None:
        self._config = config
        self._generator = generator
        self._facts = facts
        self._web = web
        self._grpc = grpc_server
        self.id = config.id or f"router-{web.address}"
        self.http_address = web.address
        self.grpc_address = grpc_server.address
        self.ready = asyncio.Event()

    @classmethod
    async def open(cls, config: RouterSettings, keys: tuple[str, ...] = ()) -> "Router":
        """Loads the model's tokenizer and binds both ports.

        Raises:
            UnsupportedModel: the model directory can't be used.
            Unavailable: a port is in use.
        """
        model = await asyncio.to_thread(load, config.model)
        name = config.served_name or model.directory.name
        static = {"decode": config.decode, "prefill": config.prefill, "kvstore": config.kvstore}
        cluster = Cluster(name, static, config.nats)
        generator = Generator(config, model, cluster, LeaseKeeper(config.lease_s), Metrics(name))
        facts = Facts(generator, cluster, name, str(model.directory))
        web = Web(Api(generator, facts, keys).app(), config.host, config.port)
        service = PenstockService(generator, facts, keys)
        grpc_server = await rpc.serve(
            config.host,
            config.grpc_port,
            SERVICE_NAMES,
            lambda server: router_pb2_grpc.add_PenstockServicer_to_server(service, server),
        )
        heap.settle()
        return cls(config, generator, facts, web, grpc_server)

    async def run(self, stop: asyncio.Event) -> None:
        self._web.start()
        log.event("listening", http=f"http://{self.http_address}", grpc=self.grpc_address)
        tasks = [
            asyncio.create_task(self._generator.cluster.run(), name="cluster"),
            asyncio.create_task(self._generator.keeper.run(), name="leases"),
            asyncio.create_task(self._announce_ready(), name="ready"),
        ]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({stopping, tasks[0], tasks[1]}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            stopping.cancel()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._generator.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _announce_ready(self) -> None:
        """Says `ready` once it is proven, and again after it was lost."""
        said, reason = False, ""
        while True:
            now = self._facts.not_ready()
            if not now and not said:
                log.event("ready", http=f"http://{self.http_address}", grpc=self.grpc_address, model=self._facts.model_name)
                self.ready.set()
            elif now and now != reason:
                (log.warning if said else log.event)("not_ready", reason=now)
            if said != (not now):
                said = not now
                await self._grpc.set_serving(said)
            reason = now
            await self._generator.cluster.changed()

    async def _drain(self) -> None:
        """Refuses what is new, lets what runs end within `drain_s`, closes both servers."""
        self._generator.draining = True
        await self._grpc.set_serving(False)
        try:
            async with asyncio.timeout(self._config.drain_s):
                await self._generator.idle.wait()
        except TimeoutError:
            log.warning("drain_cut_short", in_flight=self._generator.in_flight)
        await asyncio.gather(self._web.stop(1.0), self._grpc.stop(1.0))
        await self._generator.keeper.settle()

"""The prefill role: its parts, wired to a node."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc.aio

from common.generation import Sampling
from common.logs import Log
from common.pb import worker_pb2_grpc
from services.prefill.engine import PrefillEngine
from services.prefill.handoff import Handoffs
from services.prefill.job import Means
from services.prefill.layerwise import InPlace
from services.prefill.pulling import PeerReader
from services.prefill.ring import Ring
from services.prefill.run import NewRun
from services.prefill.runner import Runner
from services.prefill.service import PrefillService
from services.worker.engine.allocator import blocks_for
from services.worker.engine.calibration import ID, calibrate, prompt_of
from services.worker.engine.types import StepResult
from services.worker.ledger import Ledger
from services.worker.links import Link
from services.worker.memory import INSTEAD_OF_A_POOL
from services.worker.model import LoadedModel
from services.worker.node import Node
from services.worker.settings import WorkerSettings
from services.worker.stage import Stage

log = Log("prefill")


class PrefillKind:
    """A prefill worker's KV lies in its stage: it has no pool, and nothing leaves by other slots than it is in."""

    send_slots = 0
    stage_size = INSTEAD_OF_A_POOL

    def context_tokens(self, settings: WorkerSettings, model: LoadedModel) -> int:
        return model.context_tokens

    def engine(self, settings: WorkerSettings, model: LoadedModel, stage: Stage, context_tokens: int) -> PrefillEngine:
        engine = PrefillEngine(
            model,
            InPlace(stage, model) if model.device.type == "cpu" else Ring(stage, model),
            context_tokens=context_tokens,
            sequences_max=settings.sequences_max,
            waiting_max=settings.waiting_max,
            step_tokens_max=settings.step_tokens_max,
        )
        calibrated(engine, stage)
        return engine

    def role(self, node: Node[Any]) -> "PrefillWorker":
        return PrefillWorker(node)


def calibrated(engine: PrefillEngine, stage: Stage) -> None:
    """Measures the engine's speed with prompts in the stage, which are gone afterwards."""

    @contextmanager
    def add(tokens: int) -> Iterator[None]:
        slots = stage.reserve(blocks_for(tokens, engine.block_tokens))
        try:
            ledger = Ledger(len(slots), engine.model.layout.layers, ())
            sampling = Sampling(max_tokens=1, temperature=0.0)
            engine.add(NewRun(ID, prompt_of(tokens, engine.model.vocab_size), sampling, slots=slots, ledger=ledger))
            yield
        finally:
            stage.free(slots)

    longest = min(engine.step_tokens_max, engine.context_tokens - 1, stage.slots_free * engine.block_tokens)
    calibrate(engine, add, longest)


class PrefillWorker:
    """Life: runs, drains (`drain`), is done."""

    def __init__(self, node: Node[PrefillEngine]) -> None:
        self._node = node
        layout, free = node.model.layout, node.settings.simulate_free_loads
        self._peers = PeerReader(node.stage, node.transports, layout, simulate_free_loads=free)
        self._handoffs = Handoffs(node.stage, node.transports, layout)
        means = Means(node.id, node.engine, node.stage, node.reader, self._peers, self._handoffs)
        self.runner = Runner(means, node.requests_max, resident=node.settings.resident)
        node.engine.engine.announce = node.engine.posting(self.runner.on_layer)

    def on_step(self, result: StepResult) -> None:
        self.runner.on_step(result)

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillServicer_to_server(PrefillService(self._node, self.runner), server)

    @property
    def in_flight(self) -> int:
        return self.runner.in_flight

    def links(self) -> Mapping[str, Link]:
        return {"peer_read": self._peers.link, "peer_write": self._handoffs.link}

    async def drain(self, deadline_s: float) -> None:
        self.runner.draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self.runner.idle.wait()
        except TimeoutError:
            log.warning("runs_abandoned", runs=self.runner.in_flight)
        else:
            self.runner.check_integrity()

"""The decode role: its parts, wired to a node."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc.aio

from common.generation import Sampling
from common.pb import worker_pb2_grpc
from services.decode.decoder import Decoder
from services.decode.filling import Filler
from services.decode.means import Means
from services.decode.prefill_client import PrefillPeers
from services.decode.service import DecodeService
from services.worker.engine.calibration import ID, calibrate, prompt_of
from services.worker.engine.engine import Engine
from services.worker.engine.pool import pool_blocks
from services.worker.engine.types import NewSequence, StepResult
from services.worker.links import Link
from services.worker.memory import BESIDE_A_POOL
from services.worker.model import LoadedModel
from services.worker.node import Node
from services.worker.pinned import pin
from services.worker.settings import WorkerSettings
from services.worker.stage import Stage
from services.worker.writeback import Writer

WRITE_PENDING_SHARE = 2  # at most this fraction of the pool may wait to be written back
WRITE_DRAIN_S = 5.0


class DecodeKind:
    """A decode worker's KV is copied from its stage into its pool, where it is kept for reuse if the settings say so."""

    send_slots = 16  # for write-back
    stage_size = BESIDE_A_POOL

    def context_tokens(self, settings: WorkerSettings, model: LoadedModel) -> int:
        """The model's, or what the pool holds if that is less."""
        blocks = pool_blocks(model.layout, settings.pool_bytes, model.context_tokens, settings.sequences_max, model.device)
        return min(model.context_tokens, blocks * model.layout.block_tokens)

    def engine(self, settings: WorkerSettings, model: LoadedModel, stage: Stage, context_tokens: int) -> Engine:
        engine = Engine(
            model,
            pool_bytes=settings.pool_bytes,
            sequences_max=settings.sequences_max,
            waiting_max=settings.waiting_max,
            step_tokens_max=settings.step_tokens_max,
        )
        if model.device.type == "cuda":
            pin(stage, engine)
        calibrated(engine, min(settings.step_tokens_max, context_tokens - 1))
        return engine

    def role(self, node: Node[Any]) -> "DecodeWorker":
        return DecodeWorker(node)


def calibrated(engine: Engine, longest: int) -> None:
    """Measures how fast the engine computes prompts, none of which its pool keeps."""

    @contextmanager
    def add(tokens: int) -> Iterator[None]:
        prompt = prompt_of(tokens, engine.model.vocab_size)
        engine.add(NewSequence(ID, prompt, Sampling(max_tokens=1, temperature=0.0)))
        yield

    calibrate(engine, add, longest)


class DecodeWorker:
    """Life: runs, drains (`drain`), is done."""

    def __init__(self, node: Node[Engine]) -> None:
        layout = node.model.layout
        self._node = node
        self._prefills = PrefillPeers(node.model.namespace)
        pending_max = max(1, node.engine.load.pool_blocks_total // WRITE_PENDING_SHARE)
        self._writer = Writer(
            node.engine, node.stage, node.send_slots, node.transports, node.stores, node.codec, node.model.namespace, layout.block_tokens,
            pending_max,
        )  # fmt: skip
        means = Means(
            node.stage,
            lambda: node.endpoint,
            node.reader,
            self._prefills,
            layout.block_tokens,
            node.settings.lease_s,
            node.engine,
        )
        self._filler = Filler(means)
        self.decoder = Decoder(
            node.engine, self._filler, self._writer, layout.block_tokens, node.requests_max, resident=node.settings.resident
        )

    def on_step(self, result: StepResult) -> None:
        self.decoder.on_step(result)

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(DecodeService(self._node, self.decoder), server)

    @property
    def in_flight(self) -> int:
        return self.decoder.in_flight

    def links(self) -> Mapping[str, Link]:
        return {}

    async def drain(self, deadline_s: float) -> None:
        await self.decoder.drain(deadline_s)
        await self._filler.released()
        await self._writer.drained(WRITE_DRAIN_S)
        await self._writer.close()
        await self._prefills.close()
        self.decoder.check_integrity()

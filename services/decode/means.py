"""What all fillings of a decode worker share."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from common.transport.interface import Endpoint
from services.decode.prefill_client import PrefillPeers
from services.worker.engine.engine import Engine
from services.worker.engine.loop import EngineLoop
from services.worker.loading import Form, Reader
from services.worker.stage import Stage


class Means(msgspec.Struct, frozen=True):
    """What requests are filled with.

    Attributes:
        endpoint: where peers reach the stage; not known before it listens.
        lease_s: how long a prefill worker's right to the stage lasts without a heartbeat.
        engine: whose pool may hold a prompt's front, and who may wait for what has come.
    """

    stage: Stage
    endpoint: Callable[[], Endpoint]
    reader: Reader
    prefills: PrefillPeers
    block_tokens: int
    lease_s: float
    engine: EngineLoop[Engine]

    def views(self, slots: Sequence[int], form: Form) -> list[memoryview]:
        """What these slots hold, in that form."""
        size = self.reader.bytes_in_slot(form)
        return [self.stage.view(slot, 0, size) for slot in slots]

    def freer(self, slots: Sequence[int]) -> Callable[[], None]:
        """Frees the slots, from whichever thread."""
        loop = asyncio.get_running_loop()

        def free() -> None:
            loop.call_soon_threadsafe(self.stage.free, slots)

        return free


def prefix(blocks: set[int], limit: int) -> int:
    """How many of the blocks `[0, limit)` come before the first that is missing."""
    return next((block for block in range(limit) if block not in blocks), limit)

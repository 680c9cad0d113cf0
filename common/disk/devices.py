"""One engine for each device behind the face of one, so that a device that is slow or hangs holds up nobody else's transfers.

A transfer names its device by number. A batch is cut by device; its results come together in order.
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from common.disk.batch import Batch
from common.disk.engine import Engine
from common.disk.transfer import Transfer
from common.errors import Overloaded

_Piece = tuple[Engine, Batch[int]]


class DeviceEngines:
    """An `Engine` over several, device n behind `engines[n]`. At most `pending_max` transfers are pending in all."""

    def __init__(self, engines: Sequence[Engine], pending_max: int) -> None:
        self.name = engines[0].name
        self.depth = engines[0].depth  # of each device
        self.pending_max = pending_max
        self._engines = engines
        self._closed = False
        self._pieces: dict[int, list[_Piece]] = {}  # by id of a batch that isn't settled

    @property
    def pending(self) -> int:
        return sum(engine.pending for engine in self._engines)

    def submit(self, transfers: Sequence[Transfer], deadline_s: float | None = None) -> Batch[int]:
        """As `Engine.submit`."""
        if self._closed or self.pending + len(transfers) > self.pending_max:
            raise Overloaded(
                f"{self.pending} disk operations are pending, {len(transfers)} more asked for: at most {self.pending_max}"
            )
        batch: Batch[int] = Batch(len(transfers), asyncio.get_running_loop())
        by_device: dict[int, list[int]] = {}
        for transfer in transfers:
            by_device.setdefault(transfer.device, []).append(batch.start())
        if not transfers:
            batch.finish()
            return batch
        pieces = self._pieces[id(batch)] = []
        for device, places in by_device.items():
            engine = self._engines[device]
            piece = engine.submit([transfers[i] for i in places], deadline_s)
            pieces.append((engine, piece))
            piece.done.add_done_callback(partial(self._settled, batch, places))
        return batch

    def abandon(self, batch: Batch[int]) -> None:
        """As `Engine.abandon`."""
        for engine, piece in list(self._pieces.get(id(batch), ())):
            engine.abandon(piece)

    def close(self) -> None:
        """As `Engine.close`."""
        self._closed = True
        for engine in self._engines:
            engine.close()

    def _settled(self, batch: Batch[int], places: Sequence[int], done: "asyncio.Future[list[int | BaseException]]") -> None:
        for place, result in zip(places, done.result(), strict=True):
            batch.settle(place, result)
        if batch.settled:
            self._pieces.pop(id(batch))
            batch.finish()

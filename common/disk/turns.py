"""Transfers that wait for the disk: batches in turn, one transfer of each, so that a long one doesn't hold up a short one."""

from collections import deque
from collections.abc import Sequence

from common.disk.batch import Batch
from common.disk.flights import Chain, Flight
from common.disk.transfer import Transfer


class Turns:
    """`waiting` transfers of `queued_bytes` that were not started."""

    def __init__(self) -> None:
        self.waiting = 0
        self.queued_bytes = 0
        self._batches: deque[tuple[Batch[int], Sequence[Transfer]]] = deque()

    @property
    def first(self) -> Transfer:
        """The next, while some wait."""
        batch, transfers = self._batches[0]
        return transfers[batch.next]

    def add(self, batch: Batch[int], transfers: Sequence[Transfer]) -> None:
        self.waiting += len(transfers)
        self.queued_bytes += sum(transfer.length for transfer in transfers)
        self._batches.append((batch, transfers))

    def start(self, chain: Chain) -> Flight:
        """The first goes, as one of a chain."""
        batch, transfers = self._batches.popleft()
        index = batch.start()
        if batch.left:
            self._batches.append((batch, transfers))
        length = transfers[index].length
        self.waiting -= 1
        self.queued_bytes -= length
        chain.left += 1
        return Flight(batch, index, transfers[index], length, chain)

    def give_up(self, batch: Batch[int]) -> int:
        """What is left of a batch won't be started; how many that are."""
        left = batch.give_up()
        if left:
            (transfers,) = (entry[1] for entry in self._batches if entry[0] is batch)
            self.waiting -= left
            self.queued_bytes -= sum(transfer.length for transfer in transfers[-left:])
            self._batches = deque(entry for entry in self._batches if entry[0] is not batch)
        return left

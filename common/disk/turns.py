"""Transfers that wait for the disk, and whose turn it is.

1. Of reads, the batch that came first goes first, whole: it is there early and the others no later, and who asks for the next
   when one has come never finds the disk without work, as he does where all are there at once.
2. A long batch doesn't hold up a short one: while some of each wait, they go in turn.
3. Writes go one of each batch in turn, which was the quicker way (docs/benchmarks.md): who writes waits for a sync anyway.
"""

from collections import deque
from collections.abc import Sequence

from common.disk.batch import Batch
from common.disk.flights import Chain, Flight
from common.disk.transfer import Op, Transfer

SHORT_BYTES = 3 << 20  # of a short batch at most: one block
_Line = deque[tuple[Batch[int], Sequence[Transfer]]]


class Turns:
    """Lives on the loop.

    Attributes:
        first: the next transfer, while some wait.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.queued_bytes = 0
        self.first: Transfer
        self._short: _Line = deque()
        self._long: _Line = deque()
        self._turn = self._short  # the next comes from there, if some wait there
        self._line = self._short  # where it comes from

    def add(self, batch: Batch[int], transfers: Sequence[Transfer]) -> None:
        batch_bytes = sum(transfer.length for transfer in transfers)
        self.waiting += len(transfers)
        self.queued_bytes += batch_bytes
        (self._short if batch_bytes <= SHORT_BYTES else self._long).append((batch, transfers))
        self._choose()

    def start(self, chain: Chain) -> Flight:
        """The first goes, as one of a chain."""
        line, first, length = self._line, self.first, self.first.length
        batch, _ = line[0]
        index = batch.start()
        if not batch.left:
            line.popleft()
        elif first.op is not Op.READ:
            line.rotate(-1)
        self.waiting -= 1
        self.queued_bytes -= length
        chain.left += 1
        self._turn = self._long if line is self._short else self._short
        self._choose()
        return Flight(batch, index, first, length, chain)

    def give_up(self, batch: Batch[int]) -> int:
        """What is left of a batch won't be started; how many that are."""
        left = batch.give_up()
        for line in (self._short, self._long):
            for entry in [entry for entry in line if left and entry[0] is batch]:
                line.remove(entry)
                self.waiting -= left
                self.queued_bytes -= sum(transfer.length for transfer in entry[1][-left:])
        self._choose()
        return left

    def _choose(self) -> None:
        self._line = self._turn or (self._long if self._turn is self._short else self._short)
        if self._line:
            batch, transfers = self._line[0]
            self.first = transfers[batch.next]

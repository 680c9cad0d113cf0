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
    """`waiting` transfers of `queued_bytes` that were not started."""

    def __init__(self) -> None:
        self.waiting = 0
        self.queued_bytes = 0
        self._short: _Line = deque()
        self._long: _Line = deque()
        self._shorts_turn = True

    @property
    def _line(self) -> _Line:
        """Which the next comes from, while some wait."""
        return self._short if self._short and (self._shorts_turn or not self._long) else self._long

    @property
    def first(self) -> Transfer:
        """The next, while some wait."""
        batch, transfers = self._line[0]
        return transfers[batch.next]

    def add(self, batch: Batch[int], transfers: Sequence[Transfer]) -> None:
        batch_bytes = sum(transfer.length for transfer in transfers)
        self.waiting += len(transfers)
        self.queued_bytes += batch_bytes
        (self._short if batch_bytes <= SHORT_BYTES else self._long).append((batch, transfers))

    def start(self, chain: Chain) -> Flight:
        """The first goes, as one of a chain."""
        line = self._line
        batch, transfers = line[0]
        transfer = transfers[batch.start()]
        if not batch.left:
            line.popleft()
        elif transfer.op is not Op.READ:
            line.rotate(-1)
        self._shorts_turn = line is self._long
        self.waiting -= 1
        self.queued_bytes -= transfer.length
        chain.left += 1
        return Flight(batch, batch.next - 1, transfer, transfer.length, chain)

    def give_up(self, batch: Batch[int]) -> int:
        """What is left of a batch won't be started; how many that are."""
        left = batch.give_up()
        for line in (self._short, self._long):
            for entry in [entry for entry in line if left and entry[0] is batch]:
                line.remove(entry)
                self.waiting -= left
                self.queued_bytes -= sum(transfer.length for transfer in entry[1][-left:])
        return left

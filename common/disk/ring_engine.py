"""Disk transfers through an io_uring, completions on the event loop.

1. `submit` queues a batch. While the disk has fewer than `depth` transfers, those whose turn it is (turns.py) go to the kernel. Towards
   the end of what is checked there are fewer, so that little is left to check when the last has come.
2. Writes go there in chains: the kernel begins one when the one before it has ended, so that the disk, which has no more than
   `depth` of them and WRITTEN_BYTES at any moment, doesn't wait for the loop. So do reads of which much is queued; where it is little, the
   loop's look at the ring between its checks is soon enough.
3. The ring's eventfd wakes the loop: what has completed makes room, and the next transfers go to the kernel
   before anything is checked, so that the disk has work meanwhile.
4. What came short goes on where it stopped; what the kernel had no memory for goes again.
5. Checks run on the loop, with a look at the ring before each (arrivals.py).

A transfer that was not started when the batch's deadline passes, or when the batch is abandoned, results in
`NotStarted`. One that was started is always waited for: the disk may be writing to its memory.
"""

import asyncio
import errno
import os
import threading
from collections.abc import Sequence
from contextlib import suppress

from common.disk.arrivals import Arrivals
from common.disk.batch import Batch
from common.disk.flights import Chain, Flight
from common.disk.ring import Ring
from common.disk.transfer import Op, Transfer
from common.disk.turns import Turns
from common.errors import Overloaded

WRITTEN_BYTES = 8 << 20  # writes at the disk at once; what waits behind them is in chains
KERNEL_BYTES = 16 << 20  # at the kernel at once: no disk is quicker for more, and what comes together is checked after it
CHAIN_BYTES = 4 << 20  # in a row: a millisecond of the disk's time, so that the loop may be away as long
CHAIN_MAX = 16  # transfers of a few pages aren't worth more room in the ring
MUCH_BYTES = 32 << 20  # of reads in the queue: twice what is at the kernel
LAST_BYTES = 4 << 20  # of what is checked, half of what is left, but this much: little is then checked after the last has come
AGAIN_MAX = 100  # times that the kernel may ask for one transfer again
AGAIN_S = 0.002
_AGAIN = (errno.EAGAIN, errno.EINTR)


class RingEngine:
    """An `Engine` over a `Ring` of its own. Submit from one event loop."""

    name = "io_uring"

    def __init__(self, ring: Ring, depth: int, pending_max: int) -> None:
        self.pending_max = pending_max
        self.depth = min(depth, ring.entries)
        self._ring = ring
        self._turns = Turns()
        self._flights: dict[int, Flight] = {}
        self._places = 0  # at the disk: at most `depth`
        self._kernel_bytes = 0  # of the flights, but for what waits in chains
        self._tags = 0
        self._arrivals = Arrivals(self._look)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._using = threading.Lock()  # `close` may come from another thread

    @property
    def pending(self) -> int:
        return self._turns.waiting + len(self._flights) + len(self._arrivals)

    def submit(self, transfers: Sequence[Transfer], deadline_s: float | None = None) -> Batch[int]:
        """Queues transfers. Raises `Overloaded`."""
        loop = asyncio.get_running_loop()
        batch: Batch[int] = Batch(len(transfers), loop)
        if not transfers:
            batch.finish()
            return batch
        if self._closed or self.pending + len(transfers) > self.pending_max:
            raise Overloaded(
                f"{self.pending} disk operations are pending, {len(transfers)} more asked for: at most {self.pending_max}"
            )
        self._listen(loop)
        if all(transfer.op is Op.SYNC for transfer in transfers) and self._ring.in_flight + len(transfers) <= self._ring.entries:
            self._place_syncs(batch, transfers)
            return batch
        self._turns.add(batch, transfers)
        if deadline_s is not None:
            batch.timer = loop.call_later(deadline_s, self.abandon, batch)
        self._fill()
        return batch

    def abandon(self, batch: Batch[int]) -> None:
        """Gives up the transfers of a batch that were not started. Idempotent."""
        left = self._turns.give_up(batch)
        if left and batch.settled:
            batch.finish()

    def close(self) -> None:
        """Ends the engine when what is queued is done. Blocks; idempotent."""
        with self._using:
            if self._closed:
                return
            self._closed = True
            while self._turns.waiting or self._ring.in_flight:
                self._fill()
                self._ring.submit(wait=True)
                self._reap()
        if self._loop is None:
            self._ring.close()
        elif _running_loop() is self._loop:
            self._leave()
        else:
            with suppress(RuntimeError):  # the loop is closed: nobody waits, nobody watches
                self._loop.call_soon_threadsafe(self._leave)
                return
            self._ring.close()

    # On the loop

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is not loop:
            assert self._loop is None, "an engine belongs to one event loop"
            self._loop = loop
            loop.add_reader(self._ring.fd, self._ready)

    def _leave(self) -> None:
        """A descriptor is closed only when nobody watches it."""
        assert self._loop is not None
        self._loop.remove_reader(self._ring.fd)
        self._ring.close()
        self._arrivals.check()

    @property
    def _free(self) -> int:
        """How many more transfers like the next one the disk may have: none while nothing waits."""
        turns, ring = self._turns, self._ring
        if not turns.waiting or ring.in_flight >= ring.entries:
            return 0
        first = turns.first
        if first.op is Op.WRITE:
            bytes_max = WRITTEN_BYTES
        elif first.check is None:
            bytes_max = KERNEL_BYTES
        else:
            bytes_max = min(KERNEL_BYTES, max(LAST_BYTES, (self._kernel_bytes + turns.queued_bytes) // 2))
        return min(self.depth - self._places, -(-(bytes_max - self._kernel_bytes) // max(1, first.length)))

    def _fill(self) -> None:
        """Takes transfers to the kernel, as many as it may have."""
        while (free := self._free) > 0:
            flights = self._next_chain(free)
            chain = flights[0].chain
            chain.disk_bytes = flights[0].length
            self._places += chain.places
            self._kernel_bytes += chain.disk_bytes
            for flight in flights:
                self._place(flight, linked=flight is not flights[-1])
        self._hand_over()

    def _place_syncs(self, batch: Batch[int], transfers: Sequence[Transfer]) -> None:
        """Syncs need no place: they move no bytes, and who waits for one has nothing at the disk meanwhile."""
        for transfer in transfers:
            self._place(Flight(batch, batch.start(), transfer, 0, Chain(left=1, places=0)))
        self._hand_over()

    def _next_chain(self, free: int) -> list[Flight]:
        """The next transfer; with one that may be chained, a share of those like it that wait: `free` such chains have room."""
        turns, op = self._turns, self._turns.first.op
        chained = op is Op.WRITE or (op is Op.READ and turns.queued_bytes > MUCH_BYTES)
        chain = Chain()
        flights = [turns.start(chain)]
        if not chained:
            return flights
        room = self._ring.entries - self._ring.in_flight - (free - 1)  # the other chains are of one at least
        share = min(CHAIN_MAX, room, -(-(turns.waiting + 1) // free))
        left_bytes = CHAIN_BYTES - flights[0].length
        while len(flights) < share and left_bytes > 0 and turns.waiting and turns.first.op is op:
            flights.append(turns.start(chain))
            left_bytes -= flights[-1].length
        return flights

    def _place(self, flight: Flight, *, linked: bool = False) -> None:
        transfer, tag = flight.transfer, self._tags
        self._tags += 1
        self._flights[tag] = flight
        rest, offset = transfer.rest(flight.done), transfer.offset + flight.done
        match transfer.op:
            case Op.READ:
                self._ring.read(tag, transfer.fd, rest, offset, linked=linked)
            case Op.WRITE:
                self._ring.write(tag, transfer.fd, rest, offset, linked=linked)
            case Op.SYNC:
                self._ring.sync(tag, transfer.fd)

    def _hand_over(self) -> None:
        try:
            self._ring.submit()
        except OSError as error:  # the kernel has no memory just now: what was placed stays placed
            if error.errno not in (*_AGAIN, errno.EBUSY):
                raise
            assert self._loop is not None
            self._loop.call_later(AGAIN_S, self._hand_over)

    def _ready(self) -> None:
        with self._using:
            if self._closed:
                return
            with suppress(BlockingIOError):
                os.eventfd_read(self._ring.fd)
        self._take_in()
        self._arrivals.check()

    def _look(self) -> None:
        if self._ring.completed:
            self._take_in()

    def _take_in(self) -> None:
        """What has completed makes room, and the next go to the kernel."""
        with self._using:
            if not self._closed:
                self._reap()
                self._fill()

    def _reap(self) -> None:
        for tag, result in self._ring.reap():
            self._land(self._flights.pop(tag), result)

    def _land(self, flight: Flight, result: int) -> None:
        if result == flight.length - flight.done:
            flight.done = flight.length
            self._leave_kernel(flight, None)
            return
        if -result in _AGAIN and flight.again < AGAIN_MAX:
            flight.again += 1
            self._place(flight)
            return
        try:
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            flight.done = flight.transfer.advanced(flight.done, result)
        except OSError as error:
            self._leave_kernel(flight, error)
            return
        self._place(flight)

    def _leave_kernel(self, flight: Flight, error: OSError | None) -> None:
        chain = flight.chain
        chain.left -= 1
        if not chain.left:
            self._places -= chain.places
            self._kernel_bytes -= chain.disk_bytes
        self._arrivals.add(flight, error)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

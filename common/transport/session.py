"""The server's side of one connection: requests in, the area's answers out.

Life cycle:
1. HELLO (in mode REGION with the client's memfd) is answered by WELCOME.
2. Each READ or WRITE takes its place in the connection's and the server's bounds; while there is
   none, nothing more is received, so the client is held back by the carrier's own flow control.
3. Every request is replied to just once, also when it was cancelled, whatever its area did.
4. At end-of-stream or an error, what is in flight is let finish: only then are the client's region
   unmapped and the socket closed. So end-of-stream tells a client that its memory is its own again.
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from common.errors import InvalidRequest, TransferFailed
from common.transport.budget import Budget
from common.transport.conversation import Listener, Role
from common.transport.extent_desk import ExtentDesk
from common.transport.frames import (
    Cancel,
    Event,
    Goodbye,
    Hello,
    Lookup,
    Mode,
    Offers,
    Op,
    ProtocolError,
    Reason,
    Reply,
    Transfer,
    Welcome,
    encode,
)
from common.transport.interface import ExtentArea, PartStatus
from common.transport.lookups import LookupArea, found_prefix
from common.transport.reception import Reception
from common.transport.region import RemoteRegion
from common.transport.requests import IncomingWrite, ReadResult, read_area
from common.transport.streams import Bytes, ByteStream, SocketStream, discard, next_event

log = logging.getLogger(__name__)
Outcome = list[PartStatus]


class Session:
    """One connection of one client. `run` ends when the connection has."""

    def __init__(
        self,
        stream: ByteStream,
        reception: Reception,
        region: RemoteRegion | None = None,
        *,
        listener: Listener | None = None,
        passes_fds: SocketStream | None = None,
    ) -> None:
        """`passes_fds`: the stream, where descriptors can go along, so that the client is on this host and runs as our user.

        An area on disk then offers extents, and one that is a store of prefixes offers lookups.
        """
        limits = reception.limits
        self.ended = asyncio.Event()
        self._stream, self._reception, self._region = stream, reception, region
        self._area, self._limits, self._counters = reception.area, limits, reception.counters
        self._extents = ExtentDesk(reception.area, passes_fds) if passes_fds and isinstance(reception.area, ExtentArea) else None
        self._lookups = reception.area if passes_fds and isinstance(reception.area, LookupArea) else None
        self._listener = listener or Listener(Role.SERVER)
        self._budget = Budget(limits.requests_max, limits.bytes_max)
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight: set[int] = set()
        self._cancelled: set[int] = set()
        self._freed = asyncio.Event()
        self._draining = False

    async def run(self, hello: Hello | None = None) -> None:
        """Serves until the client leaves. `hello`: the carrier has received it already."""
        self._reception.sessions.add(self)
        try:
            await self._greet(hello)
            while True:
                await self._handle(await next_event(self._stream, self._listener, body_s=self._limits.body_s))
        except ProtocolError as error:
            log.warning("byte plane: closing a connection: %s", error.message)
            await self._farewell(Goodbye(Reason.MALFORMED, error.message))
        except (TransferFailed, TimeoutError):
            pass  # the client left, or stalled
        except Exception:
            log.exception("byte plane: a connection failed")
        finally:
            await self._end()

    def say_goodbye(self) -> None:
        """No new requests: those in flight are finished, then the connection ends."""
        if not self._draining:
            self._draining = True
            self._spawn(self._leave_when_idle())

    def cut(self) -> None:
        """Ends the connection now; what the area is doing is still waited for."""
        self._stream.abort()

    async def _greet(self, hello: Hello | None) -> None:
        if hello is None:
            async with asyncio.timeout(self._limits.body_s):
                event = await next_event(self._stream, self._listener, body_s=self._limits.body_s)
            assert isinstance(event, Hello)  # the table allows nothing else
            hello = event
        if (hello.mode is Mode.REGION) != (self._region is not None):
            raise ProtocolError(f"mode {hello.mode.name}: expected {'REGION' if self._region else 'INLINE'} on this carrier")
        reason = Reason.DRAINING if self._reception.draining else Reason.FULL
        if self._reception.draining or len(self._reception.sessions) > self._limits.connections_max:
            await self._farewell(Goodbye(reason, f"at most {self._limits.connections_max} connections"))
            raise TransferFailed("turned away")
        async with self._sending:
            offers = Offers.EXTENTS if self._extents is not None else Offers.NOTHING
            offers |= Offers.LOOKUPS if self._lookups is not None else Offers.NOTHING
            welcome = Welcome(self._reception.epoch, self._limits.requests_max, self._limits.bytes_max, offers)
            await self._send([encode(welcome)])

    async def _handle(self, event: Event) -> None:
        match event:
            case Transfer(op=Op.LOCATE):
                if self._extents is None:
                    raise ProtocolError("LOCATE: expected READ, as this server offers no extents here")
                async with asyncio.timeout(self._limits.stall_s), self._sending:
                    await self._extents.answer(event)
            case Lookup():
                if self._lookups is None:
                    raise ProtocolError("LOOKUP: expected READ or WRITE, as this server offers no lookups here")
                async with asyncio.timeout(self._limits.stall_s), self._sending:
                    await self._send([encode(found_prefix(self._lookups, event))])
            case Transfer():
                deadline = asyncio.get_running_loop().time() + min(event.deadline_ms / 1000, self._limits.deadline_s_max)
                spans = self._spans(event)
                if not await self._admit(event, deadline):
                    pass
                elif event.op is Op.READ:
                    self._spawn(self._read(event, spans, deadline))
                else:
                    await self._receive_write(event, spans, deadline)
            case Cancel(request):
                if request in self._in_flight:
                    self._cancelled.add(request)
        await asyncio.sleep(0)  # a client that never pauses must not keep the loop to itself

    # Admission: every admitted request is answered by `_reply`, or dropped by `_forget`, once.

    async def _admit(self, event: Transfer, deadline: float) -> bool:
        """Waits for room. False: there was none by the deadline, and the request is answered."""
        if event.request in self._in_flight:
            raise ProtocolError(f"request {event.request}: its number is in flight already")
        size = event.total_bytes
        self._in_flight.add(event.request)
        try:
            async with asyncio.timeout_at(deadline):
                await self._budget.acquire(size)
                try:
                    await self._reception.budget.acquire(size)
                except BaseException:
                    self._budget.release(size)
                    raise
        except TimeoutError:
            self._in_flight.discard(event.request)
            await self._refuse(event, PartStatus.EXPIRED)
            return False
        if self._draining:
            self._forget(event)
            await self._refuse(event, PartStatus.FAILED)
            return False
        return True

    async def _refuse(self, event: Transfer, status: PartStatus) -> None:
        async with asyncio.timeout(self._limits.body_s):
            if event.op is Op.WRITE and self._region is None:
                await discard(self._stream, event.total_bytes)
        await self._answer(event, [status] * len(event.parts), self._now())

    def _forget(self, event: Transfer) -> None:
        self._in_flight.discard(event.request)
        self._freed.set()
        self._cancelled.discard(event.request)
        self._budget.release(event.total_bytes)
        self._reception.budget.release(event.total_bytes)

    # Requests

    async def _read(self, event: Transfer, spans: Sequence[memoryview] | None, deadline: float) -> None:
        views: list[memoryview] = []
        try:
            with self._counters.read.transfer():
                results = await read_area(self._area, event, spans)
                views = [view for _, view, _ in results if view is not None]
                await self._answer_read(event, results, deadline)
        finally:
            if self._region is None and views:
                self._area.done_reading(event.token, views)
            _release(spans)
            self._forget(event)

    async def _answer_read(self, event: Transfer, results: Sequence[ReadResult], deadline: float) -> None:
        payload = [view for status, view, _ in results if view is not None and status is PartStatus.OK]
        checksums = [checksum for _, _, checksum in results]
        inline = payload if self._region is None else []
        statuses = await self._answer(event, [status for status, _, _ in results], deadline, checksums, inline)
        self._counters.read.count(statuses, [part.length for part in event.parts])

    async def _receive_write(self, event: Transfer, spans: Sequence[memoryview] | None, deadline: float) -> None:
        """Inline payloads are received here, in order; what follows runs beside the next request."""
        write = IncomingWrite(self._area, event)
        try:
            if spans is None:
                async with asyncio.timeout_at(deadline + self._limits.stall_s):
                    await write.receive(self._stream)
        except BaseException:
            write.abort(PartStatus.FAILED)
            self._forget(event)
            raise
        self._spawn(self._write(event, write, spans, deadline))

    async def _write(self, event: Transfer, write: IncomingWrite, spans: Sequence[memoryview] | None, deadline: float) -> None:
        try:
            with self._counters.write.transfer():
                if spans is not None:
                    async with self._reception.copying:
                        await write.copy_from(spans)
                if late := self._lateness(event, deadline):
                    write.abort(late)
                await write.commit()
            self._counters.write.count(write.statuses, [part.length for part in event.parts])
            await self._answer(event, write.statuses, None)
        finally:
            write.abort(PartStatus.FAILED)
            _release(spans)
            self._forget(event)

    # Common

    def _spans(self, event: Transfer) -> list[memoryview] | None:
        if event.payload_bytes != (event.total_bytes if event.op is Op.WRITE and self._region is None else 0):
            raise ProtocolError(
                f"{event.op.name} with {event.payload_bytes} payload bytes: expected all or none, as the mode says"
            )
        if self._region is None:
            return None
        try:
            return [self._region.view(offset, part.length) for offset, part in zip(event.spans, event.parts, strict=True)]
        except InvalidRequest as error:
            raise ProtocolError(error.message) from error

    def _lateness(self, event: Transfer, deadline: float) -> PartStatus | None:
        if event.request in self._cancelled:
            return PartStatus.FAILED
        return PartStatus.EXPIRED if self._now() > deadline else None

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _answer(
        self,
        event: Transfer,
        statuses: Outcome,
        deadline: float | None,
        checksums: Sequence[int] = (),
        payload: Sequence[Bytes] = (),
    ) -> Outcome:
        """Replies, and returns what was said: a reply that `deadline` has overtaken carries no payload."""
        async with self._sending:
            if deadline is not None and (late := self._lateness(event, deadline)):
                statuses, payload = [late] * len(statuses), ()
            size = sum(len(piece) for piece in payload)
            reply = Reply(event.request, tuple(statuses), tuple(checksums) or (0,) * len(statuses), size)
            async with asyncio.timeout_at(max(deadline or 0.0, self._now()) + self._limits.stall_s):
                await self._send([encode(reply), *payload])
        return statuses

    async def _send(self, pieces: Sequence[Bytes]) -> None:
        """Under the lock `_sending`."""
        try:
            await self._stream.send(pieces)
        except BaseException:
            self._stream.abort()  # a frame was cut short: nothing sensible can follow
            raise

    async def _farewell(self, goodbye: Goodbye) -> None:
        try:
            async with asyncio.timeout(self._limits.stall_s), self._sending:
                await self._send([encode(goodbye)])
        except (TransferFailed, TimeoutError):
            pass  # it isn't listening any more

    async def _leave_when_idle(self) -> None:
        await self._farewell(Goodbye(Reason.DRAINING, "this server is closing"))
        while self._in_flight:
            self._freed.clear()
            await self._freed.wait()
        self._stream.abort()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (TransferFailed, TimeoutError):
            self._stream.abort()  # the client stalled or left: `run` ends
        except Exception:
            log.exception("byte plane: a request failed")
            self._stream.abort()

    async def _end(self) -> None:
        if self._region is None:
            self._stream.abort()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._region is not None:
            self._region.close()
        await self._stream.close()
        self._reception.sessions.discard(self)
        self.ended.set()


def _release(spans: Sequence[memoryview] | None) -> None:
    """Lets go of the client's memory, also where an area or a traceback still has the view."""
    for view in spans or ():
        try:
            view.release()
        except BufferError:  # not `suppress`, which costs as much as the rest; there may be 4096
            continue

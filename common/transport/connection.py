"""The client's side of one connection: a `Transport`.

Life of a request:
1. It waits for its place within the bounds that the server's WELCOME announced.
2. The sending task puts its frame on the wire; the receiving task brings its reply, the payload
   going straight into the caller's spans, and checks every part's CRC-32C.
3. It is settled when the reply is complete, or the connection has ended: then no byte can land in
   its spans any more, and its place is free.

A caller that stops waiting (deadline, cancellation) before that takes its spans back:
- Mode INLINE: the views are released on the spot. What still comes for them is dropped, what was still
  to be sent from them goes out as zeros, whose checksum doesn't match. The connection stays in use.
- Mode REGION, read: the server may be writing into our memory. It is told to CANCEL and the caller
  waits until it has answered (a matter of its disk). Only a hung server makes that last longer than
  SETTLE_S: then the spans are held by the region until the server answers or its end-of-stream comes,
  which a server sends only when it has let go of our memory, and a killed one when its memory is gone.

A request that gets nothing at all from the peer until its deadline ends an inline connection, so that
the next one starts afresh; other requests' slowness never does.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

from common.errors import TransferFailed
from common.transport.asked import Asked
from common.transport.budget import Budget
from common.transport.conversation import Listener
from common.transport.counters import Counters
from common.transport.frames import (
    DEADLINE_MS_MAX,
    Cancel,
    Extents,
    FoundPrefix,
    Goodbye,
    Lookup,
    Mode,
    Offers,
    Op,
    ProtocolError,
    Reply,
    Transfer,
    Welcome,
    encode,
)
from common.transport.interface import LeaseToken, Part, PartStatus, Span
from common.transport.located import Located
from common.transport.memory import crc32c_in_turns
from common.transport.pending import BATCH_BYTES, FIRST_BYTES, Pending, check_reply, plan
from common.transport.region import Region
from common.transport.streams import Bytes, ByteStream, discard, next_event

log = logging.getLogger(__name__)
T = TypeVar("T")
SETTLE_S = 1.0
BODY_S = 10.0


class Connection:
    """One carrier to one peer. Made by `client.connect`; `close` it."""

    def __init__(
        self, carrier: str, mode: Mode, stream: ByteStream, listener: Listener, welcome: Welcome, region: Region
    ) -> None:
        self.carrier = carrier
        self.epoch = welcome.epoch
        self.offers = welcome.offers
        self.counters = Counters()
        self._mode, self._stream, self._listener, self._region = mode, stream, listener, region
        self._budget = Budget(welcome.requests_max, welcome.bytes_max)
        self._pending: dict[int, Pending] = {}
        self._locating: Asked[Located] = Asked()
        self._looking: Asked[FoundPrefix] = Asked()
        self._numbers = 0
        self._checking = asyncio.Lock()
        self._outbox: deque[tuple[list[Bytes], Pending | None]] = deque()
        self._outbox_filled = asyncio.Event()
        self._ended = ""  # why no more requests are taken
        self._running = asyncio.get_running_loop().create_task(self._run())

    @property
    def usable(self) -> bool:
        """Whether a new request would be tried."""
        return not self._ended

    @property
    def in_flight_bytes(self) -> int:
        return self._budget.bytes

    async def read(
        self, token: LeaseToken, parts: Sequence[Part], into: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        return await self._transfer(Op.READ, token, parts, into, deadline_s)

    async def write(
        self, token: LeaseToken, parts: Sequence[Part], source: Sequence[Span], *, deadline_s: float
    ) -> list[PartStatus]:
        return await self._transfer(Op.WRITE, token, parts, source, deadline_s)

    async def locate(self, token: LeaseToken, parts: Sequence[Part], *, deadline_s: float) -> Located:
        """Where parts lie, if the peer offers EXTENTS. Raises `TransferFailed`, `TimeoutError`. Close the result."""
        assert self.offers & Offers.EXTENTS
        none = (0,) * len(parts)
        question = Transfer(Op.LOCATE, self._number(), token, _deadline_ms(deadline_s), tuple(parts), none, none)
        return await self._ask(question, self._locating, deadline_s)

    async def lookup(self, namespace: bytes, keys: Sequence[bytes], lease_ms: int, *, deadline_s: float) -> FoundPrefix:
        """A stored prefix, if the peer offers LOOKUPS. Raises `TransferFailed`, `TimeoutError`: a lease may be out then, to its end."""
        assert self.offers & Offers.LOOKUPS
        question = Lookup(self._number(), _deadline_ms(deadline_s), namespace, lease_ms, tuple(keys))
        return await self._ask(question, self._looking, deadline_s)

    async def close(self) -> None:
        """Ends the connection; requests in flight end as FAILED. Idempotent."""
        self._end("the transport was closed")
        if self._mode is Mode.REGION:  # the server lets go of our memory first
            self._stream.finish()
            await asyncio.wait([self._running], timeout=SETTLE_S)
        self._stream.abort()
        await asyncio.wait([self._running])

    def __repr__(self) -> str:
        return f"Connection({self.carrier}, {self._ended or 'open'}, in_flight={sorted(self._pending)}, {self._budget})"

    # Requests

    async def _ask(self, question: Transfer | Lookup, asked: Asked[T], deadline_s: float) -> T:
        """The answer to what moves no bytes."""
        if self._ended:
            raise TransferFailed(self._ended)
        return await asked.ask(question.request, lambda: self._post([encode(question)], None), deadline_s)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _transfer(
        self, op: Op, token: LeaseToken, parts: Sequence[Part], spans: Sequence[Span], deadline_s: float
    ) -> list[PartStatus]:
        assert [part.length for part in parts] == [span.length for span in spans], "parts and spans differ in length"
        deadline = asyncio.get_running_loop().time() + deadline_s
        views = [self._region.view(span) for span in spans]
        flow = self.counters.read if op is Op.READ else self.counters.write
        busy = op is Op.WRITE and flow.in_flight  # what went before keeps the peer at work
        statuses, batches = plan(op, parts, spans, self._region, BATCH_BYTES if busy else FIRST_BYTES)

        async def run(batch: list[int]) -> None:
            columns = [parts[i] for i in batch], [spans[i] for i in batch], [views[i] for i in batch]
            for index, status in zip(batch, await self._request(op, token, *columns, deadline), strict=True):
                statuses[index] = status

        with flow.transfer():
            async with asyncio.TaskGroup() as group:
                for batch in batches:
                    group.create_task(run(batch))
        flow.count(statuses, [part.length for part in parts])
        return statuses

    async def _request(
        self, op: Op, token: LeaseToken, parts: list[Part], spans: list[Span], views: list[memoryview], deadline: float
    ) -> list[PartStatus]:
        size = sum(part.length for part in parts)
        pending: Pending | None = None
        received = self._stream.received_bytes
        try:
            async with asyncio.timeout_at(deadline):
                checksums = await self._checksums(views) if op is Op.WRITE else [0] * len(parts)
                await self._budget.acquire(size)
                pending = self._submit(op, token, parts, spans, views, checksums, deadline, size)
                return await asyncio.shield(pending.outcome)
        except TimeoutError:
            await self._take_back(pending)
            if self._mode is Mode.INLINE and received == self._stream.received_bytes:
                self._end("the peer didn't answer")
                self._stream.abort()
            return [PartStatus.EXPIRED] * len(parts)
        except asyncio.CancelledError:
            await self._take_back(pending)
            raise
        except TransferFailed:
            return [PartStatus.FAILED] * len(parts)

    async def _checksums(self, views: list[memoryview]) -> list[int]:
        """One request after the other, so that the first is on its way while the next is checked."""
        async with self._checking:
            return [await crc32c_in_turns(view) for view in views]

    def _submit(
        self,
        op: Op,
        token: LeaseToken,
        parts: list[Part],
        spans: list[Span],
        views: list[memoryview],
        checksums: list[int],
        deadline: float,
        size: int,
    ) -> Pending:
        """Puts the request into the outbox. From here on, its place is given back by `_settle`."""
        if self._ended:
            self._budget.release(size)
            raise TransferFailed(self._ended)
        offsets = [span.offset for span in spans] if self._mode is Mode.REGION else [0] * len(parts)
        left_s = deadline - asyncio.get_running_loop().time()
        event = Transfer(
            op=op,
            request=self._number(),
            token=token,
            deadline_ms=_deadline_ms(left_s),
            parts=tuple(parts),
            checksums=tuple(checksums),
            spans=tuple(offsets),
            payload_bytes=size if op is Op.WRITE and self._mode is Mode.INLINE else 0,
        )
        pending = Pending(event, spans, views, size)
        self._pending[event.request] = pending
        self._post([encode(event), *(views if event.payload_bytes else ())], pending)
        return pending

    def _post(self, pieces: list[Bytes], pending: Pending | None) -> None:
        self._outbox.append((pieces, pending))
        self._outbox_filled.set()

    async def _take_back(self, pending: Pending | None) -> None:
        """The caller stops waiting: its spans are its own again when this returns (see the module's text)."""
        if pending is None or pending.settled.done():
            return
        pending.abandoned = True
        unsent = [entry for entry in self._outbox if entry[1] is pending]
        if unsent:
            self._outbox.remove(unsent[0])
            self._settle(pending)
            return
        self._post([encode(Cancel(pending.event.request))], None)
        if self._mode is Mode.INLINE:
            pending.release_views()
        elif pending.event.op is Op.READ:
            try:
                await asyncio.wait([pending.settled], timeout=SETTLE_S)
            finally:
                if not pending.settled.done():
                    self._hold(pending)

    def _hold(self, pending: Pending) -> None:
        log.warning("byte plane: a peer on this host doesn't answer; %d spans stay held", len(pending.spans))
        for span in pending.spans:
            self._region.hold(span)
        pending.held = True

    def _settle(self, pending: Pending, statuses: list[PartStatus] | None = None) -> None:
        """No byte will land in the request's spans any more."""
        del self._pending[pending.event.request]
        self._budget.release(pending.size)
        if pending.held:
            for span in pending.spans:
                self._region.unhold(span)
        pending.release_views()
        pending.settled.set_result(None)
        pending.outcome.set_result(statuses or [PartStatus.FAILED] * len(pending.spans))

    # The two tasks

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_all())
                await self._receive_all()
        except* (TransferFailed, ProtocolError, TimeoutError) as errors:
            self._end(str(errors.exceptions[0]))
        except* Exception:
            log.exception("byte plane: a connection failed")
            self._end("internal error")
        finally:
            await self._hear_out()
            await self._stream.close()
            for pending in list(self._pending.values()):
                self._settle(pending)
            self._locating.fail(self._ended)
            self._looking.fail(self._ended)

    async def _hear_out(self) -> None:
        """Mode REGION: waits for the server's end-of-stream; without it, our memory stays held for good."""
        if self._mode is Mode.INLINE:
            return
        self._stream.finish()
        try:
            async with asyncio.timeout(SETTLE_S):
                while not self._stream.ended:
                    await discard(self._stream, 1)
        except (TransferFailed, TimeoutError):
            pass
        if not self._stream.ended:
            for pending in self._pending.values():
                if pending.event.op is Op.READ and not pending.held:
                    self._hold(pending)
                pending.held = False

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason

    async def _send_all(self) -> None:
        while True:
            await self._outbox_filled.wait()
            while self._outbox:
                pieces, _ = self._outbox.popleft()
                await self._stream.send(pieces)
            self._outbox_filled.clear()

    async def _receive_all(self) -> None:
        while True:
            event = await next_event(self._stream, self._listener, body_s=BODY_S)
            match event:
                case Reply():
                    await self._receive_reply(event)
                case Extents():
                    self._receive_extents(event)
                case FoundPrefix():
                    self._looking.answered(event.request, event)  # unless nobody waits any more: a lease ends by itself
                case Goodbye(reason, text):
                    self._end(f"the peer said goodbye: {reason.name}: {text}")
            await asyncio.sleep(0)

    def _receive_extents(self, event: Extents) -> None:
        located = Located(event, self._stream.take_fds())
        if not self._locating.answered(event.request, located):
            located.close()

    async def _receive_reply(self, reply: Reply) -> None:
        pending = self._pending.get(reply.request)
        if pending is None:
            raise ProtocolError(f"reply to request {reply.request}: expected one in flight")
        check_reply(reply, pending.event, self._mode)
        statuses = list(reply.statuses)
        if pending.event.op is Op.READ:
            for index, view in enumerate(pending.views):
                if statuses[index] is PartStatus.OK:
                    length = pending.spans[index].length
                    statuses[index] = await self._receive_part(pending, view, length, reply.checksums[index])
        self._settle(pending, statuses)

    async def _receive_part(self, pending: Pending, view: memoryview, length: int, checksum: int) -> PartStatus:
        if self._mode is Mode.INLINE and not await self._stream.receive(view, length):
            return PartStatus.FAILED
        try:
            return PartStatus.OK if await crc32c_in_turns(view) == checksum else PartStatus.CORRUPT
        except ValueError:  # taken back while it was checked
            return PartStatus.FAILED


def _deadline_ms(seconds: float) -> int:
    return max(1, min(int(1000 * seconds), DEADLINE_MS_MAX))

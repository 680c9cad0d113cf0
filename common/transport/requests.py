"""What one request asks of the served area.

An area's trouble is never the connection's: whatever it raises becomes FAILED parts. Its coroutines are
never cancelled, because threads or disks behind them may still write into the buffers.
"""

import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from common.errors import PenstockError
from common.transport.frames import Transfer
from common.transport.interface import Area, Part, PartStatus
from common.transport.memory import Checksums, checksums_in_turns, checksums_of_copy
from common.transport.streams import ByteStream, discard

log = logging.getLogger(__name__)
ReadResult = tuple[PartStatus, memoryview | None, int]
T = TypeVar("T")


async def read_area(area: Area, request: Transfer, into: Sequence[memoryview] | None) -> list[ReadResult]:
    """The area's answer to a READ, one result per part."""
    results = await _guarded(area.read(request.token, request.parts, into), [])
    if len(results) != len(request.parts):
        return [(PartStatus.FAILED, None, 0)] * len(request.parts)
    return [_sane(result, part) for result, part in zip(results, request.parts, strict=True)]


class IncomingWrite:
    """A WRITE's buffers: each leaves here once, to be committed or aborted.

    1. The area gives the buffers, or says why not.
    2. They are filled from the stream or from the client's region, and checked.
    3. `commit` makes those count that are still here. `abort` gives back what is left, at any time.
    """

    def __init__(self, area: Area, request: Transfer) -> None:
        self._area, self._request = area, request
        given = self._ask()
        self._buffers: list[memoryview | None] = [None if isinstance(item, PartStatus) else item for item in given]
        self.statuses = [item if isinstance(item, PartStatus) else PartStatus.FAILED for item in given]
        self._checksums: dict[int, Checksums] = {}  # of what arrived well

    async def receive(self, stream: ByteStream) -> None:
        """Takes the payload off the stream, whatever becomes of it. Raises `TransferFailed`."""
        for index, part in enumerate(self._request.parts):
            buffer = self._buffers[index]
            if buffer is None:
                await discard(stream, part.length)
            elif not await stream.receive(buffer, part.length):
                self.abort(PartStatus.REJECTED, index)
            else:
                await self._check(index, checksums_in_turns(buffer))

    async def copy_from(self, spans: Sequence[memoryview]) -> None:
        """Takes the bytes out of the client's memory, which may change meanwhile: the copy is what is checked."""
        for index, span in enumerate(spans):
            buffer = self._buffers[index]
            if buffer is not None:
                await self._check(index, checksums_of_copy(buffer, span))

    async def commit(self) -> None:
        """Sets the statuses of what had arrived well."""
        ready = self._take()
        if not ready:
            return
        request = self._request
        parts, checksums = [request.parts[i] for i, _ in ready], [self._checksums[i] for i, _ in ready]
        work = self._area.commit(request.token, parts, [buffer for _, buffer in ready], checksums)
        for (index, _), status in zip(ready, await _guarded(work, [PartStatus.FAILED] * len(ready)), strict=True):
            self.statuses[index] = status

    def abort(self, status: PartStatus, only: int | None = None) -> None:
        """Gives one or all buffers that are still here back to the area; idempotent."""
        for index, buffer in self._take(only):
            self.statuses[index] = status
            try:
                self._area.abort(self._request.token, [self._request.parts[index]], [buffer])
            except Exception:
                log.exception("byte plane: the area failed to abort a write")

    def _ask(self) -> list[memoryview | PartStatus]:
        try:
            return self._area.write_buffers(self._request.token, self._request.parts)
        except Exception:
            log.exception("byte plane: the area failed to give buffers")
            return [PartStatus.FAILED] * len(self._request.parts)

    async def _check(self, index: int, arriving: Coroutine[Any, Any, Checksums]) -> None:
        try:
            arrived = self._checksums[index] = await arriving
            if arrived.whole != self._request.checksums[index]:
                self.abort(PartStatus.CORRUPT, index)
        except ValueError:  # the buffer was released: the area took it back
            self.abort(PartStatus.REJECTED, index)

    def _take(self, only: int | None = None) -> list[tuple[int, memoryview]]:
        chosen = range(len(self._buffers)) if only is None else [only]
        taken = [(index, buffer) for index in chosen if (buffer := self._buffers[index]) is not None]
        for index, _ in taken:
            self._buffers[index] = None
        return taken


async def _guarded(work: Coroutine[Any, Any, T], otherwise: T) -> T:
    try:
        return await work
    except PenstockError as error:
        log.warning("byte plane: the area refused: %s", error.message)
    except Exception:
        log.exception("byte plane: the area failed")
    return otherwise


def _sane(result: ReadResult, part: Part) -> ReadResult:
    """An area that says OK without just the bytes asked for has failed."""
    status, view, _ = result
    if status is PartStatus.OK and (view is None or len(view) != part.length):
        log.error("byte plane: the area gave %s bytes for %s", None if view is None else len(view), part)
        return PartStatus.FAILED, view, 0
    return result

"""A client's request on its way: how a transfer is cut into requests, and what one waits for."""

import asyncio
from collections.abc import Sequence

from common.transport.frames import REQUEST_BYTES_MAX, Mode, Op, ProtocolError, Reply, Transfer
from common.transport.interface import PARTS_MAX, Part, PartStatus, Span
from common.transport.region import Region

BATCH_BYTES = 8 << 20  # a larger transfer is split, so that disk, wire and checks overlap
# And begins with little, so that they soon do; but not a write behind others: each request costs the peer 0.25 ms.
FIRST_BYTES = 2 << 20


def plan(
    op: Op, parts: Sequence[Part], spans: Sequence[Span], region: Region, first_bytes: int
) -> tuple[list[PartStatus], list[list[int]]]:
    """What is decided without the peer, and the batches of part numbers that go to it, each twice the one before, from `first_bytes` on."""
    statuses = [PartStatus.OK] * len(parts)
    batches: list[list[int]] = []
    room = 0
    for index, part in enumerate(parts):
        if part.length > REQUEST_BYTES_MAX:
            statuses[index] = PartStatus.REJECTED
        elif op is Op.READ and region.held(spans[index]):
            statuses[index] = PartStatus.FULL
        elif part.length:
            if not batches or part.length > room or len(batches[-1]) == PARTS_MAX:
                room = min(first_bytes << len(batches), BATCH_BYTES)
                batches.append([])
            batches[-1].append(index)
            room -= part.length
    return statuses, batches


class Pending:
    """A request between its submission and its settlement."""

    def __init__(self, event: Transfer, spans: list[Span], views: list[memoryview], size: int) -> None:
        loop = asyncio.get_running_loop()
        self.event, self.spans, self.views, self.size = event, spans, views, size
        self.outcome: asyncio.Future[list[PartStatus]] = loop.create_future()
        self.settled: asyncio.Future[None] = loop.create_future()
        self.abandoned = False
        self.held = False

    def release_views(self) -> None:
        for view in self.views:
            view.release()


def check_reply(reply: Reply, request: Transfer, mode: Mode) -> None:
    if len(reply.statuses) != len(request.parts):
        raise ProtocolError(f"reply of {len(reply.statuses)} parts: expected {len(request.parts)}")
    payload = 0
    if mode is Mode.INLINE and request.op is Op.READ:
        payload = sum(part.length for part, status in zip(request.parts, reply.statuses, strict=True) if status is PartStatus.OK)
    if reply.payload_bytes != payload:
        raise ProtocolError(f"reply with {reply.payload_bytes} payload bytes: expected {payload}")

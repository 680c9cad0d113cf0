"""The order in which a worker's requests read from a kvstore, and what a stalled one costs them. Transport and stage are stand-ins."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.routes import Leg, Order, Source
from common.transport.counters import Flow
from common.transport.interface import Endpoint, LeaseToken, Part, PartStatus
from services.decode.grants import Grants
from services.worker import links
from services.worker.lease import Lease
from services.worker.loading import READS_IN_FLIGHT, SMALL_BLOCKS_PER_READ, Batches, Form, Pull, Reader, Stored, in_order

BLOCKS = 4 * SMALL_BLOCKS_PER_READ


class Kvstore:
    """As a transport: notes who asks, and answers when it is let, or never."""

    carrier = "tcp"

    def __init__(self, answers: bool) -> None:
        self.asked: list[int] = []
        self.under_way = self.most = 0
        self._answers = answers

    def transport(self, endpoint: Endpoint) -> "Kvstore":
        return self

    async def read(self, token: LeaseToken, parts: Sequence[Part], spans: Any, *, deadline_s: float) -> list[PartStatus]:
        self.asked.append(token[0])
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0 if self._answers else deadline_s)
        self.under_way -= 1
        return [PartStatus.OK if self._answers else PartStatus.EXPIRED] * len(parts)


def reader_of(kvstore: Kvstore) -> Reader:
    stage = SimpleNamespace(bytes_per_slot=64, span=lambda slot, offset, length: (slot, offset, length))
    codec = SimpleNamespace(bytes_per_block=64)
    return Reader(cast(Any, stage), cast(Any, kvstore), cast(Any, None), cast(Any, codec))


async def pull(reader: Reader, number: int) -> tuple[str, list[int]]:
    """Why it failed, and the blocks that came."""
    came: list[int] = []
    stored = Stored(BLOCKS, LeaseToken(bytes([number]) * 16), Endpoint(tcp="store:1"), "store:0", 60.0)
    blocks = range(BLOCKS)
    order = Pull(stored, blocks, in_order(blocks), BLOCKS, lambda good, bad: came.extend(good), Flow(), 60.0, Form.STORED)
    return (await reader.pull(order)).failure, sorted(came)


async def test_a_read_asks_for_no_more_blocks_than_it_may_wherever_they_come_from() -> None:
    leg = Leg(2, 50, Source.STORAGE_TO_DECODE)
    awaited: list[int] = []
    lease = cast(Lease, SimpleNamespace(await_own=awaited.extend))
    for order in (Order.FORWARD, Order.MEET):
        grants = Grants(lease, [leg], order)
        if order is Order.MEET:
            grants.granted([40])
            grants.granted([2])
            grants.close()
        asked = [list(blocks) async for blocks in until_empty(grants.following)]
        assert max(map(len, asked)) == 32 and sorted(chain(*asked)) == list(range(2, 50)) == sorted(awaited)
        awaited.clear()
    asked = [list(blocks) async for blocks in until_empty(in_order(range(70)))]
    assert [len(blocks) for blocks in asked] == [32, 32, 6] and list(chain(*asked)) == list(range(70))


async def until_empty(batches: Batches) -> AsyncIterator[Sequence[int]]:
    while blocks := await batches(32):
        yield blocks


async def test_requests_read_one_after_another_and_the_link_is_never_without_the_next_read() -> None:
    kvstore = Kvstore(answers=True)
    reader = reader_of(kvstore)
    found = await asyncio.gather(*(pull(reader, number) for number in range(3)))
    assert found == [("", list(range(BLOCKS)))] * 3
    assert kvstore.asked == sorted(kvstore.asked) and kvstore.most == READS_IN_FLIGHT
    assert reader.link.queued_bytes == 0


async def test_a_stalled_kvstore_costs_all_who_wait_for_it_one_patience_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "PATIENCE_S", 0.2)
    kvstore = Kvstore(answers=False)
    reader = reader_of(kvstore)
    found = await asyncio.gather(*(pull(reader, number) for number in range(8)))
    assert all(failure and not came for failure, came in found)
    assert len(kvstore.asked) == READS_IN_FLIGHT, "the others gave up with the first"
    await pull(reader, 9)
    assert kvstore.asked.count(9) == READS_IN_FLIGHT, "who comes later tries again"

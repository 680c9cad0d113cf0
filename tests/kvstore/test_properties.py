"""Random lives of a store against a model: chains stay prefix-closed, leases hold, the budget too."""

import asyncio
import tempfile
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from common.transport.interface import LeaseToken, Part, PartStatus
from tests.kvstore.support import (
    LENGTH,
    NAMESPACE,
    OTHER,
    ROOT,
    SEGMENT_BYTES,
    Clock,
    Rig,
    bytes_on_disk,
    chain,
    options,
    payload,
    rig,
    room_for,
)

OPTIONS = options(budget_bytes=room_for(3) + 5, segment_bytes=SEGMENT_BYTES, read_depth=1, write_depth=1)
CHAINS = [(NAMESPACE, ROOT, chain(8, f"c{i}")) for i in range(4)]
CHAINS += [(NAMESPACE, CHAINS[0][2][3], chain(4, "branch", CHAINS[0][2][3])), (OTHER, ROOT, chain(5, "other"))]
WHICH = st.integers(0, len(CHAINS) - 1)


class Put(msgspec.Struct, frozen=True):
    which: int
    start: int
    count: int


class Get(msgspec.Struct, frozen=True):
    which: int


class Lease(msgspec.Struct, frozen=True):
    which: int
    count: int


class Wait(msgspec.Struct, frozen=True):
    seconds: int


class Restart(msgspec.Struct, frozen=True):
    pass


Step = Put | Get | Lease | Wait | Restart
STEPS = st.lists(
    st.one_of(
        st.builds(Put, WHICH, st.integers(0, 3), st.integers(1, 8)),
        st.builds(Put, WHICH, st.just(0), st.just(8)),
        st.builds(Get, WHICH),
        st.builds(Lease, WHICH, st.integers(1, 8)),
        st.builds(Wait, st.integers(1, 20)),
        st.builds(Restart),
    ),
    max_size=25,
)


class Life:
    """Runs steps and checks after each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.leases: dict[LeaseToken, tuple[int, int, float]] = {}  # which chain, how many blocks, until when
        self.gaps = False  # a chain may have a hole: it was written from its middle, or see `Restart`

    async def run(self, steps: list[Step]) -> None:
        left: list[Step] | None = steps
        while left is not None:
            async with rig(self.folder, OPTIONS, clock=self.clock) as one:
                self.leases.clear()
                left = await self.until_restart(one, left)

    async def until_restart(self, one: Rig, steps: list[Step]) -> list[Step] | None:
        for i, step in enumerate(steps):
            if isinstance(step, Restart):
                # What went with another segment is found again at start, perhaps without its parents.
                self.gaps = self.gaps or one.store.metrics.segment_evictions > 0
                return steps[i + 1 :]
            await self.take(one, step)
            await self.check(one)
        return None

    async def take(self, one: Rig, step: Step) -> None:
        match step:
            case Put(which, start, count):
                namespace, root, keys = CHAINS[which]
                batch = keys[start : start + count]
                if batch:
                    self.gaps = self.gaps or bool(start)
                    await one.put(batch, keys[start - 1] if start else root, namespace)
            case Get(which):
                namespace, _, keys = CHAINS[which]
                assert PartStatus.CORRUPT not in await one.get(keys, namespace)
            case Lease(which, count):
                namespace, _, keys = CHAINS[which]
                found = one.store.lookup(namespace, keys[:count], 10.0, lease=True)
                if found.token is not None:
                    self.leases[found.token] = (which, found.blocks, self.clock.now + 10.0)
            case Wait(seconds):
                self.clock.now += seconds
                one.store.sweep()

    async def check(self, one: Rig) -> None:
        assert one.store.check_integrity() == []
        assert bytes_on_disk(self.folder) <= OPTIONS.budget_bytes
        for token, (which, blocks, until) in list(self.leases.items()):
            if until <= self.clock.now:
                del self.leases[token]
                continue
            results = await one.area.read(token, [Part(blocks - 1, 0, LENGTH)], None)
            assert results[0][0] is PartStatus.OK and results[0][1] is not None
            assert bytes(results[0][1]) == payload(CHAINS[which][2][blocks - 1])
            one.area.done_reading(token, [results[0][1]])
        if not self.gaps:
            for namespace, _, keys in CHAINS:
                present = [key in one.stored(namespace) for key in keys]
                assert present == sorted(present, reverse=True), "a chain has a hole"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(STEPS)
def test_any_life_keeps_chains_closed_leases_held_and_the_budget(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(Life(Path(folder)).run(steps))

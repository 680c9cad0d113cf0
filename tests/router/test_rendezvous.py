"""Several kvstores: which keep a chain, and what a lookup over them finds."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.rendezvous import ranked
from tests.router.conftest import Stack, StackMaker
from tests.router.scripted import ScriptedStore

PROMPT = list(range(1, 90))  # five whole blocks of 16, and a tail
KEYS = st.binary(min_size=32, max_size=32)
STORES = st.lists(st.uuids().map(str), min_size=2, max_size=8, unique=True)


@given(KEYS, STORES)
def test_losing_a_kvstore_moves_only_its_own_chains(key: bytes, stores: list[str]) -> None:
    order = ranked(key, stores)
    assert sorted(order) == sorted(stores) and order == ranked(key, stores[::-1])
    for lost in stores:
        assert ranked(key, [store for store in stores if store != lost]) == [store for store in order if store != lost]


def test_chains_are_spread_evenly() -> None:
    stores = [f"10.0.0.{i}:7000" for i in range(4)]
    first = [ranked(i.to_bytes(32, "little"), stores)[0] for i in range(4000)]
    assert all(900 < first.count(store) < 1100 for store in stores)


def test_without_a_kvstore_none_is_named() -> None:
    assert ranked(b"k" * 32, ()) == []


async def placed(stack: Stack) -> tuple[list[ScriptedStore], int]:
    """The stores of the last request's chain, best first, and how many blocks it was told are replicated."""
    reply = await stack.complete(prompt=PROMPT, max_tokens=1)
    assert reply.status_code == 200, reply.text
    route = stack.decode.starts[-1].route
    by_address = {store.address: store for store in stack.stores}
    return [by_address[address] for address in (route.kvstore, *route.replicas)], route.replicated_blocks


async def settled(stack: Stack) -> None:
    """Every lease is given back."""
    async with asyncio.timeout(10):
        while any(store.leases for store in stack.stores):
            await next(store for store in stack.stores if store.leases).released.get()
    assert stack.router._generator.keeper.held == 0


async def test_a_chain_is_kept_by_as_many_stores_as_replicas_says(start_stack: StackMaker) -> None:
    for replicas in (1, 2, 3):
        async with start_stack(stores=3, replicas=replicas) as stack:
            kept, _ = await placed(stack)
            assert len(kept) == replicas
            assert [len(store.lookups) for store in stack.stores if store in kept] == [1] * replicas
            assert not any(store.lookups for store in stack.stores if store not in kept)


async def test_the_longest_prefix_is_read_wherever_it_is(start_stack: StackMaker) -> None:
    async with start_stack(stores=2, replicas=2) as stack:
        (first, second), _ = await placed(stack)
        for blocks, reader in (((3, 5), second), ((5, 3), first), ((4, 4), first), ((0, 2), second)):
            first.blocks, second.blocks = blocks
            kept, replicated = await placed(stack)
            assert kept == [first, second] and replicated == min(blocks)
            stored = stack.decode.starts[-1].route.stored
            assert (stored.kvstore, stored.blocks) == (reader.address, max(blocks))
            await settled(stack)


@pytest.mark.parametrize("lost", [0, 1])
async def test_a_replica_that_does_not_answer_costs_nothing_but_its_blocks(start_stack: StackMaker, lost: int) -> None:
    async with start_stack(stores=2, replicas=2, lookup_timeout_ms=50) as stack:
        both, _ = await placed(stack)
        both[0].blocks = both[1].blocks = 5
        both[lost].hang = True
        _, replicated = await placed(stack)
        stored = stack.decode.starts[-1].route.stored
        assert (stored.kvstore, stored.blocks, replicated) == (both[1 - lost].address, 5, 0)
        both[lost].hang = False
        _, replicated = await placed(stack)
        assert replicated == 5 and stack.decode.starts[-1].route.stored.kvstore == both[0].address
        await settled(stack)


@pytest.mark.parametrize("last", ["first", "second"])
async def test_a_client_that_goes_during_the_lookup_leaves_no_lease(start_stack: StackMaker, last: str) -> None:
    """While the first store's answer is awaited, which holds the lease already; or the replica's, which holds more."""
    async with start_stack(stores=2, replicas=2, lookup_timeout_ms=5000) as stack:
        (first, second), _ = await placed(stack)
        first.blocks, second.blocks = 3, 5
        slow = {"first": first, "second": second}[last]
        slow.gate = asyncio.Event()
        first.granted.clear()
        asking = asyncio.create_task(stack.complete(prompt=PROMPT, max_tokens=1))
        await slow.granted.wait()
        asking.cancel()
        await asyncio.wait([asking])
        async with asyncio.timeout(10):
            await stack.router._generator.idle.wait()
        slow.gate.set()
        async with asyncio.timeout(10):
            for store in (first, second):
                if store.granted.is_set():
                    await store.released.get()
        assert not first.leases and not second.leases and stack.router._generator.keeper.held == 0

"""The words of a route, which router and workers share: sources, legs, order, plans. Pure.

A route says where the KV of each range of a prompt's blocks comes from. Its name, the plan, is what
reports, logs, metrics and `usage.penstock.route` show.
"""

from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from itertools import groupby

import msgspec

# What moves KV bytes; each is counted in reports and metrics.
PATHS = ("storage_to_decode", "storage_to_prefill", "decode_to_prefill", "prefill_to_decode", "host_to_device")
BY_PREFILL = ("storage_to_prefill", "decode_to_prefill", "prefill_to_decode")  # those whose bytes a prefill worker moves


class Source(StrEnum):
    """Where the KV of a range of blocks comes from (worker.proto Source)."""

    RESIDENT = "resident"  # at decode
    RESIDENT_AT_PREFILL = "resident_at_prefill"
    STORAGE_TO_DECODE = "storage_to_decode"
    STORAGE_TO_PREFILL = "storage_to_prefill"
    RECOMPUTE = "recompute"


HELD = frozenset({Source.RESIDENT, Source.RESIDENT_AT_PREFILL})  # by a worker: nothing is loaded


class Order(StrEnum):
    """In which order a prompt's KV is made (worker.proto Order).

    FORWARD: what the legs don't cover is computed while they load, each layer as soon as its KV is there.
    MEET: legs load from their ends while compute goes on from the front, until they meet.
    WHOLE: load everything, then compute everything, then hand everything over: the baseline.
    """

    FORWARD = "forward"
    MEET = "meet"
    WHOLE = "whole"


class Leg(msgspec.Struct, frozen=True):
    """Blocks `[first_block, last_block)` of a prompt come from `source`."""

    first_block: int
    last_block: int
    source: Source

    @property
    def blocks(self) -> int:
        return self.last_block - self.first_block


class Plan(StrEnum):
    """Names of routes."""

    DIRECT = "direct"  # decode pulls from storage and computes the rest itself
    STORAGE_TO_DECODE = "storage_to_decode"  # decode pulls; prefill reads it from there and computes the rest
    STORAGE_TO_PREFILL = "storage_to_prefill"  # prefill pulls, computes, and hands everything over
    SPLIT = "split"  # both links at once
    RECOMPUTE = "recompute"  # nothing is loaded
    RESIDENT = "resident"  # workers still have all of it: never decided, found there
    DIRECT_MEET = "direct+meet"
    STORAGE_TO_DECODE_MEET = "storage_to_decode+meet"
    STORAGE_TO_PREFILL_MEET = "storage_to_prefill+meet"
    SPLIT_MEET = "split+meet"


def plan_of(sources: Iterable[Source], order: Order, by_prefill: bool) -> Plan:
    """The name of a route that takes KV from these sources."""
    sources = set(sources)
    loading = sources & {Source.STORAGE_TO_DECODE, Source.STORAGE_TO_PREFILL}
    if not loading:
        return Plan.RESIDENT if sources & HELD else Plan.RECOMPUTE
    if len(loading) == 2:
        plan = Plan.SPLIT
    elif loading == {Source.STORAGE_TO_PREFILL}:
        plan = Plan.STORAGE_TO_PREFILL
    else:
        plan = Plan.STORAGE_TO_DECODE if by_prefill else Plan.DIRECT
    return Plan(f"{plan}+meet") if order is Order.MEET else plan


def of_source(legs: Iterable[Leg], source: Source) -> set[int]:
    """The blocks that come from there."""
    return {block for leg in legs if leg.source is source for block in range(leg.first_block, leg.last_block)}


def clipped(legs: Sequence[Leg], blocks: int) -> tuple[Leg, ...]:
    """The legs as far as they lie in `[0, blocks)`."""
    return tuple(Leg(leg.first_block, min(leg.last_block, blocks), leg.source) for leg in legs if leg.first_block < blocks)


def with_resident(legs: Sequence[Leg], resident: Collection[int]) -> tuple[Leg, ...]:
    """The legs, but for these blocks, which make legs of their own."""
    if not resident:
        return tuple(legs)
    sources = {block: leg.source for leg in legs for block in range(leg.first_block, leg.last_block)}
    sources |= dict.fromkeys(resident, Source.RESIDENT)
    runs = groupby(enumerate(sorted(sources)), key=lambda at: (sources[at[1]], at[1] - at[0]))  # blocks in a row, of one source
    made = []
    for (source, _), run in runs:
        blocks = [block for _, block in run]
        made.append(Leg(blocks[0], blocks[-1] + 1, source))
    return tuple(made)


def problem_of(legs: Sequence[Leg], blocks: int) -> str:
    """What is wrong with legs that are to be ordered, disjoint and inside `[0, blocks)`; empty: nothing."""
    at = 0
    for leg in legs:
        if not at <= leg.first_block < leg.last_block <= blocks:
            return f"leg [{leg.first_block}, {leg.last_block}): expected ordered, disjoint legs inside [{at}, {blocks})"
        at = leg.last_block
    return ""

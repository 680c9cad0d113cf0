"""Carries a route out block by block, with nothing but arithmetic: what the closed form of the estimates is held to.

Every storage link fetches from the back of its leg, one block at a time, or under MEET one claim at a time as the data
path does; the computing worker computes one block at a time, under MEET from the front. A block is claimed when its fetching
or computing begins, and by one of them only.
"""

from common.routes import Order, Source
from services.router.policy.division import claim
from services.router.policy.estimates import RUN_S, Estimate


def first_token_s(
    estimate: Estimate, prompt_tokens: int, block_tokens: int, block_s: dict[Source, float], token_s: float, wait_s: float = 0.0
) -> float:
    """When the last prompt token is computed. `block_s`: per storage link; `wait_s`: until the computing worker is free."""
    missing = set(range(max((leg.last_block for leg in estimate.legs), default=0)))
    legs = {leg.source: set(range(leg.first_block, leg.last_block)) for leg in estimate.legs}
    claims = {leg.source: claim(leg.blocks) if estimate.order is Order.MEET else 1 for leg in estimate.legs}
    free = dict.fromkeys(legs, 0.0)
    if estimate.order is Order.MEET:
        free[Source.RECOMPUTE] = wait_s
    tail_tokens = prompt_tokens - len(missing) * block_tokens
    done = 0.0
    while missing:
        able = [source for source in free if source is Source.RECOMPUTE or legs[source] & missing]
        source = min(able, key=lambda s: (free[s], s))
        if source is Source.RECOMPUTE:
            blocks = {min(missing)}
            free[source] += block_tokens * token_s
        else:
            blocks = set(sorted(legs[source] & missing)[-claims[source] :])
            free[source] += len(blocks) * block_s[source]
        missing -= blocks
        done = max(done, free[source])
    run_s = RUN_S if estimate.prefill else 0.0
    return max(done, wait_s) + tail_tokens * token_s + run_s

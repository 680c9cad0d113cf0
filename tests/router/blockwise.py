"""Carries a route out block by block, with nothing but arithmetic: what the closed form of the estimates is held to.

Every storage link fetches one block at a time, from the back of its leg; the computing worker computes one block at a
time, under MEET from the front. A block is claimed when its fetching or computing begins, and by one of them only.
"""

from common.routes import Order, Source
from services.router.policy.estimates import RUN_S, Estimate


def first_token_s(
    estimate: Estimate, prompt_tokens: int, block_tokens: int, block_s: dict[Source, float], token_s: float, wait_s: float = 0.0
) -> float:
    """When the last prompt token is computed. `block_s`: per storage link; `wait_s`: until the computing worker is free."""
    missing = {block for leg in estimate.legs for block in range(leg.first_block, leg.last_block)}
    legs = {leg.source: set(range(leg.first_block, leg.last_block)) for leg in estimate.legs}
    free = dict.fromkeys(legs, 0.0)
    if estimate.order is Order.MEET:
        free[Source.RECOMPUTE] = wait_s
    tail_tokens = prompt_tokens - len(missing) * block_tokens
    done = 0.0
    while missing:
        able = [source for source in free if source is Source.RECOMPUTE or legs[source] & missing]
        source = min(able, key=lambda s: (free[s], s))
        block = min(missing) if source is Source.RECOMPUTE else max(legs[source] & missing)
        free[source] += block_tokens * token_s if source is Source.RECOMPUTE else block_s[source]
        missing.remove(block)
        done = max(done, free[source])
    run_s = RUN_S if estimate.prefill else 0.0
    return max(done, wait_s) + tail_tokens * token_s + run_s

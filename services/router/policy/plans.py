"""What the plans are made of: one table."""

import msgspec

from common.routes import Plan, Source


class Shape(msgspec.Struct, frozen=True):
    """What a plan is made of.

    Attributes:
        loads: the links that stored blocks come over, in the order of their legs. Prefill's leg is the first: compute
            that starts at the front then eats into a leg that it pulls itself, and has nobody to tell.
        meets: whether compute takes a share of the stored blocks.
        computers: the roles that may compute what is missing.
    """

    loads: tuple[Source, ...]
    meets: bool
    computers: tuple[str, ...]


_D, _P = Source.STORAGE_TO_DECODE, Source.STORAGE_TO_PREFILL
SHAPES = {
    Plan.DIRECT: Shape((_D,), False, ("decode",)),
    Plan.DIRECT_MEET: Shape((_D,), True, ("decode",)),
    Plan.STORAGE_TO_DECODE: Shape((_D,), False, ("prefill",)),
    Plan.STORAGE_TO_DECODE_MEET: Shape((_D,), True, ("prefill",)),
    Plan.STORAGE_TO_PREFILL: Shape((_P,), False, ("prefill",)),
    Plan.STORAGE_TO_PREFILL_MEET: Shape((_P,), True, ("prefill",)),
    Plan.SPLIT: Shape((_P, _D), False, ("prefill",)),
    Plan.SPLIT_MEET: Shape((_P, _D), True, ("prefill",)),
    Plan.RECOMPUTE: Shape((), False, ("decode", "prefill")),
}
PLANS = tuple(SHAPES)
PLACE = {plan: place for place, plan in enumerate(PLANS)}  # the last resort among equals

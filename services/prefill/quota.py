"""How much prefill computes in one step: packing to a quota of compute time (DualPath, arXiv 2602.21548, section 5). Pure.

Cost is counted in token equivalents: a token that attends to `c` keys costs `1 + c / attention_tokens`, where
`attention_tokens` is the context at which attention costs as much as everything else. The quota is what the engine was
measured to do in `QUOTA_S`. Sequences are packed in the engine's order; the one that overflows gets the longest chunk that
fits, found by binary search.
"""

import math

from services.worker.engine.speed import Speed
from services.worker.ledger import Loader, quarter
from services.worker.model import LoadedModel

QUOTA_S = 0.3  # the paper's
MEET_SHARE = 0.75  # of the way to where compute meets a loader: neither's speed is sure


def attention_tokens(model: LoadedModel) -> float:
    """Keys at which a token's attention costs what its matrix products cost.

    Multiply-adds per token: one per parameter, and per key and layer `2 * q_heads * head_dim`.
    """
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    layout = model.layout
    return float(parameters / (2 * layout.layers * model.config.num_attention_heads * layout.head_dim))


def cost(start: int, end: int, attention_tokens: float) -> float:
    """Token equivalents of computing tokens `[start, end)`."""
    count = end - start
    return count * (1.0 + (start + end + 1) / 2 / attention_tokens)


def fitting(start: int, end: int, step: int, budget: float, attention_tokens: float) -> int:
    """The furthest end of a chunk `[start, that)` whose cost is at most `budget`: `end`, or a multiple of `step`, or `start`."""
    if cost(start, end, attention_tokens) <= budget:
        return end
    low, high = 0, (end - start - 1) // step  # whole steps
    while low < high:
        middle = (low + high + 1) // 2
        if cost(start, start + middle * step, attention_tokens) <= budget:
            low = middle
        else:
            high = middle - 1
    return start + low * step


def meeting_point(loader: Loader, step_s: float, block_s: float) -> float:
    """How many blocks to compute in one step that ends when the loader has brought the others."""
    block_loads_s = 1.0 / loader.blocks_per_s
    return ((loader.left + loader.coming) * block_loads_s - step_s) / (block_s + block_loads_s)


class Quota:
    """What one step may compute, from what steps have taken.

    Attributes:
        speed: of one step, in tokens.
    """

    def __init__(self, attention_tokens: float, tokens_max: int) -> None:
        self.attention_tokens = attention_tokens
        self.speed = Speed()
        self._equivalents = Speed()
        self._tokens_max = tokens_max

    @property
    def equivalents(self) -> float:
        """Token equivalents of one step."""
        pace = self._equivalents
        if not pace.tokens_per_s:
            return float(self._tokens_max)
        return max(0.0, QUOTA_S - pace.step_s) * pace.tokens_per_s

    @property
    def tokens_per_s(self) -> float:
        """Of a prompt that takes many steps: each brings its fixed part. 0 until measured."""
        speed = self.speed
        if not speed.tokens_per_s:
            return 0.0
        tokens = min(max(1.0, (QUOTA_S - speed.step_s) * speed.tokens_per_s), self._tokens_max)
        return tokens / (speed.step_s + tokens / speed.tokens_per_s)

    def reach(self, start: int, block_tokens: int, loader: Loader) -> int:
        """How many blocks from token `start` on to compute now, while a loader comes towards them: most of the way to where they
        meet, then most of the rest. 0: the loader is there before a step would be over."""
        speed = self._equivalents
        if not loader.blocks_per_s or not speed.tokens_per_s:
            return quarter(start, loader)
        block_s = cost(start, start + block_tokens, self.attention_tokens) / speed.tokens_per_s
        meets = meeting_point(loader, speed.step_s, block_s)
        return math.ceil(MEET_SHARE * meets) if meets >= 1.0 else 0

    def measured(self, chunks: list[tuple[int, int]], seconds: float) -> None:
        """A step over these token ranges took so long."""
        self.speed.measured(sum(end - start for start, end in chunks), seconds)
        self._equivalents.measured(sum(cost(start, end, self.attention_tokens) for start, end in chunks), seconds)

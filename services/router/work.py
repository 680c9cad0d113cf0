"""What a router is asked for."""

from collections.abc import Sequence

import msgspec

from common.generation import Sampling


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A request, validated and tokenised.

    Attributes:
        prompts: token ids, one list per prompt.
        samplings: per prompt, one per choice; choice i of prompt p has index p * n + i.
        salt: separates a tenant's cached blocks.
        timeout_s: of the whole request.
    """

    id: str
    prompts: tuple[Sequence[int], ...]
    samplings: tuple[tuple[Sampling, ...], ...]
    timeout_s: float
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    salt: bytes = b""
    traceparent: str = ""

    @property
    def sequences(self) -> int:
        return sum(len(samplings) for samplings in self.samplings)

"""What filling a request's slots comes to, and whose the slots are then."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from common.generation import FinishReason, Token
from services.worker.engine.meeting import Meeting
from services.worker.engine.types import LoadedKv


class Filled(msgspec.Struct, frozen=True):
    """What the engine starts from.

    `kv` is None when nothing was filled; its bytes are in `slots`. `meeting`, instead: it is still being filled, by `loading`. `first` came from prefill, with how it ended the sequence.
    `stored_blocks` leading blocks are in the reservoir already.
    """

    kv: LoadedKv | None = None
    slots: Sequence[int] = ()
    stored_blocks: int = 0
    first: Token | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    meeting: Meeting | None = None
    loading: asyncio.Task[None] | None = None

    def drop(self) -> None:
        """Gives the slots back when no engine will."""
        if self.kv is not None:
            self.kv.on_copied()
        if self.meeting is not None:
            self.meeting.over()


class Shares:
    """Calls `free` when the last of its holders has let go."""

    def __init__(self, free: Callable[[], None], holders: int) -> None:
        self._free = free
        self._holders = holders

    def let_go(self) -> None:
        self._holders -= 1
        assert self._holders >= 0
        if not self._holders:
            self._free()

    def threadsafe(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        """`let_go`, from whichever thread."""

        def let_go() -> None:
            loop.call_soon_threadsafe(self.let_go)

        return let_go

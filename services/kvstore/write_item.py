"""One slot that a write lease fills, from reservation to stored block.

A missing entry in `NEXT` is our bug:

    RESERVED --receive--> FILLING --commit--> WRITING --done--> STORED
       |                    |  \\--abort--> RESERVED   \\--fail--> GONE
       +------close---------+----close (when its buffer comes back)--> GONE
"""

from enum import Enum, auto


class WriteState(Enum):
    RESERVED = auto()  # a slot is ours, no bytes yet
    FILLING = auto()  # a carrier is receiving into the buffer
    WRITING = auto()  # on its way to the disk
    STORED = auto()
    GONE = auto()  # failed, or given up; the slot went back


NEXT: dict[WriteState, dict[str, WriteState]] = {
    WriteState.RESERVED: {"receive": WriteState.FILLING, "close": WriteState.GONE},
    WriteState.FILLING: {"commit": WriteState.WRITING, "abort": WriteState.RESERVED, "close": WriteState.GONE},
    WriteState.WRITING: {"done": WriteState.STORED, "fail": WriteState.GONE},
    WriteState.STORED: {},
    WriteState.GONE: {},
}


class WriteItem:
    """One slot to be filled."""

    def __init__(self, slot: int, key: bytes, parent: bytes, tenant: int = 0, written_s: int = 0, keep_s: int = 0) -> None:
        """`written_s` and `keep_s` as in the slot page; both 0: kept for ever."""
        self.slot = slot
        self.key = key
        self.parent = parent
        self.tenant = tenant
        self.written_s = written_s
        self.keep_s = keep_s
        self.state = WriteState.RESERVED
        self.image: memoryview | None = None  # header page and payload, while FILLING or WRITING

    @property
    def expires_s(self) -> int:
        """0: never."""
        return self.written_s + self.keep_s

    def step(self, event: str) -> None:
        self.state = NEXT[self.state][event]

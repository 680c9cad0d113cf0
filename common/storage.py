"""Words that the kvstore and its clients share: blocks on offer, and what is said to them."""

from enum import IntEnum

import msgspec


class Admission(IntEnum):
    """What a kvstore says to one block on offer. Numbers as in kvstore.proto."""

    ACCEPTED = 1  # write it
    PRESENT = 2  # stored already
    IN_FLIGHT = 3  # somebody else is writing it
    DROPPED = 4  # queue or disk full, quota used up, or not admitted yet: don't write it, don't retry soon
    INVALID = 5  # the length differs from the namespace's, or the key is malformed


class Terms(msgspec.Struct, frozen=True):
    """On which terms blocks are kept."""

    tenant: bytes = b""  # opaque id of who they belong to; empty: nobody
    keep_s: int = 0  # for how long; 0: as long as the store's own setting says


NO_TERMS = Terms()


class BlockMeta(msgspec.Struct, frozen=True):
    """A block on offer. `parent` is a block key or the chain's root; `length` is in bytes."""

    key: bytes
    parent: bytes
    length: int

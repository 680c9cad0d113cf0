"""Leases: time-limited rights to read stored blocks or to fill slots, named by a random token.

1. `Lookup` grants a `ReadLease`, `Reserve` a `WriteLease`; item i is the request's i-th block.
2. The holder renews it, or it expires; `release` ends it, twice is once.
3. The store undoes what a lease held when `take`, `expired` or `drain` hands it back.
"""

import secrets
from array import array
from collections.abc import Callable

from common.errors import LeaseRejected, Overloaded
from common.transport.interface import TOKEN_BYTES, LeaseToken
from services.kvstore.chunks import Chunks
from services.kvstore.shelf import Shelf
from services.kvstore.write_item import WriteItem


class ReadLease:
    """Blocks pinned for reading: `slots[i]` held the fill `sequences[i]` when the lease was granted."""

    def __init__(self, shelf: Shelf, slots: "array[int]", sequences: "array[int]") -> None:
        self.shelf = shelf
        self.slots = slots
        self.sequences = sequences
        self.chunks: dict[int, Chunks | None] = {}  # by slot, of blocks that were read in ranges
        self.expires_s = 0.0
        self.ended = False


class WriteLease:
    """Slots to fill, and pins that keep the parents of what is to come."""

    def __init__(self, shelf: Shelf, tenant: int = 0, written_s: int = 0, keep_s: int = 0) -> None:
        """The other arguments are of all its items."""
        self.shelf = shelf
        self.tenant = tenant
        self.written_s = written_s
        self.keep_s = keep_s
        self.items: list[WriteItem | None] = []  # None: that block was not accepted
        self.pins: list[int] = []
        self.expires_s = 0.0
        self.ended = False


Lease = ReadLease | WriteLease


class LeaseTable:
    """Leases by token. Bounded; expiry is by the injected monotonic clock."""

    def __init__(self, clock: Callable[[], float], leases_max: int, ttl_s_max: float, ttl_s_default: float) -> None:
        self._clock = clock
        self._leases_max = leases_max
        self._ttl_s_max = ttl_s_max
        self._ttl_s_default = ttl_s_default
        self._leases: dict[LeaseToken, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def check_room(self) -> None:
        """Raises `Overloaded` when another lease would exceed the bound."""
        if len(self._leases) >= self._leases_max:
            raise Overloaded(
                f"{len(self._leases)} leases are out: at most {self._leases_max}; release some, or let them expire",
                retry_after_s=1.0,
            )

    def grant(self, lease: Lease, ttl_s: float | None) -> tuple[LeaseToken, float]:
        """Registers a lease; its token and the time it got. None and 0 mean the default time."""
        self.check_room()
        token = LeaseToken(secrets.token_bytes(TOKEN_BYTES))
        self._leases[token] = lease
        return token, self._extend(lease, ttl_s)

    def get(self, token: LeaseToken) -> Lease | None:
        """The live lease of a token; None when unknown or past its time."""
        lease = self._leases.get(token)
        return lease if lease is not None and self._clock() < lease.expires_s else None

    def renew(self, token: LeaseToken, ttl_s: float | None) -> float:
        """New time from now on. Raises `LeaseRejected`."""
        lease = self.get(token)
        if lease is None:
            raise LeaseRejected("lease token unknown: it expired, was released, or another run of this store granted it")
        return self._extend(lease, ttl_s)

    def take(self, token: LeaseToken) -> Lease | None:
        """Ends a lease. Idempotent: None when it is already gone."""
        return self._leases.pop(token, None)

    def expired(self) -> list[Lease]:
        """Ends and returns the leases whose time is over."""
        now = self._clock()
        gone = [token for token, lease in self._leases.items() if lease.expires_s <= now]
        return [self._leases.pop(token) for token in gone]

    def drain(self) -> list[Lease]:
        """Ends and returns all leases."""
        leases = list(self._leases.values())
        self._leases.clear()
        return leases

    def all(self) -> list[Lease]:
        return list(self._leases.values())

    def _extend(self, lease: Lease, ttl_s: float | None) -> float:
        granted_s = min(ttl_s or self._ttl_s_default, self._ttl_s_max)
        lease.expires_s = self._clock() + granted_s
        return granted_s

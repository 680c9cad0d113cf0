"""Lookups over the byte plane: how long a prefix of a chain is stored, and a lease on it.

The same question as `KvStore.Lookup` over gRPC, answered by the same function of the store, for who runs on the store's host. Only a
unix socket offers it: that has mode 0600, so whoever reaches a port still gets nothing without a lease.
"""

import logging
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec

from common.blocks import Namespace
from common.errors import Overloaded, PenstockError
from common.transport.frames import NO_TOKEN, FoundPrefix, Lookup
from common.transport.interface import LeaseToken, PartStatus

log = logging.getLogger(__name__)


class Prefix(msgspec.Struct, frozen=True):
    """The first `blocks` of a chain are stored. `token`: of the lease on them, for `ttl_s`; None where none was asked for."""

    blocks: int
    token: LeaseToken | None = None
    ttl_s: float = 0.0


@runtime_checkable
class LookupArea(Protocol):
    """An `Area` that keeps prefixes of chains."""

    @property
    def epoch(self) -> bytes:
        """Of the leases that it grants."""
        ...

    def lookup(self, namespace: Namespace, keys: Sequence[bytes], lease_s: float) -> Prefix:
        """The longest stored prefix of a chain, leased if `lease_s` isn't 0. Raises `Overloaded`, `Unavailable`."""
        ...


def found_prefix(area: LookupArea, question: Lookup) -> FoundPrefix:
    """The answer. An area that refuses says so in a word: who wants the reason asks over gRPC."""
    try:
        prefix = area.lookup(Namespace(question.namespace.hex()), question.keys, question.lease_ms / 1000)
    except PenstockError as error:
        log.info("byte plane: a lookup was refused: %s", error.message)
        return FoundPrefix(question.request, PartStatus.FULL if isinstance(error, Overloaded) else PartStatus.FAILED)
    except Exception:
        log.exception("byte plane: the area failed to look a prefix up")
        return FoundPrefix(question.request, PartStatus.FAILED)
    token = prefix.token or NO_TOKEN
    return FoundPrefix(question.request, PartStatus.OK, prefix.blocks, round(prefix.ttl_s * 1000), token, area.epoch)

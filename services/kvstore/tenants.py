"""Who the blocks belong to, by number, and how much space each of them has.

A tenant is an opaque id that writers pass; on disk it is the first 16 bytes of its SHA-256, in memory a number.
Number 0 is nobody: blocks without a tenant have no quota. Numbers are 16 bits; when all are taken, those of
tenants that have nothing any more are given out again, and if there is none the block is nobody's.
"""

import hashlib

import numpy as np

from services.kvstore.column import Numbers
from services.kvstore.entries import TENANT_BYTES

NOBODY = 0
_NUMBERS_MAX = 1 << 16


def digest(tenant: bytes) -> bytes:
    """What the disk format keeps of a tenant's id."""
    return hashlib.sha256(tenant).digest()[:TENANT_BYTES] if tenant else bytes(TENANT_BYTES)


class Tenants:
    """Space by tenant, over all namespaces. Belongs to the event loop."""

    def __init__(self, quota_bytes: int) -> None:
        """`quota_bytes` is of each tenant; 0: there is none."""
        self.quota_bytes = quota_bytes
        self._number = {bytes(TENANT_BYTES): NOBODY}
        self._digest = {NOBODY: bytes(TENANT_BYTES)}
        self._used_bytes: dict[int, int] = {NOBODY: 0}

    def number(self, tenant: bytes) -> int:
        """The number of a digest."""
        number = self._number.get(tenant)
        if number is None:
            number = self._take_number()
            if number != NOBODY:
                self._number[tenant], self._digest[number], self._used_bytes[number] = number, tenant, 0
        return number

    def numbers(self, digests: Numbers) -> Numbers:
        """`number` of many."""
        words = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)
        if not words.any():
            return np.zeros(len(words), np.uint16)
        _, first, which = np.unique(words[:, 0], return_index=True, return_inverse=True)
        if (words != words[first][which]).any():  # two digests begin alike
            _, first, which = np.unique(digests, return_index=True, return_inverse=True)
        return np.array([self.number(digests[row].tobytes()) for row in first], np.uint16)[which]

    def digests(self, numbers: Numbers) -> Numbers:
        """The digest of each number."""
        different, which = np.unique(numbers, return_inverse=True)
        return np.array([self._digest[int(one)] for one in different], f"V{TENANT_BYTES}")[which]

    def digest(self, number: int) -> bytes:
        return self._digest[number]

    def used_bytes(self, number: int) -> int:
        return self._used_bytes[number]

    @property
    def total_bytes(self) -> int:
        """What all have, nobody included."""
        return sum(self._used_bytes.values())

    def charge(self, number: int, length: int) -> None:
        """The tenant has this much more (or, negative, less)."""
        self._used_bytes[number] += length

    def over_quota(self, number: int, more: int = 0) -> bool:
        """Whether the tenant has more than its quota, with `more` bytes."""
        return bool(self.quota_bytes) and number != NOBODY and self._used_bytes[number] + more > self.quota_bytes

    def over(self) -> list[int]:
        """Tenants that have more than their quota."""
        return [number for number in self._used_bytes if self.over_quota(number)]

    def _take_number(self) -> int:
        if len(self._digest) < _NUMBERS_MAX:
            return len(self._digest)
        idle = next((number for number, used in self._used_bytes.items() if not used and number != NOBODY), NOBODY)
        if idle != NOBODY:
            del self._number[self._digest[idle]]
        return idle

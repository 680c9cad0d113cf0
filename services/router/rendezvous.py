"""Which kvstores keep a chain: rendezvous hashing (highest random weight; Thaler, Ravishankar 1996).

Every router, and every turn of a conversation, ranks the stores in the same order by the chain's first
block key, so one prefix is one lookup; a store's loss moves only the chains that it kept, and its
return moves only those back.
"""

import hashlib
from collections.abc import Iterable


def ranked(first_key: bytes, kvstores: Iterable[str]) -> list[str]:
    """Addresses by falling hash of (store, key): the first keeps the chain, those after it its replicas."""
    return sorted(
        kvstores, key=lambda address: (hashlib.sha256(address.encode() + b"\0" + first_key).digest(), address), reverse=True
    )

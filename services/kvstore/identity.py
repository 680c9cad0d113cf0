"""Which directories make up one store: pure, over what their STORE files say.

Every directory of a store carries the store's random id and a number of its own. So directories of
different stores are never mixed in silence, and one that is missing is noticed. Since blocks name
themselves and are found by content, none of this can make a wrong block: a directory that is left
alone costs misses.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

from services.kvstore.record import DISKS_MAX, StoreIdentity, Unreadable


class Claim(msgspec.Struct, frozen=True):
    """What was found in one directory."""

    identity: StoreIdentity | Unreadable | None  # None: it has no STORE file
    segments: bool  # it has segment files


class Seating(msgspec.Struct, frozen=True):
    """What becomes of the directories, in the order in which they were given."""

    seats: list[StoreIdentity | str]  # what its STORE file should say, or why it is left alone
    missing: list[int]  # numbers of directories that belong to the store and weren't given
    joined: list[int]  # positions of those that are new to the store
    unproven: list[int]  # positions of those that joined though they have segment files


def seat(claims: Sequence[Claim], new_store: bytes) -> Seating:
    """Decides by the id that most directories carry; of equals, by the one named first."""
    known = [claim.identity for claim in claims if isinstance(claim.identity, StoreIdentity)]
    votes = Counter(identity.store for identity in known)
    store = votes.most_common(1)[0][0] if votes else new_store
    ours = [identity for identity in known if identity.store == store]
    disks = max((identity.disks for identity in ours), default=0)
    seats: list[int | str] = []
    joined: list[int] = []
    for position, claim in enumerate(claims):
        chosen = _chosen(claim, store, bool(votes), {one for one in seats if isinstance(one, int)})
        if chosen is None and disks == DISKS_MAX:
            chosen = f"a store has at most {DISKS_MAX} directories in its life"
        elif chosen is None:
            chosen, disks = disks, disks + 1
            joined.append(position)
        seats.append(chosen)
    taken = {one for one in seats if isinstance(one, int)}
    return Seating(
        [StoreIdentity(store, one, disks) if isinstance(one, int) else one for one in seats],
        [number for number in range(disks) if number not in taken],
        joined,
        [position for position in joined if claims[position].segments],
    )


def _chosen(claim: Claim, store: bytes, known: bool, taken: set[int]) -> int | str | None:
    """The number a directory has, why it is left alone, or None: it joins with a new number."""
    identity = claim.identity
    if identity is None or (identity is Unreadable.DAMAGED and not known):
        return None
    if identity is Unreadable.NEWER:
        return "its STORE file is of a later version"
    if isinstance(identity, Unreadable):
        return "its STORE file is damaged; delete it to let the directory join again"
    if identity.store != store:
        return f"it belongs to another store ({identity.store.hex()}, not {store.hex()})"
    if identity.disk in taken:
        return f"it says that it is disk {identity.disk}, as another directory does: one is a copy"
    return identity.disk

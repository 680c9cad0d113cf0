"""Second-touch admission: a block is worth writing when it is offered again. Bounded memory, no I/O.

A table of fingerprints, one place for each key, the latest key in it: an old offer is forgotten when another key
takes its place. A forgotten offer costs one more; a fingerprint that matches by chance (1 in 2^32) lets a block in early.
"""

from array import array

PLACES = 1 << 20  # 4 MiB: the offers of a few hours, of a store that takes in a hundred blocks a second


class Doorkeeper:
    """Remembers who knocked."""

    def __init__(self, places: int = PLACES) -> None:
        self._fingerprints = array("I", bytes(4 * places))

    def knocked_before(self, key: bytes) -> bool:
        """Whether the key was offered before; from now on it was."""
        place = int.from_bytes(key[:8], "little") % len(self._fingerprints)
        fingerprint = int.from_bytes(key[8:12], "little") or 1
        known = self._fingerprints[place] == fingerprint
        self._fingerprints[place] = fingerprint
        return known

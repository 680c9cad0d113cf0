"""Transfers that an io_uring has."""

import msgspec

from common.disk.batch import Batch
from common.disk.transfer import Transfer


class Chain(msgspec.Struct, gc=False):
    """One transfer, or several in a row: `left` of them have not landed.

    `places`: how many of the disk's it takes. `disk_bytes`: about what the disk has of it at any moment.
    """

    left: int = 0
    places: int = 1
    disk_bytes: int = 0


class Flight(msgspec.Struct, gc=False):
    """A transfer at the kernel, as one of its chain: `done` bytes of it have moved."""

    batch: Batch[int]
    index: int
    transfer: Transfer
    length: int
    chain: Chain
    done: int = 0
    again: int = 0

"""Transfers that an io_uring has."""

import msgspec

from common.disk.batch import Batch
from common.disk.transfer import Transfer


class Chain(msgspec.Struct, gc=False):
    """One transfer, or writes in a row: `left` of them have not landed."""

    left: int = 0


class Flight(msgspec.Struct, gc=False):
    """A transfer at the kernel, as one of its chain: `done` bytes of it have moved."""

    batch: Batch[int]
    index: int
    transfer: Transfer
    length: int
    chain: Chain
    done: int = 0
    again: int = 0

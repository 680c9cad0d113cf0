"""Bounds and choices of a store."""

from typing import Literal

import msgspec

from common.disk.engine import EngineChoice


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds and choices of a store; `settings.py` documents them."""

    budget_bytes: int
    segment_bytes: int = 256 << 20
    reserved_bytes_max: int = 1 << 30
    io: EngineChoice = "auto"
    read_depth: int = 32
    write_depth: int = 16
    pending_reads_max: int = 65_536
    durable: bool = True
    direct: bool = True
    block_ttl_s: int = 0
    tenant_quota_bytes: int = 0
    admission: Literal["all", "second_touch"] = "all"
    leases_max: int = 10_000
    lease_s: float = 30.0
    lease_s_max: float = 600.0

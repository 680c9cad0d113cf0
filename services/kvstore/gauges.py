"""What the store exposes beside its counters: how full it is, how busy, and each disk by itself."""

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.kvstore.area import StoreArea
from services.kvstore.disk import Disk, DiskState
from services.kvstore.store import Store


def gauges(store: Store, area: StoreArea) -> dict[str, tuple[str, float]]:
    """Name -> (help, value)."""
    counted = store.metrics
    return {
        "budget_bytes": ("Byte budget", store.space.budget_bytes),
        "used_bytes": ("Bytes of segment files", store.space.used_bytes),
        "blocks": ("Blocks stored", store.blocks),
        "leases": ("Leases out", len(store.leases)),
        "io_uring": ("1: disk I/O goes through io_uring; 0: through threads", int(store.readers.name == "io_uring")),
        "read_queue": ("Disk reads queued or running", store.readers.pending),
        "write_queue": ("Disk writes and syncs queued or running", store.writers.pending),
        "reserved_bytes": ("Space reserved and not yet written", store.intake.reserved_bytes),
        "read_buffer_bytes": ("Read buffers in use", area.reads.buffers.taken_bytes),
        "write_buffer_bytes": ("Write buffers in use", area.writes.buffers.taken_bytes),
        "pins": ("Prefixes that operators keep", len(store.pins)),
        "pinned_bytes": ("Bytes of the slots that pins keep", store.pins.kept_bytes),
        "index_bytes": ("Memory of the index", sum(shelf.index.nbytes for shelf in store.space.shelves.values())),
        "best_hit_ratio": (
            "Blocks an unlimited store would have found over blocks asked for, since the start; estimated from a sample",
            store.reuse.best_hit_ratio or 0.0,
        ),
        "hit_ratio": (
            "Of the blocks that lookups asked for, the share found, since the start",
            _share(counted.hit_blocks, counted.lookup_blocks),
        ),
        "write_amplification": (
            "Bytes written to disk for each payload byte committed, since the start",
            _share(counted.disk_written_bytes, counted.written_bytes),
        ),
    }


class DiskCollector:
    """Each data directory, labelled by its folder."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        self._disks = disks

    def collect(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("penstock_kvstore_disk_used_bytes", "Bytes of segment files", labels=["folder"])
        budget = GaugeMetricFamily("penstock_kvstore_disk_budget_bytes", "Share of the byte budget", labels=["folder"])
        errors = CounterMetricFamily("penstock_kvstore_disk_io_errors", "Errors counted against the disk", labels=["folder"])
        state = GaugeMetricFamily("penstock_kvstore_disk_state", "1 for the state it is in", labels=["folder", "state"])
        for disk in self._disks:
            used.add_metric([str(disk.folder)], disk.used_bytes)
            budget.add_metric([str(disk.folder)], disk.budget_bytes)
            errors.add_metric([str(disk.folder)], disk.errors)
            for one in DiskState:
                state.add_metric([str(disk.folder), one], float(disk.state is one))
        yield from (used, budget, errors, state)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

"""What the store counts, and its Prometheus face.

Plain integers are added to where things happen; a collector reads them when it is asked.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_COUNTERS = {
    "lookups": "Lookups",
    "lookup_blocks": "Blocks asked for by lookups",
    "hit_blocks": "Blocks found by lookups",
    "reads": "Blocks or block ranges read from disk",
    "read_bytes": "Bytes read from disk and served",
    "located_blocks": "Blocks whose place on disk was handed to a reader on this host",
    "located_bytes": "Their bytes",
    "failed_reads": "Reads that ended in an I/O error, a short read or a passed deadline",
    "writes": "Blocks committed",
    "written_bytes": "Payload bytes committed",
    "disk_written_bytes": "Bytes written to disk, with headers and padding",
    "failed_writes": "Writes that ended in an I/O error",
    "dropped_writes": "Blocks not accepted for want of space or room in the queue",
    "present_writes": "Blocks offered that were stored already or in flight",
    "evictions": "Blocks evicted for space",
    "segment_evictions": "Blocks evicted because their segment went to another namespace or was over the budget",
    "quota_evictions": "Blocks evicted because their tenant was at its quota",
    "expired_blocks": "Blocks dropped because their time was over",
    "first_touches": "Blocks not accepted because they were offered for the first time (second-touch admission)",
    "corrupt_blocks": "Blocks dropped as damaged, torn or foreign",
    "removed_blocks": "Blocks taken out at an operator's word",
    "scrubbed_blocks": "Blocks read by the background scrub",
    "scrubbed_bytes": "Bytes read by the background scrub, with headers and padding",
    "scrub_corrupt_blocks": "Blocks that the background scrub found bad; counted in corrupt_blocks too",
    "scrub_passes": "Passes of the background scrub that came to their end",
    "lost_blocks": "Blocks that became misses because their disk was lost",
    "rejected_parts": "Byte-plane parts refused: lease unknown or expired, item or range outside it",
    "expired_leases": "Leases that ran out",
}


class Metrics:
    """Counters (by the names above) and histograms of one store."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lookups = 0
        self.lookup_blocks = 0
        self.hit_blocks = 0
        self.reads = 0
        self.read_bytes = 0
        self.located_blocks = 0
        self.located_bytes = 0
        self.failed_reads = 0
        self.writes = 0
        self.written_bytes = 0
        self.disk_written_bytes = 0
        self.failed_writes = 0
        self.dropped_writes = 0
        self.present_writes = 0
        self.evictions = 0
        self.segment_evictions = 0
        self.quota_evictions = 0
        self.expired_blocks = 0
        self.first_touches = 0
        self.corrupt_blocks = 0
        self.removed_blocks = 0
        self.scrubbed_blocks = 0
        self.scrubbed_bytes = 0
        self.scrub_corrupt_blocks = 0
        self.scrub_passes = 0
        self.lost_blocks = 0
        self.rejected_parts = 0
        self.expired_leases = 0
        self.read_s = Histogram(
            "penstock_kvstore_read_seconds", "Reading one batch of parts", buckets=_SECONDS, registry=self.registry
        )
        self.write_s = Histogram(
            "penstock_kvstore_write_seconds",
            "Writing one batch of parts until it is durable",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def counters(self) -> dict[str, int]:
        """All counters by name."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def publish(self, gauges: Callable[[], dict[str, tuple[str, float]]]) -> None:
        """Registers the counters and what `gauges` returns: name -> (help, value)."""
        self.registry.register(_Collector(self, gauges))


class _Collector:
    def __init__(self, metrics: Metrics, gauges: Callable[[], dict[str, tuple[str, float]]]) -> None:
        self._metrics = metrics
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"penstock_kvstore_{name}", text, value=getattr(self._metrics, name))
        for name, (text, value) in self._gauges().items():
            yield GaugeMetricFamily(f"penstock_kvstore_{name}", text, value=value)

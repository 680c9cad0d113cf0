"""bench-store reads as workers do."""

from loadtest.store import fio
from services.worker import loading


def test_the_benchmark_makes_a_workers_requests() -> None:
    assert (fio.BLOCKS_PER_READ, fio.READS_IN_FLIGHT) == (loading.BLOCKS_PER_READ, loading.READS_IN_FLIGHT)

"""bench-store reads as workers do."""

from loadtest.store import fio
from services.worker import loading


def test_the_benchmark_makes_a_workers_requests() -> None:
    assert fio.READS_IN_FLIGHT == loading.READS_IN_FLIGHT
    for size in (4 << 10, 96 << 10, 128 << 10, 512 << 10, 2 << 20):
        assert fio.blocks_per_read(size) == loading.blocks_per_read(size)
    assert [loading.blocks_per_read(size) for size in (4 << 10, 128 << 10, 2 << 20)] == [64, 32, 16]

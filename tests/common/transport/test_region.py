"""Regions: sealed, bounded, without a name that could be left behind."""

import fcntl
import mmap
import os
from pathlib import Path

import pytest

from common.disk.pages import HUGE_BYTES, address
from common.errors import InvalidRequest
from common.transport import shared_pages
from common.transport.interface import Span
from common.transport.region import Region, RemoteRegion


def test_two_mappings_of_a_region_see_each_other_s_bytes() -> None:
    region = Region(3 * mmap.PAGESIZE + 5)
    remote = RemoteRegion.map(region.fd, region.size)
    remote.view(4096, 3)[:] = b"abc"
    assert bytes(region.view(Span(4096, 3))) == b"abc"
    region.close()
    assert bytes(remote.view(4096, 3)) == b"abc"  # the memory lives as long as somebody maps it
    remote.close()


@pytest.mark.parametrize("span", [Span(0, 4097), Span(4096, 1), Span(-1, 1), Span(0, -1), Span(1 << 63, 1)])
def test_a_span_outside_is_refused_on_both_sides(span: Span) -> None:
    region = Region(4096)
    remote = RemoteRegion.map(region.fd, region.size)
    with pytest.raises(InvalidRequest, match=r"outside the region's \[0, 4096\)"):
        region.view(span)
    with pytest.raises(InvalidRequest, match=r"outside the region's \[0, 4096\)"):
        remote.view(span.offset, span.length)
    remote.close()
    region.close()


def test_a_region_can_be_neither_shrunk_nor_grown() -> None:
    region = Region(8192)
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)
    region.close()


def test_an_fd_that_could_be_truncated_under_us_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(InvalidRequest, match="expected SHRINK and GROW to be sealed"):
        RemoteRegion.map(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(InvalidRequest, match="announced as 8192"):
        RemoteRegion.map(fd, 8192)
    RemoteRegion.map(fd, 4096).close()
    os.close(fd)


def test_a_pipe_or_a_sealed_read_only_memfd_is_refused() -> None:
    readable, writable = os.pipe()
    with pytest.raises(InvalidRequest):
        RemoteRegion.map(readable, 4096)
    os.close(readable)
    os.close(writable)
    fd = os.memfd_create("fixed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    with pytest.raises(InvalidRequest, match="cannot be mapped"):
        RemoteRegion.map(fd, 4096)
    os.close(fd)


def test_held_bytes_are_those_a_span_overlaps_until_released_as_often() -> None:
    region = Region(1 << 16)
    region.hold(Span(100, 50))
    region.hold(Span(100, 50))
    assert region.held(Span(149, 1)) and region.held(Span(0, 101))
    assert not region.held(Span(150, 10)) and not region.held(Span(0, 100))
    region.unhold(Span(100, 50))
    assert region.held(Span(120, 1))
    region.unhold(Span(100, 50))
    assert not region.held(Span(0, 1 << 16))
    region.close()


def test_closing_with_a_view_out_keeps_the_view_good() -> None:
    region = Region(4096)
    view = region.view(Span(0, 4))
    view[:] = b"good"
    region.close()
    region.close()
    assert bytes(view) == b"good"
    assert region.fd == -1


def test_an_impossible_size_is_refused() -> None:
    for size in (0, -1, 1 << 50):
        with pytest.raises(InvalidRequest, match="region size"):
            Region(size)


def huge_bytes_of(name: str) -> int:
    """Of this process' mapping of that memfd: what lies on huge pages."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if f"memfd:{name} " in line:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("ShmemPmdMapped"))
    raise AssertionError(name)


def test_a_region_says_whether_it_is_on_huge_pages_and_starts_on_one() -> None:
    size = 2 * HUGE_BYTES + 4096  # what is over takes an ordinary page
    region = Region(size, name="on-huge-pages")
    view = region.view(Span(0, size))
    assert address(view) % HUGE_BYTES == 0 and not any(view)
    assert region.huge is (huge_bytes_of("on-huge-pages") == 2 * HUGE_BYTES)
    remote = RemoteRegion.map(region.fd, size)
    view[-1] = view[HUGE_BYTES] = 7
    assert bytes(remote.view(size - 1, 1)) == bytes(remote.view(HUGE_BYTES, 1)) == b"\7"
    remote.close()
    view.release()
    region.close()


def test_where_the_kernel_collapses_nothing_a_region_is_present_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pages, "_MADV_COLLAPSE", 9999)  # as before Linux 6.1
    size = 2 * HUGE_BYTES
    region = Region(size, name="on-small-pages")
    assert region.huge is False and os.fstat(region.fd).st_blocks * 512 == size
    region.close()

"""Both I/O engines under the same tests, and a reader of extents."""

import pytest

from common.disk.ring import RingUnavailable, open_ring
from tests.kvstore import support
from tests.kvstore.extent_reader import reader  # noqa: F401


@pytest.fixture(params=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stores opened with `support.options` use this engine."""
    name: str = request.param
    if name == "io_uring":
        try:
            open_ring(1).close()
        except RingUnavailable as error:
            pytest.skip(str(error))
    monkeypatch.setattr(support, "ENGINE", name)
    return name

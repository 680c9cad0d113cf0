"""That each service settles its heap is for `common.process` to insist on: one that doesn't ends with an error."""

import gc
import subprocess
import sys

from common import heap

SERVICE = """
from common import heap, logs, process
logs.setup("kvstore")
async def main(stop):
    {start}
    print(heap.settled())
process.leave(process.run(main))
"""


def test_what_a_start_makes_is_looked_at_once() -> None:
    kept: list[object] = [[] for _ in range(10_000)]
    assert gc.isenabled()
    heap.hold()
    try:
        assert not heap.settled()
        heap.settle()
        assert heap.settled() and gc.get_freeze_count() >= len(kept)
        later: list[object] = [[] for _ in range(10)]
        assert not any(item is kept[0] for item in gc.get_objects()) and any(item is later for item in gc.get_objects())
    finally:
        gc.enable()
        gc.unfreeze()


def test_without_a_hold_nothing_is_frozen() -> None:
    before = gc.get_freeze_count()
    heap.settle()
    assert gc.get_freeze_count() == before


def test_a_service_that_runs_has_settled_its_heap() -> None:
    for start, status in (("heap.settle()", 0), ("pass", 1)):
        done = subprocess.run([sys.executable, "-c", SERVICE.format(start=start)], capture_output=True, text=True, timeout=60)
        assert done.returncode == status and ("settles its heap" in done.stderr) == bool(status), done.stderr
        assert done.stdout.strip() == str(not status)

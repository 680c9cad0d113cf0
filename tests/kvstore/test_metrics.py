"""What the kvstore exposes is what its page says."""

import re
from pathlib import Path

from prometheus_client import generate_latest

from services.kvstore.disk import DiskState
from services.kvstore.gauges import DiskCollector, gauges
from tests.kvstore.support import chain, rig

PAGE = Path(__file__).parents[2] / "docs" / "kvstore.md"


async def test_every_metric_is_on_the_page_and_every_name_there_is_one(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.store.metrics.publish(lambda: gauges(one.store, one.area))
        one.store.metrics.registry.register(DiskCollector(one.store.disks))
        text = generate_latest(one.store.metrics.registry).decode()
    exposed = set(re.findall(r"^# TYPE (penstock_kvstore_\w+)", text, re.MULTILINE))
    exposed = {name for name in exposed if not name.endswith("_created")}
    written = set(re.findall(r"`(penstock_kvstore_\w+)`", PAGE.read_text()))
    assert exposed - written == set(), "not on the page"
    assert written - exposed == set(), "on the page, but not exposed"


async def test_ratios_and_disks_are_computed(tmp_path: Path) -> None:
    async with rig([tmp_path / "a", tmp_path / "b"]) as one:
        assert gauges(one.store, one.area)["hit_ratio"][1] == 0.0
        await one.put(chain(3))
        await one.get(chain(4))
        shown = gauges(one.store, one.area)
        assert shown["hit_ratio"][1] == 0.75
        assert shown["write_amplification"][1] == 3 * 12288 / (3 * 5000)
        assert one.store.disks[1].step("read_failed", "gone")
        states = {metric.name: metric for metric in DiskCollector(one.store.disks).collect()}["penstock_kvstore_disk_state"]
        held = {(s.labels["folder"], s.labels["state"]) for s in states.samples if s.value}
        assert held == {(str(tmp_path / "a"), DiskState.SERVING), (str(tmp_path / "b"), DiskState.LOST)}

"""How much memory there is, in and out of containers."""

from pathlib import Path

import pytest

from common import machine


def test_a_control_groups_limit_counts_when_it_is_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (str(limit), str(tmp_path / "absent")))
    whole = machine.memory_bytes()
    limit.write_text("max\n")
    assert machine.memory_bytes() == whole
    limit.write_text("1048576\n")
    assert machine.memory_bytes() == 1 << 20
    limit.write_text(str(1 << 62))
    assert machine.memory_bytes() == whole

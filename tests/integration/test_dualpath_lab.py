"""The experiment in small: real services in namespaces, a job over shaped links, the kernel's bytes beside the services' own.

Needs root and iproute2; reported as not run elsewhere.
"""

from pathlib import Path

import msgspec
import pytest

from loadtest.dualpath import namespaces
from loadtest.dualpath.experiment import Experiment, Results, Size
from loadtest.dualpath.figures import Slo, figures
from loadtest.dualpath.links import Topology
from loadtest.dualpath.model import CPU
from loadtest.dualpath.trajectories import Statistics

MISSING = namespaces.why_not()
SETUP = msgspec.structs.replace(CPU, statistics=Statistics(48))
SMALL = Size(contexts=2, turns=2, long_context_tokens=256)


@pytest.mark.skipif(bool(MISSING), reason=f"not run: {MISSING}")
@pytest.mark.timeout(300)
def test_a_basic_job_loads_over_prefills_link_alone_and_all_counters_agree(tmp_path: Path) -> None:
    shape, results = Topology(1, 1), Results(tmp_path / "measured")
    with namespaces.Lab(shape) as lab:
        Experiment(lab, SETUP, tmp_path, tmp_path / "logs", results, SMALL, 1, Slo()).offline(["basic"])
    measured = results.get("offline", shape, "basic")
    assert measured is not None
    found = figures(measured, Slo())
    assert (found.failed, found.requests) == (0, 4)
    assert set(found.routes) == {"storage_to_prefill"}
    assert found.hit_rate > 0.9
    read = {link.port: link.towards_bytes for link in found.links if link.port.startswith("st-")}
    said = found.path_bytes["storage_to_prefill"]
    assert said <= read["st-prefill-0"] < 1.05 * said
    assert read["st-decode-0"] < 0.05 * said
    assert 1.0 <= found.overhead["compute"] < 1.05


@pytest.mark.skipif(bool(MISSING), reason=f"not run: {MISSING}")
@pytest.mark.timeout(300)
def test_a_split_request_loads_over_both_links_and_a_recomputed_one_over_none(tmp_path: Path) -> None:
    shape, results = Topology(1, 1), Results(tmp_path / "measured")
    with namespaces.Lab(shape) as lab:
        Experiment(lab, SETUP, tmp_path, tmp_path / "logs", results, SMALL, 1, Slo()).one_request(["split", "recompute"])
    found = {}
    for mode in ("split", "recompute"):
        measured = results.get("one-request", shape, mode)
        assert measured is not None
        found[mode] = figures(measured, Slo())
        assert (found[mode].failed, set(found[mode].routes)) == (0, {mode})
    read = {link.port: link.towards_bytes for link in found["split"].links}
    for port, path in (("st-prefill-0", "storage_to_prefill"), ("st-decode-0", "storage_to_decode")):
        said = found["split"].path_bytes[path]
        assert 0 < said <= read[port] < 1.1 * said
    assert all(found["recompute"].path_bytes[path] == 0 for path in ("storage_to_prefill", "storage_to_decode"))

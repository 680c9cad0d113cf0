"""The report's folder, from recorded jobs."""

import json
from pathlib import Path

import pytest

from loadtest.dualpath import report
from loadtest.dualpath.experiment import Results
from loadtest.dualpath.figures import Slo
from loadtest.dualpath.links import Topology
from tests.loadtest.dualpath.recorded import measured, sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    jobs = [
        measured("basic"),
        measured("full", wall_s=10.0, decode_bytes=100_000_000),
        measured("basic", "online", step=0.5),
        measured("full", "online", step=1.0),
        *(measured(mode, "crossing", step=1e7, samples=[sample(0, 1.0)]) for mode in ("split", "full", "recompute")),
    ]
    report.write(out, jobs, Slo())
    return out


def test_page_is_self_contained(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<table>") == page.count("</table>") > 3
    assert 'src="data:image/png;base64,' in page
    assert "http://" not in page and "https://" not in page


def test_plots_are_files_too(folder: Path) -> None:
    names = {path.stem for path in folder.glob("*.png")}
    assert {"completion_1P1D", "ttft_1P1D", "links_1P1D_basic", "links_1P1D_full", "online_1P1D", "crossing_1P1D"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_figures_as_json(folder: Path) -> None:
    document = json.loads((folder / "figures.json").read_text())
    assert document["ratios"]["offline_1p1d_over_basic"] == 2.0
    assert {job["part"] for job in document["jobs"]} == {"offline", "online", "crossing"}


def test_measured_jobs_survive_their_files(tmp_path: Path) -> None:
    results = Results(tmp_path / "measured")
    one = measured("full", "online", step=0.123)
    assert results.get("online", Topology(1, 1), "full", 0.123) is None
    results.put(one)
    assert results.get("online", Topology(1, 1), "full", 0.123) == one
    assert results.all() == [one]

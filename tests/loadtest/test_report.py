"""The report's folder from recorded samples."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadtest import report
from loadtest.figures import summarize
from loadtest.samples import Sample
from loadtest.target import Target
from tests.loadtest.recorded import finished, unfinished

RUN = report.Run(
    Target("http://127.0.0.1:8080", "tiny", 1024, {"decode": 1, "kvstore": 1}), {"seconds": 4, "seed": 7}, 1_800_000_000.0
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects addresses; fails where tags don't match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("reports"), [*finished(), *unfinished()])


def written(tmp_path: Path, samples: list[Sample]) -> Path:
    return report.write(tmp_path, RUN, summarize(samples), samples)


def test_the_page_holds_its_plots_and_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and len(page.addresses) == 7
    assert all(address.startswith("data:image/png;base64,iVBORw0KGgo") for address in page.addresses)
    assert "@import" not in text and "url(" not in text


def test_what_a_server_said_is_shown_and_not_run(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert "&lt;script&gt;x&lt;/script&gt;" in text and "<script" not in text


def test_the_csv_has_a_row_per_request_with_what_was_measured(folder: Path) -> None:
    with (folder / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and tuple(rows[0]) == report.COLUMNS
    second, single, refused = rows[1], rows[5], rows[6]
    assert (second["ttft_ms"], second["tpot_ms"], second["gap_max_ms"]) == ("50.000", "30.000", "40.000")
    assert (second["cached_tokens"], second["route"], second["request_id"]) == ("128", "direct", "load-0-2")
    assert (single["ttft_ms"], single["tpot_ms"], single["gap_max_ms"]) == ("80.000", "", "")
    assert (refused["outcome"], refused["status"], refused["ttft_ms"]) == ("refused", "429", "")


def test_the_summary_says_how_the_run_was_made(folder: Path) -> None:
    kept = json.loads((folder / "summary.json").read_text())
    assert kept["run"]["target"]["model"] == "tiny" and kept["run"]["settings"]["seed"] == 7
    assert kept["summary"]["kinds"][0]["name"] == "chat" and kept["summary"]["all"]["hit_rate"] == 0.5953


@pytest.mark.parametrize("samples", [[], unfinished()], ids=["no request", "no request that finished"])
def test_a_test_without_results_has_a_report_without_plots(tmp_path: Path, samples: list[Sample]) -> None:
    text = (written(tmp_path, samples) / "report.html").read_text()
    assert "<img" not in text and "0 in " in text


def test_two_tests_of_one_second_get_a_folder_each(tmp_path: Path) -> None:
    first, second = written(tmp_path, []), written(tmp_path, [])
    assert second.name == f"{first.name}-2" and re.fullmatch(r"\d{8}-\d{6}", first.name)


def test_the_terminal_shows_the_same_numbers_side_by_side() -> None:
    text = report.in_words(summarize([*finished(), *unfinished()]))
    assert "errors                1 internal_error, 1 connection" in text
    assert re.search(r"^agent: TTFT +3 +460\.0 +400\.0 +800\.0 +890\.0 +900\.0$", text, re.MULTILINE)
    assert re.search(r"^direct +2 +94\.1% +850 +65\.0 +77\.0 +79\.7$", text, re.MULTILINE)


def test_the_last_line_has_the_main_figures() -> None:
    figures = report.main_figures(RUN, summarize([*finished(), *unfinished()]), Path("reports/x"))
    assert figures["errors"] == 2 and figures["refused_429"] == 1 and figures["requests"] == 6
    assert figures["chat_ttft_p50_ms"] == 100 and figures["routes"] == {"recompute": 3, "direct": 2, "storage_to_prefill": 1}
    assert figures["report"] == "reports/x/report.html" and json.dumps(figures)

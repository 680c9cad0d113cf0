"""`make load` as a process: against servers in trouble, and against a real cluster."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.routes import Plan
from loadtest.local import LocalCluster
from tests.families import CONTEXT_TOKENS, save_tiny
from tests.loadtest.fake_server import fake_server

ROOT = Path(__file__).resolve().parents[2]


def start(*flags: str) -> "subprocess.Popen[str]":
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PENSTOCK_", "OPENAI_"))}
    command = [sys.executable, "-m", "loadtest.load", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process: "subprocess.Popen[str]") -> tuple[int, dict[str, Any], str]:
    """Exit status, the last line, and what it said on stderr."""
    out, err = process.communicate(timeout=100)
    return process.returncode, json.loads(out.splitlines()[-1]) if out else {}, err


def rows(figures: dict[str, Any]) -> list[dict[str, str]]:
    with Path(figures["report"]).with_name("requests.csv").open() as file:
        return list(csv.DictReader(file))


def test_refused_requests_are_sent_again_after_the_time_asked_for_and_are_no_errors(tmp_path: Path) -> None:
    with fake_server(lambda number: "busy" if number == 1 else "fine") as server:
        flags = ("--url", server.url, "--seconds", "2", "--users", "1", "--think-s", "0", "--out", str(tmp_path))
        status, figures, err = ended(start(*flags))
        first, second = server.bodies[:2]
    assert status == 0, err
    assert figures["refused_429"] == 1 and figures["errors"] == 0 and figures["requests"] > 0
    assert first["messages"] == second["messages"] and first["request_id"] != second["request_id"]
    refused, after = rows(figures)[:2]
    assert float(after["sent_s"]) - float(refused["sent_s"]) >= 1


def test_failed_requests_make_the_exit_status_1_and_are_counted_by_code(tmp_path: Path) -> None:
    with fake_server(lambda number: "torn" if number == 1 else "fine") as server:
        flags = ("--url", server.url, "--seconds", "3", "--users", "1", "--agents", "1", "--out", str(tmp_path))
        status, figures, err = ended(start(*flags))
    assert status == 1, err
    assert figures["errors"] == 1 and "1 truncated" in (Path(figures["report"])).read_text()


def test_ctrl_c_ends_early_with_a_report_of_what_there_is_and_cuts_what_does_not_end(tmp_path: Path) -> None:
    with fake_server(lambda number: "endless" if number == 4 else "fine") as server:
        flags = ("--url", server.url, "--seconds", "60", "--users", "1", "--think-s", "0", "--out", str(tmp_path))
        process = start(*flags)
        assert process.stderr is not None
        while "3 requests" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        status, figures, err = ended(process)
    assert status == 0, err
    assert figures["requests"] == 3 and figures["cut"] == 1 and figures["window_s"] < 60
    assert "Interrupted" in Path(figures["report"]).read_text()


def test_asked_wrongly_it_says_so_and_sends_nothing() -> None:
    status, _, err = ended(start("--url", "http://192.0.2.1"))
    assert status == 2 and "not on this machine" in err
    status, _, err = ended(start("--users", "2", "--agents", "3"))
    assert status == 2 and "--agents 3: expected at most --users 2" in err


@pytest.mark.timeout(300)
def test_a_real_cluster_under_load_answers_every_request_and_finds_what_it_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model = save_tiny("llama", tmp_path / "tiny-llama")
    with LocalCluster(model, tmp_path / "data", threads=1, flags=("--block-tokens", "16")) as cluster:
        flags = ("--data", str(cluster.data), "--seconds", "5", "--users", "4", "--max-tokens", "12", "--think-s", "0.2")
        status, figures, err = ended(start(*flags, "--out", str(tmp_path)))
    assert status == 0, err
    assert figures["errors"] == 0 and figures["model"] == "tiny-llama"
    assert figures["chat_requests"] > 2 and figures["agent_requests"] > 2
    done = [row for row in rows(figures) if row["outcome"] == "ok"]
    assert {row["route"] for row in done} <= set(Plan)
    assert all(0 < int(row["prompt_tokens"]) <= CONTEXT_TOKENS and int(row["output_tokens"]) > 0 for row in done)
    later = [row for row in done if row["kind"] == "agent" and int(row["turn"]) > 1]
    assert any(int(row["cached_tokens"]) >= 256 for row in later)  # at least the prefix that agents share

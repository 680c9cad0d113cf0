"""The launcher over real processes: start, supervise, drain, kill, and nothing left behind."""

import json
import os
import signal
import urllib.request
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from services.cli import down, state
from services.cli.detach import detach
from services.cli.messages import Failed, Message, Note, Ready
from tests.cli.conftest import Launcher


def events(launcher: Launcher, name: str) -> list[dict[str, object]]:
    return [
        json.loads(line) for line in (launcher.data / "logs" / f"{name}.log").read_text().splitlines() if line.startswith("{")
    ]


def when(launcher: Launcher, name: str, event: str) -> float:
    return float(str(next(found["ts"] for found in events(launcher, name) if found["event"] == event)))


def test_it_reports_ready_with_a_url_and_a_command_to_paste(launcher: Launcher) -> None:
    launcher.start()
    ready = launcher.until("Ready in")
    url = launcher.state().url
    assert f"fake at {url}" in ready
    assert f"curl {url}/v1/models" in launcher.until("curl")
    assert {service.state for service in launcher.state().services} == {"ready"}


def test_a_termination_drains_callers_before_those_they_call(launcher: Launcher) -> None:
    launcher.start().until("Ready in")
    run_dir = Path(launcher.state().run_dir)
    assert run_dir.is_dir()
    launcher.signal(signal.SIGTERM)
    assert launcher.end() == 0
    order = ["router", "decode", "prefill", "kvstore"]
    for caller, called in pairwise(order):
        assert when(launcher, caller, "stopped") < when(launcher, called, "draining")
    assert not launcher.left()
    assert not run_dir.exists()
    assert state.read(launcher.data) is None


def test_ctrl_c_in_a_terminal_drains_and_leaves_nothing(launcher: Launcher) -> None:
    launcher.start("decode=socket RUN/decode.sock", tty=True).until("Ready in")
    run_dir = Path(launcher.state().run_dir)
    assert (run_dir / "decode.sock").is_socket()
    launcher.press_ctrl_c()
    assert launcher.end() == 0
    assert "Stopped." in "".join(launcher.seen)
    assert events(launcher, "decode")[-1]["event"] == "stopped"
    assert not launcher.left()
    assert not run_dir.exists()


def test_a_second_ctrl_c_stops_at_once(launcher: Launcher) -> None:
    launcher.start("router=stubborn", tty=True).until("Ready in")
    launcher.press_ctrl_c()
    launcher.until("Ctrl-C again")
    launcher.press_ctrl_c()
    assert launcher.end() == 130
    assert "Stopped at once." in "".join(launcher.seen)
    assert "stopped" not in {event["event"] for event in events(launcher, "decode")}
    assert not launcher.left()


def test_a_launcher_that_is_killed_takes_every_service_with_it(launcher: Launcher) -> None:
    launcher.start("decode=stubborn").until("Ready in")
    services = [psutil.Process(launcher.pid(name)) for name in ("nats", "kvstore", "prefill", "decode", "router")]
    launcher.signal(signal.SIGKILL)
    psutil.wait_procs(services, timeout=30)
    launcher.end()
    assert not launcher.left()


def test_after_a_killed_launcher_down_cleans_up(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    launcher.start().until("Ready in")
    run_dir = Path(launcher.state().run_dir)
    launcher.signal(signal.SIGKILL)
    launcher.end()
    assert down.main(["--data", str(launcher.data)]) == 0
    assert not run_dir.exists()
    assert state.read(launcher.data) is None
    capsys.readouterr()
    assert down.main(["--data", str(launcher.data)]) == 0
    assert "No cluster runs" in capsys.readouterr().out


def test_a_service_that_fails_at_start_stops_everything_and_says_why(launcher: Launcher) -> None:
    launcher.start("decode=fail")
    assert launcher.end() == 1
    said = "".join(launcher.seen)
    assert "Failed: decode did not start: model = '/nowhere': no config.json" in said
    assert f"The end of {launcher.data / 'logs' / 'decode.log'}:" in said
    assert not launcher.left()


def test_a_cluster_that_is_not_ready_in_time_says_what_is_missing(launcher: Launcher) -> None:
    launcher.start("router=unready", "ready_s=2")
    assert launcher.end() == 1
    assert "not ready within 2 s: no decode worker yet" in "".join(launcher.seen)
    assert not launcher.left()


def test_ctrl_c_while_starting_stops_everything(launcher: Launcher) -> None:
    launcher.start("router=unready", tty=True).until("no decode worker yet")
    launcher.press_ctrl_c()
    assert launcher.end() == 130
    assert not launcher.left()


def test_a_service_that_dies_later_is_reported_and_started_again(launcher: Launcher, tmp_path: Path) -> None:
    fuse = tmp_path / "fuse"
    launcher.start(f"prefill=crash-on {fuse}").until("Ready in")
    first = launcher.pid("prefill")
    fuse.touch()
    assert "told to crash; restarting in 0.5 s" in launcher.until("prefill: ")
    launcher.until("prefill: ready again")
    assert launcher.pid("prefill") != first
    assert next(service.restarts for service in launcher.state().services if service.name == "prefill") == 1


def test_a_restarted_nats_comes_back_at_its_address(launcher: Launcher) -> None:
    launcher.start().until("Ready in")
    before = next(service.addresses["nats"] for service in launcher.state().services if service.name == "nats")
    os.kill(launcher.pid("nats"), signal.SIGKILL)
    launcher.until("nats: ready again")
    assert next(service.addresses["nats"] for service in launcher.state().services if service.name == "nats") == before


def test_a_service_that_will_not_drain_is_killed_and_named(launcher: Launcher) -> None:
    launcher.start("decode=stubborn", "drain_s=0.3").until("Ready in")
    launcher.signal(signal.SIGTERM)
    assert launcher.end() == 0
    assert "was killed: decode\n" in "".join(launcher.seen)
    assert not launcher.left()


def test_what_a_service_started_itself_ends_with_it(launcher: Launcher, tmp_path: Path) -> None:
    launcher.start(f"kvstore=brood {tmp_path / 'brood'}").until("Ready in")
    brood = psutil.Process(int((tmp_path / "brood").read_text()))
    launcher.signal(signal.SIGTERM)
    assert launcher.end() == 0
    assert not brood.is_running() or brood.status() == psutil.STATUS_ZOMBIE


def test_each_request_is_one_line(launcher: Launcher) -> None:
    launcher.start().until("Ready in")
    urllib.request.urlopen(launcher.state().url + "/serve").close()
    line = launcher.until("direct")
    assert line.split()[1:] == [
        "direct",
        "cached",
        "1,024",
        "of",
        "1,100",
        "ttft",
        "41",
        "ms",
        "7",
        "tokens",
        "37.2",
        "tok/s",
        "stop",
    ]


def test_a_second_launcher_on_the_same_data_is_refused_and_told_of_the_first(launcher: Launcher) -> None:
    launcher.start().until("Ready in")
    second = Launcher(launcher.data)
    assert second.start().end() == 1
    said = "".join(second.seen)
    assert f"is used by the cluster at {launcher.state().url} (launcher pid {launcher.state().launcher.pid})" in said
    assert len(launcher.left()) == 6


def test_detached_it_returns_when_ready_and_down_stops_it(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launcher.environ.items():
        monkeypatch.setenv(name, value)
    shown: list[Message] = []
    assert detach(launcher.command(), launcher.data, shown.append) == 0
    assert any(isinstance(message, Ready) for message in shown)
    assert isinstance(shown[-1], Note) and f"penstock down --data {launcher.data}" in shown[-1].text
    monkeypatch.delenv("FAKE_CLUSTER")
    assert len(launcher.left()) == 6
    assert down.main(["--data", str(launcher.data)]) == 0
    assert not launcher.left()


def test_detached_it_fails_with_the_reason(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launcher.environ.items():
        monkeypatch.setenv(name, value)
    shown: list[Message] = []
    assert detach(launcher.command("prefill=fail"), launcher.data, shown.append) == 1
    failed = next(message for message in shown if isinstance(message, Failed))
    assert "prefill did not start: model = '/nowhere'" in failed.reason
    monkeypatch.delenv("FAKE_CLUSTER")
    assert not launcher.left()

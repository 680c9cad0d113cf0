"""The launcher's small parts: logs, process identity, ports, model directories, lines for people."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from common.errors import PenstockError, SettingsError
from services.cli import logfile, model_directory, nats_binary, ports, served, state, supervisor
from services.cli.__main__ import main
from services.cli.logfile import Record, Tail
from services.cli.make_model_command import parse_count
from services.cli.messages import Failed, Message, Note, Progress, Ready, Row, Served, Stopped, decode, encode
from services.cli.screen import lines_of
from services.cli.spawn import how_it_ended
from services.cli.supervisor import NEXT, Service, Spec, Supervisor


def test_a_rotated_log_keeps_the_last_starts(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    for start in range(logfile.ROTATED_MAX + 3):
        logfile.rotate(log)
        log.write_text(f"start {start}")
    assert log.read_text() == "start 6"
    assert [log.with_name(f"x.log.{age}").read_text() for age in (1, 2, 3, 4)] == ["start 5", "start 4", "start 3", "start 2"]
    assert not log.with_name("x.log.5").exists()


def test_a_tail_gives_whole_lines_only(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("before\n")
    tail = Tail(log)
    with log.open("a") as file:
        file.write("one\ntw")
        file.flush()
        assert tail.read() == ["one"]
        file.write("o\n\nthree\n")
        file.flush()
        assert tail.read() == ["two", "three"]
    assert tail.read() == []
    tail.close()


def test_lines_of_services_and_of_nats_are_understood() -> None:
    ours = logfile.read_line('{"ts": 0, "level": "info", "service": "decode", "event": "ready", "grpc": "127.0.0.1:5"}')
    assert (ours.event, ours.fields) == ("ready", {"grpc": "127.0.0.1:5"})
    nats = "[1] 2026/11/23 22:39:37.806697 [INF] "
    assert logfile.read_line(nats + "Listening for client connections on 127.0.0.1:35495").fields == {
        "nats": "nats://127.0.0.1:35495"
    }
    assert logfile.read_line(nats + "Server is ready").event == "ready"
    assert logfile.read_line("Traceback (most recent call last):").event == ""
    assert logfile.read_line("[1, 2]").event == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"level": "error", "event": "failed", "reason": "no config.json"}\n{"event": "stopped"}\n', "no config.json"),
        ("Traceback (most recent call last):\n  File x\ncommon.errors.SettingsError: [decode] threads = -1\n", "SettingsError: [decode] threads = -1"),
        ('{"level": "info", "event": "starting"}\ndecode: error: unrecognized arguments: --x\n', "decode: error: unrecognized arguments: --x"),
        ('[1] 2026/11/23 22:39:37 [FTL] can\'t listen\n', "can't listen"),
        ('{"level": "info", "event": "starting"}\n', None),
        ("", None),
    ],
)  # fmt: skip
def test_the_reason_of_an_end_is_found_in_the_log(tmp_path: Path, text: str, reason: str | None) -> None:
    log = tmp_path / "x.log"
    log.write_text("old: ValueError: of an earlier run\n" + text)
    assert logfile.reason_in(log, since=len("old: ValueError: of an earlier run\n")) == reason


def test_a_process_that_only_shares_the_pid_is_left_alone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        real = state.identify(child.pid)
        assert real is not None and state.alive(real)
        recycled = msgspec.structs.replace(real, start_ticks=real.start_ticks - 1)
        assert not state.alive(recycled)
        assert not state.send(recycled, signal.SIGKILL)
        assert state.wait_gone(recycled, 60)
        assert child.poll() is None
        assert state.send(real, signal.SIGKILL)
        assert state.wait_gone(real, 60)
    finally:
        child.kill()
        child.communicate()
    assert not state.alive(real)
    assert not state.send(real, signal.SIGKILL)


def test_a_state_file_that_is_not_one_is_named(tmp_path: Path) -> None:
    (tmp_path / state.FILE).write_text("{")
    with pytest.raises(PenstockError, match=r"penstock\.json"):
        state.read(tmp_path)


def test_a_data_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="choose a folder"):
        state.take_lock(tmp_path / "file" / "data")


def test_a_port_in_use_is_refused_with_its_holder_and_another_to_try() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            SettingsError, match=rf"port = {port}: in use on 127\.0\.0\.1 by .*\(pid {os.getpid()}\); .*--port {port + 1}"
        ):
            ports.check_free("127.0.0.1", port)
    ports.check_free("127.0.0.1", port)
    ports.check_free("127.0.0.1", 0)


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(SettingsError, match="not an address of this machine"):
        ports.check_free("192.0.2.1", 8080)


def test_what_is_wrong_with_a_model_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such directory"):
        model_directory.resolve(str(tmp_path / "absent"))
    assert model_directory.problem_with(tmp_path) == "it holds no config.json"
    (tmp_path / "config.json").write_text("{")
    assert "can't be read" in str(model_directory.problem_with(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in str(model_directory.problem_with(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "no weights" in str(model_directory.problem_with(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert model_directory.problem_with(tmp_path) is None


def test_the_command_to_paste_survives_the_shell(tmp_path: Path) -> None:
    for has_template in (False, True):
        if has_template:
            (tmp_path / "chat_template.jinja").touch()
        line = model_directory.example_request(tmp_path, "m", "http://h:1")
        done = subprocess.run(["sh", "-c", line.replace("curl", 'printf "%s\\n"', 1)], capture_output=True, text=True, check=True)
        url, _, _, _, body = done.stdout.split("\n", 4)
        assert url == ("http://h:1/v1/chat/completions" if has_template else "http://h:1/v1/completions")
        assert json.loads(body)["model"] == "m"


def test_the_nats_server_of_the_wheel_is_found_and_new_enough() -> None:
    found = nats_binary.version(nats_binary.find())
    assert found is not None and found >= nats_binary.VERSION_MIN


def test_a_request_that_failed_says_so() -> None:
    record = Record(
        event="request", fields={"route": "", "prompt_tokens": 5, "status": "overloaded", "reason": "the queue is full"}
    )
    assert served.line(record, "10:00:00") == Served(
        text="10:00:00  -               cached      0 of      5  overloaded  the queue is full", ok=False
    )


@pytest.mark.parametrize(
    "message",
    [
        Progress(rows=[Row(name="a", state="ready", stage="ready")]),
        Note(text="x", bad=True),
        Ready(url="http://h:1", model="m", curl="curl", seconds=1.5),
        Served(text="x", ok=True),
        Failed(reason="r", lines=["a"], log="l"),
        Stopped(clean=False),
    ],
)
def test_messages_cross_the_pipe_and_have_words(message: Message) -> None:
    assert decode(encode(message)) == message
    assert lines_of(message)


def test_how_a_process_ended_is_said_in_words() -> None:
    assert how_it_ended(3) == "exit status 3"
    assert how_it_ended(-9) == "ended by SIGKILL (out of memory?)"
    assert how_it_ended(-15) == "ended by SIGTERM"


def test_every_state_can_be_stopped() -> None:
    for name, edges in NEXT.items():
        assert "stop" in edges, name
        assert set(edges.values()) <= NEXT.keys()


async def test_a_service_that_keeps_dying_is_given_up_and_the_last_decode_worker_ends_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_FIRST_S", 0.0)
    monkeypatch.setattr(supervisor, "RESTARTS_MAX", 2)
    states: list[str] = []

    def on_change(service: Service) -> None:
        states.append(service.state)

    kept = Supervisor(on_change, lambda *_: None)
    kept.settled()
    script = "import sys; sys.exit('ValueError: no')"
    kept.start(
        [Spec(name="decode-0", kind="decode", argv=(sys.executable, "-S", "-c", script), environ={}, log=tmp_path / "d.log")]
    )
    error = await kept.fatal()
    assert error.message.startswith("decode-0: given up after 2 restarts: ValueError: no; see ")
    assert kept.services["decode-0"].restarts == 2
    assert await kept.stop([["decode"]], 60) == []
    assert states[-1] == "stopped"


async def test_a_stop_before_the_first_start_starts_nothing(tmp_path: Path) -> None:
    kept = Supervisor(lambda _: None, lambda *_: None)
    kept.start([Spec(name="x", kind="decode", argv=(sys.executable, "-c", "input()"), environ={}, log=tmp_path / "x.log")])
    kept.kill()
    await kept.gone()
    assert kept.services["x"].state == "stopped" and kept.services["x"].child is None
    await asyncio.sleep(0)


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu"]) == 2
    assert "Did you mean 'status'?" in capsys.readouterr().err
    assert main([]) == 0
    assert "usage: penstock COMMAND" in capsys.readouterr().out
    assert main(["down", "--data", "/nowhere/at/all"]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "count"), [("100m", 10**8), ("1.5B", 1_500_000_000), ("500k", 500_000), ("1234", 1234)])
def test_sizes_of_models_are_read(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "m", "-1m", "1q", "nan", "infb"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="expected a count such as"):
        parse_count(text)

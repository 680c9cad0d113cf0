"""The terminal chat against a server that answers as the router does."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli import chat, status
from services.cli.__main__ import main
from tests.cli.conftest import Launcher
from tests.cli.fake_router import STATUS, FakeRouter, fake_router


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with fake_router() as server:
        yield server


def talk(monkeypatch: pytest.MonkeyPatch, url: str, *lines: str) -> int:
    typed = iter(lines)

    def type_next(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_next)
    return main(["chat", "--url", url])


def test_a_turn_shows_the_answer_and_what_it_cost(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, router.url, "hello", "/exit") == 0
    shown = capsys.readouterr().out
    assert "you said hello\ufffd[2J\n" in shown  # control characters don't reach the terminal
    assert "direct · cached 1,024 of 1,100 · ttft " in shown and " ms · 3 tokens · " in shown
    assert router.asked[0]["model"] == "tiny" and router.asked[0]["stream_options"] == {"include_usage": True}


def test_the_conversation_grows_until_it_is_reset(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, router.url, "one", "two", "/reset", "three") == 0
    assert [len(body["messages"]) for body in router.asked] == [1, 3, 1]
    assert router.asked[1]["messages"][1] == {"role": "assistant", "content": "you said one\x1b[2J"}


@pytest.mark.parametrize(("said", "shown"), [("refuse", "prompt has 9 tokens, the context 8"), ("break", "the worker died")])
def test_a_failed_turn_is_told_and_forgotten(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str, shown: str
) -> None:
    assert talk(monkeypatch, router.url, said, "then") == 0
    assert shown in capsys.readouterr().err
    assert [message["content"] for message in router.asked[-1]["messages"]] == ["then"]


def test_ctrl_c_stops_the_turn_and_the_chat_goes_on(
    router: FakeRouter, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "command", lambda *_: [sys.executable, "-m", "services.cli", "chat", "--url", router.url])
    launcher.start(tty=True).until("tiny at")
    launcher.type("forever\n")
    launcher.until_piece("on on on")
    launcher.press_ctrl_c()
    launcher.until_piece("[stopped]")
    assert router.gone.wait(60)
    launcher.type("again\n")
    launcher.until_piece("you said again")
    launcher.type("/exit\n")
    assert launcher.end() == 0


def test_no_cluster_is_said_with_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "nothing answers at http://127.0.0.1:9; start a cluster with: penstock up" in capsys.readouterr().err


def test_status_shows_members_their_load_and_the_stores_fill(router: FakeRouter, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", router.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ready; 1 of 512 sequences in flight; NATS connected" in lines
    assert "decode-0   decode   yes        2 running, 1 waiting, pool 25% of 4 blocks" in lines
    assert "kvstore-0  kvstore  yes        1.0 MiB of 4.0 MiB (25%), 9 blocks, 2 evicted" in lines
    assert "prefill-0  prefill  no         lost: connection refused" in lines
    assert main(["status", "--url", router.url, "--json"]) == 0
    assert '"decode-0"' in capsys.readouterr().out


def test_status_without_a_cluster_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--data", str(tmp_path)]) == 1
    assert f"penstock up --data {tmp_path}" in capsys.readouterr().out


def test_a_router_that_is_not_ready_says_why() -> None:
    lines = status.report(None, "http://x", STATUS | {"ready": False, "reason": "no decode worker is connected"}, 0.0)
    assert any(line.startswith("not ready: no decode worker is connected") for line in lines)


def test_control_characters_of_an_answer_are_replaced() -> None:
    assert chat.printable("a\x1b]0;x\x07\n\tb\x9b") == "a\ufffd]0;x\ufffd\n\tb\ufffd"

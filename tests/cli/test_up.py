"""`penstock up` with the real services and a tiny model: detach, serve, stop, and find the blocks again."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.cli import state
from tests.families import save_tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPT = list(range(5, 205))
BLOCK_TOKENS = 16


def penstock(mark: str, *argv: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command; it and all it starts carry `mark`."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
    environ |= {"PYTHONPATH": str(ROOT), "CLUSTER_UNDER_TEST": mark}
    return subprocess.run([sys.executable, "-P", "-m", "services.cli", *argv], env=environ, capture_output=True, text=True)


def left(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CLUSTER_UNDER_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def complete(url: str, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.mark.timeout(300)
def test_up_serves_down_leaves_nothing_and_the_next_up_finds_the_blocks(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    mark = str(tmp_path)
    flags = [
        "--data",
        str(data),
        "--model",
        str(model),
        "--port",
        "0",
        "--block-tokens",
        str(BLOCK_TOKENS),
        "--threads",
        "1",
        "--detach",
    ]
    answers = []
    for _ in range(2):
        up = penstock(mark, "up", *flags)
        assert up.returncode == 0, up.stdout + up.stderr
        assert f"tiny-llama at {_url(data)}" in up.stdout and f"curl {_url(data)}/v1/chat/completions" in up.stdout
        run_dir = Path(str(_state(data).run_dir))
        answers.append(complete(_url(data), "tiny-llama"))
        status = penstock(mark, "status", "--data", str(data))
        assert status.returncode == 0 and "kvstore-0" in status.stdout and "ready;" in status.stdout
        second = penstock(mark, "up", *flags)
        assert second.returncode == 2 and f"is used by the cluster at {_url(data)}" in second.stderr
        down = penstock(mark, "down", "--data", str(data))
        assert down.returncode == 0, down.stdout + down.stderr
        assert not left(mark)
        assert not run_dir.exists() and state.read(data) is None
    fresh, again = answers
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(PROMPT) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert again["choices"][0]["token_ids"] == fresh["choices"][0]["token_ids"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("detached", [False, True])
def test_a_model_whose_weights_are_cut_short_stops_the_start_with_the_reason(model: Path, tmp_path: Path, detached: bool) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    mark = str(tmp_path)
    flags = ["--data", str(tmp_path / "data"), "--model", str(broken), "--port", "0", "--prefill", "0"]
    up = penstock(mark, "up", *flags, *(["--detach"] if detached else []))
    assert up.returncode == 1
    assert "Failed: decode-0 did not start: " in up.stdout and "broken" in up.stdout
    assert not left(mark)


def test_a_port_in_use_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        up = penstock(str(tmp_path), "up", "--data", str(tmp_path / "data"), "--model", str(model), "--port", str(port))
    assert up.returncode == 2
    assert f"port = {port}: in use" in up.stderr and f"(pid {os.getpid()})" in up.stderr
    assert not (tmp_path / "data").exists()


def test_a_model_directory_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    up = penstock(str(tmp_path), "up", "--data", str(tmp_path / "data"), "--model", str(tmp_path / "absent"), "--detach")
    assert up.returncode == 2
    assert "no such directory; expected a Hugging Face model directory" in up.stderr


def _state(data: Path) -> state.ClusterState:
    found = state.read(data)
    assert found is not None
    return found


def _url(data: Path) -> str:
    return _state(data).url

"""Which cluster is loaded, and which is refused."""

import os
from pathlib import Path

import msgspec
import pytest

from common.errors import SettingsError, Unavailable
from loadtest import target
from services.cli import state
from tests.loadtest.fake_server import CONTEXT_TOKENS, fake_server


def remember(data: Path, launcher: state.ProcessId) -> None:
    cluster = state.ClusterState(launcher, "/models/x", "x", "http://127.0.0.1:1234", "", True, 1.0, 0.0)
    (data / state.FILE).write_bytes(msgspec.json.encode(cluster))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "[::1]"])
def test_a_loopback_address_is_fine(host: str) -> None:
    assert target.choose(f"http://{host}:8080/", None, allow_remote=False) == f"http://{host}:8080"


@pytest.mark.parametrize("host", ["10.0.0.1", "example.org", "127.0.0.1.example.org", "0.0.0.0", "[2001:db8::1]"])
def test_another_machine_is_refused_unless_it_is_allowed(host: str) -> None:
    url = f"http://{host}:8080"
    with pytest.raises(SettingsError, match="--allow-remote"):
        target.choose(url, None, allow_remote=False)
    assert target.choose(url, None, allow_remote=True) == url


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://127.0.0.1", "http://", "x"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="expected a URL such as"):
        target.choose(url, None, allow_remote=True)


def test_the_cluster_of_a_data_folder_is_found(tmp_path: Path) -> None:
    remember(tmp_path, state.myself())
    assert target.choose("", tmp_path, allow_remote=False) == "http://127.0.0.1:1234"


def test_a_data_folder_without_a_running_cluster_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no cluster runs there; start one with: penstock up --data"):
        target.choose("", tmp_path, allow_remote=False)
    remember(tmp_path, state.ProcessId(os.getpid(), 1, "another boot"))
    with pytest.raises(SettingsError, match="no cluster runs there"):
        target.choose("", tmp_path, allow_remote=False)


def test_nothing_given_means_the_default_folder_then_the_default_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert target.choose("", None, allow_remote=False) == target.DEFAULT_URL
    (tmp_path / "data").mkdir()
    remember(tmp_path / "data", state.myself())
    assert target.choose("", None, allow_remote=False) == "http://127.0.0.1:1234"


def test_a_server_is_asked_what_it_serves() -> None:
    with fake_server() as server:
        assert target.inspect(server.url, "", "") == target.Target(server.url, "fake", CONTEXT_TOKENS, {})
        with pytest.raises(SettingsError, match="--model other: not served; there is fake"):
            target.inspect(server.url, "", "other")


def test_when_nothing_answers_the_way_to_start_a_cluster_is_named() -> None:
    with fake_server() as server:
        url = server.url
    with pytest.raises(Unavailable, match=f"nothing answers at {url}; start a cluster with: make up"):
        target.inspect(url, "", "")

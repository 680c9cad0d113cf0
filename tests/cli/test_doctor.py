"""The doctor on this machine, and on machines that lack something."""

import resource
import socket
from pathlib import Path

import pytest

from services.cli import check_machine, check_software, nats_binary
from services.cli.__main__ import main
from services.cli.findings import Finding, Level


def bad(findings: list[Finding]) -> Finding:
    (found,) = [finding for finding in findings if finding.level is Level.BAD]
    assert found.mend
    return found


def a_model(path: Path) -> Path:
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (path / name).touch()
    return path


def test_a_machine_that_has_everything_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model(tmp_path)
    assert main(["doctor", "--data", str(tmp_path / "data"), "--model", str(model), "--port", "0"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing is wrong." in shown
    for what in ("python", "packages", "nats", "disk", "shared memory", "open files", "port", "model"):
        assert f" {what} " in shown
    assert not (tmp_path / "data").exists()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".penstock")]


def test_what_is_wrong_sets_the_exit_status_and_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["doctor", "--data", str(tmp_path), "--model", str(tmp_path), "--port", str(port)]) == 1
    shown = capsys.readouterr().out
    assert f"port = {port}: in use" in shown and f"-> penstock up --port {port + 1}" in shown
    assert "it holds no config.json" in shown and "-> penstock up --model PATH" in shown
    assert "2 things are wrong." in shown


def test_packages_that_are_missing_or_of_another_version_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.lock").write_text("# a lock\nmsgspec==0.0.1\n")
    monkeypatch.setattr(check_software, "REPOSITORY", tmp_path)
    monkeypatch.setattr(check_software, "NEEDED", ("msgspec", "no-such-package"))
    missing, other = check_software.packages()
    assert missing.level is Level.BAD and "no-such-package" in missing.detail and "make setup" in missing.mend
    assert other.level is Level.NOTE and "(tested: 0.0.1)" in other.detail


def test_an_old_nats_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho nats-server: v2.9.1\n")
    old.chmod(0o755)
    monkeypatch.setattr(nats_binary, "find", lambda: str(old))
    assert "2.9.1: too old" in bad(check_software.nats()).detail
    old.write_text("#!/bin/sh\nexit 1\n")
    assert "does not run" in bad(check_software.nats()).detail


def test_a_missing_or_broken_compiler_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = check_software.compiler()
    assert found.level is Level.NOTE and "no C compiler" in found.detail and "apt install gcc" in found.mend
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no headers >&2\nexit 1\n")
    broken.chmod(0o755)
    (found,) = check_software.compiler()
    assert found.level is Level.NOTE and "no headers" in found.detail


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "can't be written" in bad(check_machine.disk(tmp_path / "file" / "data")).detail


def test_a_disk_that_is_nearly_full_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.check_machine.shutil.disk_usage", lambda _: _Usage(1 << 20))
    assert "0.0 GiB free" in bad(check_machine.disk(tmp_path)).detail
    monkeypatch.setattr("services.cli.check_machine.shutil.disk_usage", lambda _: _Usage(1 << 30))
    assert check_machine.disk(tmp_path)[0].level is Level.NOTE


def test_too_few_open_files_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert bad(check_machine.limits()).mend == "ulimit -n 4096"


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free

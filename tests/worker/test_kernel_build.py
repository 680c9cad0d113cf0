"""Finding a compiler, the cache of compiled libraries, and what happens when there is no compiler."""

from pathlib import Path

import pytest

from services.worker.kernels import build


def fake_compiler(folder: Path, body: str) -> str:
    path = folder / "fake-cc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = build.load(tmp_path)
    assert outcome.library is None
    assert "no C compiler found (tried cc, gcc, clang)" in outcome.reason
    assert "install gcc or clang" in outcome.reason


def test_a_failing_compiler_is_quoted_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", fake_compiler(tmp_path, 'echo "unknown option: march" >&2; exit 3'))
    cache = tmp_path / "cache"
    assert "unknown option: march" in build.load(cache).reason
    assert list(cache.iterdir()) == []


def test_a_library_is_compiled_once_for_each_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = 'echo run >> "$0.log"; while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done'
    monkeypatch.setenv("CC", fake_compiler(tmp_path, f'[ "$1" = --version ] && exit 0; {script}'))
    cache = tmp_path / "cache"
    first = build.compile_library(cache)
    assert build.compile_library(cache) == first
    assert (tmp_path / "fake-cc.log").read_text().split() == ["run"]
    monkeypatch.setenv("CC", fake_compiler(tmp_path, f'[ "$1" = --version ] && echo 2.0 && exit 0; {script}'))
    assert build.compile_library(cache) != first


def test_a_file_that_is_no_library_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", fake_compiler(tmp_path, 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done'))
    assert build.load(tmp_path / "cache").library is None

"""The project's own rules: import contracts, generated code, the lock, the commands the README names."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from services.cli.__main__ import COMMANDS, usage
from services.cli.settings import UpSettings
from tests.service_settings import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
ENVIRON = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")} | {"PYTHONPATH": str(ROOT)}
NO_TORCH = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "safetensors"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
for package in sys.argv[1:]:
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def python(*arguments: str, environ: dict[str, str] = ENVIRON) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


def said(process: "subprocess.CompletedProcess[str]") -> str:
    return process.stdout + process.stderr


def test_the_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, env=ENVIRON, capture_output=True, text=True)
    assert done.returncode == 0, said(done)


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "proto/generate.sh", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRON | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, said(done)
    fresh = {file.name: file.read_text() for file in tmp_path.iterdir()}
    kept = {file.name: file.read_text() for file in (ROOT / "common" / "pb").glob("*_pb2*")}
    assert kept.keys() == fresh.keys()
    assert [name for name in kept if kept[name] != fresh[name]] == []


@pytest.mark.parametrize("packages", [("services.router", "common"), ("services.kvstore", "common")], ids=lambda p: p[0])
def test_torch_is_out_of_reach_of(packages: tuple[str, ...]) -> None:
    done = python("-c", NO_TORCH, *packages)
    assert done.returncode == 0, said(done)


def test_the_lock_satisfies_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = [
        Requirement(text) for texts in (project["dependencies"], *project["optional-dependencies"].values()) for text in texts
    ]
    for requirement in wanted:
        if requirement.name != "penstock":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_lock_names_no_build_of_one_kind_of_machine() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"^(nvidia-|cuda-|triton==)|\+c|--hash", text, re.MULTILINE)


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    script = "import sys; from services.cli.__main__ import main; main(['--help']); print([m for m in ('torch', 'grpc', 'httpx', 'rich') if m in sys.modules])"
    assert python("-c", script).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_works(name: str) -> None:
    done = python("-m", "services.cli", name, "--help")
    assert done.returncode == 0, said(done)
    assert f"usage: penstock {name} " in done.stdout
    assert name in usage()


def keys_without_flag(text: str, fields: "tuple[str, ...]") -> list[str]:
    return [field for field in fields if not re.search(rf"--(\[no-\])?{field.replace('_', '-')}\b", text)]


def test_help_of_up_names_each_key() -> None:
    text = python("-m", "services.cli", "up", "--help").stdout
    assert keys_without_flag(text, UpSettings.__struct_fields__) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_help_of_each_service_names_each_key(name: str) -> None:
    done = python("-m", f"services.{name}", "--help")
    assert done.returncode == 0, said(done)
    assert keys_without_flag(done.stdout, SETTINGS[name].__struct_fields__) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_each_service_refuses_an_unknown_variable_by_name(name: str) -> None:
    done = python("-m", f"services.{name}", environ=ENVIRON | {f"PENSTOCK_{name.upper()}_POTR": "1"})
    assert done.returncode != 0
    assert f"PENSTOCK_{name.upper()}_POTR" in said(done)


def test_every_make_target_says_what_it_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*  ## \w", makefile, re.MULTILINE), target


def commands_in(text: str) -> list[str]:
    """Command lines of the shell blocks of a document."""
    blocks = re.findall(r"```(?:sh|console|bash)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip().removeprefix("$ ") for line in lines if line.split("#")[0].strip()]


def test_the_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    help_of: dict[str, str] = {}
    for command in commands_in((ROOT / "README.md").read_text()):
        tool, *words = command.split()
        if tool == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), command
            words = ["up", *words[1:]] if words[0] == "up" else []
        elif tool == "python" and words[:1] == ["-m"]:
            assert (ROOT / words[1].replace(".", "/")).exists() or (ROOT / (words[1].replace(".", "/") + ".py")).exists(), command
            continue
        if tool == "penstock":
            assert words[0] in COMMANDS, command
        flags = re.findall(r"--[a-z-]+", command) if tool in ("penstock", "make") else []
        if flags:
            text = help_of.setdefault(words[0], python("-m", "services.cli", words[0], "--help").stdout)
            assert [flag for flag in flags if flag not in text] == [], command


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("name", ["reservoir.md", "bad-input.md"])
def test_the_tests_that_a_table_of_faults_names_exist(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    short = dict(re.findall(r"`(\w)` is `(tests/[\w/.]+)`", text))
    named = re.findall(r"`([\w/.]+)::(test_\w+)`", text)
    assert len(named) > 15
    for file, test in named:
        letter, slash, rest = file.partition("/")
        path = ROOT / (short[letter].rstrip("/") + slash + rest if letter in short else file)
        assert re.search(rf"^(async )?def {test}\(", path.read_text(), re.MULTILINE), f"{file}::{test}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_python_that_is_too_old_is_refused_with_advice(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.9.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PY={old}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Penstock needs Python 3.11 or newer" in said(done) and "Python 3.9.1" in said(done)

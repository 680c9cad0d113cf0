"""The Python environment that the peers live in, apart from Penstock's own.

1. A virtual environment is made in a cache folder (named on the command line and printed).
2. torch comes first, in the release that Penstock itself uses, so that LMCache takes it as it is.
3. The peers come without their dependencies, which are GPU libraries for the greater part; then
   what the disk paths really import.
4. A stamp holds the list that was installed: another list makes the environment again.

Pins are the versions that the comparison in docs/benchmarks.md was made with.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = ["torch==2.13.0"]
PEERS = ["lmcache==0.5.6", "mooncake-transfer-engine-non-cuda==0.3.13.post1"]
IMPORTED = [
    "aiofile==3.12.3",
    "aiofiles==25.1.0",
    "aiohttp==3.14.5",
    "blake3==1.0.11",
    "cachetools==8.0.2",
    "cryptography==50.0.2",
    "fastapi==0.165.0",
    "httpx==0.28.1",
    "msgpack==1.2.4",
    "msgspec==0.22.0",
    "numba==0.68.1",
    "numpy==2.2.6",
    "nvtx==0.2.17",
    "prometheus_client==0.24.1",
    "psutil==7.2.2",
    "py-cpuinfo==9.0.0",
    "pyyaml==6.0.4",
    "pyzmq==27.3.0",
    "redis==8.1.0",
    "requests==2.34.2",
    "safetensors==0.8.0",
    "setuptools==80.10.2",
    "sortedcontainers==2.4.0",
    "transformers==5.24.0",
]
STEPS = [TORCH, ["--no-deps", *PEERS], IMPORTED]
STEP_DEADLINE_S = 900
REASON_LINES = 3  # of pip's output


class NotInstalled(Exception):
    """The environment could not be made; the text says where it stopped."""


def default_folder() -> Path:
    """In the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock" / "peers"


def python_of(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, which is made when it is not there. Raises `NotInstalled`."""
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(json.dumps(STEPS).encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    for step in STEPS:
        print(f"peers: installing {' '.join(step)} into {folder}", file=sys.stderr)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step])
    stamp.write_text(wanted)
    return python


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=STEP_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"{' '.join(argv)}: not done after {STEP_DEADLINE_S} s") from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise NotInstalled(f"{' '.join(argv)} ended with {done.returncode}: {' | '.join(lines[-REASON_LINES:])}")

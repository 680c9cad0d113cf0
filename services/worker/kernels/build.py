"""Compiles the C kernels once per machine and loads them.

1. The library's name is a digest of sources, flags, compiler version and CPU features, so a changed file, an upgraded
   compiler or a home directory shared by unlike machines each get a library of their own.
2. A missing library is compiled beside its place and renamed into it: concurrent processes agree, a killed one leaves
   nothing that could be loaded.

The kernels bring their own helper threads (pool.h says why) beside torch's OpenMP pool. An idle helper spins for 0.1 ms; an
idle OpenMP thread of torch's spins for several, so where processes share cores workers should run with
`OMP_WAIT_POLICY=passive` (set before torch is imported).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from common.errors import Unavailable

SOURCES = ("simd.h", "pool.h", "linear.h", "attention.h", "rows.h", "codec.h", "kernels.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_DEADLINE_S = 120  # takes about 7 s alone on one core


class Build(NamedTuple):
    """The outcome: a library, or the reason why there is none."""

    library: ctypes.CDLL | None
    path: Path | None
    reason: str


def load(cache: Path | None = None) -> Build:
    """Compiles if needed and loads; a machine that can't gets the reason."""
    try:
        path = compile_library(cache or cache_dir())
        return Build(ctypes.CDLL(str(path)), path, f"compiled kernels from {path}")
    except (OSError, subprocess.SubprocessError, Unavailable) as error:
        return Build(None, None, f"CPU kernels are not available, torch is used instead: {error}")


def compile_library(cache: Path) -> Path:
    """Path of the library for this source, compiler and CPU, compiled now if it isn't there."""
    compiler = find_compiler()
    sources = Path(__file__).parent
    path = cache / f"penstock-kernels-{_digest(sources, compiler)}.so"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=cache, prefix="compile-") as scratch:
        made = Path(scratch) / path.name
        if complaint := _compile(compiler, sources / SOURCES[-1], made):
            raise Unavailable(f"{compiler} failed: {complaint}")
        made.rename(path)
    return path


def find_compiler() -> str:
    """`CC`, or the first of `COMPILERS` on the path."""
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    tried = f"CC={wanted}" if wanted else ", ".join(COMPILERS)
    raise Unavailable(f"no C compiler found (tried {tried}); install gcc or clang, or set CC")


def cache_dir() -> Path:
    """Per user: `$XDG_CACHE_HOME/penstock`, else `~/.cache/penstock`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "penstock"


def _compile(compiler: str, source: Path, target: Path) -> str:
    """The compiler's complaint, empty when it succeeded."""
    command = [compiler, *FLAGS, "-o", str(target), str(source), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_DEADLINE_S, check=False)
    return "" if done.returncode == 0 else done.stderr.strip()[-2000:] or f"exit status {done.returncode}"


def _digest(sources: Path, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_DEADLINE_S, check=False).stdout
    parts = [*((sources / name).read_bytes() for name in SOURCES), *(flag.encode() for flag in FLAGS)]
    digest = hashlib.sha256()
    for part in (*parts, compiler.encode(), version, _cpu_features().encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return f"{platform.machine()} {platform.processor()} {sorted(first.values())}"

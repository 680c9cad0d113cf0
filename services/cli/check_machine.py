"""Doctor's checks of the machine: disk, shared memory, limits, ports, and the model to serve."""

import mmap
import os
import resource
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from common.errors import PenstockError, SettingsError
from services.cli import model_directory, ports, state
from services.cli.findings import Finding, bad, good, note

_GIB = 1 << 30
_FREE_NOTE = 4 * _GIB  # below this the SSD tier is too small to show what it is for
_FREE_BAD = 256 << 20
_SHARED_PROBE = 64 << 20
_OPEN_FILES_MIN = 1024


def disk(data: Path) -> list[Finding]:
    """The data folder: writable, room, and whether reads can pass the page cache by."""
    existing = next(parent for parent in (data, *data.parents) if parent.exists())
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        return [bad("disk", f"{existing} can't be written", "choose another folder with --data DIR")]
    free = shutil.disk_usage(existing).free
    shown = f"{data}: {free / _GIB:.1f} GiB free"
    if free < _FREE_BAD:
        return [bad("disk", shown, "free some space, or choose another disk with --data DIR")]
    if free < _FREE_NOTE:
        return [note("disk", shown, "stored KV is evicted early; more room, or another disk with --data DIR, keeps more")]
    return [good("disk", shown), _direct_io(existing)]


def _direct_io(folder: Path) -> Finding:
    if not hasattr(os, "O_DIRECT"):
        return note("direct I/O", "not on this system", "reads go through the page cache; nothing to do")
    handle, name = tempfile.mkstemp(prefix=".penstock-probe-", dir=folder)
    os.close(handle)
    try:
        fd = os.open(name, os.O_RDWR | os.O_DIRECT)
        try:
            os.write(fd, mmap.mmap(-1, 4096))
        finally:
            os.close(fd)
    except OSError as error:
        return note(
            "direct I/O",
            f"{folder} refuses O_DIRECT ({error.strerror})",
            "KV reads go through the page cache; a local ext4 or xfs disk is faster",
        )
    finally:
        os.unlink(name)
    return good("direct I/O", f"{folder} takes O_DIRECT")


def shared_memory() -> list[Finding]:
    """Same-host KV moves through memfd regions handed over unix sockets."""
    try:
        fd = os.memfd_create("penstock-doctor")
        try:
            os.ftruncate(fd, _SHARED_PROBE)
            with mmap.mmap(fd, _SHARED_PROBE) as region:
                region[-1] = 1
            ours, theirs = socket.socketpair(socket.AF_UNIX)
            with ours, theirs:
                socket.send_fds(ours, [b"x"], [fd])
                os.close(socket.recv_fds(theirs, 1, 1)[1][0])
        finally:
            os.close(fd)
    except (OSError, AttributeError) as error:
        return [note("shared memory", f"memfd or fd passing does not work here ({error})", "use --transport tcp")]
    free = psutil.virtual_memory().available
    shown = f"memfd and fd passing work; {free / _GIB:.1f} GiB of memory available"
    if free < 2 * _GIB:
        return [note("shared memory", shown, "two workers want about 2 GiB; close something, or set stage_bytes and pool_bytes")]
    return [good("shared memory", shown)]


def limits() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES_MIN:
        return [bad("open files", f"at most {soft}", f"ulimit -n {min(65536, hard) if hard > 0 else 65536}")]
    return [good("open files", f"at most {soft}")]


def port(data: Path, host: str, number: int) -> list[Finding]:
    """Free, or held by the cluster of this very data folder."""
    with suppress(PenstockError):
        cluster = state.read(data)
        if cluster is not None and state.alive(cluster.launcher):
            return [good("port", f"the cluster of {data} runs at {cluster.url or '(starting)'}")]
    try:
        ports.check_free(host, number)
    except SettingsError as error:
        return [bad("port", error.message, f"penstock up --port {number + 1}")]
    return [good("port", f"{host}:{number} is free")]


def model(given: str) -> list[Finding]:
    try:
        path = model_directory.resolve(given)
    except SettingsError as error:
        return [bad("model", error.message, "penstock up --model PATH, or: penstock make-model --params 100m --out DIR")]
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    findings = [good("model", f"{path} ({weights / (1 << 20):,.0f} MiB of weights)")]
    if not (path / "tokenizer.json").is_file():
        findings.append(
            note("tokenizer", "no tokenizer.json", "serving needs a tokenizer that transformers can load from the directory")
        )
    if not model_directory.has_chat_template(path):
        findings.append(
            note("chat template", "the model has none: /v1/completions only", "put a chat_template.jinja beside tokenizer.json")
        )
    free = psutil.virtual_memory().available
    if 2 * weights > 0.9 * free:  # one copy in prefill, one in decode
        mend = "use a smaller model, --dtype bfloat16, or --prefill 0"
        findings.append(
            note("model memory", f"two copies of the weights want {2 * weights / _GIB:.1f} of {free / _GIB:.1f} GiB", mend)
        )
    return findings

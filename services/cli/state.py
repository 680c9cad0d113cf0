"""DATA/penstock.json: which processes a cluster consists of, so that `down` and `status` find them.

A process is named by pid, start time and boot id, so a pid that has been given to another process
is never signalled. The file is replaced whole (write, rename); DATA/lock is held with
`flock` by the launcher for as long as it lives, which the kernel ends with it however it ends.
"""

import fcntl
import functools
import os
import select
import signal
from pathlib import Path

import msgspec

from common.errors import PenstockError, SettingsError

FILE = "penstock.json"


class ProcessId(msgspec.Struct, frozen=True):
    """One incarnation of a process."""

    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    boot: str


class ServiceState(msgspec.Struct, frozen=True):
    name: str
    kind: str
    state: str
    stage: str
    restarts: int
    addresses: dict[str, str]
    process: ProcessId | None
    log: str


class ClusterState(msgspec.Struct, frozen=True):
    launcher: ProcessId
    model: str
    served_name: str
    url: str
    run_dir: str
    ready: bool
    stop_s: float  # how long a stop may take before `down` loses patience
    started_at: float  # Unix time
    services: list[ServiceState] = []


def myself() -> ProcessId:
    found = identify(os.getpid())
    assert found is not None
    return found


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name may hold spaces and brackets
    return None if fields[0] in "ZX" else ProcessId(pid=pid, start_ticks=int(fields[19]), boot=_boot())


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def alive(process: ProcessId | None) -> bool:
    return process is not None and identify(process.pid) == process


def send(process: ProcessId, number: signal.Signals, *, group: bool = False) -> bool:
    """Signals exactly this incarnation (or its process group); False when it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if identify(process.pid) != process:
            return False
        if group:
            os.killpg(process.pid, number)
        else:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def wait_gone(process: ProcessId, timeout_s: float) -> bool:
    """Whether the process ends within the time; for processes that are not our children."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if identify(process.pid) != process:
            return True
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(fd)


def read(data: Path) -> ClusterState | None:
    """What the file says; None when there is none. A file that can't be read is an error."""
    try:
        return msgspec.json.decode((data / FILE).read_bytes(), type=ClusterState)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise PenstockError(f"{data / FILE}: {error}; if no cluster uses {data}, remove the file") from error


def write(data: Path, state: ClusterState) -> None:
    scratch = data / (FILE + ".new")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
    scratch.replace(data / FILE)


def forget(data: Path) -> None:
    (data / FILE).unlink(missing_ok=True)


def take_lock(data: Path) -> int:
    """Makes this process the launcher of `data`; the descriptor keeps it so.

    Raises:
        SettingsError: another launcher has it, or the folder can't be used.
    """
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(
            f"data = {str(data)!r}: {error.strerror}; choose a folder that can be written (--data DIR)"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise SettingsError(
            f"data = {str(data)!r} {_held_by(data)}; stop it (penstock down --data {data}) or use another --data"
        ) from error
    return fd


def _held_by(data: Path) -> str:
    state = read(data)
    if state is None:
        return "is used by a cluster that is just starting"
    return f"is used by the cluster at {state.url or '(starting)'} (launcher pid {state.launcher.pid})"

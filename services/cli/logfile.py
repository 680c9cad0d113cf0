"""Log files of the services: rotated at every start, followed while they run, read when one dies.

A service writes JSON lines (`common.logs`); NATS writes its own format. `read_line` turns either
into a `Record`. Following is by polling the file's end: a read that finds nothing costs one system
call, and the service never waits for its reader.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

ROTATED_MAX = 4  # older starts' logs kept beside the current one
_TAIL_BYTES = 64 << 10
_HOUSEKEEPING = ("ts", "level", "service", "event", "logger")
_LAST_OF_TRACEBACK = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b.*|^the launcher is gone$")
_NATS_ADDRESS = re.compile(r"Listening for client connections on (\S+)$")


class Record(msgspec.Struct, frozen=True):
    """One line. `event` is empty for lines that are not ours."""

    event: str
    fields: dict[str, Any] = {}
    level: str = "info"
    text: str = ""


def read_line(line: str) -> Record:
    """A line of a service's log."""
    try:
        parsed = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return _read_nats(line)
    if not isinstance(parsed, dict):
        return Record(event="", text=line)
    fields = {key: value for key, value in parsed.items() if key not in _HOUSEKEEPING}
    event, level = str(parsed.get("event", "")), str(parsed.get("level", "info"))
    return Record(event=event, fields=fields, level=level, text=_in_words(parsed, fields))


def _read_nats(line: str) -> Record:
    address = _NATS_ADDRESS.search(line)
    if address:
        return Record(event="listening", fields={"nats": f"nats://{address[1]}"}, text=line)
    if line.endswith("Server is ready"):
        return Record(event="ready", text=line)
    if "[FTL]" in line:
        return Record(event="failed", fields={"reason": line.partition("[FTL] ")[2]}, level="error", text=line)
    return Record(event="", text=line)


def _in_words(parsed: dict[str, Any], fields: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(float(parsed.get("ts", 0))))
    pairs = " ".join(f"{key}={value}" for key, value in fields.items() if key != "traceback")
    trace = f"\n{fields['traceback']}" if "traceback" in fields else ""
    return f"{clock} {parsed.get('level', '')} {parsed.get('event', '')} {pairs}".rstrip() + trace


class Tail:
    """Follows one growing file from where it ends now; `read()` returns the complete lines since the last call."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._file.seek(0, 2)
        self._rest = b""  # a line still being written

    def read(self) -> list[str]:
        chunk = self._file.read(1 << 20)
        if not chunk:
            return []
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode(errors="replace") for line in lines if line.strip()]

    def close(self) -> None:
        self._file.close()


def rotate(path: Path) -> None:
    """Makes room for a new, empty log: path.1 is the previous start's, at most ROTATED_MAX are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        for age in range(ROTATED_MAX, 1, -1):
            older = path.with_name(f"{path.name}.{age - 1}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{age}"))
        path.replace(path.with_name(f"{path.name}.1"))
    path.touch()


def last_lines(path: Path, count: int, since: int = 0) -> Sequence[str]:
    """The end of a log, in words; nothing from before byte `since`."""
    return [text for line in _end_of(path, since)[-count:] for text in read_line(line).text.splitlines()][-count:]


def reason_in(path: Path, since: int = 0) -> str | None:
    """Why the service ended, where its log says so after byte `since`."""
    lines = [line for line in _end_of(path, since) if line.strip()]
    for line in reversed(lines):
        record = read_line(line)
        if "reason" in record.fields and record.level == "error":
            return str(record.fields["reason"])
        if not record.event and _LAST_OF_TRACEBACK.match(line):
            return line.strip().removeprefix("common.errors.")
    last = read_line(lines[-1]) if lines else None
    return last.text.strip() if last is not None and not last.event else None  # a wrong flag: said before logs are set up


def _end_of(path: Path, since: int) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(since, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []

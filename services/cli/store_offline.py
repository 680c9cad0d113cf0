"""`penstock store` on the directories of a store that is stopped: stat, check, dump-block. Nothing is written to them."""

import argparse
import json
import sys
import time
from pathlib import Path

import msgspec

from services.cli.status import size, table
from services.cli.store_text import bar, header_lines, hex_lines, problem_lines
from services.kvstore.offline import BlockOnDisk, Survey, find_block, survey

_EVERY_S = 0.2  # the bar moves


def run(given: argparse.Namespace) -> int:
    """The exit status."""
    match given.command:
        case "stat":
            return _stat(given)
        case "check":
            return _check(given)
        case _:
            return _dump(given)


def _stat(given: argparse.Namespace) -> int:
    found = survey(given.folder, payloads=False)
    print(_json(found) if given.json else "\n".join(_lines(found)))
    return 1 if found.problem_count else 0


def _check(given: argparse.Namespace) -> int:
    began_s = time.monotonic()
    progress = _Bar(began_s)
    found = survey(given.folder, payloads=True, bytes_per_s=(given.mib_per_s or 0) * (1 << 20), progress=progress.show)
    progress.clear()
    seconds = time.monotonic() - began_s
    verdict = f"{found.problem_count:,} problems: each is a miss" if found.problem_count else "all is well"
    lines = [*_lines(found), "", f"Read {size(found.read_bytes)} in {seconds:,.1f} s: {verdict}."]
    print(_json(found) if given.json else "\n".join(lines))
    return 1 if found.problem_count else 0


def _dump(given: argparse.Namespace) -> int:
    block = find_block(given.folder, bytes.fromhex(given.key))
    if block is None:
        print(f"penstock store: block {given.key} is in none of these folders", file=sys.stderr)
        return 1
    print("\n".join(header_lines(_fields(block))))
    if block.payload is None:
        print("penstock store: the payload doesn't match its checksum", file=sys.stderr)
        return 1
    return write_payload(block.payload, given.raw)


def write_payload(payload: bytes, raw: Path | None) -> int:
    """To a file, or the beginning of it to the screen."""
    if raw is None:
        print("\n".join(["", *hex_lines(payload)]))
    else:
        raw.write_bytes(payload)
        print(f"{len(payload):,} bytes written to {raw}")
    return 0


def _fields(block: BlockOnDisk) -> dict[str, object]:
    place: dict[str, object] = {"path": block.path, "offset": block.offset}
    return {**msgspec.structs.asdict(block.header), **place}


def _lines(found: Survey) -> list[str]:
    lines = [f"{folder}: {said}" for folder, said in found.folders.items()]
    lines += [f"{found.blocks:,} blocks in {size(found.file_bytes)} of segment files", ""]
    rows = [
        [
            name[:16],
            f"{one.blocks:,}",
            size(one.payload_bytes),
            str(one.segments),
            f"{one.slots_per_segment:,}",
            f"{one.superseded:,}",
        ]
        for name, one in found.namespaces.items()
    ]
    lines += table([["NAMESPACE", "BLOCKS", "BLOCK", "SEGMENTS", "SLOTS EACH", "SUPERSEDED"], *rows])
    if found.problem_count:
        lines += ["", f"{found.problem_count:,} problems:", *problem_lines(found.problems, found.problem_count)]
    if found.notes:
        lines += ["", "Left alone:", *problem_lines(found.notes, len(found.notes))]
    return lines


def _json(found: Survey) -> str:
    return json.dumps(msgspec.to_builtins(found), indent=2)


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._shown_s = 0.0
        self._on = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if self._on and now_s - self._shown_s >= _EVERY_S:
            self._shown_s = now_s
            print(f"\r{bar(done, total, now_s - self._began_s)}\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

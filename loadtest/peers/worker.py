"""One store under test, in a process of its own: it is told what to do and says how long that took.

A store gets blocks whose bytes follow from (seed, round, index), so that whoever reads them can check
every byte without having kept them. What is timed is the store's own work; making, checking and
forgetting bytes is not.

Commands come as JSON lines on stdin, answers go as JSON lines to stdout; whatever a library prints is
turned to stderr. Runs in the peers' environment: nothing here but the standard library and numpy.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

SYNCS = 8  # at once: as many as LMCache has I/O threads


@dataclass(frozen=True)
class Shape:
    """What a round is: `blocks` blocks of `block_bytes` bytes."""

    blocks: int
    block_bytes: int
    seed: int

    def block(self, round_: int, index: int) -> bytes:
        """The bytes of a block: the same in every process."""
        return np.random.default_rng([self.seed, round_, index]).bytes(self.block_bytes)


@dataclass(frozen=True)
class Put:
    """What a store took in, by index; seconds until it had said so, until it was on the disk (None: never seen there),
    and until it was synced, so that a power cut loses nothing of it."""

    accepted: list[int]
    accepted_s: float
    stored_s: float | None
    durable_s: float | None


@dataclass(frozen=True)
class Got:
    """Seconds, and per block asked for its bytes, or None for a miss. The views are good until the next call."""

    seconds: float
    blocks: list[memoryview | None]


class Store(Protocol):
    """A store under test. Calls come one after another, from one thread."""

    @property
    def how(self) -> str:
        """The way that bytes take, in a few words; known after the first read."""

    def forget(self) -> None:
        """Lets go of what was got before, so that none of what is asked for next is in the caller's memory."""

    def put(self, round_: int, blocks: Sequence[bytes]) -> Put: ...

    def get(self, round_: int, indices: Sequence[int]) -> Got:
        """One block at a time: the next is asked for when the one before it is there."""

    def batched_get(self, round_: int, indices: Sequence[int]) -> Got:
        """All in the store's largest unit."""

    def close(self) -> None: ...


class Session:
    """Carries out the commands for one store."""

    def __init__(self, store: Store, shape: Shape, folder: Path) -> None:
        self._store = store
        self._shape = shape
        self._folder = folder
        self._accepted: dict[int, list[int]] = {}

    def put(self, round_: int) -> dict[str, Any]:
        self._store.forget()
        done = self._store.put(round_, [self._shape.block(round_, i) for i in range(self._shape.blocks)])
        self._accepted[round_] = done.accepted
        return asdict(done) | {"accepted": len(done.accepted)}

    def get(self, round_: int) -> dict[str, Any]:
        return self._read(round_, self._store.get)

    def batched_get(self, round_: int) -> dict[str, Any]:
        return self._read(round_, self._store.batched_get)

    def verify(self) -> dict[str, Any]:
        """Every accepted block of every round, read again."""
        answers = [self._read(round_, self._store.batched_get) for round_ in self._accepted]
        sums = {name: sum(answer[name] for answer in answers) for name in ("asked", "right", "wrong")}
        return sums | {"how": self._store.how}

    def _read(self, round_: int, read: Callable[[int, Sequence[int]], Got]) -> dict[str, Any]:
        self._store.forget()
        forget_cached(self._folder)
        indices = self._accepted[round_]
        got = read(round_, indices)
        right = wrong = 0
        for index, block in zip(indices, got.blocks, strict=True):
            same = block is not None and block == self._shape.block(round_, index)
            right += same
            wrong += block is not None and not same
        return {"seconds": got.seconds, "asked": len(indices), "right": right, "wrong": wrong}


def forget_cached(folder: Path) -> None:
    """Writes a store's files out and drops them from the page cache, so that reads come from the disk."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def sync(paths: Sequence[Path]) -> None:
    """Syncs files, SYNCS at a time, and the folders that they are in."""
    with ThreadPoolExecutor(SYNCS) as pool:
        list(pool.map(_sync, [*paths, *{path.parent for path in paths}]))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def bytes_in(folder: Path) -> int:
    """Of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # removed meanwhile
            continue
    return total


def until(done: Callable[[], bool], began_s: float, limit_s: float) -> float | None:
    """Seconds since `began_s` when `done` first says so; None when it doesn't within the limit."""
    while not done():
        if time.perf_counter() - began_s > limit_s:
            return None
        time.sleep(0.005)
    return time.perf_counter() - began_s


def serve(open_store: Callable[[Path, Shape, list[str]], Store]) -> None:
    """A worker's main: opens the store, then obeys until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--block-bytes", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args, more = parser.parse_known_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    args.folder.mkdir(parents=True, exist_ok=True)
    shape = Shape(args.blocks, args.block_bytes, args.seed)
    store = open_store(args.folder, shape, more)
    try:
        _say(answers, {"ready": True})
        session = Session(store, shape, args.folder)
        for line in sys.stdin:
            command = json.loads(line)
            _say(answers, getattr(session, command.pop("do"))(**command))
    finally:
        store.close()


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()

"""File layers for tests: one that fails on demand, one that remembers everything for a crash.

Their rings ask the same layer: an operation that it may fail or must see is made by it, on a thread, and
completes through the ring like any other.
"""

import errno
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from common.disk.ring import Ring, open_ring
from services.kvstore.files import Files

SECTOR = 512  # what a disk writes at once


class LayeredRing(Ring):
    """A ring whose operations go through `files` where `seen` says so."""

    def __init__(self, entries: int, files: Files, seen: Callable[[str], bool]) -> None:
        open_ring(1).close()  # raises `RingUnavailable`
        super().__init__(entries)
        self._files, self._seen = files, seen
        self._threads: dict[int, threading.Thread] = {}
        self._ended: deque[tuple[int, int]] = deque()
        self._linked: threading.Thread | None = None  # what the next one waits for

    @property
    def in_flight(self) -> int:
        return super().in_flight + len(self._threads)

    def read(self, tag: int, fd: int, buffers: Sequence[memoryview], offset: int, *, linked: bool = False) -> None:
        if self._seen("read"):
            self._start(tag, lambda: self._files.read(fd, buffers, offset), self._linked)
            self._linked = self._threads[tag] if linked else None
        else:
            super().read(tag, fd, buffers, offset, linked=linked)

    def write(self, tag: int, fd: int, buffers: Sequence[memoryview], offset: int, *, linked: bool = False) -> None:
        if self._seen("write"):
            self._start(tag, lambda: self._files.write(fd, buffers[0], offset), self._linked)
            self._linked = self._threads[tag] if linked else None
        else:
            super().write(tag, fd, buffers, offset, linked=linked)

    def sync(self, tag: int, fd: int) -> None:
        if self._seen("sync"):
            self._start(tag, lambda: self._files.sync(fd) or 0)
        else:
            super().sync(tag, fd)

    def submit(self, *, wait: bool = False) -> None:
        if wait and self._threads:
            for thread in list(self._threads.values()):
                thread.join()
            wait = False
        super().submit(wait=wait)

    def reap(self) -> list[tuple[int, int]]:
        ended = [self._ended.popleft() for _ in range(len(self._ended))]
        for tag, _ in ended:
            self._threads.pop(tag).join()
        return ended + super().reap()

    def _start(self, tag: int, call: Callable[[], int], before: threading.Thread | None = None) -> None:
        def run() -> None:
            if before is not None:
                before.join()
            try:
                result = call()
            except OSError as error:
                result = -(error.errno or errno.EIO)
            self._ended.append((tag, result))
            os.eventfd_write(self.fd, 1)

        self._threads[tag] = threading.Thread(target=run)
        self._threads[tag].start()


class FailingFiles(Files):
    """`fail[name]` is asked before each call of that name: it may raise, return a result, or None to go on."""

    def __init__(self) -> None:
        self.fail: dict[str, Callable[..., int | None]] = {}

    def ring(self, entries: int) -> Ring:
        return LayeredRing(entries, self, lambda name: name in self.fail)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = self.fail["read"](fd, buffers, offset) if "read" in self.fail else None
        return super().read(fd, buffers, offset) if got is None else got

    def write(self, fd: int, buffer: memoryview, offset: int) -> int:
        got = self.fail["write"](fd, buffer, offset) if "write" in self.fail else None
        return super().write(fd, buffer, offset) if got is None else got

    def open(self, path: Path, flags: int) -> int:
        if "open" in self.fail:
            self.fail["open"](path, flags)
        return super().open(path, flags)

    def allocate(self, fd: int, length: int) -> None:
        if "allocate" in self.fail:
            self.fail["allocate"](fd, length)
        super().allocate(fd, length)

    def sync(self, fd: int) -> None:
        if "sync" in self.fail:
            self.fail["sync"](fd)
        super().sync(fd)

    def remove(self, path: Path) -> None:
        if "remove" in self.fail:
            self.fail["remove"](path)
        super().remove(path)

    def make_folder(self, path: Path) -> None:
        if "make_folder" in self.fail:
            self.fail["make_folder"](path)
        super().make_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        if "rename" in self.fail:
            self.fail["rename"](old, new)
        super().rename(old, new)

    def sync_folder(self, path: Path) -> None:
        if "sync_folder" in self.fail:
            self.fail["sync_folder"](path)
        super().sync_folder(path)


def raising(number: int) -> Callable[..., int | None]:
    """Fails with an errno."""

    def fail(*_: object) -> int | None:
        raise OSError(number, os.strerror(number))

    return fail


EIO, ENOSPC = raising(errno.EIO), raising(errno.ENOSPC)


class Event(msgspec.Struct, frozen=True):
    """One thing that happened. Which fields count depends on `kind`."""

    kind: str  # write, sync, allocate, create, rename, remove, sync_folder, mark
    file: int = 0  # number of the file, by order of creation
    offset: int = 0
    data: bytes = b""
    began: int = 0  # sync, sync_folder: how many events had ended when it began
    path: str = ""
    target: str = ""
    mark: object = None


class RecordingFiles(Files):
    """Does everything for real and notes it, in the order in which the calls ended."""

    def __init__(self, root: Path) -> None:
        self.events: list[Event] = []
        self.root = root
        self._lock = threading.Lock()
        self._numbers: dict[int, int] = {}  # inode -> file number; inodes aren't reused while fds are open
        self._keep: list[int] = []

    def ring(self, entries: int) -> Ring:
        return LayeredRing(entries, self, lambda name: name != "read")

    def mark(self, what: object) -> None:
        self._note(Event("mark", mark=what))

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        inode = os.fstat(fd).st_ino
        if inode not in self._numbers:
            self._numbers[inode] = len(self._numbers) + 1
            self._keep.append(os.dup(fd))
            self._note(Event("create", self._numbers[inode], path=self._name(path)))
        return fd

    def write(self, fd: int, buffer: memoryview, offset: int) -> int:
        data = bytes(buffer)
        done = super().write(fd, buffer, offset)
        self._note(Event("write", self._number(fd), offset, data[:done]))
        return done

    def allocate(self, fd: int, length: int) -> None:
        super().allocate(fd, length)
        self._note(Event("allocate", self._number(fd), length))

    def sync(self, fd: int) -> None:
        began = len(self.events)
        super().sync(fd)
        self._note(Event("sync", self._number(fd), began=began))

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self._note(Event("rename", path=self._name(old), target=self._name(new)))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._note(Event("remove", path=self._name(path)))

    def sync_folder(self, path: Path) -> None:
        began = len(self.events)
        super().sync_folder(path)
        self._note(Event("sync_folder", began=began))

    def close_all(self) -> None:
        for fd in self._keep:
            os.close(fd)

    def _number(self, fd: int) -> int:
        return self._numbers[os.fstat(fd).st_ino]

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _note(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)


def disk_after_crash(events: Sequence[Event], crash: int, folder: Path, choice: random.Random) -> None:
    """Makes in `folder` what a disk may hold when the power goes after `crash` events.

    What was synced is there. Of the rest, each write is there, or not, or in part, sector by sector;
    each change of a name is there or not, in order. The event under way may have begun.
    """
    happened = list(events[:crash])
    if crash < len(events) and events[crash].kind == "write":
        happened.append(events[crash])
    synced: dict[int, int] = {}
    names_synced = 0
    for event in happened:
        if event.kind == "sync":
            synced[event.file] = max(synced.get(event.file, 0), event.began)
        elif event.kind == "sync_folder":
            names_synced = max(names_synced, event.began)
    contents: dict[int, bytearray] = {}
    names: dict[str, int] = {}
    names_lost = False
    for i, event in enumerate(happened):
        durable = i < synced.get(event.file, 0)
        match event.kind:
            case "write":
                _write(contents[event.file], event, durable, choice)
            case "allocate":
                data = contents[event.file]
                if durable or choice.random() < 0.5:
                    data.extend(bytes(max(0, event.offset - len(data))))
            case "create" | "rename" | "remove":
                if event.kind == "create":
                    contents[event.file] = bytearray()
                names_lost = names_lost or (i >= names_synced and choice.random() < 0.3)
                if not names_lost:
                    _rename(names, event)
    for name, number in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number])


def _write(data: bytearray, event: Event, durable: bool, choice: random.Random) -> None:
    fate = "whole" if durable else choice.choice(["whole", "lost", "torn", "torn"])
    if fate == "lost":
        return
    data.extend(bytes(max(0, event.offset + len(event.data) - len(data))))
    for at in range(0, len(event.data), SECTOR):
        if fate == "whole" or choice.random() < 0.5:
            data[event.offset + at : event.offset + at + SECTOR] = event.data[at : at + SECTOR]


def _rename(names: dict[str, int], event: Event) -> None:
    if event.kind == "create":
        names[event.path] = event.file
    elif event.kind == "rename":
        if event.path in names:
            names[event.target] = names.pop(event.path)
    else:
        names.pop(event.path, None)

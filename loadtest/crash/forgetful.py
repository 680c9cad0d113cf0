"""A kvstore whose writes are lost with its process, unless they were synced: a power cut by SIGKILL.

    python -m loadtest.crash.forgetful SEED -- FLAGS OF THE KVSTORE

What is written to a file stays in this process until the file is synced. Of each write some pages may
reach the disk at once, as they do when nobody waits for them. Names and sizes of files are the file
system's own.
"""

import os
import random
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from common import process
from common.disk.pages import aligned
from common.disk.ring import Ring, RingUnavailable
from services.kvstore import store
from services.kvstore.files import Files
from services.kvstore.record import PAGE_BYTES
from services.kvstore.serve import serve
from services.kvstore.settings import KvStoreSettings


class ForgetfulFiles(Files):
    """Pages written and not yet synced, by inode and offset, over the real files."""

    def __init__(self, choice: random.Random) -> None:
        self._choice = choice
        self._lock = threading.Lock()
        self._unsynced: dict[int, dict[int, bytes]] = {}

    def ring(self, entries: int) -> Ring:
        raise RingUnavailable("the kernel would not forget what it was given")

    def write(self, fd: int, buffer: memoryview, offset: int) -> int:
        if offset % PAGE_BYTES:
            raise AssertionError(f"a write at {offset} does not begin at a page")
        pages = {offset + at: bytes(buffer[at : at + PAGE_BYTES]) for at in range(0, len(buffer), PAGE_BYTES)}
        with self._lock:
            self._unsynced.setdefault(os.fstat(fd).st_ino, {}).update(pages)
            count = self._choice.choice((0, 0, 1, len(pages) // 2, len(pages)))  # that get there by themselves
            for at in sorted(self._choice.sample(sorted(pages), count)):
                _write_page(fd, at, pages[at])
        return len(buffer)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            got = super().read(fd, buffers, offset)
            waiting = self._unsynced.get(os.fstat(fd).st_ino, {})
            for buffer in buffers:
                _patch(buffer, offset, waiting)
                offset += len(buffer)
            return got

    def sync(self, fd: int) -> None:
        with self._lock:
            waiting = self._unsynced.pop(os.fstat(fd).st_ino, {})
            for at, page in waiting.items():
                _write_page(fd, at, page)
            super().sync(fd)

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        if flags & os.O_TRUNC:
            self._forget(os.fstat(fd).st_ino)
        return fd

    def remove(self, path: Path) -> None:
        self._forget(path.stat().st_ino)  # the number will be another file's
        super().remove(path)

    def _forget(self, inode: int) -> None:
        with self._lock:
            self._unsynced.pop(inode, None)


def _write_page(fd: int, offset: int, page: bytes) -> None:
    buffer = aligned(len(page))
    buffer[:] = page
    os.pwrite(fd, buffer, offset)


def _patch(buffer: memoryview, offset: int, waiting: dict[int, bytes]) -> None:
    """Puts the unsynced pages over what was read from `offset` on."""
    for at in range(0, len(buffer), PAGE_BYTES):
        page = waiting.get(offset + at)
        if page is not None:
            part = min(PAGE_BYTES, len(buffer) - at)
            buffer[at : at + part] = page[:part]


def main() -> None:
    """Wires the files in: the store makes its own otherwise."""
    choice = random.Random(sys.argv[1])
    files = ForgetfulFiles(choice)
    vars(store)["Files"] = lambda: files
    sys.argv = [str(Path(__file__)), *sys.argv[3:]]
    sys.exit(process.start("kvstore", KvStoreSettings, "A kvstore that forgets what is not synced.", serve))


if __name__ == "__main__":
    main()

"""The file system calls that the store makes, in one place.

`Files` is the real thing. Tests pass a layer over it that records, fails or forgets, so every call
that can lose data goes through here, and so does the io_uring that makes them in bulk.
"""

import errno
import fcntl
import os
import shutil
from pathlib import Path

from common.disk.engine import Machine
from common.disk.pages import aligned
from common.errors import Unavailable
from common.transport.memory import crc32c
from services.kvstore.budget import Room

PROBE_NAME = ".probe"
LOCK_NAME = "LOCK"


class Files(Machine):
    """Thin, blocking calls; errors are `OSError`."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o640)

    def close(self, fd: int) -> None:
        os.close(fd)

    def allocate(self, fd: int, length: int) -> None:
        os.posix_fallocate(fd, 0, length)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o750, parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def room(self, folder: Path) -> Room:
        """What the file system under a folder has, and what our segments and their checkpoints there take."""
        held_bytes = sum(path.stat().st_size for ending in ("seg", "ckp") for path in folder.rglob(f"*.{ending}"))
        usage = shutil.disk_usage(folder)
        return Room(folder.stat().st_dev, usage.total, usage.free, held_bytes)

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def direct_io_works(folder: Path) -> bool:
    """Whether the file system takes O_DIRECT reads and writes of aligned pages."""
    path = folder / PROBE_NAME
    page = aligned(4096)
    page[:5] = b"probe"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        back = aligned(4096)
        return os.pwrite(fd, page, 0) == 4096 and os.preadv(fd, [back], 0) == 4096 and crc32c(back) == crc32c(page)
    except OSError:
        return False
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


class FolderLock:
    """One process owns a data folder. The lock is the kernel's: it goes when the process does."""

    def __init__(self, folder: Path) -> None:
        """Takes the lock. Raises `Unavailable`, naming the process that has it."""
        self._path = folder / LOCK_NAME
        self._fd, writable = _open_lock(self._path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._fd, 64, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise Unavailable(
                f"data folder {folder} is in use by process {owner}: stop it, or give this one another data_dir"
            ) from error
        if writable:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two processes lock two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_lock(path: Path) -> tuple[int, bool]:
    """The lock file and whether it can be written: a file system that can't be is locked all the same."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640), True
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False

"""One data directory of the store, and whether it can be used.

1. `open_disks` locks every directory, reads its STORE file, seats it (identity.py) and splits the budget.
   Only a directory that another process owns stops the start; one that can't be used is LOST.
2. While it serves, an I/O error on a segment makes the store probe the directory: a bad block leaves
   it SERVING, a file system that takes no writes makes it READ_ONLY, one that is gone makes it LOST.
3. It stays so until the store is opened again.

A missing entry in `NEXT` means that the event changes nothing.
"""

import errno
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from common.disk.pages import aligned
from common.logs import Log
from services.kvstore.budget import split
from services.kvstore.files import PROBE_NAME, Files, FolderLock, direct_io_works
from services.kvstore.identity import Claim, seat
from services.kvstore.record import PAGE_BYTES, STORE_ID_BYTES, StoreIdentity, Unreadable, decode_store, encode_store

log = Log("disk")
STORE_NAME = "STORE"
NAMESPACES_FOLDER = "namespaces"
OWN_FILES_BYTES = 4 * PAGE_BYTES  # STORE, the one that is to replace it, LOCK, the probe's file
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskState(StrEnum):
    SERVING = "serving"
    READ_ONLY = "read_only"  # its blocks are served, nothing is written
    LOST = "lost"  # its blocks are misses


NEXT: dict[tuple[DiskState, str], DiskState] = {
    (DiskState.SERVING, "write_failed"): DiskState.READ_ONLY,
    (DiskState.SERVING, "read_failed"): DiskState.LOST,
    (DiskState.READ_ONLY, "read_failed"): DiskState.LOST,
}


class Disk:
    """A directory. Belongs to the event loop, but for the probes."""

    def __init__(self, position: int, folder: Path) -> None:
        self.position = position  # among the directories that were given
        self.folder = folder
        self.state = DiskState.SERVING
        self.problem = ""  # why it isn't SERVING
        self.identity: StoreIdentity | None = None
        self.direct = False
        self.budget_bytes = 0
        self.unusable_bytes = 0  # of files that must be left alone
        self.segment_bytes = 0  # of segments in use, their checkpoints included
        self.changing_bytes = 0  # of segments being created or removed
        self.full_until_s = 0.0
        self.errors = 0
        self._lock: FolderLock | None = None

    def __repr__(self) -> str:
        return f"Disk({self.folder}, {self.state}, {self.used_bytes} of {self.budget_bytes} bytes)"

    @property
    def namespaces(self) -> Path:
        return self.folder / NAMESPACES_FOLDER

    @property
    def used_bytes(self) -> int:
        """What all files there take or may take, in whole pages."""
        own_bytes = OWN_FILES_BYTES if self.identity is not None else 0
        return own_bytes + self.unusable_bytes + self.changing_bytes + self.segment_bytes

    def has_room(self, length: int) -> bool:
        return self.state is DiskState.SERVING and self.used_bytes + length <= self.budget_bytes

    def step(self, event: str, reason: str) -> bool:
        """Whether the event changed the state."""
        state = NEXT.get((self.state, event), self.state)
        if state is self.state:
            return False
        self.state, self.problem = state, reason
        log.error(f"disk_{state}", folder=str(self.folder), reason=reason)
        return True

    def take(self, files: Files) -> Claim:
        """Makes and locks the directory; what it says it is. Blocking; raises `OSError`, `Unavailable`."""
        files.make_folder(self.folder)
        self._lock = FolderLock(self.folder)
        if not self.namespaces.exists():
            files.make_folder(self.namespaces)
        for parent in (self.folder, self.folder.parent):
            files.sync_folder(parent)  # a power cut must not take the folders with what is in them
        segments = next(self.namespaces.glob("*/*.seg"), None) is not None
        return Claim(read_identity(files, self.folder), segments)

    def settle(self, files: Files, identity: StoreIdentity, *, direct: bool) -> None:
        """Takes the seat: the STORE file says so from now on. Blocking."""
        before = read_identity(files, self.folder)
        self.direct = direct and direct_io_works(self.folder)
        self.identity = identity
        if before == identity:
            return
        try:
            write_identity(files, self.folder, identity)
        except OSError as error:
            if before is None or isinstance(before, Unreadable):
                raise
            self.identity = before
            self.step("write_failed", str(error))

    def release(self) -> None:
        """Idempotent."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def probe_read(self, files: Files) -> str:
        """Whether the directory can still be read: empty, or why not. Blocking; any thread."""
        try:
            found = read_identity(files, self.folder, direct=self.direct)
        except OSError as error:
            return str(error)
        if not isinstance(found, StoreIdentity) or (self.identity and found.store != self.identity.store):
            return f"{self.folder / STORE_NAME} is gone or another: is the file system still mounted?"
        return ""

    def probe_write(self, files: Files) -> str:
        """Whether the directory takes writes: empty (also when it is merely full), or why not. Blocking; any thread."""
        try:
            _write_page(files, self.folder / PROBE_NAME, bytes(PAGE_BYTES), direct=self.direct)
            files.remove(self.folder / PROBE_NAME)
        except OSError as error:
            return "" if error.errno in _FULL else str(error)
        return ""


def open_disks(files: Files, folders: Sequence[Path], *, budget_bytes: int, direct: bool) -> list[Disk]:
    """The directories, in order. Blocking. Raises `Unavailable` when another process has one of them, and
    the first `OSError` when none can be used."""
    disks = [Disk(position, folder) for position, folder in enumerate(folders)]
    try:
        claims, errors = _take_all(files, disks)
        _seat_all(files, disks, claims, errors, direct)
        if all(disk.state is DiskState.LOST for disk in disks):
            raise errors[0] if errors else OSError(errno.EINVAL, "; ".join(disk.problem for disk in disks))
    except BaseException:
        for disk in disks:
            disk.release()
        raise
    usable = [disk for disk in disks if disk.state is not DiskState.LOST]
    for disk, share in zip(usable, split(budget_bytes, [files.room(disk.folder) for disk in usable]), strict=True):
        disk.budget_bytes = share
    return disks


def _take_all(files: Files, disks: Sequence[Disk]) -> tuple[dict[int, Claim], list[OSError]]:
    claims: dict[int, Claim] = {}
    errors: list[OSError] = []
    for disk in disks:
        try:
            claims[disk.position] = disk.take(files)
        except OSError as error:
            errors.append(error)
            disk.step("read_failed", str(error))
    return claims, errors


def _seat_all(files: Files, disks: Sequence[Disk], claims: dict[int, Claim], errors: list[OSError], direct: bool) -> None:
    positions = list(claims)
    seating = seat(list(claims.values()), os.urandom(STORE_ID_BYTES))
    for position, chosen in zip(positions, seating.seats, strict=True):
        disk = disks[position]
        if isinstance(chosen, str):
            disk.step("read_failed", f"left alone: {chosen}")
            continue
        try:
            disk.settle(files, chosen, direct=direct)
        except OSError as error:
            errors.append(error)
            disk.step("read_failed", str(error))
    for i in seating.unproven:
        log.warning("disk_joined", folder=str(disks[positions[i]].folder), reason="it has segments but no usable STORE file")
    if seating.missing:
        new = [str(disks[positions[i]].folder) for i in seating.joined]
        log.warning(
            "disks_missing",
            numbers=seating.missing,
            joined=new,
            effect="their blocks are misses",
            advice="give their directories too; a new directory beside a missing one may be a file system that isn't mounted",
        )


def read_identity(files: Files, folder: Path, *, direct: bool = False) -> StoreIdentity | Unreadable | None:
    """What a directory's STORE file says; None when there is none. Raises `OSError`."""
    path = folder / STORE_NAME
    if not path.exists():
        os.listdir(folder)  # a directory that can't be read has no answer
        return None
    fd = files.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        page = aligned(PAGE_BYTES)
        got = files.read(fd, [page], 0)
    finally:
        files.close(fd)
    return decode_store(page[:got])


def write_identity(files: Files, folder: Path, identity: StoreIdentity) -> None:
    """Writes the STORE file aside, makes it durable and puts it in place."""
    temporary = folder / f"{STORE_NAME}.tmp"
    _write_page(files, temporary, encode_store(identity), direct=False)
    files.rename(temporary, folder / STORE_NAME)
    files.sync_folder(folder)


def _write_page(files: Files, path: Path, page: bytes, *, direct: bool) -> None:
    buffer = aligned(PAGE_BYTES)
    buffer[:] = page
    fd = files.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0))
    try:
        if files.write(fd, buffer, 0) != PAGE_BYTES:
            raise OSError(errno.ENOSPC, "short write", str(path))
        files.sync(fd)
    finally:
        files.close(fd)

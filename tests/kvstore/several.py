"""Stores over several directories."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kvstore.support import NAMESPACE, Rig, options, room_for


def folders(root: Path, count: int = 3) -> list[Path]:
    return [root / f"ssd{i}" for i in range(count)]


def three(**changed: object) -> object:
    """Eight segments of four slots on each of three disks."""
    return options(**({"budget_bytes": room_for(24, disks=3)} | changed))


def disks_of(one: Rig, keys: Sequence[bytes]) -> list[int]:
    """On which disk each block lies."""
    shelf = one.store.space.shelves[NAMESPACE]
    slots = [shelf.index.find(key) for key in keys]
    return [shelf.place(slot)[0].disk for slot in slots if slot is not None]


def on_folder(folder: Path, act: Callable[..., int | None]) -> Callable[..., int | None]:
    """`act`, for calls on files in `folder` only."""

    def fail(first: int | Path, *rest: object) -> int | None:
        path = str(first) if isinstance(first, Path) else os.readlink(f"/proc/self/fd/{first}")
        return act(first, *rest) if path.startswith(str(folder)) else None

    return fail


def hanging(release: threading.Event) -> Callable[..., int | None]:
    """Doesn't come back before `release` is set."""

    def hang(*_: object) -> int | None:
        release.wait()
        return None

    return hang

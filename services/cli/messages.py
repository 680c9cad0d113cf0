"""What the launcher tells: shown on a terminal, written as plain lines, or sent to `up --detach`.

One tagged union, so that the three places show the same things and a new one misses none.
"""

from collections.abc import Callable

import msgspec


class Row(msgspec.Struct, frozen=True):
    """One service in the progress display."""

    name: str
    state: str
    stage: str


class Progress(msgspec.Struct, frozen=True, tag=True):
    rows: list[Row]


class Note(msgspec.Struct, frozen=True, tag=True):
    """Something worth a line: a restart, a drain."""

    text: str
    bad: bool = False


class Ready(msgspec.Struct, frozen=True, tag=True):
    url: str
    model: str
    curl: str
    seconds: float


class Served(msgspec.Struct, frozen=True, tag=True):
    """One finished request."""

    text: str
    ok: bool


class Failed(msgspec.Struct, frozen=True, tag=True):
    reason: str
    lines: list[str] = []  # the end of the log
    log: str = ""


class Stopped(msgspec.Struct, frozen=True, tag=True):
    clean: bool


Message = Progress | Note | Ready | Served | Failed | Stopped
Show = Callable[[Message], None]

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Message).decode

"""What a check of `penstock doctor` found."""

import enum

import msgspec


class Level(enum.Enum):
    GOOD = "good"
    NOTE = "note"  # it works, but less well than it could
    BAD = "bad"  # a cluster would not start or not work


class Finding(msgspec.Struct, frozen=True):
    what: str
    level: Level
    detail: str
    mend: str = ""  # what to do about it


def good(what: str, detail: str) -> Finding:
    return Finding(what=what, level=Level.GOOD, detail=detail)


def note(what: str, detail: str, mend: str) -> Finding:
    return Finding(what=what, level=Level.NOTE, detail=detail, mend=mend)


def bad(what: str, detail: str, mend: str) -> Finding:
    return Finding(what=what, level=Level.BAD, detail=detail, mend=mend)

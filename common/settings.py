"""Settings of a service: one frozen struct, filled from flags, one TOML file, or the environment.

Precedence: a flag, then the file's `[section]`, then `PENSTOCK_<SECTION>_<KEY>`, then the struct's
default. The struct is the only place where a key, its type, its bounds and its default are
declared; an unknown key anywhere stops the start and is named, with the nearest key that exists.

Fields are annotated with `Annotated[type, msgspec.Meta(description=..., ge=...)]`; the description
is the flag's help. A field whose name ends in `_key` or `_secret` is masked when shown.
"""

import argparse
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.errors import SettingsError

SECTIONS = ("router", "kvstore", "prefill", "decode", "up", "load", "bench")
_PREFIX = "PENSTOCK_"
_PROGRAMS = {name: f"python -m services.{name}" for name in ("router", "kvstore", "prefill", "decode")} | {"up": "penstock up"}
S = TypeVar("S", bound=msgspec.Struct)


def load(kind: type[S], section: str, argv: Sequence[str], environ: Mapping[str, str] = os.environ, *, about: str = "") -> S:
    """Settings from `argv`, `--config FILE` and `environ`. Exits on `--help`, raises `SettingsError`."""
    flags = vars(parser(kind, section, about).parse_args(argv))
    config = flags.pop("config", None) or environ.get(_PREFIX + "CONFIG")
    merged: dict[str, Any] = {}
    merged |= _from_environ(kind, section, environ)
    if config:
        merged |= _from_toml(kind, section, Path(config))
    merged |= {key: value for key, value in flags.items() if value is not None}
    return convert(kind, merged, section)


def convert(kind: type[S], values: Mapping[str, Any], section: str) -> S:
    """Checks types and bounds of `values`; the error names the key and its value."""
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as error:
        text = str(error)
        key = text.rpartition("`$.")[2].split("`")[0].split("[")[0] if "`$." in text else ""
        shown = f" = {values[key]!r}" if key in values else ""
        raise SettingsError(f"[{section}] {key}{shown}: {text.split(' - at')[0]}") from error


def shown(settings: msgspec.Struct) -> dict[str, Any]:
    """The effective settings for the log, secrets masked."""
    values = msgspec.to_builtins(settings)
    return {k: "***" if v and k.endswith(("_key", "_secret")) else v for k, v in values.items()}


def parser(kind: type[msgspec.Struct], section: str, about: str) -> argparse.ArgumentParser:
    """Flags for every field of `kind`, `--config FILE` beside them. Values are checked by `convert`."""
    out = argparse.ArgumentParser(
        prog=_PROGRAMS.get(section),
        description=about,
        epilog=f"Each flag is also a key of [{section}] in the TOML file, and a variable {_PREFIX}{section.upper()}_<KEY>.",
        allow_abbrev=False,
    )
    out.add_argument("--config", metavar="FILE", help=f"TOML file with a [{section}] table")
    add_flags(out, kind)
    return out


def add_flags(out: argparse.ArgumentParser, kind: type[msgspec.Struct]) -> None:
    """One `--flag` per field; booleans take `--flag/--no-flag`; tuples take a comma-separated list, and may be repeated."""
    for field in msgspec.structs.fields(kind):
        base, meta = _unwrap(field.type)
        text = (meta.description if meta and meta.description else field.name.replace("_", " ")).replace("%", "%%")
        if field.default is not msgspec.NODEFAULT and field.default not in (None, "", ()):
            text += f" (default: {field.default})"
        elif field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT:
            text += " (required)"
        flag = "--" + field.name.replace("_", "-")
        if base is bool:
            out.add_argument(flag, dest=field.name, default=None, action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(base) is tuple:
            out.add_argument(flag, dest=field.name, default=None, type=_comma_list, action="extend", metavar="VALUE", help=text)
        else:
            out.add_argument(flag, dest=field.name, default=None, metavar="VALUE", help=text)


def _comma_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _unwrap(annotation: Any) -> tuple[Any, msgspec.Meta | None]:
    """The plain type behind `Annotated` and `| None`, and its Meta."""
    meta = None
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, meta = typing.get_args(annotation)[0], typing.get_args(annotation)[1]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [_unwrap(arg) for arg in typing.get_args(annotation) if arg is not type(None)]
        annotation, meta = inner[0][0], meta or inner[0][1]
    return annotation, meta


def _from_environ(kind: type[msgspec.Struct], section: str, environ: Mapping[str, str]) -> dict[str, Any]:
    known = {field.name: _unwrap(field.type)[0] for field in msgspec.structs.fields(kind)}
    found: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith(_PREFIX) or name == _PREFIX + "CONFIG":
            continue
        owner, _, key = name.removeprefix(_PREFIX).lower().partition("_")
        if owner not in SECTIONS:
            raise SettingsError(
                f"unknown variable {name}: expected {_PREFIX}CONFIG or {_PREFIX}<{'|'.join(SECTIONS).upper()}>_<KEY>"
            )
        if owner == section:
            if key not in known:
                raise SettingsError(f"unknown variable {name}{_nearest(key, known)}")
            found[key] = _comma_list(value) if typing.get_origin(known[key]) is tuple else value
    return found


def _from_toml(kind: type[msgspec.Struct], section: str, path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from error
    for table in document:
        if table not in SECTIONS or not isinstance(document[table], dict):
            raise SettingsError(
                f"{path}: unknown key {table!r}{_nearest(table, SECTIONS)}; expected the tables {', '.join(SECTIONS)}"
            )
    known = {field.name: _unwrap(field.type)[0] for field in msgspec.structs.fields(kind)}
    table_values: dict[str, Any] = document.get(section, {})
    for key, value in table_values.items():
        if key not in known:
            raise SettingsError(f"{path}: unknown key {key!r} in [{section}]{_nearest(key, known)}")
        if isinstance(value, str) and typing.get_origin(known[key]) is tuple:
            table_values[key] = (value,)  # a list of one may be written without brackets
    return table_values


def _nearest(key: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""Structured logs: one event a line, on stderr.

`log.event("ready", grpc="127.0.0.1:5000")` writes `{"ts": ..., "level": "info", "service": ...,
"event": "ready", "grpc": ...}` as JSON, or the same as text. A bound logger adds fields to all its
events (`log.bind(request_id=...)`). Values are rendered as they are; never hand it a secret.
"""

import logging
import sys
import time
from typing import Any, Literal

import msgspec

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_ROOT = "penstock"


def setup(service: str, level: str = "info", style: Literal["text", "json"] | str = "json") -> None:
    """Sends every log record of the process to stderr in one style. Called once, in `__main__`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(service) if style == "json" else _Text(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(_LEVELS[level])


class Log:
    """A named logger with bound fields."""

    def __init__(self, name: str, **fields: Any) -> None:
        self._logger = logging.getLogger(f"{_ROOT}.{name}")
        self._name = name
        self._fields = fields

    def bind(self, **fields: Any) -> "Log":
        return Log(self._name, **(self._fields | fields))

    def event(self, event: str, /, **fields: Any) -> None:
        self._emit(logging.INFO, event, fields)

    def debug(self, event: str, /, **fields: Any) -> None:
        self._emit(logging.DEBUG, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._emit(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        """An error event; inside an `except` block the traceback goes along at debug level."""
        self._emit(logging.ERROR, event, fields, trace=self._logger.isEnabledFor(logging.DEBUG))

    def exception(self, event: str, /, **fields: Any) -> None:
        """An error that is our bug: always with its traceback."""
        self._emit(logging.ERROR, event, fields, trace=True)

    def _emit(self, level: int, event: str, fields: dict[str, Any], trace: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            raised = sys.exc_info() if trace and sys.exc_info()[0] is not None else None
            record = self._logger.makeRecord(
                self._logger.name, level, "", 0, event, (), raised, extra={"fields": self._fields | fields}
            )
            self._logger.handle(record)  # not `log`, which walks the stack for a line number that nobody is shown


class _Json(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {"ts": round(record.created, 3), "level": record.levelname.lower(), "service": self._service}
        line |= {"logger": record.name.removeprefix(_ROOT + "."), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class _Text(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return f"{clock} {record.levelname[0]} {self._service} {record.getMessage()} {fields}".rstrip() + trace

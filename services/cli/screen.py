"""Messages for people: a live table on a terminal, plain lines anywhere else.

A screen never stops the cluster: when nobody reads any more (closed pipe, closed terminal) it
falls silent.
"""

import sys
from contextlib import suppress
from typing import TextIO

from services.cli.messages import Failed, Message, Note, Progress, Ready, Row, Served, Show, Stopped

_MARK = {"ready": "[green]✓[/]", "failed": "[red]✗[/]", "backoff": "[yellow]![/]", "stopped": "[dim]-[/]"}


def screen(out: TextIO = sys.stdout) -> "Screen":
    return Terminal() if out.isatty() else Plain(out)


class Screen:
    """Shows messages; `close` leaves the terminal as it was."""

    def __init__(self) -> None:
        self._silent = False

    def show(self, message: Message) -> None:
        if not self._silent:
            try:
                self._show(message)
            except OSError:
                self._silent = True

    def close(self) -> None: ...

    def _show(self, message: Message) -> None:
        raise NotImplementedError


class Plain(Screen):
    """One line per change; for logs, CI and pipes."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out
        self._shown: dict[str, tuple[str, str]] = {}

    def _show(self, message: Message) -> None:
        for line in self._new_rows(message.rows) if isinstance(message, Progress) else lines_of(message):
            print(line, file=self._out, flush=True)

    def _new_rows(self, rows: list[Row]) -> list[str]:
        new = [row for row in rows if self._shown.get(row.name) != (row.state, row.stage)]
        self._shown |= {row.name: (row.state, row.stage) for row in new}
        return [f"{row.name:<12}{row.stage if row.stage.startswith(row.state) else f'{row.state}: {row.stage}'}" for row in new]


class Terminal(Screen):
    """A table that updates in place until the cluster is ready, then lines."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False)
        self._live: Live | None = None

    def close(self) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
            self._live = None

    def _show(self, message: Message) -> None:
        if isinstance(message, Progress):
            self._progress(message.rows)
            return
        if isinstance(message, Ready | Failed):
            self.close()
        style = _style(message)
        for line in lines_of(message):
            self._console.print(line, style=style, markup=False, soft_wrap=True)

    def _progress(self, rows: list[Row]) -> None:
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for row in rows:
            mark = Text.from_markup(_MARK[row.state]) if row.state in _MARK else Spinner("dots")
            table.add_row(mark, row.name, Text(row.stage, style="green" if row.state == "ready" else ""))
        if self._live is None:
            self._live = Live(table, console=self._console, refresh_per_second=8, transient=False)
            self._live.start()
        else:
            self._live.update(table)


def lines_of(message: Message) -> list[str]:
    """A message as text."""
    match message:
        case Ready(url=url, model=model, curl=curl, seconds=seconds):
            return ["", f"Ready in {seconds:.1f} s: {model} at {url}", "", "  " + curl, ""]
        case Failed(reason=reason, lines=lines, log=log):
            shown = [f"  | {line}" for line in lines]
            return ["", f"Failed: {reason}", *([f"The end of {log}:", *shown] if shown else [])]
        case Note(text=text) | Served(text=text):
            return [text]
        case Stopped(clean=clean):
            return ["Stopped." if clean else "Stopped at once."]
        case Progress(rows=rows):
            return [f"{row.name:<12}{row.state}: {row.stage}" for row in rows]


def _style(message: Message) -> str:
    match message:
        case Failed() | Note(bad=True) | Served(ok=False):
            return "red"
        case Note() | Stopped():
            return "dim"
    return ""


def silent(message: Message) -> None:
    """Shows nothing."""


def both(first: Show, second: Show) -> Show:
    def show(message: Message) -> None:
        first(message)
        second(message)

    return show

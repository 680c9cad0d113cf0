"""The `penstock` console script: picks a command and loads only that command's modules.

A command is one module with `main(argv) -> exit status`. Exit statuses: 0 done, 1 it failed, 2 it
was asked for wrongly, 130 stopped at once by a second Ctrl-C.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "up": Command("services.cli.up", "start a cluster on this machine and serve a model"),
    "down": Command("services.cli.down", "stop a cluster that was started with up --detach"),
    "status": Command("services.cli.status", "what runs, where, and how loaded it is"),
    "explain": Command("services.cli.explain", "why a request took its route, and what it then took"),
    "chat": Command("services.cli.chat", "chat in the terminal; shows cached tokens and route per turn"),
    "store": Command("services.cli.store", "look into a kvstore: stat, check, scrub, evict, dump-block"),
    "doctor": Command("services.cli.doctor", "check this machine; says what is wrong and how to mend it"),
    "make-model": Command("services.cli.make_model_command", "write a random-weight model directory, for benchmarks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"penstock {_version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"penstock: no command {name!r}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return _run(name, rest)


def usage() -> str:
    lines = [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: penstock COMMAND [flags]     (penstock COMMAND --help lists a command's flags)",
            "",
            "Serves a language model with router, prefill, decode and KV storage as separate processes.",
            "",
            *lines,
        ]
    )


def _run(name: str, argv: Sequence[str]) -> int:
    command = importlib.import_module(COMMANDS[name].module)
    from common.errors import PenstockError, SettingsError  # brings grpc, which `--help` does without

    try:
        status: int = command.main(argv)
    except PenstockError as error:
        print(f"penstock {name}: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 130
    return status


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("penstock")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())

"""`penstock store`: what a kvstore holds, whether it is whole, and taking things out of it.

stat      blocks, bytes, namespaces, hit ratio, disks
check     verify every block of a store that is stopped; nothing is written
scrub     start, stop or watch the verification that a running store does by itself
evict     make blocks misses for good: by key, by namespace, or a share of the coldest
pin       keep a block, and those before it in its chain, from eviction for a time
unpin     end that
dump-block  one block's header and bytes

A running store is asked over gRPC: that of the cluster whose data folder is `--data`, or the one `--at`
an address. `--folder` (once for each of its directories) reads a stopped store's disk instead.
Exit status: 0 done, 1 something is wrong with the store, 2 asked for wrongly.
"""

import argparse
import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from services.cli import state

PIN_S = 3600
COMMANDS: dict[str, str] = {
    "stat": "what is stored, where, and how it is used",
    "check": "verify every block of a stopped store",
    "scrub": "the background verification of a running store",
    "evict": "make blocks misses, for good",
    "pin": "keep chains of a running store from eviction for a time",
    "unpin": "let pinned chains go their usual way again",
    "dump-block": "one block's header and bytes",
}


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    if given.command is None:
        parser.error(f"expected one of {', '.join(COMMANDS)}")
    problem = _contradiction(given)
    if problem:
        parser.error(f"{given.command}: {problem}")
    if given.command == "check" or getattr(given, "folder", None):
        from services.cli import store_offline

        return store_offline.run(given)
    from services.cli import store_online

    return asyncio.run(store_online.run(given, _addresses(parser, given)))


def _parser() -> argparse.ArgumentParser:
    about, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="penstock store", description=about, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    usages = []
    for name, summary in COMMANDS.items():
        one = commands.add_parser(name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
        _FLAGS[name](one)
        usages.append(" ".join(one.format_usage().split()).removeprefix("usage: penstock store "))
    parser.epilog = "".join(["flags:\n", *(f"  {usage}\n" for usage in usages), "\n", rest[rest.index("A running") :]])
    return parser


def _online(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default="data", metavar="DIR", help="data folder given to up: asks its kvstores (default: data)"
    )
    parser.add_argument("--at", metavar="HOST:PORT", help="ask the kvstore at this gRPC address instead")


def _folders(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--folder",
        action="append",
        type=Path,
        metavar="DIR",
        required=required,
        help="a data folder of a stopped kvstore; repeat it",
    )


def _stat(parser: argparse.ArgumentParser) -> None:
    _online(parser)
    _folders(parser)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def _check(parser: argparse.ArgumentParser) -> None:
    _folders(parser, required=True)
    parser.add_argument("--mib-per-s", type=_positive, metavar="N", help="read at most so fast (default: as fast as the disk)")
    parser.add_argument("--json", action="store_true", help="the findings, as JSON")


def _scrub(parser: argparse.ArgumentParser) -> None:
    _online(parser)
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--start", action="store_true", help="begin a pass now")
    act.add_argument("--stop", action="store_true", help="end the pass that runs")
    parser.add_argument("--wait", action="store_true", help="return when the pass has ended; 1 if it found bad blocks")
    parser.add_argument("--json", action="store_true", help="the report, as JSON")


def _evict(parser: argparse.ArgumentParser) -> None:
    _online(parser)
    parser.add_argument("--namespace", type=_hex, metavar="HEX", help="only of this one; alone: all of it, and its files")
    parser.add_argument(
        "--key", action="append", type=_hex, metavar="HEX", help="this block, with all that hangs on it; repeat it"
    )
    parser.add_argument("--fraction", type=_fraction, metavar="F", help="this share of the blocks, the coldest (0 to 1)")


def _pin(parser: argparse.ArgumentParser) -> None:
    _unpin(parser)
    parser.add_argument(
        "--for-s", type=_seconds, default=PIN_S, metavar="N", help="seconds from now on, at most 2^32 - 1 (default: %(default)s)"
    )


def _unpin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "key", nargs="+", type=_hex, metavar="KEY", help="64 hex digits: this block, and those before it in its chain"
    )
    _online(parser)


def _dump(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", type=_hex, metavar="KEY", help="64 hex digits")
    _online(parser)
    _folders(parser)
    parser.add_argument("--raw", type=Path, metavar="FILE", help="write the payload there; without it, its first bytes are shown")


_FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "stat": _stat,
    "check": _check,
    "scrub": _scrub,
    "evict": _evict,
    "pin": _pin,
    "unpin": _unpin,
    "dump-block": _dump,
}


def _contradiction(given: argparse.Namespace) -> str:
    """What doesn't go together."""
    if getattr(given, "folder", None) and getattr(given, "at", None):
        return "--folder reads a stopped store, --at asks a running one: give one of them"
    if given.command == "evict" and given.key and given.fraction is not None:
        return "give --key or --fraction, not both"
    if given.command == "evict" and not (given.key or given.fraction is not None or given.namespace):
        return "say what: --key, --namespace or --fraction"
    return ""


def _addresses(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    """gRPC addresses of the kvstores to ask."""
    if given.at:
        return [given.at]
    data = Path(given.data).expanduser().resolve()
    cluster = state.read(data)
    found = (
        [service.addresses["grpc"] for service in cluster.services if service.kind == "kvstore" and "grpc" in service.addresses]
        if cluster
        else []
    )
    if not found:
        parser.exit(
            1, f"penstock store: no kvstore runs on {data}; name one with --at HOST:PORT, or a stopped one with --folder DIR\n"
        )
    return found


def _hex(text: str) -> str:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 64 lower-case hex digits")
    return text


def _seconds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole seconds, 1 to {(1 << 32) - 1}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number over 0, at most 1")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number over 0")
    return value

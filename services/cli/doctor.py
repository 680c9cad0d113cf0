"""`penstock doctor`: checks this machine for what a cluster needs, and says how to mend what is wrong.

A check is a function that returns findings; it changes nothing but scratch files it removes. The
exit status is 1 when something is wrong (a cluster would not start or not work), else 0.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from services.cli.findings import Finding, Level

_SIGN = {Level.GOOD: "ok", Level.NOTE: "note", Level.BAD: "WRONG"}


class Subject(NamedTuple):
    """What to examine."""

    data: Path
    model: str
    host: str
    port: int


Check = Callable[[Subject], list[Finding]]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="penstock doctor", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="data", metavar="DIR", help="data folder a cluster would use (default: data)")
    parser.add_argument(
        "--model", default="", metavar="PATH", help="model directory a cluster would serve (default: the demo model)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the HTTP API (default: 127.0.0.1)")
    parser.add_argument("--port", default=8080, type=int, help="port of the HTTP API (default: 8080)")
    given = parser.parse_args(argv)
    subject = Subject(Path(given.data).expanduser().resolve(), given.model, given.host, given.port)
    findings = examine(subject)
    print(report(findings))
    return 1 if any(finding.level is Level.BAD for finding in findings) else 0


def examine(subject: Subject) -> list[Finding]:
    from services.cli import check_machine, check_software

    checks: list[Check] = [
        lambda _: check_software.python(),
        lambda _: check_software.packages(),
        lambda _: check_software.nats(),
        lambda _: check_software.compiler(),
        lambda s: check_machine.disk(s.data),
        lambda _: check_machine.shared_memory(),
        lambda _: check_machine.limits(),
        lambda s: check_machine.port(s.data, s.host, s.port),
        lambda s: check_machine.model(s.model),
    ]
    return [finding for check in checks for finding in check(subject)]


def report(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{_SIGN[finding.level]:<6} {finding.what:<15} {finding.detail}")
        if finding.mend:
            lines.append(f"{'':<6} {'':<15} -> {finding.mend}")
    wrong = sum(finding.level is Level.BAD for finding in findings)
    verdict = "Nothing is wrong." if not wrong else f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong."
    return "\n".join([*lines, "", verdict])

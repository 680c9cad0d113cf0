"""A load test's report: a folder with report.html, summary.json and requests.csv, and tables for the terminal."""

import base64
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from loadtest.figures import Group, Spread, Summary
from loadtest.plots import plots
from loadtest.samples import Sample
from loadtest.target import Target

TEMPLATE = "report.html.jinja"
ERRORS_SHOWN_MAX = 10
Table = list[list[str]]  # the first row is the heading
COLUMNS = (
    "kind", "user", "session", "turn", "request_id", "outcome", "status", "code", "sent_s", "ttft_ms", "tpot_ms",
    "gap_max_ms", "total_ms", "prompt_tokens", "cached_tokens", "output_tokens", "route", "finish_reason", "message",
)  # fmt: skip


class Run(msgspec.Struct, frozen=True):
    """What was done: the cluster, how it was loaded, and when (Unix time)."""

    target: Target
    settings: dict[str, Any]
    began_at: float
    interrupted: bool = False


def write(folder: Path, run: Run, summary: Summary, samples: Sequence[Sample]) -> Path:
    """Writes the three files; returns the folder, which is `folder`/<time of the test>."""
    out = _fresh(folder, time.strftime("%Y%m%d-%H%M%S", time.localtime(run.began_at)))
    (out / "report.html").write_text(html(run, summary, samples), encoding="utf-8")
    (out / "summary.json").write_bytes(
        msgspec.json.format(msgspec.json.encode({"run": run, "summary": summary}), indent=2) + b"\n"
    )
    with (out / "requests.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        rows.writerows(_row(sample) for sample in samples)
    return out


def html(run: Run, summary: Summary, samples: Sequence[Sample]) -> str:
    """One page that needs no other file."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(TEMPLATE)
    return page.render(
        run=run,
        when=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(run.began_at)),
        members=", ".join(f"{count} {role}" for role, count in run.target.members.items()),
        facts=facts(summary),
        tables=tables(summary),
        errors=[sample for sample in samples if sample.outcome == "error"][:ERRORS_SHOWN_MAX],
        plots=[(plot, base64.b64encode(plot.png).decode()) for plot in plots(samples, summary.turns)],
    )


def in_words(summary: Summary) -> str:
    """All tables and facts for a terminal."""
    parts = ["\n".join(f"{name:<22}{value}" for name, value in facts(summary))]
    parts += [f"{title}\n{aligned(rows)}" for title, rows in tables(summary)]
    return "\n\n".join(parts)


def facts(summary: Summary) -> list[tuple[str, str]]:
    errors = ", ".join(f"{count} {code}" for code, count in summary.errors.items())
    return [
        ("requests finished", f"{summary.finished} in {summary.window_s:.1f} s, {summary.requests_per_s:.2f}/s"),
        ("output tokens", f"{summary.all.output_tokens:,}, {summary.output_tokens_per_s:,.1f}/s"),
        ("prompt tokens", f"{summary.all.prompt_tokens:,}, {summary.prompt_tokens_per_s:,.1f}/s"),
        ("token hit rate", f"{summary.all.hit_rate:.1%} (cached {summary.all.cached_tokens:,})"),
        ("refused (429)", str(summary.refused)),
        ("cut at the end", str(summary.cut)),
        ("errors", errors or "none"),
    ]


def tables(summary: Summary) -> list[tuple[str, Table]]:
    heading = ["", "requests", "hit rate", "prompt p. request"]
    by_route = [[*heading, "TTFT p50", "p90", "p99"]] + [_counts(group) + _percentiles(group.ttft) for group in summary.routes]
    return [("Latency in ms, by user kind", _latency(summary)), ("By route, TTFT in ms", by_route)]


def aligned(rows: Table) -> str:
    """Columns side by side, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def main_figures(run: Run, summary: Summary, folder: Path) -> dict[str, Any]:
    """What the last line says."""
    out: dict[str, Any] = {
        "benchmark": "load",
        "model": run.target.model,
        "window_s": summary.window_s,
        "requests": summary.finished,
        "errors": sum(summary.errors.values()),
        "refused_429": summary.refused,
        "cut": summary.cut,
        "requests_per_s": summary.requests_per_s,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "hit_rate": summary.all.hit_rate,
    }
    for group in summary.kinds:
        out[f"{group.name}_requests"] = group.requests
        out[f"{group.name}_hit_rate"] = group.hit_rate
        for name, found in (("ttft", group.ttft), ("tpot", group.tpot)):
            if found is not None:
                out |= {f"{group.name}_{name}_p50_ms": found.p50, f"{group.name}_{name}_p99_ms": found.p99}
    return out | {"routes": {group.name: group.requests for group in summary.routes}, "report": str(folder / "report.html")}


def _latency(summary: Summary) -> Table:
    rows = [["", "n", "mean", "p50", "p90", "p99", "max"]]
    for group in [*summary.kinds, summary.all]:
        measured = (("TTFT", group.ttft), ("TPOT", group.tpot), ("between tokens", group.gap), ("whole request", group.total))
        rows += [[f"{group.name}: {name}", str(found.n), *_times(found)] for name, found in measured if found is not None]
    return rows


def _times(found: Spread) -> list[str]:
    return [f"{value:,.1f}" for value in (found.mean, found.p50, found.p90, found.p99, found.max)]


def _counts(group: Group) -> list[str]:
    return [group.name, str(group.requests), f"{group.hit_rate:.1%}", f"{group.prompt_tokens / group.requests:,.0f}"]


def _percentiles(found: Spread | None) -> list[str]:
    return [f"{value:,.1f}" for value in (found.p50, found.p90, found.p99)] if found else ["-"] * 3


def _row(sample: Sample) -> list[Any]:
    values = msgspec.structs.asdict(sample) | {
        "sent_s": f"{sample.sent_s:.4f}",
        "ttft_ms": _ms(sample.ttft_s),
        "tpot_ms": _ms(sample.tpot_s),
        "gap_max_ms": _ms(max(sample.gaps_s, default=None)),
        "total_ms": _ms(sample.total_s),
    }
    return [values[column] for column in COLUMNS]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _fresh(folder: Path, name: str) -> Path:
    """A folder that wasn't there: `name`, or `name`-2 and so on when two tests began in one second."""
    for number in range(1, 100):
        out = folder / (name if number == 1 else f"{name}-{number}")
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        return out
    raise FileExistsError(f"{folder / name}: a hundred reports of this second are there")

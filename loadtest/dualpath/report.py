"""The report: one self-contained page, its plots as files, and all figures as JSON."""

import base64
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
import msgspec

from loadtest.dualpath import conclusions, model
from loadtest.dualpath.figures import Figures, Slo, figures
from loadtest.dualpath.jobs import Measured
from loadtest.dualpath.model import SETUPS
from loadtest.dualpath.modes import MODES
from loadtest.dualpath.plots import plots
from loadtest.dualpath.trajectories import PAPER_HIT_RATE
from loadtest.figures import Spread
from loadtest.report import Table

TEMPLATE = "report.html.jinja"


def write(folder: Path, found: Sequence[Measured], slo: Slo) -> Path:
    """Writes `report.html`, `figures.json` and a PNG per plot; the page's path."""
    every = [figures(one, slo) for one in found]
    drawn = plots(found, every)
    for plot in drawn:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
    ratios = conclusions.ratios(found, slo)
    (folder / "figures.json").write_bytes(
        msgspec.json.format(msgspec.json.encode({"ratios": ratios, "jobs": every}), indent=2) + b"\n"
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = folder / "report.html"
    page.write_text(
        environment.get_template(TEMPLATE).render(
            when=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            facts=facts(found, slo),
            ratios=ratios,
            modes=MODES.values(),
            tables=tables(found, every),
            plots=[(plot, base64.b64encode(plot.png).decode()) for plot in drawn],
        ),
        encoding="utf-8",
    )
    return page


def facts(found: Sequence[Measured], slo: Slo) -> list[tuple[str, str]]:
    """What the figures hold for."""
    setup = SETUPS[found[0].setup if found else "cpu"]
    of, shape = setup.statistics, setup.shape
    turn = model.cost(setup, of.context - setup.block_tokens / 2, of.appended + setup.block_tokens / 2)
    objective = slo.here(max((one.tpot_alone_s for one in found), default=0.0))
    storage = max((one.rates.storage or 0.0 for one in found if one.part != "crossing"), default=0.0)
    return [
        (
            "model",
            f"{shape.layers} layers x {shape.hidden}, {shape.kv_heads} KV heads, {shape.parameters / 1e6:.1f} M parameters",
        ),
        ("KV", f"{setup.kv_bytes_per_token:,} bytes a token, {setup.bytes_per_block:,} a block"),
        (
            "a turn loads and computes",
            f"{turn.bytes / 1e6:.1f} MB, {turn.flop / 1e9:.2f} GFLOP ({turn.gb_per_pflop:,.0f} GB/PFLOP)",
        ),
        (
            "a storage link",
            f"{storage / 1e6:.1f} MB/s, {model.STORAGE_OVER_RECOMPUTE:g} times what one prefill worker makes of such prompts, measured",
        ),
        ("trajectories", f"paper's 64K set / {of.scale}: {of.context} + {of.appended} tokens, {of.generated} generated"),
        ("hit rate of the paper", f"{PAPER_HIT_RATE:.1%}"),
        (
            "objective",
            f"{objective.share:.0%} with TTFT <= {objective.ttft_s:g} s and TPOT <= {objective.tpot_s * 1e3:.0f} ms (the paper's, or twice that of one request alone)",
        ),
    ]


def tables(found: Sequence[Measured], every: Sequence[Figures]) -> list[tuple[str, Table]]:
    out: list[tuple[str, Table]] = []
    for name in sorted({one.topology for one in every}):
        for part in ("offline", "online", "one-request", "crossing"):
            those = [one for one in every if (one.part, one.topology) == (part, name)]
            if those:
                out.append((f"{name}, {part}", _jobs(those)))
                out += [(f"{name}, {part}: links", _links(those))] if part == "offline" else []
        crossed = conclusions.crossings([one for one in found if (one.part, one.topology) == ("crossing", name)])
        if crossed:
            rows = [["MB/s", "load s", "recompute s", "Penstock s", "over the better"]]
            rows += [
                [f"{p.rate / 1e6:g}", *(f"{s:.3f}" for s in (p.load_s, p.recompute_s, p.full_s, p.over_better))] for p in crossed
            ]
            out.append((f"{name}: loading against recomputing", rows))
    return out


def _jobs(those: Sequence[Figures]) -> Table:
    rows = [["mode", "step", "seconds", "requests", "failed", "req/s", "out tok/s", "hit rate", "TTFT p50", "p90", "p99", "TPOT p50", "p99",
             "in SLO", "link max/avg", "whole job", "CPU cluster", "machine", "routes"]]  # fmt: skip
    for one in sorted(those, key=lambda one: (one.mode not in MODES, [*MODES, one.mode].index(one.mode), one.step)):
        rows.append([
            one.mode, f"{one.step:g}", f"{one.wall_s:.2f}", str(one.requests), str(one.failed), f"{one.requests_per_s:.2f}",
            f"{one.output_tokens_per_s:.1f}", f"{one.hit_rate:.1%}", *_spread(one.ttft, ("p50", "p90", "p99")), *_spread(one.tpot, ("p50", "p99")),
            f"{one.slo_share:.0%}", f"{one.max_over_avg:.2f}", f"{one.max_over_avg_run:.2f}", f"{one.cpu['cluster']:.2f}",
            f"{one.cpu['machine']:.2f} of {one.cpu['cores']:g}", ", ".join(f"{name} {count}" for name, count in one.routes.items()),
        ])  # fmt: skip
    return rows


def _links(those: Sequence[Figures]) -> Table:
    rows = [["mode", "link", "MB to worker", "load", "MB from worker", "load", "kernel over services"]]
    for one in those:
        for link in one.links:
            network = "storage" if link.port.startswith("st-") else "compute"
            rows.append([
                one.mode, link.port, f"{link.towards_bytes / 1e6:.1f}", f"{link.towards_load:.0%}", f"{link.from_bytes / 1e6:.1f}",
                f"{link.from_load:.0%}", f"{one.overhead[network]:.3f}" if network in one.overhead else "-",
            ])  # fmt: skip
    return rows


def _spread(found: Spread | None, names: Sequence[str]) -> list[str]:
    return [f"{getattr(found, name):,.0f}" if found else "-" for name in names]

"""The plots of the dual-path report, each as a PNG."""

import functools
import io
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.dualpath.conclusions import Crossing, crossings
from loadtest.dualpath.figures import Figures
from loadtest.dualpath.jobs import Measured
from loadtest.plots import DPI, Plot

BASIC, OURS, OTHER = "#64748b", "#2563eb", "#93c5fd"
LINK_COLOURS = ("#2563eb", "#ea7317", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#475569")


def plots(found: Sequence[Measured], every: Sequence[Figures]) -> list[Plot]:
    """One set per topology that was measured."""
    names = sorted({one.topology for one in every})
    return [plot for name in names for plot in _of_topology(
        name, [one for one in found if one.topology == name], [one for one in every if one.topology == name])]  # fmt: skip


def _of_topology(name: str, raw: Sequence[Measured], every: Sequence[Figures]) -> Iterator[Plot]:
    offline = [one for one in raw if one.part == "offline"]
    online = [one for one in every if one.part == "online"]
    if offline:
        bars = [one for one in every if one.part == "offline"]
        yield _plot(f"completion_{name}", f"{name}: job completion time", "All agents at once, until the last turn is done.",
                    lambda axes: _bars(axes, bars))  # fmt: skip
        yield _plot(f"ttft_{name}", f"{name}: TTFT in the offline job", "The share of requests whose first token came within a time.",
                    lambda axes: _ttft(axes, offline))  # fmt: skip
    for one in offline:
        yield _plot(f"links_{name}_{one.mode}", f"{name}, {one.mode}: storage links", "Bytes per second towards each worker, by the "
                    "kernel's counters.", functools.partial(_links, one=one))  # fmt: skip
    if online:
        yield _plot(f"online_{name}", f"{name}: requests within the objective", "By the rate at which agents come.",
                    lambda axes: _online(axes, online))  # fmt: skip
    points = crossings([one for one in raw if one.part == "crossing"])
    if points:
        yield _plot(f"crossing_{name}", f"{name}: loading against recomputing", "Median TTFT of one prompt, by the rate of a storage "
                    "link.", lambda axes: _crossing(axes, points))  # fmt: skip


def _plot(name: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Plot:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return Plot(name, title, caption, out.getvalue())


def _bars(axes: Axes, offline: Sequence[Figures]) -> None:
    names = [one.mode for one in offline]
    bars = axes.barh(names, [one.wall_s for one in offline], color=[_colour(name) for name in names])
    axes.bar_label(bars, fmt="%.1f s", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", xlim=(0, 1.15 * max(one.wall_s for one in offline)))


def _ttft(axes: Axes, offline: Sequence[Measured]) -> None:
    for one in offline:
        values = [sample.ttft_s for sample in one.done.samples if sample.ttft_s is not None]
        if values:
            axes.ecdf(values, label=one.mode, linewidth=1.6)
    axes.set(xlabel="TTFT [s]", ylabel="share of requests", ylim=(0, 1.02))


def _links(axes: Axes, one: Measured) -> None:
    ports = [port for port in one.ticks[0].ports if port.startswith("st-")]
    for port, colour in zip(ports, LINK_COLOURS, strict=False):
        pairs = list(zip(one.ticks, one.ticks[1:], strict=False))
        rates = [(b.ports[port][0] - a.ports[port][0]) / max(b.at_s - a.at_s, 1e-9) / 1e6 for a, b in pairs]
        axes.plot([b.at_s for _, b in pairs], rates, label=port.removeprefix("st-"), color=colour, linewidth=1.4)
    if one.rates.storage:
        axes.axhline(one.rates.storage / 1e6, color="#0f172a", linewidth=0.8, linestyle="--", label="the link's rate")
    axes.set(xlabel="time [s]", ylabel="MB/s")
    axes.set_ylim(bottom=0)


def _online(axes: Axes, online: Sequence[Figures]) -> None:
    for mode in dict.fromkeys(one.mode for one in online):
        points = sorted((one.step, one.slo_share) for one in online if one.mode == mode)
        axes.plot(*zip(*points, strict=True), marker="o", color=_colour(mode), label=mode)
    axes.set(xlabel="agents per second", ylabel="share of requests", ylim=(-0.02, 1.05))


def _crossing(axes: Axes, points: Sequence[Crossing]) -> None:
    rates = [point.rate / 1e6 for point in points]
    axes.plot(rates, [point.load_s for point in points], marker="o", color=OTHER, label="load")
    axes.plot(rates, [point.recompute_s for point in points], marker="o", color=BASIC, label="recompute")
    axes.plot(rates, [point.full_s for point in points], marker="o", color=OURS, label="Penstock")
    axes.set(xlabel="storage link [MB/s]", ylabel="TTFT [s]", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")


def _colour(mode: str) -> str:
    return {"basic": BASIC, "full": OURS}.get(mode, OTHER)

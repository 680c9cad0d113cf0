"""The plots of a load test's report, each as a PNG."""

import io
from collections.abc import Callable, Sequence

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from loadtest.figures import Group, kinds
from loadtest.samples import Sample

COLOURS = {"chat": "#2563eb", "agent": "#ea7317"}
BINS_MAX = 60
DPI = 130
GREY, INK = "#64748b", "#0f172a"
WIDE = 20  # from so many times the smallest time on, the axis is logarithmic


class Plot(msgspec.Struct, frozen=True):
    name: str
    title: str
    caption: str
    png: bytes


def plots(samples: Sequence[Sample], turns: dict[str, list[Group]]) -> list[Plot]:
    """All plots of the finished ones among `samples`; none when nothing finished."""
    done = sorted((sample for sample in samples if sample.outcome == "ok" and sample.chunk_s), key=lambda sample: sample.sent_s)
    if not done:
        return []
    return [
        _plot("ttft_over_time", "TTFT over time", "One dot per request, when it was sent.", lambda axes: _ttft_time(axes, done)),
        _plot("ttft_cdf", "TTFT, distribution", "The share of requests whose first token came within a time.", lambda axes: _cdf(
            axes, done, lambda sample: sample.ttft_s, "TTFT [ms]")),
        _plot("tpot_cdf", "TPOT, distribution", "Mean time per output token after the first, per request.", lambda axes: _cdf(
            axes, done, lambda sample: sample.tpot_s, "TPOT [ms]")),
        _plot("tokens_over_time", "Tokens per second", "Output tokens as they arrived; below, prompt tokens by where they came from "
              "(when their request was sent).", lambda axes: _throughput(axes, done)),
        _plot("hit_rate_over_time", "Token hit rate over time", "Cached tokens over prompt tokens of the requests sent in a bin.",
              lambda axes: _hits_time(axes, done)),
        _plot("hit_rate_by_turn", "Token hit rate by turn", "Later turns repeat more: what a session said before should not be "
              "computed again. Faint bars count requests.", lambda axes: _hits_turn(axes, turns)),
        _plot("ttft_by_prompt", "TTFT by prompt length", "Colour: the share of the prompt that was cached.",
              lambda axes: _ttft_prompt(axes, done)),
    ]  # fmt: skip


def _plot(name: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Plot:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return Plot(name, title, caption, out.getvalue())


def _ttft_time(axes: Axes, done: Sequence[Sample]) -> None:
    for kind, own in _by_kind(done):
        axes.scatter([s.sent_s for s in own], [s.chunk_s[0] * 1e3 for s in own], s=14, alpha=0.7, color=COLOURS[kind], label=kind)
    axes.set(xlabel="time [s]", ylabel="TTFT [ms]")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")


def _cdf(axes: Axes, done: Sequence[Sample], time_s: Callable[[Sample], float | None], label: str) -> None:
    measured = [(kind, [value * 1e3 for value in map(time_s, own) if value]) for kind, own in _by_kind(done)]
    for kind, values in measured:
        if values:
            axes.ecdf(values, color=COLOURS[kind], linewidth=1.8, label=f"{kind} (n = {len(values)})")
    everything = [value for _, values in measured for value in values]
    axes.set(xlabel=label, ylabel="share of requests", ylim=(0, 1.02))
    if everything and max(everything) > WIDE * min(everything):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")


def _throughput(axes: Axes, done: Sequence[Sample]) -> None:
    bin_s, count = _bins(done)
    output, cached, computed = [0.0] * count, [0.0] * count, [0.0] * count
    for sample in done:
        at = int(sample.sent_s / bin_s)
        cached[at] += sample.cached_tokens / bin_s
        computed[at] += (sample.prompt_tokens - sample.cached_tokens) / bin_s
        for arrived in sample.chunk_s:
            output[int((sample.sent_s + arrived) / bin_s)] += sample.output_tokens / len(sample.chunk_s) / bin_s
    centres = [(index + 0.5) * bin_s for index in range(count)]
    axes.bar(centres, computed, bin_s * 0.9, color="#fda4af", label="prompt, computed")
    axes.bar(centres, cached, bin_s * 0.9, bottom=computed, color="#a7f3d0", label="prompt, cached")
    highest = max(map(sum, zip(cached, computed, strict=True)))
    axes.set(xlabel="time [s]", ylabel="prompt tokens / s", ylim=(0, 1.25 * (highest or 1)))
    right = axes.twinx()
    right.plot(centres, output, color=INK, linewidth=1.4)
    right.set(ylim=(0, 1.25 * (max(output) or 1)))
    right.set_ylabel("output tokens / s", color=INK)
    right.spines["top"].set_visible(False)
    axes.plot([], [], color=INK, linewidth=1.4, label="output (right axis)")


def _hits_time(axes: Axes, done: Sequence[Sample]) -> None:
    bin_s, count = _bins(done)
    for kind, own in _by_kind(done):
        prompt, cached = [0] * count, [0] * count
        for sample in own:
            prompt[int(sample.sent_s / bin_s)] += sample.prompt_tokens
            cached[int(sample.sent_s / bin_s)] += sample.cached_tokens
        found = [((index + 0.5) * bin_s, cached[index] / prompt[index]) for index in range(count) if prompt[index]]
        if found:
            axes.plot(*zip(*found, strict=True), marker="o", markersize=3, linewidth=1.4, color=COLOURS[kind], label=kind)
    axes.set(xlabel="time [s]", ylabel="hit rate", ylim=(-0.02, 1.02))


def _hits_turn(axes: Axes, turns: dict[str, list[Group]]) -> None:
    most = max(group.requests for groups in turns.values() for group in groups)
    for index, (kind, groups) in enumerate(turns.items()):
        own = [group for group in groups if group.requests]
        at = [int(group.name) for group in own]
        axes.plot(at, [group.hit_rate for group in own], marker="o", color=COLOURS[kind], linewidth=1.8, label=kind)
        offset = (index - (len(turns) - 1) / 2) * 0.4
        heights = [0.25 * group.requests / most for group in own]
        axes.bar([turn + offset for turn in at], heights, 0.36, color=COLOURS[kind], alpha=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="turn of the session", ylabel="hit rate", ylim=(-0.02, 1.02))


def _ttft_prompt(axes: Axes, done: Sequence[Sample]) -> None:
    marks = {"chat": "o", "agent": "^"}
    for kind, own in _by_kind(done):
        x, y = [s.prompt_tokens for s in own], [s.chunk_s[0] * 1e3 for s in own]
        dots = axes.scatter(x, y, c=[s.cached_share for s in own], cmap="viridis", vmin=0, vmax=1, s=18, marker=marks[kind])
        axes.scatter([], [], color=GREY, marker=marks[kind], s=18, label=kind)
    axes.figure.colorbar(dots, ax=axes, label="cached share")
    axes.set(xlabel="prompt tokens", ylabel="TTFT [ms]")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")


def _by_kind(done: Sequence[Sample]) -> list[tuple[str, list[Sample]]]:
    return [(kind, [sample for sample in done if sample.kind == kind]) for kind in kinds(done)]


def _bins(done: Sequence[Sample]) -> tuple[float, int]:
    """Width in seconds and number of bins that hold everything that was sent or arrived."""
    end_s = max(sample.sent_s + sample.chunk_s[-1] for sample in done)
    width_s = max(1.0, end_s / BINS_MAX)
    return width_s, int(end_s / width_s) + 1

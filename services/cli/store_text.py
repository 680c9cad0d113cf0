"""`penstock store` for people: reports as lines. Pure."""

from collections.abc import Mapping, Sequence

from common.clients.kvstore_admin import ScrubReport, StoreStat
from services.cli.status import size, table

HEX_BYTES = 256  # of a payload that are shown
_ROW = 16


def stat_lines(address: str, stat: StoreStat) -> list[str]:
    """What a running store says of itself."""
    info, counters = stat.info, stat.counters
    lines = [
        f"{info.id} at {address}{', draining' if info.draining else ''}",
        f"  {info.blocks:,} blocks, {size(info.used_bytes)} of {size(info.budget_bytes)}, {info.leases:,} leases",
        f"  looked up {counters['lookup_blocks']:,} blocks, found {_share(counters['hit_blocks'], counters['lookup_blocks'])}",
        f"  read {counters['reads']:,} blocks ({size(info.read_bytes)}), wrote {counters['writes']:,} ({size(info.written_bytes)}),"
        f" write amplification {_ratio(counters['disk_written_bytes'], counters['written_bytes'])}",
        f"  evicted {info.evictions:,}, dropped {info.dropped_writes:,} writes, corrupt {info.corrupt_blocks:,}",
        f"  scrub: {scrub_line(stat.scrub)}",
        f"  pins: {stat.pins:,}, which keep {size(stat.pinned_bytes)}",
        "",
    ]
    lines += table(
        [["DISK", "STATE", "USED", "OF", "ERRORS", "PROBLEM"]]
        + [
            [disk.folder, disk.state, size(disk.used_bytes), size(disk.budget_bytes), str(disk.errors), disk.problem]
            for disk in info.disks
        ]
    )
    rows = [
        [
            one.namespace[:16],
            f"{one.blocks:,}",
            size(one.payload_bytes),
            f"{one.segments}",
            f"{one.slots_per_segment:,}",
            f"{one.free_slots:,}",
        ]
        for one in stat.namespaces
    ]
    return [*lines, "", *table([["NAMESPACE", "BLOCKS", "BLOCK", "SEGMENTS", "SLOTS EACH", "FREE SLOTS"], *rows])]


def scrub_line(scrub: ScrubReport) -> str:
    """Where a scrub stands."""
    if not scrub.bytes_per_s_max:
        return "off (scrub_bytes_per_s = 0)"
    done = f"{scrub.blocks_done:,} of {scrub.blocks_total:,} blocks, {size(scrub.bytes_done)} in {scrub.seconds:,.0f} s, {scrub.corrupt} bad"
    if scrub.state == "running":
        return f"running: {done}; at most {size(scrub.bytes_per_s_max)}/s"
    if not scrub.seconds:
        return f"idle, no pass yet; at most {size(scrub.bytes_per_s_max)}/s"
    return f"idle; the last pass: {done}; {scrub.passes} passes ended since the start"


def header_lines(fields: Mapping[str, object]) -> list[str]:
    width = max(map(len, fields))
    return [f"{name.ljust(width)}  {value.hex() if isinstance(value, bytes) else value}" for name, value in fields.items()]


def hex_lines(payload: bytes) -> list[str]:
    """The first bytes, sixteen to a line."""
    shown = payload[:HEX_BYTES]
    lines = [f"{at:08x}  {shown[at : at + _ROW].hex(' ')}" for at in range(0, len(shown), _ROW)]
    return [*lines, f"... {len(payload) - len(shown):,} more; --raw FILE writes all"] if len(payload) > len(shown) else lines


def bar(done: int, total: int, seconds: float, width: int = 30) -> str:
    """A progress bar with rate and what is left."""
    share = done / total if total else 1.0
    rate = done / seconds if seconds else 0.0
    left_s = (total - done) / rate if rate else 0.0
    return f"[{'#' * int(share * width):<{width}}] {share:>4.0%}  {size(rate)}/s  {left_s:,.0f} s left"


def problem_lines(problems: Sequence[str], count: int, shown_max: int = 50) -> list[str]:
    shown = [f"  {problem}" for problem in problems[:shown_max]]
    return [*shown, f"  ... and {count - len(shown):,} more"] if count > len(shown) else shown


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"

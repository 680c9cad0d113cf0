"""What a measured job means: times, rates, links, bounds. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from loadtest.dualpath.jobs import Measured, Tick
from loadtest.figures import Spread, spread
from loadtest.samples import Sample

WINDOW_S = 5.0  # over which links are compared with each other
WINDOW_LOAD_MIN = 0.05  # of a rate, on average: an emptier window says nothing about balance
TPOT_OVER_ALONE = 2.0
WARM_SHARE = 0.25  # of an online window: before that, the agents under way are still too few


class Slo(msgspec.Struct, frozen=True):
    """The paper's service-level objective, and which share of the requests must attain both.

    A machine whose decode worker needs most of the 50 ms for a token with nothing else to do gets `TPOT_OVER_ALONE` times as long as
    that: else no rate at all would attain it, however a prompt's KV comes.
    """

    ttft_s: float = 4.0
    tpot_s: float = 0.050
    share: float = 0.9

    def here(self, tpot_alone_s: float) -> "Slo":
        """On a machine with that TPOT for one request at a time."""
        return msgspec.structs.replace(self, tpot_s=max(self.tpot_s, TPOT_OVER_ALONE * tpot_alone_s))

    def attained(self, sample: Sample) -> bool:
        ttft, tpot = sample.ttft_s, sample.tpot_s
        return sample.outcome == "ok" and ttft is not None and ttft <= self.ttft_s and (tpot is None or tpot <= self.tpot_s)


class LinkUse(msgspec.Struct, frozen=True):
    """Of one port over one job: bytes towards its worker and from it, and the former as a share of what the rate allows."""

    port: str
    towards_bytes: int
    from_bytes: int
    towards_load: float
    from_load: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One job.

    Attributes:
        wall_s: from the first request to the last token.
        max_over_avg: busiest storage link over their mean, mean over windows of `WINDOW_S` weighted by bytes.
        max_over_avg_run: the same over the whole job at once.
        overhead: what the kernel counted on the links over what the services say they moved, by network.
        cpu: busy cores, of the cluster's processes together and of the machine.
    """

    part: str
    topology: str
    mode: str
    step: float
    wall_s: float
    requests: int
    failed: int
    prompt_tokens: int
    hit_rate: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft: Spread | None
    tpot: Spread | None
    slo_share: float
    links: list[LinkUse]
    max_over_avg: float
    max_over_avg_run: float
    path_bytes: dict[str, float]
    overhead: dict[str, float]
    routes: dict[str, int]
    cpu: dict[str, float]


def figures(of: Measured, slo: Slo) -> Figures:
    ok = [sample for sample in of.done.samples if sample.outcome == "ok"]
    wall = of.done.wall_s or 1e-9
    prompt = sum(sample.prompt_tokens for sample in ok)
    links = link_uses(of)
    storage = [link.port for link in links if link.port.startswith("st-")]
    return Figures(
        part=of.part,
        topology=of.topology,
        mode=of.mode,
        step=of.step,
        wall_s=round(of.done.wall_s, 3),
        requests=len(ok),
        failed=len(of.done.samples) - len(ok),
        prompt_tokens=prompt,
        hit_rate=round(sum(sample.cached_tokens for sample in ok) / prompt, 4) if prompt else 0.0,
        requests_per_s=round(len(ok) / wall, 3),
        output_tokens_per_s=round(sum(sample.output_tokens for sample in ok) / wall, 2),
        ttft=spread(sample.ttft_s for sample in ok),
        tpot=spread(sample.tpot_s for sample in ok),
        slo_share=round(slo_share(of.done.samples, slo.here(of.tpot_alone_s)), 4),
        links=links,
        max_over_avg=round(windowed_max_over_avg(of.ticks, storage, WINDOW_S, of.rates.storage), 3),
        max_over_avg_run=round(max_over_avg([link.towards_bytes for link in links if link.port in storage]), 3),
        path_bytes=of.done.path_bytes,
        overhead=overhead(links, of.done.path_bytes),
        routes=dict(Counter(sample.route or "-" for sample in ok)),
        cpu={
            "cluster": round(sum(of.cpu_s.values()) / wall, 3),
            "machine": round(of.machine_cpu_s / max(of.ticks[-1].at_s, 1e-9), 3),
            "cores": of.cores,
        },
    )


def slo_share(samples: Sequence[Sample], slo: Slo) -> float:
    """Of the requests sent after the warm part of the time in which requests were sent."""
    last_s = max((sample.sent_s for sample in samples), default=0.0)
    counted = [sample for sample in samples if sample.sent_s >= WARM_SHARE * last_s]
    return sum(slo.attained(sample) for sample in counted) / len(counted) if counted else 0.0


def link_uses(of: Measured) -> list[LinkUse]:
    first, last = of.ticks[0].ports, of.ticks[-1].ports
    seconds = of.done.wall_s or 1e-9
    out = []
    for port, (towards, away) in last.items():
        towards, away = towards - first[port][0], away - first[port][1]
        rate = of.rates.storage if port.startswith("st-") else of.rates.compute
        room = rate * seconds if rate else float("inf")
        out.append(LinkUse(port, towards, away, round(towards / room, 4), round(away / room, 4)))
    return out


def max_over_avg(loads: Sequence[float]) -> float:
    """1: all links carried the same. 0: they carried nothing."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 0.0


def windowed_max_over_avg(ticks: Sequence[Tick], ports: Sequence[str], window_s: float, rate: float | None) -> float:
    """`max_over_avg` of the bytes towards the workers in each window, weighted by the window's bytes; all but idle windows are left out."""
    weighted = total = 0.0
    begin = ticks[0]
    for tick in ticks[1:]:
        if tick.at_s - begin.at_s < window_s:
            continue
        loads = [tick.ports[port][0] - begin.ports[port][0] for port in ports]
        room = (rate or 0.0) * (tick.at_s - begin.at_s) * len(ports)
        if sum(loads) > WINDOW_LOAD_MIN * room:
            weighted += max_over_avg(loads) * sum(loads)
            total += sum(loads)
        begin = tick
    return weighted / total if total else 0.0


def overhead(links: Sequence[LinkUse], path_bytes: Mapping[str, float]) -> dict[str, float]:
    """Headers, acknowledgements and control: what the links carried over the KV bytes that the services say they moved."""
    out = {}
    for network, prefix, paths in (
        ("storage", "st-", ("storage_to_decode", "storage_to_prefill")),
        ("compute", "co-", ("prefill_to_decode", "decode_to_prefill")),
    ):
        said = sum(path_bytes.get(path, 0.0) for path in paths)
        if said:
            out[network] = round(sum(link.towards_bytes for link in links if link.port.startswith(prefix)) / said, 4)
    return out


def dual_bound(prefills: int, decodes: int, basic_s: float, oracle_s: float | None) -> float:
    """How many times quicker than `basic` a job can be: all storage links instead of prefill's, or no loads at all (measured)."""
    by_links = (prefills + decodes) / prefills
    return min(by_links, basic_s / oracle_s) if oracle_s else by_links


def one_request_bound_s(kv_bytes: float, rates: Sequence[float], tail_s: float) -> float:
    """When a prefix could be there if every source gave all it has at once, and the tail is computed after."""
    return kv_bytes / sum(rates) + tail_s

"""A measured job as the kernel and the clients could have told it: round numbers, so that the figures can be worked out by hand."""

from loadtest.dualpath.jobs import Done, Measured, Tick
from loadtest.dualpath.links import Rates
from loadtest.samples import Sample

RATE = 10_000_000.0


def sample(sent_s: float, ttft_s: float, tpot_s: float = 0.01, *, tokens: int = 11, outcome: str = "ok") -> Sample:
    chunks = tuple(ttft_s + n * tpot_s for n in range(tokens))
    return Sample(
        kind="agent", user=1, session=0, turn=1, sent_s=sent_s, total_s=chunks[-1], outcome=outcome, chunk_s=chunks,  # type: ignore[arg-type]
        prompt_tokens=1000, cached_tokens=960, output_tokens=tokens, route="storage_to_prefill",
    )  # fmt: skip


def measured(
    mode: str = "basic", part: str = "offline", *, wall_s: float = 20.0, step: float = 0.0, samples: list[Sample] | None = None,
    prefill_bytes: int = 190_000_000, decode_bytes: int = 0,
) -> Measured:  # fmt: skip
    """Storage bytes flow evenly over the job; the services say 1 % less than the kernel."""
    ticks = [
        Tick(
            share * wall_s,
            {
                "st-prefill-0": (round(share * prefill_bytes), 0),
                "st-decode-0": (round(share * decode_bytes), 0),
                "co-prefill-0": (0, round(share * prefill_bytes)),
                "co-decode-0": (round(share * prefill_bytes), 0),
            },
        )
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    done = Done(
        wall_s=wall_s,
        samples=[sample(0.0, 1.0), sample(10.0, 2.0)] if samples is None else samples,
        path_bytes={
            "storage_to_prefill": prefill_bytes / 1.01,
            "storage_to_decode": decode_bytes / 1.01,
            "prefill_to_decode": prefill_bytes / 1.01,
        },
    )
    return Measured(
        part=part, topology="1P1D", mode=mode, step=step, rates=Rates(RATE, 8 * RATE), done=done, ticks=ticks,
        cpu_s={"prefill-0": 4.0, "decode-0": 2.0}, machine_cpu_s=10.0, cores=2,
    )  # fmt: skip

"""What is asked of the agents' process, what it answers, and what is measured beside it. Only data: it crosses processes and lies in files."""

from typing import Any

import msgspec

from loadtest.dualpath.links import Rates
from loadtest.dualpath.trajectories import Agent
from loadtest.samples import Sample


class Job(msgspec.Struct, frozen=True):
    """What to do.

    Attributes:
        starts_s: when each agent begins; as many as agents.
        at_once: agents in flight; the others wait for one to end.
        turns_until_s: no turn is begun after that; None: all are.
        stored_blocks: wait at the end until the kvstore holds so many.
    """

    url: str
    model: str
    agents: list[Agent]
    starts_s: list[float]
    at_once: int
    turns_until_s: float | None = None
    stored_blocks: int = 0


class Done(msgspec.Struct, frozen=True):
    """What happened.

    Attributes:
        wall_s: from the first request to the last token.
        path_bytes: what the services say they moved meanwhile.
        explained: what `penstock explain` says of each request, by its id.
    """

    wall_s: float
    samples: list[Sample]
    path_bytes: dict[str, float]
    explained: dict[str, Any] = {}


class Tick(msgspec.Struct, frozen=True):
    """The links at one moment: seconds since the job's process began, and port -> bytes so far (towards its worker, from it)."""

    at_s: float
    ports: dict[str, tuple[int, int]]

    def followed_by(self, later: "Tick", first: "Tick") -> "Tick":
        """`later`, counted from this one on; `first` is the first of its job."""
        ports = {}
        for port, (towards, off) in later.ports.items():
            (ours, ours_off), (theirs, theirs_off) = self.ports.get(port, (0, 0)), first.ports.get(port, (0, 0))
            ports[port] = ours + towards - theirs, ours_off + off - theirs_off
        return Tick(self.at_s + later.at_s, ports)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One job, raw. What it means is worked out in `figures`.

    Attributes:
        setup: name of what the cluster was made of.
        part: "offline", "online", "one-request" or "crossing".
        step: what was varied within the part: agents per second, bytes per second; 0: nothing.
        tpot_alone_s: of one request at a time, measured before over unshaped links.
        cpu_s: CPU seconds of each process of the cluster meanwhile.
        machine_cpu_s: of everything on the machine, other people's work too.
        cores: how many the machine has.
    """

    part: str
    topology: str
    mode: str
    step: float
    rates: Rates
    done: Done
    ticks: list[Tick]
    cpu_s: dict[str, float]
    machine_cpu_s: float
    cores: int
    tpot_alone_s: float = 0.0
    setup: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.part}-{self.topology}-{self.mode}-{self.step:g}"

    def followed_by(self, later: "Measured") -> "Measured":
        """Both as one job, as if the later had begun when this one ended. What lay between them, other modes' turns, is left out."""
        began_s, counted = self.done.wall_s, self.ticks[-1]
        samples = [msgspec.structs.replace(sample, sent_s=began_s + sample.sent_s) for sample in later.done.samples]
        done = Done(
            self.done.wall_s + later.done.wall_s, [*self.done.samples, *samples], _sums(self.done.path_bytes, later.done.path_bytes),
            self.done.explained | later.done.explained,
        )  # fmt: skip
        return msgspec.structs.replace(
            self, done=done, ticks=[*self.ticks, *(counted.followed_by(tick, later.ticks[0]) for tick in later.ticks)],
            cpu_s=_sums(self.cpu_s, later.cpu_s), machine_cpu_s=self.machine_cpu_s + later.machine_cpu_s,
        )  # fmt: skip


def _sums(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    return {name: ours.get(name, 0.0) + theirs.get(name, 0.0) for name in ours | theirs}

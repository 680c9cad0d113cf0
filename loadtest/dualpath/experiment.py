"""The parts of the experiment. Each puts what it measures into `Results`, and measures nothing that is there already.

Every part of one topology begins with the same *warm* store: the agents' contexts, computed once over unshaped links, not measured. Every mode
gets a copy of it and processes of its own, answers a few requests that don't count (first touches; the router learns the links'
rates), and then does its job.
"""

import functools
import random
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from loadtest.dualpath import conclusions, model, trajectories
from loadtest.dualpath.cluster import Cluster, copy_store
from loadtest.dualpath.figures import Slo, figures
from loadtest.dualpath.jobs import Job, Measured
from loadtest.dualpath.links import Rates, Topology
from loadtest.dualpath.measure import drive, measure
from loadtest.dualpath.model import STORAGE_OVER_RECOMPUTE, Setup
from loadtest.dualpath.modes import MODES
from loadtest.dualpath.namespaces import Lab
from loadtest.dualpath.said import say
from loadtest.dualpath.search import capacity
from loadtest.dualpath.trajectories import Agent, Turn
from loadtest.samples import Sample

COMPUTE_OVER_STORAGE = 8  # in the paper a node has eight NICs for the compute network and one for storage
WARM_AT_ONCE = 2
PRIMERS, PRIMERS_AT_ONCE = 4, 2
CROSSING = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 16.0)  # a storage link's rate over the rate at which one worker makes KV
CROSSING_COMPUTE_MIN = 8.0  # the compute network's, likewise
CROSSING_PRIMERS = 2
CROSSING_ROUNDS = 15  # of one request for each mode
CROSSING_FAR = 2.0  # a side that takes so many times as long as the other in the first round is not asked again
REPEATS = 3


class Size(msgspec.Struct, frozen=True):
    """How much is done. `contexts` are stored ones, shared by the online agents; the offline job has one agent for each."""

    contexts: int = 10
    turns: int = 3
    online_turns: int = 3
    online_window_s: float = 30.0
    online_ratio: float = 1.12  # between rates that are tried
    online_bisections: int = 0
    long_context_tokens: int = 4096  # of the one-request part


SIZES = {
    ("cpu", "default"): Size(),
    ("cpu", "full"): Size(contexts=16, turns=4, online_window_s=60.0, online_bisections=1, long_context_tokens=8192),
    ("gpu", "default"): Size(contexts=32, turns=2, long_context_tokens=32_768),
    ("gpu", "full"): Size(contexts=48, turns=4, online_window_s=60.0, online_bisections=1, long_context_tokens=49_152),
}  # by setup


class Machine(msgspec.Struct, frozen=True):
    """What this machine does with one request at a time, over unshaped links: bytes of KV a second that one prefill worker makes of a
    prompt of the mean length, and the time per output token."""

    recompute_bytes_per_s: float
    tpot_s: float


class Results:
    """Measured jobs of one report, each in a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, part: str, topology: Topology, mode: str, step: float = 0.0) -> Measured | None:
        path = self._folder / f"{part}-{topology}-{mode}-{step:g}.json"
        return msgspec.json.decode(path.read_bytes(), type=Measured) if path.exists() else None

    def put(self, measured: Measured) -> None:
        (self._folder / f"{measured.name}.json").write_bytes(msgspec.json.encode(measured))

    def all(self) -> list[Measured]:
        return [msgspec.json.decode(path.read_bytes(), type=Measured) for path in sorted(self._folder.glob("*.json"))]


class Experiment:
    """One topology's parts, in its own namespaces, which somebody else builds and destroys."""

    def __init__(self, lab: Lab, setup: Setup, data: Path, logs: Path, results: Results, size: Size, seed: int, slo: Slo) -> None:
        self._lab = lab
        self._setup = setup
        self._data = data
        self._logs = logs
        self._results = results
        self._size = size
        self._seed = seed
        self._slo = slo
        self._model = model.made(data, setup)
        self._vocab = model.vocab_size(self._model)
        self._agents = trajectories.agents(seed, size.contexts, size.turns, setup.statistics, self._vocab)
        rng = random.Random(seed + 1)
        self._machine_file = Path()
        self._primers = [self._tokens(rng, setup.statistics.context) for _ in range(PRIMERS)]
        self._long = [self._tokens(rng, size.long_context_tokens) for _ in range(REPEATS)]

    def offline(self, modes: Sequence[str]) -> None:
        """All agents at once, each turn after turn, until all are done."""
        for mode in modes:
            if self._results.get("offline", self._lab.topology, mode) is None:
                with self._cluster(mode) as cluster:
                    self._prime(cluster, mode)
                    self._results.put(self._measure(cluster, self._agents, [0.0] * len(self._agents), "offline", mode))

    def online(self, modes: Sequence[str]) -> None:
        """Agents come at a rate; the highest rate at which enough requests attain the objective."""
        for mode in modes:
            with self._cluster(mode) as cluster:
                self._prime(cluster, mode)
                found = capacity(
                    functools.partial(self._trial, cluster, mode), self._guess(mode),
                    ratio=self._size.online_ratio, bisections=self._size.online_bisections,
                )  # fmt: skip
                say(f"online {self._lab.topology} {mode}: {found:.3g} agents/s")

    def one_request(self, modes: Sequence[str]) -> None:
        """One long prompt at a time on an idle cluster, from each source and from all; for every prompt the modes take turns."""
        if all(self._results.get("one-request", self._lab.topology, mode) for mode in modes):
            return
        with self._cluster(*modes) as cluster:
            for mode in modes:
                self._prime(cluster, mode)
            self._keep([self._turn(cluster, long, "one-request", modes, n) for n, long in enumerate(self._long)])

    def crossing(self, modes: Sequence[str]) -> None:
        """The storage links' rate from far below to far above the speed of recomputing. At every rate the modes take turns, because
        the machine's speed of computing drifts. The shortest contexts: loading them from far below takes long enough."""
        left = [
            over for over in CROSSING if not all(self._results.get("crossing", self._lab.topology, mode, over) for mode in modes)
        ]
        if not left:
            return
        shortest = sorted((agent.context for agent in self._agents), key=len)[:REPEATS]
        with self._cluster(*modes) as cluster:
            for over in left:
                made = self._machine().recompute_bytes_per_s
                self._lab.shape(Rates(over * made, max(CROSSING_COMPUTE_MIN, COMPUTE_OVER_STORAGE * over) * made))
                for mode in modes:
                    self._prime(cluster, mode, CROSSING_PRIMERS)
                rounds: list[dict[str, Measured]] = []
                for number in range(CROSSING_ROUNDS):
                    asked = conclusions.near(rounds[0], CROSSING_FAR) if rounds else modes
                    rounds.append(self._turn(cluster, shortest[number % len(shortest)], "crossing", asked, number, over))
                self._keep(rounds)

    def _guess(self, mode: str) -> float:
        """Agents a second to try first: the paper's gain over `basic` where that was measured, else what the storage links carry."""
        trials = (figures(one, self._slo) for one in self._results.all() if one.topology == str(self._lab.topology))
        basic = conclusions.capacity_of([one for one in trials if (one.part, one.mode) == ("online", "basic")], self._slo)
        if mode != "basic" and basic is not None:
            return trajectories.PAPER_AGENTS_OVER_BASIC * basic.step
        links = self._lab.topology.prefills if mode == "basic" else len(self._lab.topology.workers)
        per_agent = self._size.online_turns * self._setup.statistics.context * self._setup.kv_bytes_per_token
        return links * STORAGE_OVER_RECOMPUTE * self._machine().recompute_bytes_per_s / per_agent

    def _trial(self, cluster: Cluster, mode: str, rate: float) -> bool:
        rate = round(rate, 3)
        known = self._results.get("online", self._lab.topology, mode, rate)
        if known is None:
            window = self._size.online_window_s
            starts = trajectories.arrivals(self._seed, rate, window)
            those = trajectories.agents(
                random.Random(f"{self._seed} {rate}").getrandbits(32), len(starts), self._size.online_turns, self._setup.statistics, self._vocab
            )  # fmt: skip
            shared = [
                msgspec.structs.replace(agent, context=self._agents[agent.id % len(self._agents)].context) for agent in those
            ]
            known = self._measure(cluster, shared, starts, "online", mode, step=rate, turns_until_s=window)
            self._results.put(known)
        found = figures(known, self._slo)
        say(f"  {rate:g} agents/s: {found.slo_share:.0%} within the objective, {found.failed} failed")
        return found.slo_share >= self._slo.share and not found.failed

    def _turn(
        self, cluster: Cluster, context: tuple[int, ...], part: str, modes: Sequence[str], number: int, step: float = 0.0
    ) -> dict[str, Measured]:  # fmt: skip
        """One round: each mode asks for this context, with a tail that is new. Every other round goes the other way about."""
        out = {}
        for mode in modes if number % 2 == 0 else modes[::-1]:
            rng = random.Random(f"{self._seed} {part} {mode} {step} {number}")
            asks = Agent(number, context, (Turn(self._tokens(rng, self._setup.statistics.appended), 2),))
            out[mode] = self._measure(cluster, [asks], [0.0], part, mode, step=step)
        return out

    def _keep(self, rounds: Sequence[dict[str, Measured]]) -> None:
        for mode in rounds[0]:
            self._results.put(functools.reduce(Measured.followed_by, (one[mode] for one in rounds if mode in one)))

    def _prime(self, cluster: Cluster, mode: str, count: int = PRIMERS) -> None:
        rng = random.Random(f"{self._seed} {mode} {self._lab.rates}")
        those = [Agent(n, context, (Turn(self._tokens(rng, 30), 2),)) for n, context in enumerate(self._primers[:count])]
        drive(self._lab, Job(cluster.urls[mode], cluster.model_name, those, [0.0] * len(those), PRIMERS_AT_ONCE))

    def _measure(
        self, cluster: Cluster, those: Sequence[Agent], starts: Sequence[float], part: str, mode: str, *, step: float = 0.0,
        turns_until_s: float | None = None, at_once: int | None = None,
    ) -> Measured:  # fmt: skip
        job = Job(cluster.urls[mode], cluster.model_name, list(those), list(starts), at_once or max(1, len(those)), turns_until_s)
        measured = measure(self._lab, cluster, job, part=part, mode=mode, step=step, tpot_alone_s=self._machine().tpot_s)
        found = figures(measured, self._slo)
        ttft = f", TTFT p50 {found.ttft.p50:.0f} ms" if found.ttft else ""
        say(f"{measured.name}: {found.wall_s:.2f} s, {found.requests} requests, {found.failed} failed{ttft}, {found.routes}")
        return measured

    @contextmanager
    def _cluster(self, mode: str, *others: str) -> Iterator[Cluster]:
        """A fresh cluster of that mode, with a router for each of the others too, on a copy of the warm store, over shaped links."""
        warm = self._warm()
        live = self._data / "live"
        copy_store(warm, live)
        storage = STORAGE_OVER_RECOMPUTE * self._machine().recompute_bytes_per_s
        self._lab.shape(Rates(storage, COMPUTE_OVER_STORAGE * storage))
        with self._running(live, mode) as cluster:
            for other in others:
                cluster.add_router(MODES[other])
            yield cluster

    @contextmanager
    def _running(self, store: Path, mode: str) -> Iterator[Cluster]:
        cluster = Cluster(self._lab, self._setup, self._model, store, self._logs / f"{self._lab.topology}-{mode}", MODES[mode])
        try:
            cluster.start()
            yield cluster
            cluster.stop()
        finally:
            cluster.kill()

    def _warm(self) -> Path:
        """The store with every context in it, made once for a seed and a size; beside it, what the machine does with one request."""
        stored = [*trajectories.contexts_of(self._agents), *self._primers, *self._long]
        blocks = sum(len(context) // self._setup.block_tokens for context in stored)
        folder = self._data / f"warm-{self._model.name}-{self._seed}-{blocks}"
        self._machine_file = folder.with_suffix(".json")
        if self._machine_file.exists():
            return folder
        say(f"storing {len(stored)} contexts, {blocks} blocks of {self._setup.bytes_per_block} bytes (not measured)")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted: what is computed below must not be stored
        self._lab.shape(Rates())
        those = [Agent(n, (), (Turn(context, 1),)) for n, context in enumerate(stored)]
        with self._running(folder, "basic") as cluster:
            url, name = cluster.urls["basic"], cluster.model_name
            drive(self._lab, Job(url, name, those, [0.0] * len(those), WARM_AT_ONCE, stored_blocks=blocks))
            rng = random.Random(self._seed + 2)
            tokens = self._setup.statistics.generated
            fresh = [Agent(n, self._tokens(rng, self._setup.statistics.context), (Turn((), tokens),)) for n in range(REPEATS)]
            took = drive(self._lab, Job(url, name, fresh, [0.0] * REPEATS, at_once=1)).samples
        machine = Machine(
            made_bytes_per_s(took, self._setup.kv_bytes_per_token), statistics.median(sample.tpot_s or 0.0 for sample in took)
        )
        self._machine_file.write_bytes(msgspec.json.encode(machine))
        return folder

    def _machine(self) -> Machine:
        """Measured when the store was warmed."""
        self._warm()
        return msgspec.json.decode(self._machine_file.read_bytes(), type=Machine)

    def _tokens(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(trajectories.FIRST_TOKEN_ID, self._vocab) for _ in range(count))


def made_bytes_per_s(samples: Sequence[Sample], per_token: int) -> float:
    """KV bytes a second of prompts that were computed: the median of them."""
    return statistics.median(s.prompt_tokens * per_token / (s.ttft_s or float("inf")) for s in samples)

"""Agents that resend their context turn after turn, on links and workers that are nothing but arithmetic.

Every link moves bytes in the order in which they were routed over it, every worker computes tokens likewise, at rates that the
policy learns of when the first transfer is over. A turn is: route, load, compute, generate; then the next turn begins.
"""

import heapq
import random
from dataclasses import dataclass, field

from services.router.placement import Route, route
from services.router.policy.settings import PolicySettings
from services.router.policy.view import ClusterView, DecodeView, Link, PrefillView, Query, WorkerView
from tests.router.clusters import BLOCK_BYTES, BLOCK_TOKENS, NS

LINK_BYTES_PER_S = 250.0 * BLOCK_BYTES  # 250 blocks, or 4,000 tokens, a second
TOKENS_PER_S = 1000.0  # computing a block takes four times as long as loading it, as for the paper's Qwen2.5-32B
PEER_BYTES_PER_S = 100 * LINK_BYTES_PER_S
GENERATION_S = 0.2


@dataclass
class Worker:
    """When its storage link and its compute are free, and since when its link has been measured."""

    address: str
    link_free: float = 0.0
    compute_free: float = 0.0
    measured_at: float = float("inf")
    bytes: float = 0.0
    sequences: int = 0
    tokens: int = 0

    def load(self, amount: float, now: float) -> float:
        """When so many bytes are there."""
        if not amount:
            return now
        self.link_free = max(self.link_free, now) + amount / LINK_BYTES_PER_S
        self.measured_at = min(self.measured_at, self.link_free)
        self.bytes += amount
        return self.link_free

    def facts(self, now: float) -> dict[str, object]:
        queued = max(0.0, self.link_free - now) * LINK_BYTES_PER_S
        peer = Link(PEER_BYTES_PER_S)
        return {
            "address": self.address,
            "id": self.address,
            "namespace": NS,
            "tokens": self.tokens,
            "prefill_tokens_per_s": TOKENS_PER_S,
            "queued_tokens": max(0.0, self.compute_free - now) * TOKENS_PER_S,
            "storage": Link(LINK_BYTES_PER_S if now >= self.measured_at else 0.0, queued),
            "peer_read": peer,
            "peer_write": peer,
        }


@dataclass
class Job:
    """What came of a run."""

    seconds: float = 0.0
    first_tokens_s: list[float] = field(default_factory=list)
    link_bytes: list[float] = field(default_factory=list)
    moves: int = 0  # turns by another prefill worker than the agent's turn before

    @property
    def imbalance(self) -> float:
        """Bytes of the busiest storage link over the mean of all."""
        return max(self.link_bytes) * len(self.link_bytes) / sum(self.link_bytes)


def run(
    prefills: int, decodes: int, agents: int, settings: PolicySettings, turns: int = 15, seed: int = 0, *, keeping: bool = False
) -> Job:
    """Every agent's turns to the end. A turn adds 30 tokens and generates 10, to a context of 600 to 1,200 at first.

    `keeping`: prefill workers keep every prompt that they computed.
    """
    chance = random.Random(seed)
    at_decode = {f"d{i}": Worker(f"d{i}") for i in range(decodes)}
    at_prefill = {f"p{i}": Worker(f"p{i}") for i in range(prefills)}
    events = [(chance.random() / 10, agent, 0, chance.randint(600, 1200), "") for agent in range(agents)]
    heapq.heapify(events)
    job, placed = Job(), 0
    kept: list[dict[str, int]] = [{} for _ in range(agents)]  # blocks of an agent's context, by prefill worker, the last one last
    while events:
        now, agent, turn, context, left = heapq.heappop(events)
        if left:
            at_decode[left].sequences -= 1
            at_decode[left].tokens -= context
            job.seconds = now
            turn, context = turn + 1, context + 40
        if turn == turns:
            continue
        resident = {address: min(blocks, (context + 29) // BLOCK_TOKENS) for address, blocks in kept[agent].items() if keeping}
        query = Query(prompt_tokens=context + 30, stored_blocks=context // BLOCK_TOKENS, resident=resident, turn=placed)
        placed += 1
        decision = route(query, _view(at_decode, at_prefill, now), now, settings)
        assert isinstance(decision, Route)
        first = _carry_out(decision, at_decode[decision.decode], at_prefill.get(decision.prefill), now)
        job.first_tokens_s.append(first - now)
        if decision.prefill:
            job.moves += bool(kept[agent]) and decision.prefill != [*kept[agent]][-1]
            kept[agent].pop(decision.prefill, None)
            kept[agent][decision.prefill] = (context + 30) // BLOCK_TOKENS
        at_decode[decision.decode].sequences += 1
        at_decode[decision.decode].tokens += context
        heapq.heappush(events, (first + GENERATION_S, agent, turn, context, decision.decode))
    job.link_bytes = [worker.bytes for worker in (*at_decode.values(), *at_prefill.values())]
    return job


def _carry_out(decision: Route, decode: Worker, prefill: Worker | None, now: float) -> float:
    """When the first token is there."""
    moved, computer = decision.estimate.moved, prefill or decode
    ready = decode.load(moved.storage_to_decode, now)
    if prefill is not None:
        ready = max(ready, prefill.load(moved.storage_to_prefill, now))
    computing_s = decision.estimate.computed_tokens / TOKENS_PER_S
    computer.compute_free = max(computer.compute_free, now) + computing_s
    return max(ready, computer.compute_free)


def _view(at_decode: dict[str, Worker], at_prefill: dict[str, Worker], now: float) -> ClusterView:
    def of(kind: type[WorkerView], worker: Worker, **facts: object) -> WorkerView:
        return kind(**worker.facts(now), **facts)  # type: ignore[arg-type]

    return ClusterView(
        namespace=NS,
        block_tokens=BLOCK_TOKENS,
        decodes=tuple(of(DecodeView, w, sequences=w.sequences) for w in at_decode.values()),  # type: ignore[misc]
        prefills=tuple(of(PrefillView, w) for w in at_prefill.values()),  # type: ignore[misc]
        bytes_per_block=BLOCK_BYTES,
        stored_bytes_per_block=BLOCK_BYTES,
    )

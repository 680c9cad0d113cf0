"""Prometheus metrics: vLLM's names where one exists, `penstock:` for what only Penstock has."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from common.routes import PATHS, Plan
from services.router.choice import Choice
from services.router.policy.view import LINKS, ClusterView, Link
from services.router.work import Work

if TYPE_CHECKING:
    from services.router.cluster import Cluster

_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_ITL_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40)
_E2E_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)
_RATIO = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)


class Metrics:
    """Every series of one router. `expose` renders them."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        label = {"model_name": model_name}

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(name, text, ("model_name", *labels), registry=self.registry)
            return made if labels else made.labels(**label)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            made = Gauge(name, text, ("model_name", *labels), registry=self.registry)
            return made if labels else made.labels(**label)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            made = Histogram(name, text, ("model_name", *labels), buckets=buckets, registry=self.registry)
            return made if labels else made.labels(**label)

        self._label = model_name
        self._ttft = histogram("vllm:time_to_first_token_seconds", "From the request's arrival to its first token.", _TTFT_S)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _ITL_S)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _E2E_S)
        self._queue = histogram("vllm:request_queue_time_seconds", "Waiting for the decode worker.", _E2E_S)
        self._prompt_size = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output_size = histogram("vllm:request_generation_tokens", "Generated tokens of a sequence.", _TOKENS)
        self._running = gauge("vllm:num_requests_running", "Sequences that have their first token.")
        self._waiting = gauge("vllm:num_requests_waiting", "Sequences that wait for their first token.")
        self._kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of the decode workers' KV pools in use, 1 is all.")
        self._queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the kvstore.")
        self._hits = counter("vllm:prefix_cache_hits", "Prompt tokens whose KV was loaded.")
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of finished requests.")
        self._generated = counter("vllm:generation_tokens", "Generated tokens.")
        self._preemptions = counter("vllm:num_preemptions", "Sequences that lost their KV memory and recomputed.")
        self._success = counter("vllm:request_success", "Finished sequences.", "finished_reason")
        self._failed = counter("penstock:request_failures", "Requests that ended in an error.", "code")
        self._routes = counter("penstock:routes", "Routes decided.", "plan")
        self._carried_out = counter("penstock:routes_carried_out", "Routes as decode reported them.", "plan", "carrier")
        self._fallbacks = counter("penstock:route_fallbacks", "Routes that decode could not carry out as asked.")
        self._retries = counter("penstock:prefill_retries", "Prefill workers asked because another one failed the request.")
        self._kept = counter("penstock:kept_tokens", "Prompt tokens whose KV a prefill worker's stage still held.")
        moved = counter("penstock:kv_bytes", "KV bytes moved for requests.", "path")
        took = counter("penstock:kv_path_seconds", "Seconds in which requests moved KV.", "path")
        self._flows = {path: (moved.labels(model_name, path), took.labels(model_name, path)) for path in PATHS}
        self._ratio = histogram(
            "penstock:first_token_over_estimate", "Time to the first token over its estimate, routes that were carried out.",
            _RATIO, "plan",
        )  # fmt: skip
        self._corrections = gauge("penstock:estimate_correction", "What estimates are multiplied with.", "plan")
        self._link_rate = gauge("penstock:link_bytes_per_s", "Rate of a worker's link that estimates go by.", "worker", "link")
        self._link_queue = gauge("penstock:link_queue_bytes", "Bytes that a worker's link has yet to move.", "worker", "link")
        self._compute_queue = gauge("penstock:queued_tokens", "Tokens that a worker has yet to compute.", "worker")
        self._moves = counter("penstock:moves", "Sequences moved to another decode worker.")
        self._lookup_failures = counter("penstock:lookup_failures", "kvstore lookups that failed and counted as misses.")
        self._peers = gauge("penstock:peers", "Peers connected.", "role")

    def waiting(self, sequences: int) -> None:
        self._waiting.inc(sequences)

    def running(self, sequences: int) -> None:
        """So many sequences got their first token."""
        self._waiting.dec(sequences)
        self._running.inc(sequences)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        self._itl.observe(seconds / tokens)

    def queried(self, tokens: int) -> None:
        self._queries.inc(tokens)

    def lookup_failed(self) -> None:
        self._lookup_failures.inc()

    def routed(self, plan: Plan) -> None:
        self._routes.labels(self._label, plan).inc()

    def estimated(self, plan: Plan, ratio: float) -> None:
        """A first token took so many times its estimate."""
        self._ratio.labels(self._label, plan).observe(ratio)

    def moved(self) -> None:
        self._moves.inc()

    def finished(self, choices: Sequence[Choice], running: int, work: Work, seconds: float, status: str) -> None:
        """A request is over; `running` of its sequences had their first token."""
        self._running.dec(running)
        self._waiting.dec(len(choices) - running)
        self._e2e.observe(seconds)
        for prompt in work.prompts:
            self._prompt_size.observe(len(prompt))
            self._prompt_tokens.inc(len(prompt))
        if status not in ("stop", "length", "cancelled"):
            self._failed.labels(self._label, status).inc()
        for choice in choices:
            self._generated.inc(len(choice.output))
            self._output_size.observe(len(choice.output))
            self._hits.inc(choice.cached_tokens)
            if choice.finish is not None:
                self._success.labels(self._label, choice.finish).inc()
            self._reported(choice)

    def expose(self, cluster: "Cluster") -> bytes:
        """The exposition text, with the cluster's gauges brought up to date."""
        total = free = 0
        for peer in cluster.of("decode"):
            if peer.usable and peer.info is not None:
                total += peer.info.load.pool_blocks_total
                free += peer.info.load.pool_blocks_free
        self._kv_usage.set((total - free) / total if total else 0.0)
        for role in ("decode", "prefill", "kvstore"):
            self._peers.labels(self._label, role).set(sum(peer.usable for peer in cluster.of(role)))
        self._show(cluster.view())
        return generate_latest(self.registry)

    def _show(self, view: ClusterView) -> None:
        """What the policy goes by. Workers that left are left out."""
        for series in (self._link_rate, self._link_queue, self._compute_queue):
            series.clear()
        for worker in (*view.decodes, *view.prefills):
            self._compute_queue.labels(self._label, worker.id).set(worker.queued_tokens)
            for name in LINKS:
                link: Link = getattr(worker, name)
                self._link_rate.labels(self._label, worker.id, name).set(link.bytes_per_s)
                self._link_queue.labels(self._label, worker.id, name).set(link.queue_bytes)
        for plan, factor in view.corrections.items():
            self._corrections.labels(self._label, plan).set(factor)

    def _reported(self, choice: Choice) -> None:
        report = choice.last_report
        if report is None:
            return
        self._queue.observe(report.queue_s)
        self._preemptions.inc(report.preemptions)
        self._carried_out.labels(self._label, report.plan, report.carrier or "none").inc()
        if report.fallback:
            self._fallbacks.inc()
        self._retries.inc(report.prefill_retries)
        self._kept.inc(report.kept_tokens)
        for path, (moved, took) in self._flows.items():
            flow = getattr(report, path)
            if flow.bytes:
                moved.inc(flow.bytes)
                took.inc(flow.seconds)

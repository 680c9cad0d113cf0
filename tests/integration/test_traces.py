"""One request, traced over three services, seen by a real OTLP/gRPC collector."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.integration.asking import ask, settled
from tests.integration.cluster import Cluster
from tests.integration.test_oracle import BLOCK_TOKENS, ROUTER_FLAGS, prompt_of

EXPORT_DEADLINE_S = 15.0
CLOCKS_S = 1.0  # a stage that was measured by another clock may seem to have begun a moment before
STAGES = {"request", "lookup", "decode", "prefill_run", "ssd_read", "queue", "prefill", "transfer", "handoff", "first_token"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request, context):  # type: ignore[no-untyped-def]
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(1).wait()


@pytest.mark.timeout(180)
def test_the_stages_of_a_request_are_separate_spans_of_one_trace(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with collecting() as (collector, url):
        flags = ("--otlp-endpoint", url)
        cluster = Cluster(
            tiny("llama"),
            tmp_path,
            worker_flags=flags,
            router_flags=(*ROUTER_FLAGS, *flags),
            kvstore_flags=flags,
            block_tokens=BLOCK_TOKENS,
        )
        with cluster:
            ask(cluster, prompt_of(64))
            settled(cluster, 4)
            ask(cluster, prompt_of(64) + prompt_of(60, seed=1))  # storage -> prefill
        until = time.monotonic() + EXPORT_DEADLINE_S
        while time.monotonic() < until:
            whole = next((spans for spans in _traces(collector) if {span.name for span in spans} >= STAGES), None)
            if whole is not None:
                (request,) = (span for span in whole if span.name == "request")
                early = [((request.start_time_unix_nano - span.start_time_unix_nano) / 1e9, span.name) for span in whole]
                assert max(early)[0] < CLOCKS_S, f"stages, by how many seconds before their request they began: {early}"
                return
            time.sleep(0.1)  # spans leave in batches
        raise AssertionError([[span.name for span in spans] for spans in _traces(collector)])


def _traces(collector: Collector) -> list[list[Span]]:
    traces: dict[bytes, list[Span]] = {}
    for span in list(collector.spans):
        traces.setdefault(span.trace_id, []).append(span)
    return list(traces.values())

"""worker.proto messages from and to `services.worker.requests`."""

from collections.abc import Collection, Iterable

import msgspec

from common.blocks import KEY_BYTES, ChainRoot, reusable_blocks
from common.errors import Internal, InvalidRequest, PenstockError, from_code, meaning
from common.generation import FinishReason
from common.pb import worker_pb2 as pb
from common.routes import BY_PREFILL, HELD, PATHS, Leg, Order, Plan, Source, problem_of
from common.wire import (
    endpoint_from_pb,
    endpoint_to_pb,
    lease_token,
    legs_to_pb,
    order_to_pb,
    sampling_from_pb,
    sampling_to_pb,
    token_from_pb,
    token_to_pb,
)
from services.worker.loading import Stored
from services.worker.requests import (
    DecodeRequest,
    Flow,
    PrefillProgress,
    PrefillRequest,
    Report,
    RequestStep,
    Route,
    StageLease,
)

# What legs may name: a prefill worker is not told what it holds itself.
_OF_ROUTES = [source for source in Source if source is not Source.RECOMPUTE]
_OF_RUNS = [source for source in _OF_ROUTES if source is not Source.RESIDENT_AT_PREFILL]


def stored_from_pb(message: pb.StoredPrefix) -> Stored:
    lease = message.lease
    return Stored(message.blocks, lease_token(lease.token), endpoint_from_pb(lease.endpoint), message.kvstore, lease.ttl_ms / 1e3)


def stored_to_pb(stored: Stored) -> pb.StoredPrefix:
    lease = pb.Lease(token=stored.token, endpoint=endpoint_to_pb(stored.endpoint), ttl_ms=int(stored.ttl_s * 1e3))
    return pb.StoredPrefix(blocks=stored.blocks, lease=lease, kvstore=stored.kvstore)


def decode_request(start: pb.Start) -> DecodeRequest:
    """Raises InvalidRequest for what can't be a request."""
    if not start.token_ids:
        raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
    stored = stored_from_pb(start.route.stored) if start.route.stored.blocks else None
    return DecodeRequest(
        id=start.request_id,
        prompt=tuple(start.token_ids),
        sampling=sampling_from_pb(start.sampling),
        route=Route(
            _decode_legs(start.route, len(start.token_ids)),
            order_from_pb(start.route.order),
            stored,
            start.route.prefill,
            start.route.kvstore,
            tuple(start.route.replicas),
            start.route.replicated_blocks,
            tuple(start.route.alternates),
            start.route.tail_tokens,
        ),
        deadline_s=start.deadline_ms / 1e3,
        chain_root=_chain_root(start.chain_root),
        output=tuple(start.output_ids),
        traceparent=start.traceparent,
    )


def run_request(request: PrefillRequest, namespace: str) -> pb.RunRequest:
    lease = pb.Lease(
        token=request.stage.token, endpoint=endpoint_to_pb(request.stage.endpoint), ttl_ms=int(request.stage.ttl_s * 1e3)
    )
    return pb.RunRequest(
        request_id=request.id,
        token_ids=request.prompt,
        sampling=sampling_to_pb(request.sampling),
        legs=legs_to_pb(request.legs),
        order=order_to_pb(request.order),
        stored=stored_to_pb(request.stored) if request.stored else None,
        stage=lease,
        namespace=namespace,
        deadline_ms=int(request.deadline_s * 1e3),
        traceparent=request.traceparent,
        chain_root=request.chain_root or b"",
    )


def prefill_request(message: pb.RunRequest, block_tokens: int) -> PrefillRequest:
    """Raises InvalidRequest for what can't be a run."""
    if not message.token_ids:
        raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
    legs = legs_from_pb(message.legs, reusable_blocks(len(message.token_ids), block_tokens), _OF_RUNS)
    wanted = max((leg.last_block for leg in legs if leg.source is Source.STORAGE_TO_PREFILL), default=0)
    if wanted > message.stored.blocks:
        raise InvalidRequest(f"a leg up to block {wanted} of a stored prefix of {message.stored.blocks} blocks")
    stage = StageLease(lease_token(message.stage.token), endpoint_from_pb(message.stage.endpoint), message.stage.ttl_ms / 1e3)
    return PrefillRequest(
        id=message.request_id,
        prompt=tuple(message.token_ids),
        sampling=sampling_from_pb(message.sampling),
        stage=stage,
        legs=legs,
        order=order_from_pb(message.order),
        stored=stored_from_pb(message.stored) if message.stored.blocks else None,
        deadline_s=message.deadline_ms / 1e3,
        chain_root=_chain_root(message.chain_root) if message.chain_root else None,
        traceparent=message.traceparent,
    )


def _chain_root(raw: bytes) -> ChainRoot:
    if len(raw) != KEY_BYTES:
        raise InvalidRequest(f"chain_root of {len(raw)} bytes: must be {KEY_BYTES}")
    return ChainRoot(raw)


def _decode_legs(route: pb.Route, tokens: int) -> tuple[Leg, ...]:
    """The leading ones may be of blocks that workers hold, which need not be stored."""
    legs = legs_from_pb(route.legs, tokens, _OF_ROUTES)
    held = 0
    for leg in legs:
        where = f"{leg.source} leg [{leg.first_block}, {leg.last_block})"
        if leg.source in HELD:
            if leg.first_block != held:
                raise InvalidRequest(f"{where}: must begin at block {held}")
            held = leg.last_block
        elif leg.last_block > route.stored.blocks:
            raise InvalidRequest(f"{where}: expected ordered, disjoint legs inside [0, {route.stored.blocks})")
        if leg.source is Source.RESIDENT_AT_PREFILL and not route.prefill:
            raise InvalidRequest(f"{where}: expected a prefill worker, and the route names none")
    return legs


def legs_from_pb(messages: Iterable[pb.Leg], blocks: int, sources: Collection[Source]) -> tuple[Leg, ...]:
    """Raises InvalidRequest unless they are ordered, disjoint, inside `[0, blocks)` and of these sources."""
    served = {pb.Source.Value(source.upper()): source for source in sources}
    legs = []
    for message in messages:
        source = served.get(message.source)
        if source is None:
            raise InvalidRequest(f"leg.source = {message.source}: must be one of {', '.join(served.values())}")
        legs.append(Leg(message.first_block, message.last_block, source))
    if problem := problem_of(legs, blocks):
        raise InvalidRequest(problem)
    return tuple(legs)


def order_from_pb(value: pb.Order) -> Order:
    if value not in (pb.FORWARD, pb.MEET, pb.WHOLE):
        raise InvalidRequest(f"order = {value}: must be one of {', '.join(Order)}")
    return Order(pb.Order.Name(value).lower())


def report_to_pb(report: Report) -> pb.Report:
    values = msgspec.structs.asdict(report)
    return pb.Report(**(values | {path: pb.Flow(**msgspec.structs.asdict(values[path])) for path in PATHS}))


def report_from_pb(message: pb.Report) -> Report:
    values = {field: getattr(message, field) for field in Report.__struct_fields__}
    plan = Plan(message.plan) if message.plan in set(Plan) else Plan.RECOMPUTE
    return Report(**(values | _flows(message, PATHS) | {"plan": plan}))


def _flows(message: pb.Report | pb.RunEvent, paths: Iterable[str]) -> dict[str, Flow]:
    flows = {path: getattr(message, path) for path in paths}
    return {path: Flow(flow.bytes, flow.seconds) for path, flow in flows.items()}


def error_to_pb(error: PenstockError) -> pb.Error:
    return pb.Error(
        code=meaning(error).code, message=error.message, param=error.param or "", retry_after_s=error.retry_after_s or 0.0
    )


def error_from_pb(message: pb.Error) -> PenstockError:
    return from_code(message.code, message.message, param=message.param or None, retry_after_s=message.retry_after_s or None)


def step_to_pb(step: RequestStep) -> pb.SequenceStep:
    return pb.SequenceStep(
        request_id=step.id,
        tokens=[token_to_pb(token) for token in step.tokens],
        finish=step.finish or "",
        error=error_to_pb(step.error) if step.error else None,
        report=report_to_pb(step.report) if step.report else None,
        stop_token=0 if step.stop_token is None else step.stop_token + 1,
    )


def progress_to_pb(progress: PrefillProgress) -> pb.RunEvent:
    return pb.RunEvent(
        computed_blocks=progress.computed_blocks,
        pull_from=progress.pull_from,
        first=token_to_pb(progress.first) if progress.first else None,
        report=report_to_pb(progress.report) if progress.report else None,
        finish=progress.finish or "",
        stop_token=0 if progress.stop_token is None else progress.stop_token + 1,
        **{path: pb.Flow(**msgspec.structs.asdict(getattr(progress, path))) for path in BY_PREFILL},
    )


def progress_from_pb(message: pb.RunEvent) -> PrefillProgress:
    first, finish = None, None
    if message.HasField("first"):
        if message.finish not in (FinishReason.STOP, FinishReason.LENGTH):
            raise Internal(f"prefill's finish = {message.finish!r}: must be stop or length")
        first, finish = token_from_pb(message.first), FinishReason(message.finish)
    return PrefillProgress(
        message.computed_blocks,
        tuple(message.pull_from),
        first,
        finish,
        message.stop_token - 1 if message.stop_token else None,
        report_from_pb(message.report) if message.HasField("report") else None,
        **_flows(message, BY_PREFILL),
    )

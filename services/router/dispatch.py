"""Placing a choice: block keys -> kvstore lookup -> `placement.route` -> `Start` on the decode stream."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from common import tracing
from common.blocks import Namespace, block_keys, chain_root, reusable_blocks
from common.clients.decode import Report, Step
from common.errors import ContextExceeded, Overloaded, PenstockError, Unavailable
from common.logs import Log
from common.pb import worker_pb2 as pb
from common.wire import legs_to_pb, order_to_pb, sampling_to_pb
from services.router.choice import Choice, Placement
from services.router.cluster import Basis
from services.router.generator import Generator
from services.router.lookup import Answer, give_back, look_up
from services.router.placement import Route, route
from services.router.policy.view import ClusterView, Query
from services.router.policy.workers import Refusal, Why
from services.router.rendezvous import ranked
from services.router.work import Work

INLINE_TOKENS_MAX = 65536  # fewer are hashed in place: a thread hop costs more
log = Log("dispatch")


class Dispatch:
    """Places the choices of one request. `arrived` gets every step, with the choice and its id on the stream."""

    def __init__(
        self,
        generator: Generator,
        work: Work,
        deadline: float,
        traceparent: str,
        arrived: Callable[[Choice, str, Step], None],
    ) -> None:
        self._generator = generator
        self._work = work
        self._deadline = deadline
        self._traceparent = traceparent
        self._arrived = arrived
        self._serial = next(generator.serials)  # clients may reuse a request id

    async def place(self, choice: Choice) -> None:
        """Finds a worker and starts the choice there; waits for one only if it was running before."""
        give_up_at = time.monotonic() + (self._generator.settings.failover_wait_s if choice.moves else 0)
        if isinstance(choice.failure, Overloaded) and not choice.output:
            give_up_at = 0.0  # nothing has been shown: refuse early rather than wait
        while True:
            refusal = await self._try_place(choice)
            if refusal is None:
                return
            now = time.monotonic()
            if now >= min(give_up_at, self._deadline) or refusal.why is Why.TOO_LARGE:
                raise _refused(refusal)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, give_up_at - now)):
                    await self._generator.cluster.changed()

    async def _try_place(self, choice: Choice) -> Refusal | None:
        basis = self._generator.cluster.basis()
        if not basis.block_tokens:
            return Refusal(
                Why.UNAVAILABLE, self._generator.cluster.not_ready(needs_kvstore=False) or "no decode worker is connected"
            )
        if choice.output and choice.namespace != basis.namespace:
            return Refusal(Why.UNAVAILABLE, "no decode worker has the weights this answer was begun with")
        answer, kvstores, resident = await self._lookup(choice, basis)
        found = answer.found
        query = Query(
            prompt_tokens=len(choice.prompt) + len(choice.output),
            stored_blocks=found.prefix.blocks if found else 0,
            kvstore=next(iter(kvstores), ""),
            avoid=choice.avoid,
            resident=resident,
            turn=next(self._generator.turns),
            moved=bool(choice.output),
        )
        view = self._generator.cluster.view()
        decision = route(query, view, time.monotonic(), self._generator.policy)
        choice.decision = self._generator.decisions.made(self._work.id, choice.index, choice.moves, query, view, decision)
        if isinstance(decision, Route) and view.namespace == basis.namespace:
            placed_at = decision.decode
            try:
                self._start(choice, decision, answer, kvstores[1:], view)
                return None
            except (Unavailable, Overloaded) as error:
                decision = Refusal(Why.UNAVAILABLE, error.message)
                choice.avoid |= {placed_at}
        if found is not None:
            self._generator.keeper.release(found)
        return decision if isinstance(decision, Refusal) else Refusal(Why.UNAVAILABLE, "the cluster changed its namespace")

    async def _lookup(self, choice: Choice, basis: Basis) -> tuple[Answer, list[str], dict[str, int]]:
        """The stored prefix, leased; the stores for this chain, best first; who still holds how much of it. Any failure is a miss."""
        began = time.monotonic()
        root = chain_root(Namespace(basis.namespace), self._work.salt)
        reusable = reusable_blocks(len(choice.prompt), basis.block_tokens)
        leading = choice.prompt[: max(1, reusable) * basis.block_tokens]
        big = len(leading) > INLINE_TOKENS_MAX
        keys = await self._generator.off_loop(big, lambda: block_keys(root, leading, basis.block_tokens))
        keeper, settings, cluster = self._generator.keeper, self._generator.settings, self._generator.cluster
        best = ranked(keys[0] if keys else root, basis.kvstores)[: settings.replicas]
        stores = [peer.store for address in best if (peer := cluster.peer("kvstore", address)) and peer.store]
        kvstores = [store.address for store in stores]
        if reusable == 0:
            return Answer(), kvstores, {}
        self._generator.metrics.queried(len(choice.prompt))
        looking = asyncio.ensure_future(
            look_up(stores, Namespace(basis.namespace), keys, keeper, settings.lookup_timeout_ms / 1000)
        )
        try:
            resident = await cluster.resident(keys, settings.resident_timeout_ms / 1000)
            answer = await asyncio.shield(looking)
        except BaseException:
            keeper.see_to(give_back(looking, keeper))
            raise
        for address, reason in answer.failures:
            log.warning("lookup_failed", request_id=self._work.id, kvstore=address, reason=reason)
            self._generator.metrics.lookup_failed()
        blocks = answer.found.prefix.blocks if answer.found else 0
        tracing.record("lookup", time.monotonic() - began, self._traceparent, blocks=blocks)
        return answer, kvstores, resident

    def _start(self, choice: Choice, decision: Route, answer: Answer, replicas: list[str], view: ClusterView) -> None:
        """Sends the choice to its worker and counts it there."""
        found = answer.found
        peer = self._generator.cluster.peer("decode", decision.decode)
        if peer is None or peer.connection is None:
            raise Unavailable(f"decode worker {decision.decode}: not connected")
        stream_id = f"{self._work.id}.{self._serial}.{choice.index}.{choice.moves}"
        remaining_s = max(0.001, self._deadline - time.monotonic())
        message = pb.Start(
            request_id=stream_id,
            token_ids=choice.prompt,
            sampling=sampling_to_pb(choice.sampling),
            route=pb.Route(
                legs=legs_to_pb(decision.legs),
                order=order_to_pb(decision.order),
                plan=decision.plan,
                stored=found.to_pb() if found is not None and decision.legs else None,
                prefill=decision.prefill,
                kvstore=decision.kvstore,
                replicas=replicas,
                replicated_blocks=answer.replicated_blocks,
                alternates=decision.alternates,
                tail_tokens=decision.tail_tokens,
            ),
            deadline_ms=int(remaining_s * 1000) + 1,
            chain_root=chain_root(Namespace(view.namespace), self._work.salt),
            traceparent=self._traceparent,
            output_ids=choice.output,
        )
        peer.connection.start(message, lambda step: self._arrived(choice, stream_id, step))
        tokens = len(choice.prompt) + len(choice.output)
        prefill = self._generator.cluster.peer("prefill", decision.prefill) if decision.prefill else None
        stay, prefill_stay = self._generator.cluster.send(decision.estimate, peer, prefill, tokens)
        placement = Placement(decision, peer, peer.connection, stream_id, stay, prefill, prefill_stay, found)
        choice.placement = placement
        choice.route = decision
        choice.namespace = view.namespace
        self._generator.metrics.routed(decision.plan)
        log.debug("placed", request_id=stream_id, decode=peer.id, plan=decision.plan, reason=decision.reason)

    def asked_another(self, placement: Placement, report: Report) -> None:
        """A prefill worker failed, and decode has asked the next of the route's alternates: the request waits there now."""
        if placement.prefill_stay is not None:
            placement.prefill_stay.ended()
        alternates, number = placement.route.alternates, report.prefill_retries
        address = alternates[number - 1] if 0 < number <= len(alternates) else ""
        placement.prefill = self._generator.cluster.peer("prefill", address)
        placement.prefill_stay = self._generator.cluster.send_on(placement.route.estimate, placement.prefill)


def _refused(refusal: Refusal) -> PenstockError:
    if refusal.why is Why.TOO_LARGE:
        return ContextExceeded(refusal.reason, param="prompt")
    kind = Overloaded if refusal.why is Why.OVERLOADED else Unavailable
    return kind(refusal.reason, retry_after_s=refusal.retry_after_s)

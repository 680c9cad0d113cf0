"""A kvstore, a decode worker and a prefill worker in one process, for tests that choose the route and reach inside.

The workers are what `serve_worker` makes of them, without their processes: real engines in threads, real stages, real gRPC and
byte planes. Requests go to the decoder as the service would pass them.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from common import rpc
from common.blocks import Namespace, block_keys, chain_root, reusable_blocks
from common.clients.kvstore import KvStoreClient
from common.errors import DeadlineExceeded, PenstockError, Unavailable
from common.generation import Sampling, Token
from common.routes import Leg, Order, Source
from common.transport.interface import Endpoint, Part, PartStatus, Span
from services.decode.worker import DecodeKind, DecodeWorker
from services.kvstore.serve import serve
from services.kvstore.settings import KvStoreSettings
from services.prefill.worker import PrefillKind, PrefillWorker
from services.worker import node as nodes
from services.worker.engine.engine import Engine
from services.worker.loading import Stored
from services.worker.model import LoadedModel, load_model
from services.worker.requests import DecodeRequest, Report, RequestStep, Route
from services.worker.settings import WorkerSettings
from tests.families import EOS

DEADLINE_S = 30.0
LEASE_S = 2 * DEADLINE_S  # a lease that is left does not end by itself while a test looks for it
SERVERS: dict[bytes, rpc.Server] = {}  # of running workers, by epoch


class Answer(msgspec.Struct):
    """What came of a request. `fallback` is in the report."""

    tokens: list[Token] = []
    report: Report | None = None
    error: PenstockError | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


class Pair:
    """One prefill worker, one decode worker, one kvstore; perhaps a spare prefill worker."""

    def __init__(
        self,
        model: LoadedModel,
        prefill: nodes.Node[Any],
        decode: nodes.Node[Any],
        store: KvStoreClient,
        spare: nodes.Node[Any] | None = None,
    ) -> None:
        self.model = model
        self.prefill = prefill
        self.decode = decode
        self.store = store
        self.spare = spare
        assert isinstance(decode.worker, DecodeWorker) and isinstance(prefill.worker, PrefillWorker)
        self.decoder = decode.worker.decoder
        self.runner = prefill.worker.runner
        self._serial = 0

    @property
    def block_tokens(self) -> int:
        return self.model.layout.block_tokens

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        return list(block_keys(self._root, prompt, self.block_tokens))

    @property
    def _root(self) -> Any:
        return chain_root(Namespace(self.model.namespace))

    async def stored(self, prompt: Sequence[int]) -> Stored | None:
        """The longest stored prefix, leased as the router does it."""
        keys = self.keys(prompt)[: reusable_blocks(len(prompt), self.block_tokens)]
        found = await self.store.lookup(Namespace(self.model.namespace), keys, LEASE_S) if keys else None
        return Stored(found.blocks, found.token, found.endpoint, self.store.address, found.ttl_s) if found else None

    async def request(
        self, prompt: Sequence[int], legs: Sequence[Leg] = (), order: Order = Order.FORWARD, *, prefill: str | None = None,
        alternates: Sequence[str] = (), tail_tokens: int = 0, tokens: int = 8, store: bool = False, **sampling: Any,
    ) -> DecodeRequest:  # fmt: skip
        """With a lease on what is stored when there are legs. `prefill`: its address, empty for none; the pair's by default."""
        stored = await self.stored(prompt) if legs else None
        self._serial += 1
        address = self.prefill.address if prefill is None else prefill
        kvstore = self.store.address if store else ""
        route = Route(
            tuple(legs), order, stored, address, kvstore, alternates=tuple(alternates), tail_tokens=tail_tokens
        )  # fmt: skip
        chosen = Sampling(**{"max_tokens": tokens, "temperature": 0.0, "eos_token_ids": (EOS,), "logprobs": 0} | sampling)
        return DecodeRequest(f"r{self._serial}", tuple(prompt), chosen, route, DEADLINE_S, self._root)

    async def run(self, request: DecodeRequest) -> Answer:
        answer, over = Answer(), asyncio.Event()

        def emit(step: RequestStep) -> None:
            answer.tokens += step.tokens
            answer.report = step.report or answer.report
            answer.error = step.error
            if step.finish is not None:
                over.set()

        self.decoder.start(request, emit)
        async with asyncio.timeout(DEADLINE_S + 5):
            await over.wait()
        return answer

    async def cancelled(self, request: DecodeRequest, turns: int) -> PenstockError | None:
        """What a request ends with that is cancelled after so many turns of the event loop."""
        over: asyncio.Future[PenstockError | None] = asyncio.get_running_loop().create_future()

        def emit(step: RequestStep) -> None:
            if step.finish is not None:
                over.set_result(step.error)

        key = self.decoder.start(request, emit)
        assert key is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        self.decoder.cancel(key)
        async with asyncio.timeout(DEADLINE_S + 5):
            return await over

    async def ask(self, prompt: Sequence[int], *args: Any, **more: Any) -> Answer:
        return await self.run(await self.request(prompt, *args, **more))

    async def keep(self, prompt: Sequence[int]) -> None:
        """Computes a prompt on decode alone until all its full blocks are stored: a busy machine may drop some of them."""
        wanted = len(prompt) // self.block_tokens
        for _ in range(5):
            answer = await self.ask(prompt, prefill="", tokens=1, store=True)
            assert answer.error is None, answer.error
            with suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE_S / 5):
                    while await self.store.count(Namespace(self.model.namespace), self.keys(prompt)) < wanted:
                        await asyncio.sleep(0.01)  # a poll of the kvstore, bounded above
                    return
        raise AssertionError(f"not all of {wanted} blocks were stored")

    @property
    def prefills(self) -> list[nodes.Node[Any]]:
        return [node for node in (self.prefill, self.spare) if node is not None]

    async def check_at_rest(self) -> None:
        """Every slot, lease, block and queued byte is where it belongs."""
        until = asyncio.get_running_loop().time() + DEADLINE_S
        while self.decoder.in_flight or any(node.worker.in_flight for node in self.prefills) or not self._slots_home():
            await asyncio.sleep(0.01)  # what ended is given back by threads and background writes
            assert asyncio.get_running_loop().time() < until, self
        self.decoder.check_integrity()
        for node in self.prefills:
            node.worker.runner.check_integrity()
        for node in (*self.prefills, self.decode):
            node.stage.check_integrity()
            assert not node.stage._leases, node.stage
            await node.engine.call(lambda engine: engine.check_integrity())
            assert not node.reader.link.queued_bytes
        load = await self.decode.engine.call(_load)
        assert load.pool_blocks_free == load.pool_blocks_total
        with suppress(Unavailable, DeadlineExceeded):  # of a store that a test has killed nothing can be asked
            while left := (await self.store.describe()).leases:
                await asyncio.sleep(0.01)  # decode gives a lease back beside what it does next
                assert asyncio.get_running_loop().time() < until, f"{left} leases are left at the store"

    def __repr__(self) -> str:
        return (
            f"Pair({self.decoder._live}, {list(self.runner._live)}, {self.prefill.stage}, {self.decode.stage}, "
            f"{self.decode.engine.load}, {self.decode.reader.link}, {self.prefill.reader.link})"
        )

    def _slots_home(self) -> bool:
        load = self.decode.engine.load
        return (
            all(node.stage.slots_free == node.stage.slots_total for node in self.prefills)
            and self.decode.stage.slots_free + self.decode.send_slots.size == self.decode.stage.slots_total
            and load.pool_blocks_free == load.pool_blocks_total
        )


def _load(engine: Engine) -> Any:
    return engine.load


@asynccontextmanager
async def running_pair(
    directory: Path,
    data: Path,
    *,
    transport: str = "tcp",
    model: LoadedModel | None = None,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    resident: bool = False,
    keeping: bool = False,
    store: dict[str, Any] | None = None,
    spare: bool = False,
) -> AsyncIterator[Pair]:
    """The extra arguments are settings of each. `resident`: decode's pool keeps KV. `keeping`: prefill's stage does. `spare`: a second prefill worker."""
    model = model or tiny_model(directory)
    run_dir = str(data) if transport == "shm" else ""
    common = {
        "model": str(directory),
        "transport": transport,
        "run_dir": run_dir,
        "stage_bytes": 512 * model.layout.bytes_per_block,
    }
    async with AsyncExitStack() as stack:
        address = await _kvstore(stack, data, {"run_dir": run_dir} | (store or {}))
        client = KvStoreClient(address)
        stack.push_async_callback(client.close)
        prefills = common | {"resident": keeping}
        there = await _worker("prefill", WorkerSettings(**prefills | (prefill or {})), model, PrefillKind(), stack)
        here = await _worker(
            "decode",
            WorkerSettings(**common | {"pool_bytes": 16 << 20, "resident": resident} | (decode or {})),
            model,
            DecodeKind(),
            stack,
        )
        other = await _worker("prefill", WorkerSettings(**prefills), model, PrefillKind(), stack) if spare else None
        pair = Pair(model, there, here, client, other)
        yield pair
        await pair.check_at_rest()


@asynccontextmanager
async def reborn(pair: Pair, port: int) -> AsyncIterator[nodes.Node[Any]]:
    """The pair's prefill worker as a new process has it: the same settings, and nothing of what it held."""
    async with AsyncExitStack() as stack:
        settings = msgspec.structs.replace(pair.prefill.settings, port=port)
        yield await _worker("prefill", settings, pair.model, PrefillKind(), stack)


def tiny_model(directory: Path, block_tokens: int = 16) -> LoadedModel:
    """Without kernels: their helper threads serve one engine per process, and here are two."""
    return load_model(directory, device="cpu", dtype="float32", block_tokens=block_tokens, kernels="off")


async def _kvstore(stack: AsyncExitStack, data: Path, settings: dict[str, Any]) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = asyncio.Event()
    chosen = {"data": (str(data / "kv"),), "port": port, "budget_bytes": 64 << 20, "durable": False} | settings
    task = asyncio.create_task(serve(KvStoreSettings(**chosen), stop))

    async def end() -> None:
        stop.set()
        await task

    stack.push_async_callback(end)
    client = KvStoreClient(f"127.0.0.1:{port}")
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await client.describe(deadline_s=1.0)
                break
            except PenstockError:
                assert not task.done(), task.exception()
                await asyncio.sleep(0.05)
    await client.close()
    return f"127.0.0.1:{port}"


async def _worker(
    role: str, settings: WorkerSettings, model: LoadedModel, kind: nodes.Kind, stack: AsyncExitStack
) -> nodes.Node[Any]:
    node: nodes.Node[Any] = nodes.Node(role, settings, model, kind)
    stack.callback(node.stage.close)
    stack.push_async_callback(node.stores.close)
    stack.push_async_callback(node.transports.close)
    node.engine.start()
    stack.push_async_callback(node.engine.stop)
    node.worker = worker = kind.role(node)
    SERVERS[node.epoch] = server = await nodes._listen(node, worker, stack)
    stack.callback(SERVERS.pop, node.epoch)
    await server.set_serving(True)
    stack.push_async_callback(worker.drain, 5.0)
    return node


def legs(*ranges: tuple[int, int, Source]) -> tuple[Leg, ...]:
    return tuple(Leg(*one) for one in ranges)


Rule = Callable[[str, Endpoint, Part], PartStatus | None]


@contextmanager
def faults(node: nodes.Node[Any], rule: Rule) -> Iterator[list[Part]]:
    """Parts of a node's transfers end as `rule` says, given "read" or "write", the peer, and the part; None lets them pass.

    A part that is to fail never leaves here. The value collects those parts.
    """
    honest = node.transports.transport
    failed: list[Part] = []

    class Faulty:
        def __init__(self, endpoint: Endpoint) -> None:
            self._honest = honest(endpoint)
            self._endpoint = endpoint

        @property
        def carrier(self) -> str:
            return self._honest.carrier

        async def read(self, token: Any, parts: Sequence[Part], into: Sequence[Span], *, deadline_s: float) -> list[PartStatus]:
            return await self._transfer("read", token, parts, into, deadline_s)

        async def write(
            self, token: Any, parts: Sequence[Part], source: Sequence[Span], *, deadline_s: float
        ) -> list[PartStatus]:
            return await self._transfer("write", token, parts, source, deadline_s)

        async def _transfer(
            self, op: str, token: Any, parts: Sequence[Part], spans: Sequence[Span], deadline_s: float
        ) -> list[PartStatus]:
            ends = [rule(op, self._endpoint, part) for part in parts]
            failed.extend(part for part, end in zip(parts, ends, strict=True) if end is not None)
            passing = [i for i, end in enumerate(ends) if end is None]
            statuses = [end or PartStatus.OK for end in ends]
            if passing:
                move = getattr(self._honest, op)
                moved = await move(token, [parts[i] for i in passing], [spans[i] for i in passing], deadline_s=deadline_s)
                for i, status in zip(passing, moved, strict=True):
                    statuses[i] = status
            return statuses

    node.transports.transport = Faulty  # type: ignore[method-assign, assignment]
    try:
        yield failed
    finally:
        node.transports.transport = honest  # type: ignore[method-assign]

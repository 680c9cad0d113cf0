"""Asks a decode worker directly, as the router does, to see what the router adds."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence

from common.blocks import Namespace, chain_root
from common.clients.decode import DecodeConnection, Step
from common.generation import Sampling
from common.pb import worker_pb2 as pb
from common.wire import sampling_to_pb

DEADLINE_MS = 60_000


class DirectDecode:
    """A stream of our own to one decode worker. Nothing is stored and no prefill takes part."""

    def __init__(self, address: str) -> None:
        self._connection = DecodeConnection(address)
        self._root = b""

    async def __aenter__(self) -> "DirectDecode":
        info = await self._connection.describe(5.0)
        self._root = chain_root(Namespace(info.namespace))
        opened = asyncio.Event()
        self._serving = asyncio.create_task(self._connection.serve(opened.set))
        await opened.wait()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving
        await self._connection.close()

    async def ttft_s(self, prompt: Sequence[int]) -> float:
        """Seconds until the only token of a greedy request arrives."""
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def sink(step: Step) -> None:
            if step.error is not None:
                done.set_exception(step.error)
            elif step.tokens:
                done.set_result(time.perf_counter() - began)

        start = pb.Start(
            request_id=uuid.uuid4().hex,
            token_ids=prompt,
            sampling=sampling_to_pb(Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)),
            route=pb.Route(order=pb.FORWARD),
            deadline_ms=DEADLINE_MS,
            chain_root=self._root,
        )
        began = time.perf_counter()
        self._connection.start(start, sink)
        return await done

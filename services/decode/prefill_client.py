"""Decode's calls to prefill workers: one channel per worker, one streaming call per run."""

import asyncio
from collections.abc import Callable

import grpc.aio

from common import rpc
from common.errors import Internal, TransferFailed, Unavailable
from common.pb import worker_pb2_grpc
from services.worker.convert import progress_from_pb, run_request
from services.worker.requests import HEARTBEAT_S, PrefillProgress, PrefillRequest, Report

CONNECT_DEADLINE_S = 2.0
SILENCE_S = 6 * HEARTBEAT_S  # a worker that says nothing for so long is stuck, whatever its connection says
Tell = Callable[[PrefillProgress], None]


class PrefillPeers:
    """The prefill workers this process has called, by host:port."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def run(self, address: str, request: PrefillRequest, tell: Tell) -> Report:
        """Runs prefill to its end; its report. `tell` takes the news on the way, the first token among them.

        Cancelling this call cancels the work over there.

        Raises:
            PenstockError: refused, failed, or ended without a first token and a report.
        """
        channel = self._channels.setdefault(address, rpc.channel(address))
        await self._connected(channel, address)
        stub = worker_pb2_grpc.PrefillStub(channel)
        call = stub.Run(run_request(request, self._namespace), timeout=request.deadline_s)
        computed_blocks, has_first = 0, False
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    event = await call.read()
                if event is grpc.aio.EOF:
                    break
                progress = progress_from_pb(event)
                if progress.computed_blocks < computed_blocks:
                    raise Internal(f"prefill {address} counted back from {computed_blocks} to {progress.computed_blocks} blocks")
                computed_blocks = progress.computed_blocks
                has_first = has_first or progress.first is not None
                tell(progress)
                if progress.report is not None and has_first:
                    return progress.report
        except TimeoutError as error:
            raise Unavailable(f"prefill {address} has said nothing for {SILENCE_S:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise rpc.raised(error, address) from error
        finally:
            call.cancel()
        raise TransferFailed(f"prefill {address} ended after {computed_blocks} blocks, without a first token and a report")

    async def _connected(self, channel: grpc.aio.Channel, address: str) -> None:
        """Fails within the connect deadline when nobody listens, so that the request falls back early."""
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await channel.channel_ready()
        except TimeoutError as error:
            raise Unavailable(f"prefill {address} can't be reached within {CONNECT_DEADLINE_S:g} s") from error

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

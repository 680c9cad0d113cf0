"""The router's side of a prefill worker: who is there, and what its stage holds of a chain. Its runs are decode's to ask for."""

from collections.abc import Sequence
from typing import cast

from common import rpc
from common.pb import worker_pb2 as pb
from common.pb import worker_pb2_grpc


class PrefillConnection:
    """One incarnation of the connection to a prefill worker."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.channel(address)
        self._stub = worker_pb2_grpc.PrefillStub(self._channel)

    def __repr__(self) -> str:
        return f"<PrefillConnection {self.address}>"

    async def describe(self, timeout_s: float) -> pb.WorkerInfo:
        pending = self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        return cast(pb.WorkerInfo, await rpc.call(pending, self.address))

    async def resident(self, keys: Sequence[bytes], timeout_s: float) -> int:
        """How many leading blocks of a chain are in the worker's stage at this moment."""
        pending = self._stub.Resident(pb.ResidentRequest(keys=keys), timeout=timeout_s)
        return min(len(keys), cast(pb.ResidentReply, await rpc.call(pending, self.address)).blocks)

    async def close(self) -> None:
        await self._channel.close()

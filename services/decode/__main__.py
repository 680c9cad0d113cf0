"""python -m services.decode: one decode worker."""

import asyncio

from common import process
from services.worker.settings import WorkerSettings


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    from services.decode.worker import DecodeKind  # brings torch, which --help and a wrong flag do without
    from services.worker.node import serve_worker

    await serve_worker("decode", settings, stop, DecodeKind())


if __name__ == "__main__":
    process.leave(process.start("decode", WorkerSettings, "A decode worker: owns requests and generates their tokens.", serve))

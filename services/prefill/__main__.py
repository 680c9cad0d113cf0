"""python -m services.prefill: one prefill worker."""

import asyncio

from common import process
from services.worker.settings import WorkerSettings


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    from services.prefill.worker import PrefillKind  # brings torch, which --help and a wrong flag do without
    from services.worker.node import serve_worker

    await serve_worker("prefill", settings, stop, PrefillKind())


if __name__ == "__main__":
    process.leave(
        process.start("prefill", WorkerSettings, "A prefill worker: computes prompts into decode workers' stages.", serve)
    )

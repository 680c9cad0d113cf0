"""python -m services.prefill: one prefill worker."""

import asyncio
import sys

from common import process
from services.prefill.settings import PrefillSettings


async def serve(settings: PrefillSettings, stop: asyncio.Event) -> None:
    from services.prefill.worker import PrefillKind  # brings torch, which --help and a wrong flag do without
    from services.worker.node import serve_worker

    await serve_worker("prefill", settings, stop, PrefillKind())


if __name__ == "__main__":
    sys.exit(process.start("prefill", PrefillSettings, "A prefill worker: computes prompts into decode workers' stages.", serve))

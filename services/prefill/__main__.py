"""python -m services.prefill: one prefill worker."""

import asyncio
import sys

from common import logs, process, settings
from services.prefill.settings import PrefillSettings
from services.prefill.worker import PrefillWorker
from services.worker.node import serve_worker


def main() -> int:
    async def serve(stop: asyncio.Event) -> None:
        await serve_worker("prefill", chosen, stop, PrefillWorker)

    chosen = settings.load(
        PrefillSettings, "prefill", sys.argv[1:], about="A prefill worker: computes prompts into decode workers' stages."
    )
    logs.setup("prefill", chosen.log_level, chosen.log_format)
    return process.run(serve)


if __name__ == "__main__":
    sys.exit(main())

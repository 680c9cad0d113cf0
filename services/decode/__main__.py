"""python -m services.decode: one decode worker."""

import asyncio
import sys

from common import logs, process, settings
from services.decode.settings import DecodeSettings
from services.decode.worker import DecodeWorker
from services.worker.node import serve_worker


def main() -> int:
    async def serve(stop: asyncio.Event) -> None:
        await serve_worker("decode", chosen, stop, DecodeWorker)

    chosen = settings.load(DecodeSettings, "decode", sys.argv[1:], about="A decode worker: owns requests, generates tokens.")
    logs.setup("decode", chosen.log_level, chosen.log_format)
    return process.run(serve)


if __name__ == "__main__":
    sys.exit(main())

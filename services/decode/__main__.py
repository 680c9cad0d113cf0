"""python -m services.decode: one decode worker."""

import asyncio
import sys

from common import process
from services.decode.settings import DecodeSettings
from services.decode.worker import DecodeWorker
from services.worker.node import serve_worker


async def serve(settings: DecodeSettings, stop: asyncio.Event) -> None:
    await serve_worker("decode", settings, stop, DecodeWorker)


if __name__ == "__main__":
    sys.exit(process.start("decode", DecodeSettings, "A decode worker: owns requests and generates their tokens.", serve))

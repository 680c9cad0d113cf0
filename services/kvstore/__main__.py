"""python -m services.kvstore: one kvstore."""

import asyncio
import sys

from common import logs, process, settings
from services.kvstore.serve import serve
from services.kvstore.settings import KvStoreSettings


def main() -> int:
    async def run(stop: asyncio.Event) -> None:
        await serve(chosen, stop)

    chosen = settings.load(KvStoreSettings, "kvstore", sys.argv[1:], about="The reservoir: KV blocks on SSD.")
    logs.setup("kvstore", chosen.log_level, chosen.log_format)
    return process.run(run)


if __name__ == "__main__":
    sys.exit(main())

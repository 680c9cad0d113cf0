"""`python -m services.router`: settings -> wire -> run."""

import asyncio
import sys
from pathlib import Path

from common import logs, process, settings, tracing
from common.errors import PenstockError, SettingsError
from common.logs import Log
from services.router.model import hide_torch
from services.router.settings import RouterSettings

log = Log("main")


def main() -> int:
    try:
        config = settings.load(
            RouterSettings, "router", sys.argv[1:], about="Penstock's router: HTTP and gRPC in front of the workers."
        )
    except PenstockError as error:
        logs.setup("router", style="text")
        log.error("failed", reason=error.message)
        return 2
    logs.setup("router", config.log_level, config.log_format)
    log.event("settings", **settings.shown(config))
    hide_torch()
    return process.run(lambda stop: serve(config, stop))


async def serve(config: RouterSettings, stop: asyncio.Event) -> None:
    """One router, from binding its ports to the end of its drain."""
    from services.router.router import Router

    keys = api_keys(config)
    router = await Router.open(config, keys)
    tracing.setup("router", router.id, config.otlp_endpoint)
    try:
        await router.run(stop)
    finally:
        tracing.shutdown()


def api_keys(config: RouterSettings) -> tuple[str, ...]:
    """Keys of the settings and of the file."""
    if not config.api_keys_file:
        return config.api_key
    try:
        lines = Path(config.api_keys_file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_keys_file = {config.api_keys_file!r}: {error}") from error
    if not lines:
        raise SettingsError(f"api_keys_file = {config.api_keys_file!r}: expected one key a line, found none")
    return (*config.api_key, *lines)


if __name__ == "__main__":
    process.leave(main())

"""Settings of a decode worker."""

from typing import Annotated

from msgspec import Meta

from services.worker.settings import WorkerSettings


class DecodeSettings(WorkerSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Peers are named by each request's route."""

    resident: Annotated[
        bool,
        Meta(description="keep the KV of finished sequences in the engine's memory while nobody else needs it, and use it again"),
    ] = True

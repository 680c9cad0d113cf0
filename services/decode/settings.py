"""Settings of a decode worker."""

from services.worker.settings import WorkerSettings


class DecodeSettings(WorkerSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Peers are named by each request's route, so there is nothing to add."""

"""Settings of a prefill worker."""

from services.worker.settings import WorkerSettings


class PrefillSettings(WorkerSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Peers are named by each run, so there is nothing to add."""

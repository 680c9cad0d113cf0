"""The settings of each service, by its name."""

import msgspec

from services.kvstore.settings import KvStoreSettings
from services.router.settings import RouterSettings
from services.worker.settings import WorkerSettings

SETTINGS: dict[str, type[msgspec.Struct]] = {
    "router": RouterSettings,
    "kvstore": KvStoreSettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}

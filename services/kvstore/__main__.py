"""python -m services.kvstore: one kvstore."""

from common import process
from services.kvstore.serve import serve
from services.kvstore.settings import KvStoreSettings

if __name__ == "__main__":
    process.leave(process.start("kvstore", KvStoreSettings, "The reservoir: keeps KV blocks on SSD.", serve))

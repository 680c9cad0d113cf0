"""A kvstore on a disk without room: every allocation fails as on a full file system. Flags as of the kvstore."""

import errno
import os
import sys

from common import process
from services.kvstore import store
from services.kvstore.files import Files
from services.kvstore.serve import serve
from services.kvstore.settings import KvStoreSettings


class FullDisk(Files):
    """Takes small files, such as LOCK, and no segment."""

    def allocate(self, fd: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    vars(store)["Files"] = FullDisk
    sys.exit(process.start("kvstore", KvStoreSettings, "A kvstore on a full disk.", serve))

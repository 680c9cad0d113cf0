"""What `penstock up --detach` leaves running: one launch, reported over a pipe until it is ready."""

import os
import sys
from collections.abc import Sequence

from common.errors import PenstockError
from services.cli import up
from services.cli.detach import Reporter
from services.cli.messages import Failed
from services.cli.screen import Plain, both


def main(argv: Sequence[str]) -> int:
    *given, report = argv
    fd = int(report.partition("=")[2])
    os.set_inheritable(fd, False)
    show = both(Plain(sys.stdout).show, Reporter(fd).show)
    config = up.config_file(given)
    try:
        return up.run(up.read_settings(given, config), config, show)
    except PenstockError as error:
        show(Failed(reason=error.message))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

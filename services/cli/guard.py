"""`python -I -S guard.py PARENT COMMAND...`: becomes COMMAND, tied to the life of PARENT.

The kernel sends SIGKILL when the parent ends (PR_SET_PDEATHSIG), however it ends, so nothing the
launcher starts outlives it, not even after `kill -9`. Set here, between fork and exec, because a
hook in the launcher itself is unsafe beside threads, and because NATS can't set it on its own.
Standard library only: this file runs before anything else is importable.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before we asked
        sys.exit("the launcher is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

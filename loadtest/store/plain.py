"""The plain-socket ceiling: another process sends memory, this one receives it into memory. No disk, frames, checks.

python -m loadtest.store.plain        the sender: prints its port, sends MESSAGE_BYTES per byte that it gets
"""

import mmap
import os
import socket
import subprocess
import sys
import time

from loadtest.store.fio import GIB, Sample

MESSAGE_BYTES = 8 << 20


class PlainSocket:
    """The receiving side, and the sender's process."""

    def __init__(self) -> None:
        self._sender = subprocess.Popen([sys.executable, "-m", "loadtest.store.plain"], stdout=subprocess.PIPE, text=True)
        assert self._sender.stdout is not None
        self._socket = socket.create_connection(("127.0.0.1", int(self._sender.stdout.readline())))
        self._into = _memory()

    def receive(self, seconds: float) -> Sample:
        began, cpu_s, latencies_s = time.perf_counter(), self._cpu_s(), []
        self._socket.sendall(b"x")
        while time.perf_counter() - began < seconds:
            self._socket.sendall(b"x")  # one ahead, so that the sender never waits
            latencies_s.append(self._receive_one())
        latencies_s.append(self._receive_one())
        took_s, ordered = time.perf_counter() - began, sorted(latencies_s)
        moved = len(ordered) * MESSAGE_BYTES
        return Sample(moved / took_s, ordered[len(ordered) // 2], ordered[-1], (self._cpu_s() - cpu_s) / (moved / GIB))

    def _receive_one(self) -> float:
        began, got = time.perf_counter(), 0
        while got < MESSAGE_BYTES:
            got += self._socket.recv_into(self._into[got:])
        return time.perf_counter() - began

    def _cpu_s(self) -> float:
        with open(f"/proc/{self._sender.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + time.process_time()

    def close(self) -> None:
        self._socket.close()
        self._sender.wait()


def _memory() -> memoryview:
    return memoryview(mmap.mmap(-1, MESSAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))


def main() -> None:
    source = _memory()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        peer, _ = listener.accept()
        with peer:
            while peer.recv(1):
                peer.sendall(source)


if __name__ == "__main__":
    main()

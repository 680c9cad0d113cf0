"""Real namespaces and links, where the machine lets us: root, iproute2, a kernel with both. Else reported as not run."""

import os
import subprocess
import sys

import pytest

from loadtest.dualpath import namespaces
from loadtest.dualpath.links import STORE, Network, Rates, Topology, address, attachments
from loadtest.dualpath.namespaces import PREFIX, Lab, stale_among, sweep

MISSING = namespaces.why_not()
needs_root = pytest.mark.skipif(bool(MISSING), reason=f"not run: {MISSING}")
SENT_BYTES = 1_000_000
SERVE = """
import socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
peer, _ = server.accept()
peer.sendall(bytes(int(sys.argv[2])))
peer.close()
"""
FETCH = """
import socket, sys
peer = socket.create_connection((sys.argv[1], 5000), timeout=20)
got = 0
while piece := peer.recv(1 << 20):
    got += len(piece)
print(got)
"""


def test_only_names_of_dead_runs_are_stale() -> None:
    names = [f"{PREFIX}-10-switch", f"{PREFIX}-11-store", "somebody-else", f"{PREFIX}-x-store", f"{PREFIX}-10-decode-0"]
    assert stale_among(names, alive=lambda pid: pid == 11) == [f"{PREFIX}-10-switch", f"{PREFIX}-10-decode-0"]


@needs_root
def test_bytes_cross_only_the_link_they_are_sent_over_and_the_kernel_counts_them() -> None:
    shape = Topology(1, 1)
    with Lab(shape) as lab:
        lab.shape(Rates(50e6, 400e6))
        before = lab.counters()
        store = address(shape, STORE, Network.STORAGE)
        server = subprocess.Popen(
            [*lab.inside(STORE), sys.executable, "-c", SERVE, store, str(SENT_BYTES)], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        got = subprocess.run(
            [*lab.inside("decode-0"), sys.executable, "-c", FETCH, store], capture_output=True, text=True, timeout=60
        )
        assert int(got.stdout) == SENT_BYTES, got.stderr
        assert server.wait(10) == 0
        server.stdout.close()
        after = lab.counters()
    moved = {port: after[port][0] - before[port][0] for port in after}
    assert SENT_BYTES < moved["st-decode-0"] < 1.1 * SENT_BYTES
    assert all(count < 0.01 * SENT_BYTES for port, count in moved.items() if port != "st-decode-0")


@needs_root
def test_every_shaped_interface_has_its_token_bucket_and_rates_can_change() -> None:
    with Lab(Topology(1, 1)) as lab:
        for rate, shown in ((25e6, "200Mbit"), (50e6, "400Mbit")):
            lab.shape(Rates(rate, 8 * rate))
            for link in (link for link in attachments(lab.topology) if link.shaped and link.network is Network.STORAGE):
                for member, interface in ((namespaces.SWITCH, link.port), (link.member, link.interface)):
                    said = subprocess.run(
                        ["tc", "-n", lab.namespace(member), "qdisc", "show", "dev", interface], capture_output=True, text=True, check=True
                    ).stdout  # fmt: skip
                    assert "tbf" in said and f"rate {shown}" in said


@needs_root
def test_networks_are_not_routed_to_each_other_nor_out() -> None:
    shape = Topology(1, 1)
    with Lab(shape) as lab:
        control = address(shape, "decode-0", Network.CONTROL)
        for member, target in (("prefill-0", "192.0.2.1"), (STORE, address(shape, "decode-0", Network.COMPUTE))):
            found = subprocess.run([*lab.inside(member), "ip", "route", "get", target], capture_output=True, text=True)
            assert "unreachable" in found.stderr.lower(), found.stdout
        found = subprocess.run([*lab.inside("prefill-0"), "ip", "route", "get", control], capture_output=True, text=True)
        assert "dev control" in found.stdout


@needs_root
def test_nothing_is_left_and_a_dead_runs_leftovers_are_swept() -> None:
    with Lab(Topology(1, 1)):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    subprocess.run(["ip", "netns", "add", f"{PREFIX}-{dead.pid}-switch"], check=True)
    assert sweep() == [f"{PREFIX}-{dead.pid}-switch"]
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"{PREFIX}-{os.getpid()}-" not in listed

"""The links for real: network namespaces, veth pairs, bridges and token buckets of the kernel. Needs root and iproute2.

Life of a `Lab`: entered, it is built (namespaces named `penstock-lab-<pid>-<member>`), `shape` as often as wanted, `counters`; left, it is destroyed.
Nothing of it is outside its namespaces, so that deleting those is enough. A run that was
killed leaves its namespaces behind, without processes (those follow their parent); `sweep` at the next start deletes what belongs
to a process that is gone.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence

from common.errors import Unavailable
from loadtest.dualpath.links import (
    MTU_BYTES,
    TCP_BUFFER_BYTES,
    Attachment,
    Network,
    Rates,
    Topology,
    attachments,
    shaping,
)

PREFIX = "penstock-lab"
SWITCH = "switch"
COMMAND_DEADLINE_S = 30.0
_OURS = re.compile(rf"{PREFIX}-(\d+)-.+")


def why_not() -> str:
    """What this machine lacks for network namespaces, in words; empty: nothing."""
    if os.name != "posix" or not os.path.exists("/proc/self/ns/net"):
        return "network namespaces need Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} found: install iproute2 (Debian, Ubuntu: apt install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces and traffic shaping need root: run it with sudo"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _run(["ip", "netns", "add", probe])
        _run(["ip", "-n", probe, "link", "set", "lo", "up"])
        _run(["tc", "-n", probe, *shaping("lo", 1e6).split()])
    except Unavailable as error:
        return f"this machine's kernel refuses: {error.message}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True, timeout=COMMAND_DEADLINE_S, check=False)
    return ""


def sweep() -> list[str]:
    """Deletes namespaces that a dead run left; their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False)
    found = [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]
    stale = stale_among(found, alive=lambda pid: os.path.exists(f"/proc/{pid}"))
    for name in stale:
        _run(["ip", "netns", "delete", name])
    return stale


def stale_among(names: Iterable[str], alive: Callable[[int], bool]) -> list[str]:
    """Those of our names whose process is gone. Pure."""
    return [name for name in names if (found := _OURS.fullmatch(name)) and not alive(int(found[1]))]


class Lab:
    """The namespaces and links of one topology."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.links = attachments(topology)
        self.rates = Rates()
        self._built: list[str] = []

    def __enter__(self) -> "Lab":
        try:
            self.build()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.destroy()

    def namespace(self, member: str) -> str:
        return f"{PREFIX}-{os.getpid()}-{member}"

    def inside(self, member: str) -> list[str]:
        """What a command line begins with to run there."""
        return ["ip", "netns", "exec", self.namespace(member)]

    def build(self) -> None:
        """Makes everything, unshaped. Raises Unavailable with what the kernel said; `destroy` is due in any case."""
        for member in (SWITCH, *self.topology.members):
            name = self.namespace(member)
            _run(["ip", "netns", "add", name])
            self._built.append(name)
            self._ip(member, ["link set lo up"])
            self._limit_buffers(member)
        self._ip(SWITCH, [f"link add {network} type bridge mcast_snooping 0" for network in Network])
        self._ip(SWITCH, [f"link set {network} up mtu {MTU_BYTES}" for network in Network])
        for link in self.links:
            self._attach(link)

    def shape(self, rates: Rates) -> None:
        """Gives every worker's links these rates, from now on."""
        ports = [(link, rates.of(link.network)) for link in self.links if link.shaped]
        self._tc(SWITCH, [shaping(link.port, rate) for link, rate in ports])
        for link, rate in ports:
            self._tc(link.member, [shaping(link.interface, rate)])
        self.rates = rates

    def counters(self) -> dict[str, tuple[int, int]]:
        """Port -> bytes the kernel counted since it was made, (towards the member, from it)."""
        found = json.loads(_run(["ip", "-n", self.namespace(SWITCH), "-j", "-s", "link", "show"]))
        counted = {entry["ifname"]: entry["stats64"] for entry in found if "stats64" in entry}
        return {
            link.port: (counted[link.port]["tx"]["bytes"], counted[link.port]["rx"]["bytes"])
            for link in self.links
            if link.shaped
        }

    def destroy(self) -> None:
        """Deletes what was built. Idempotent; a name that can't be deleted is left to the next `sweep`."""
        while self._built:
            name = self._built.pop()
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=COMMAND_DEADLINE_S, check=False)

    def _attach(self, link: Attachment) -> None:
        _run(["ip", "-n", self.namespace(SWITCH), "link", "add", link.port, "type", "veth",
              "peer", "name", link.interface, "netns", self.namespace(link.member)])  # fmt: skip
        self._ip(SWITCH, [f"link set {link.port} mtu {MTU_BYTES} master {link.network} up"])
        self._ip(
            link.member, [f"link set {link.interface} mtu {MTU_BYTES} up", f"addr add {link.address}/24 dev {link.interface}"]
        )

    def _limit_buffers(self, member: str) -> None:
        """A connection has little in flight: what waits, waits in the sender, where it can still be reordered."""
        for name in ("tcp_wmem", "tcp_rmem"):
            _run([*self.inside(member), "sysctl", "-q", "-w", f"net.ipv4.{name}=4096 131072 {TCP_BUFFER_BYTES}"])

    def _ip(self, member: str, commands: Sequence[str]) -> None:
        _run(["ip", "-n", self.namespace(member), "-batch", "-"], "\n".join(commands))

    def _tc(self, member: str, commands: Sequence[str]) -> None:
        _run(["tc", "-n", self.namespace(member), "-batch", "-"], "\n".join(commands))


def _run(argv: Sequence[str], given: str = "") -> str:
    try:
        done = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{' '.join(argv)}: {error}") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(argv)}: {done.stderr.strip()}{f' (given: {given})' if given else ''}")
    return done.stdout

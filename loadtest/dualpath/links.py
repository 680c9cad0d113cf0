"""Which processes there are, which links join them, and how fast those are. Pure: commands come out as text.

Three networks, each a bridge in a namespace of its own (the *switch*), and one namespace per member:

    control   10.77.0.0/24   everybody; not shaped: HTTP, gRPC, NATS
    storage   10.77.1.0/24   workers and the store: KV bytes from and to SSD
    compute   10.77.2.0/24   workers: KV bytes between them

A worker's storage link and its compute link are shaped, each direction at the end that sends: towards
the worker at the switch's port, away from it at the worker's own interface. So a rate bounds one link in
one direction, as that of a full-duplex cable does. The store's own port is not shaped: the workers' links are
the bottleneck, never the store's. Nothing is routed between networks, or out of the namespaces.
"""

import re
from enum import StrEnum

import msgspec

from common.errors import SettingsError

WORKERS_MAX = 8  # of each role: ports and addresses are made for so many
SUBNET = "10.77"
MTU_BYTES = 9000  # jumbo frames, as storage networks have
# A token bucket lets a whole segment of the kernel's segmentation offload (64 KiB) through at once, or it cuts it up. Two of
# them, or 4 ms of the rate where that is more: what a link may be ahead of its rate is then nothing beside a transfer.
BURST_BYTES_MIN = 128 << 10
BURST_S = 0.004
# The bucket's queue is longer than what all connections may have in flight (`TCP_BUFFER_BYTES` each), so that it never drops.
QUEUE_BYTES = 8 << 20
TCP_BUFFER_BYTES = 256 << 10
STORE, CONTROL = "store", "control"


class Network(StrEnum):
    CONTROL = "control"
    STORAGE = "storage"
    COMPUTE = "compute"


_NUMBERS = {Network.CONTROL: 0, Network.STORAGE: 1, Network.COMPUTE: 2}
_PORTS = {Network.CONTROL: "ct", Network.STORAGE: "st", Network.COMPUTE: "co"}  # an interface's name has at most 15 characters


class Topology(msgspec.Struct, frozen=True):
    """So many prefill and decode workers."""

    prefills: int
    decodes: int

    def __str__(self) -> str:
        return f"{self.prefills}P{self.decodes}D"

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(
            f"{role}-{n}" for role, count in (("prefill", self.prefills), ("decode", self.decodes)) for n in range(count)
        )

    @property
    def members(self) -> tuple[str, ...]:
        return (CONTROL, STORE, *self.workers)


def topology(text: str) -> Topology:
    """`2P1D` -> two prefill workers, one decode worker. Raises `SettingsError`."""
    found = re.fullmatch(r"(\d+)[pP](\d+)[dD]", text)
    prefills, decodes = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (1 <= prefills <= WORKERS_MAX and 1 <= decodes <= WORKERS_MAX):
        raise SettingsError(f"topology = {text!r}: expected such as 1P1D or 2P1D, 1 to {WORKERS_MAX} of each")
    return Topology(prefills, decodes)


class Rates(msgspec.Struct, frozen=True):
    """Bytes per second of every worker's links, in each direction. None: as fast as the machine."""

    storage: float | None = None
    compute: float | None = None

    def of(self, network: Network) -> float | None:
        return {Network.CONTROL: None, Network.STORAGE: self.storage, Network.COMPUTE: self.compute}[network]


class Attachment(msgspec.Struct, frozen=True):
    """A member's link to a network: its own interface, the switch's port, its address."""

    member: str
    network: Network
    host: int

    @property
    def interface(self) -> str:
        return str(self.network)

    @property
    def port(self) -> str:
        return f"{_PORTS[self.network]}-{self.member}"

    @property
    def address(self) -> str:
        return f"{SUBNET}.{_NUMBERS[self.network]}.{self.host}"

    @property
    def shaped(self) -> bool:
        return self.network is not Network.CONTROL and self.member != STORE


def attachments(shape: Topology) -> tuple[Attachment, ...]:
    """Every link of a topology."""
    out = []
    for host, member in enumerate(shape.members, start=1):
        out.append(Attachment(member, Network.CONTROL, host))
        if member != CONTROL:
            out.append(Attachment(member, Network.STORAGE, host))
        if member not in (CONTROL, STORE):
            out.append(Attachment(member, Network.COMPUTE, host))
    return tuple(out)


def address(shape: Topology, member: str, network: Network) -> str:
    return next(a.address for a in attachments(shape) if (a.member, a.network) == (member, network))


def shaping(interface: str, rate: float | None) -> str:
    """The `tc` command that gives an interface's sending side a rate, in place of the one it had."""
    if rate is None:
        return f"qdisc replace dev {interface} root pfifo limit 10000"
    burst = max(BURST_BYTES_MIN, round(BURST_S * rate))
    return f"qdisc replace dev {interface} root tbf rate {round(rate * 8)}bit burst {burst} limit {QUEUE_BYTES + burst}"

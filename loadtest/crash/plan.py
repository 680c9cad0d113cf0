"""What happens in each life of a store: it follows from one number."""

import random
from enum import Enum

import msgspec

KILL_AFTER_S_MAX = 0.5  # of traffic, or of starting
STARTING_SHARE = 0.15  # of the lives end before they serve
POWER_SHARE = 0.5
WARNED_SHARE = 0.2  # get SIGTERM first, so that what a store writes at its end is cut off too
WARNING_S_MAX = 0.3
CARRIERS = ("shm", "tcp", "grpc")


class Death(Enum):
    """How a process ends."""

    KILL = "kill"  # SIGKILL: what was written stays
    POWER = "power"  # SIGKILL of a process that keeps what is not synced to itself


class Plan(msgspec.Struct, frozen=True):
    """One life."""

    seed: str
    death: Death
    kill_after_s: float
    while_starting: bool  # killed after that time, whether it is ready or not
    warning_s: float | None  # between SIGTERM and SIGKILL
    carrier: str


def plan_of(seed: str) -> Plan:
    """The plan of a life, from a seed of its own."""
    choice = random.Random(seed)
    return Plan(
        seed=seed,
        death=Death.POWER if choice.random() < POWER_SHARE else Death.KILL,
        kill_after_s=choice.uniform(0.0, KILL_AFTER_S_MAX),
        while_starting=choice.random() < STARTING_SHARE,
        warning_s=choice.uniform(0.0, WARNING_S_MAX) if choice.random() < WARNED_SHARE else None,
        carrier=choice.choice(CARRIERS),
    )

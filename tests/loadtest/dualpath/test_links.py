"""Topologies, addresses and shaping, as text."""

import pytest

from common.errors import SettingsError
from loadtest.dualpath.links import CONTROL, STORE, Network, Rates, Topology, address, attachments, shaping, topology


def test_topology_is_read_and_written() -> None:
    assert topology("2p1D") == Topology(2, 1)
    assert str(Topology(2, 1)) == "2P1D"
    assert Topology(1, 2).workers == ("prefill-0", "decode-0", "decode-1")


@pytest.mark.parametrize("text", ["", "1P", "0P1D", "1P0D", "9P1D", "1D1P"])
def test_a_topology_that_cant_be_built_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match=f"topology = '{text}'"):
        topology(text)


def test_workers_have_every_network_and_the_store_has_no_compute_link() -> None:
    found = {(a.member, a.network) for a in attachments(Topology(1, 2))}
    for worker in Topology(1, 2).workers:
        assert {network for member, network in found if member == worker} == set(Network)
    assert (STORE, Network.COMPUTE) not in found
    assert (CONTROL, Network.STORAGE) not in found


def test_only_the_workers_storage_and_compute_links_are_shaped() -> None:
    shaped = {(a.member, a.network) for a in attachments(Topology(1, 1)) if a.shaped}
    workers, networks = Topology(1, 1).workers, (Network.STORAGE, Network.COMPUTE)
    assert shaped == {(worker, network) for worker in workers for network in networks}


def test_names_and_addresses_are_unique_and_short_enough_for_the_kernel() -> None:
    links = attachments(Topology(8, 8))
    assert len({a.port for a in links}) == len({a.address for a in links}) == len(links)
    assert max(len(a.port) for a in links) <= 15
    assert address(Topology(1, 1), STORE, Network.STORAGE) == "10.77.1.2"


def test_shaping_commands() -> None:
    assert shaping("st-decode-0", 24e6) == "qdisc replace dev st-decode-0 root tbf rate 192000000bit burst 131072 limit 8519680"
    assert shaping("compute", 192e6) == "qdisc replace dev compute root tbf rate 1536000000bit burst 768000 limit 9156608"
    assert shaping("storage", None) == "qdisc replace dev storage root pfifo limit 10000"


def test_rates_leave_the_control_network_alone() -> None:
    assert [Rates(1.0, 2.0).of(network) for network in Network] == [None, 1.0, 2.0]

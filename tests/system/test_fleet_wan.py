"""A fleet over a wide-area network that is slow, changes, stalls and breaks: where requests go; none is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.cli.wan import Wan
from tests.support.apps import make_app
from tests.support.nodes import FleetOfNodes
from tests.support.processes import wait_for
from tests.system.test_fleet import Asking, machine_of, served_by

pytestmark = pytest.mark.slow

REGIONS = {"ams-1": "ams", "fra-1": "fra", "iad-1": "iad"}
FRA_S, IAD_S = 0.02, 0.08


@pytest.fixture(scope="module")
def wan() -> Iterator[Wan]:
    with Wan() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, wan: Wan) -> Iterator[FleetOfNodes]:
    def apps(name: str, place: Path) -> str:
        found = make_app(place, "wide", autostop="off") if name != "ams-1" else ""
        return found + (make_app(place, "far", autostop="off") if name == "iad-1" else "")

    with FleetOfNodes(tmp_path_factory.mktemp("wan"), REGIONS, apps, wan=wan) as made:
        for name in ("fra-1", "iad-1"):
            made[name].wait_machine_state("wide", "started")
        yield made


@pytest.fixture(autouse=True)
def healed(wan: Wan, fleet: FleetOfNodes) -> None:
    """Each test begins with a network that is whole, fra nearer to ams than iad, and everybody heard."""
    for other, rtt_s in (("fra-1", FRA_S), ("iad-1", IAD_S)):
        wan.both("ams-1", other, rtt_s=rtt_s, jitter_s=0.0, is_stalled=False, is_cut=False)
    wan.both("fra-1", "iad-1", rtt_s=0.09, is_stalled=False, is_cut=False)
    for name in fleet:
        fleet.wait_met(fleet[name], set(fleet) - {name})
    fra = machine_of(fleet, "fra-1", "wide")
    wait_for(lambda: [served_by(fleet, "ams-1", "wide") for _ in range(5)] == [fra] * 5, 25, "fra is the nearest")


def distances(fleet: FleetOfNodes, node: str) -> dict[str, float]:
    return {one["name"]: one["rtt_ms"] or 0.0 for one in fleet[node].api("GET", "/v1/regions")[1]["regions"]}


def test_measured_round_trips_are_those_of_the_network(fleet: FleetOfNodes) -> None:
    def as_they_are() -> bool:
        found = distances(fleet, "ams-1")
        return FRA_S * 1000 <= found["fra"] < FRA_S * 1000 + 15 and IAD_S * 1000 <= found["iad"] < IAD_S * 1000 + 20

    wait_for(as_they_are, 15, lambda: f"{distances(fleet, 'ams-1')}")


def test_a_change_of_the_network_moves_traffic_within_ten_seconds(fleet: FleetOfNodes, wan: Wan) -> None:
    iad = machine_of(fleet, "iad-1", "wide")
    wan.both("ams-1", "fra-1", rtt_s=0.3)
    began = time.monotonic()
    wait_for(lambda: served_by(fleet, "ams-1", "wide") == iad, 12, "iad is the nearest now")
    assert time.monotonic() - began < 10


def test_a_crossing_request_takes_one_round_trip_more(fleet: FleetOfNodes) -> None:
    connection = fleet["ams-1"].client("wide")
    took = []
    for _ in range(10):
        began = time.monotonic()
        connection.request("GET", "/", headers={"Host": fleet["ams-1"].host("wide")})
        assert connection.getresponse().read()
        took.append(time.monotonic() - began)
    connection.close()
    assert FRA_S <= min(took) < FRA_S + 0.015


def test_a_stalled_link_costs_no_safe_request(fleet: FleetOfNodes, wan: Wan) -> None:
    """Nothing is closed, nothing arrives: after a second of silence what waits there goes elsewhere."""
    iad, fra = machine_of(fleet, "iad-1", "wide"), machine_of(fleet, "fra-1", "wide")
    with Asking(fleet, "ams-1") as asking:
        wait_for(lambda: len(asking.answers) > 10, 10, "requests")
        wan.both("ams-1", "fra-1", is_stalled=True)
        asking.wait_for(iad, 10)
        time.sleep(1.0)
        wan.both("ams-1", "fra-1", is_stalled=False)
        asking.wait_for(fra, 30)
    failed = [one for one in asking.answers if one[1] != 200]
    assert not failed, failed[:5]
    assert max(one[3] for one in asking.answers) < 4.0


@pytest.mark.parametrize("way", [("ams-1", "fra-1"), ("fra-1", "ams-1")])
def test_a_link_that_is_cut_one_way_costs_no_safe_request(fleet: FleetOfNodes, wan: Wan, way: tuple[str, str]) -> None:
    iad = machine_of(fleet, "iad-1", "wide")
    with Asking(fleet, "ams-1") as asking:
        wait_for(lambda: len(asking.answers) > 10, 10, "requests")
        wan.set(*way, is_cut=True)
        asking.wait_for(iad, 10)
        time.sleep(1.0)
    failed = [one for one in asking.answers if one[1] != 200]
    assert not failed, failed[:5]


@pytest.mark.parametrize("ways", [[("ams-1", "iad-1"), ("iad-1", "ams-1")], [("ams-1", "iad-1")]], ids=["both", "one"])
def test_a_node_that_is_not_reached_is_reached_by_way_of_another(
    fleet: FleetOfNodes, wan: Wan, ways: list[tuple[str, str]]
) -> None:
    far = machine_of(fleet, "iad-1", "far")
    assert served_by(fleet, "ams-1", "far") == far
    for way in ways:
        wan.set(*way, is_cut=True)
    wait_for(lambda: fleet["ams-1"].get("far", timeout=20)[0] == 200, 15, "a way around")
    for _ in range(10):
        status, _, body = fleet["ams-1"].get("far", timeout=20)
        assert status == 200 and json.loads(body)["machine"] == far
    for way in ways:
        wan.set(*way, is_cut=False)
    fleet.wait_met(fleet["ams-1"], {"iad-1"})
    assert served_by(fleet, "ams-1", "far") == far


def test_a_partition_leaves_each_side_with_what_it_has(fleet: FleetOfNodes, wan: Wan) -> None:
    iad, fra = machine_of(fleet, "iad-1", "wide"), machine_of(fleet, "fra-1", "wide")
    wan.both("ams-1", "iad-1", is_cut=True)
    wan.both("fra-1", "iad-1", is_cut=True)
    wait_for(lambda: fleet.states(fleet["ams-1"]).get("iad-1") == "silent", 5, "the split is known")
    assert served_by(fleet, "ams-1", "wide") == fra
    assert served_by(fleet, "iad-1", "wide") == iad

    def refused() -> bool:
        """At first it is tried by way of fra, which has not noticed yet."""
        status, fields, _ = fleet["ams-1"].get("wide", headers={"fly-force-region": "iad"})
        assert status in (502, 503), (status, fields)
        return (status, fields["wakefront-error"]) == (503, "PR04")

    wait_for(refused, 6, "nobody reaches it")
    nodes = json.loads(fleet["ams-1"].cli("nodes", "--json"))
    assert next(one["state"] for one in nodes if one["name"] == "iad-1") == "silent"

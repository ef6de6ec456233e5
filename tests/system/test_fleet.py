"""Several real nodes as one fleet: any takes any request, the nearest machine serves it, losses cost nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apps import make_app, starts
from tests.support.nodes import FleetOfNodes
from tests.support.processes import wait_for

pytestmark = pytest.mark.slow

REGIONS = {"ams-1": "ams", "fra-1": "fra", "iad-1": "iad"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetOfNodes]:
    """`wide` runs at fra and iad; `only` is configured at iad, and sleeps."""
    folder = tmp_path_factory.mktemp("fleet")

    def apps(name: str, place: Path) -> str:
        made = make_app(place, "wide", autostop="off") if name != "ams-1" else ""
        for app, wake in (("asked", "fly"), ("near", "nearest"), ("raced", "race")):
            made += make_app(place, app, keys=f'wake = "{wake}"\n')
        return made + (make_app(place, "only") if name == "iad-1" else "")

    with FleetOfNodes(folder, REGIONS, apps) as made:
        for name in ("fra-1", "iad-1"):
            made[name].wait_machine_state("wide", "started")
        yield made


def machine_of(fleet: FleetOfNodes, node: str, app: str) -> str:
    return str(fleet[node].machines(app)[0]["id"])


def served_by(fleet: FleetOfNodes, node: str, app: str, **more: object) -> str:
    status, _, body = fleet[node].get(app, **more)  # type: ignore[arg-type]  # as the caller has it
    assert status == 200, (status, body, fleet[node].log()[-3000:])
    return str(json.loads(body)["machine"])


def test_any_node_takes_a_request_for_an_app_that_another_has(fleet: FleetOfNodes) -> None:
    """With nothing configured there; and what sleeps is woken where it is."""
    before = len(starts(fleet["iad-1"].folder, "only"))
    assert served_by(fleet, "ams-1", "only") == machine_of(fleet, "iad-1", "only")
    assert served_by(fleet, "fra-1", "only") == machine_of(fleet, "iad-1", "only")
    assert len(starts(fleet["iad-1"].folder, "only")) == before + 1


@pytest.mark.parametrize(
    ("app", "first", "later"), [("asked", "iad", "iad"), ("near", "ams", "ams"), ("raced", "iad", "ams")]
)
def test_where_a_machine_far_away_runs_and_a_near_one_sleeps(
    fleet: FleetOfNodes, app: str, first: str, later: str
) -> None:
    """Fly's rule takes what runs; `nearest` waits for the near one; `race` takes what runs until the near one does."""
    machines = {region: machine_of(fleet, f"{region}-1", app) for region in ("ams", "iad")}
    assert served_by(fleet, "iad-1", app) == machines["iad"]
    assert fleet["ams-1"].machines(app)[0]["state"] == "created"
    running = _started_at_iad(fleet, "iad-1")
    wait_for(lambda: _started_at_iad(fleet, "ams-1") == running, 5, "ams hears that it runs")
    assert served_by(fleet, "ams-1", app) == machines[first]
    wait_for(lambda: served_by(fleet, "ams-1", app) == machines[later], 10, f"{later} serves")
    assert served_by(fleet, "ams-1", app) == machines[later]


def _started_at_iad(fleet: FleetOfNodes, seen_from: str) -> int:
    rows = json.loads(fleet[seen_from].cli("nodes", "--json"))
    return int(next(one["started"] for one in rows if one["name"] == "iad-1"))


def test_the_own_region_comes_first_and_a_client_may_ask_for_another(fleet: FleetOfNodes) -> None:
    fra, iad = machine_of(fleet, "fra-1", "wide"), machine_of(fleet, "iad-1", "wide")
    assert {served_by(fleet, "fra-1", "wide") for _ in range(5)} == {fra}
    assert {served_by(fleet, "iad-1", "wide") for _ in range(5)} == {iad}
    assert served_by(fleet, "fra-1", "wide", headers={"fly-force-region": "iad"}) == iad
    assert served_by(fleet, "ams-1", "wide", headers={"fly-force-instance-id": iad}) == iad
    assert served_by(fleet, "ams-1", "wide", headers={"fly-prefer-region": "fra"}) == fra


def test_https_is_served_for_an_app_that_only_others_have(fleet: FleetOfNodes) -> None:
    assert served_by(fleet, "ams-1", "only", tls=True) == machine_of(fleet, "iad-1", "only")


def test_nodes_and_regions_are_shown_with_their_round_trips(fleet: FleetOfNodes) -> None:
    def measured() -> bool:
        rows = json.loads(fleet["ams-1"].cli("nodes", "--json"))
        if not all(one["is_self"] or 0 < one["rtt_ms"] < 1000 for one in rows):
            return False
        return "not measured" not in fleet["ams-1"].cli("regions")

    wait_for(measured, 10, "round trips")
    rows = {one["name"]: one for one in json.loads(fleet["ams-1"].cli("nodes", "--json"))}
    assert rows.keys() == REGIONS.keys() and rows["iad-1"]["apps"] == 5
    regions = json.loads(fleet["ams-1"].cli("regions", "--json"))
    assert regions[0]["name"] == "ams" and {one["name"] for one in regions} == {"ams", "fra", "iad"}
    assert "fra-1" in fleet["ams-1"].cli("nodes")


def test_a_node_that_drains_gets_no_new_requests(fleet: FleetOfNodes) -> None:
    fra, iad = machine_of(fleet, "fra-1", "wide"), machine_of(fleet, "iad-1", "wide")
    fleet["fra-1"].cli("node", "drain")
    try:
        wait_for(lambda: fleet.states(fleet["ams-1"]).get("fra-1") == "draining", 5, "the drain is known")
        assert {served_by(fleet, "fra-1", "wide") for _ in range(3)} == {iad}
        assert {served_by(fleet, "ams-1", "wide") for _ in range(3)} == {iad}
    finally:
        fleet["fra-1"].cli("node", "undrain")
    wait_for(lambda: fleet.states(fleet["ams-1"]).get("fra-1") == "up", 5, "the end of it")
    assert {served_by(fleet, "fra-1", "wide") for _ in range(3)} == {fra}


class Asking(threading.Thread):
    """Asks one node for an app, again and again, each time on a new connection."""

    def __init__(self, fleet: FleetOfNodes, node: str) -> None:
        super().__init__(daemon=True)
        self._node = fleet[node]
        self.is_over = threading.Event()
        self.answers: list[tuple[float, int, str, float]] = []  # when, status, machine, seconds

    def run(self) -> None:
        while not self.is_over.is_set():
            began = time.monotonic()
            try:
                status, fields, body = self._node.get("wide", timeout=10)
                machine = json.loads(body)["machine"] if status == 200 else fields.get("wakefront-error", "?")
            except OSError as error:
                status, machine = 0, repr(error)
            self.answers.append((began, status, machine, time.monotonic() - began))

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.is_over.set()
        self.join(15)

    def wait_for(self, machine: str, seconds: float) -> None:
        wait_for(lambda: bool(self.answers) and self.answers[-1][2] == machine, seconds, lambda: f"{self.answers[-3:]}")


def test_killed_controls_cost_no_request_and_what_they_knew_is_there(fleet: FleetOfNodes) -> None:
    """Workers serve on; the next control knows the other nodes before it has heard of them."""
    iad = machine_of(fleet, "iad-1", "wide")
    fleet["fra-1"].cli("node", "drain")
    with Asking(fleet, "ams-1") as asking:
        asking.wait_for(iad, 5)
        for name in ("ams-1", "iad-1"):
            pid = fleet[name].pid_of("control")
            os.kill(pid, signal.SIGKILL)
            fleet[name].wait_replaced("control", 0, pid)
        time.sleep(2.0)
    fleet["fra-1"].cli("node", "undrain")
    failed = [one for one in asking.answers if one[1] != 200]
    assert not failed and len(asking.answers) > 50, failed[:5]
    fleet.wait_met(fleet["ams-1"], {"fra-1", "iad-1"})


def test_a_node_that_is_killed_costs_no_safe_request_and_gets_its_share_when_it_is_back(fleet: FleetOfNodes) -> None:
    """Last: it ends the nearest node."""
    iad = machine_of(fleet, "iad-1", "wide")
    node = fleet["fra-1"]
    fra = machine_of(fleet, "fra-1", "wide")
    with Asking(fleet, "ams-1") as asking:
        wait_for(lambda: len(asking.answers) > 20, 10, "requests")
        node.abandon()
        asking.wait_for(iad, 5)
        time.sleep(1.5)
        killed = [one for one in asking.answers if one[1] != 200]
        assert not killed, killed[:5]
        node.start()
        node.wait_ready()
        fleet.wait_met(fleet["ams-1"], {"fra-1"})
        asking.is_over.set()
        asking.join(15)
    assert not [one for one in asking.answers if one[1] != 200]
    node.wait_machine_state("wide", "started")
    wait_for(lambda: served_by(fleet, "fra-1", "wide") == fra, 5, "its own machine has its requests again")

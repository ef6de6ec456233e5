"""What a worker knows of apps: the newest word wins, and what goes takes its connections with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from proxy.edge.table import Table
from proxy.model import App, AppName, Endpoint, Machine, MachineId, MachineState, Port, RegionCode, Service
from tests.support.edge import EdgeHarness, answers

STARTED, STOPPED = MachineState.STARTED, MachineState.STOPPED
GET = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\nFly-Force-Instance-Id: %b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def machine(
    name: str = "m1", state: MachineState = STARTED, version: int = 1, port: int = 9000, **more: Any
) -> Machine:
    return Machine(
        MachineId(name), RegionCode("ams"), more.pop("group", "app"), state, version, 1,
        (Endpoint(8080, "127.0.0.1", port),) if port else (), **more,
    )  # fmt: skip


def app(*machines: Machine, name: str = "web", hosts: tuple[str, ...] = (), ports: tuple[Port, ...] = ()) -> App:
    service = Service("tcp", 8080, ports or (Port(80, 80, ("http",)), Port(443, 443, ("tls", "http"))))
    return App(AppName(name), (f"{name}.test", *hosts), (service,), machines)


class Heard:
    def __init__(self, table: Table) -> None:
        self.changed: list[tuple[str, int]] = []
        self.gone: list[str] = []
        table.on_machine = lambda name, machine: self.changed.append((machine.id, machine.version))
        table.on_machine_gone = self.gone.append


@pytest.fixture
def table() -> Table:
    return Table((80, 443), lambda slot: slot * 1000)


@pytest.fixture
def heard(table: Table) -> Heard:
    return Heard(table)


def running(table: Table, name: str = "web", port: int = 80) -> list[str]:
    return [one.record.id for one in table.apps[AppName(name)].ports[port].service.running]


def test_an_older_version_never_overwrites_a_newer_one(table: Table, heard: Heard) -> None:
    table.set_app(app(machine(version=5)))
    table.set_machine(AppName("web"), machine(version=4, state=STOPPED))
    assert running(table) == ["m1"]
    table.set_app(app(machine(version=3, state=STOPPED)))
    assert running(table) == ["m1"] and table.apps[AppName("web")].machines[MachineId("m1")].record.version == 5
    table.set_machine(AppName("web"), machine(version=6, state=STOPPED))
    assert running(table) == []
    assert heard.changed == [("m1", 5), ("m1", 6)]


def test_records_of_unknown_apps_and_machines_are_passed_over(table: Table, heard: Heard) -> None:
    table.set_machine(AppName("nobody"), machine())
    table.set_app(app(machine()))
    table.set_machine(AppName("web"), machine("m9"))
    table.soft_cordon(AppName("web"), MachineId("m9"), True)
    table.soft_cordon(AppName("nobody"), MachineId("m1"), True)
    table.remove_app(AppName("nobody"))
    assert running(table) == ["m1"] and heard.changed == [("m1", 1)]


def test_an_app_replaced_keeps_its_machines(table: Table, heard: Heard) -> None:
    table.set_app(app(machine("m1"), machine("m2")))
    machines = table.apps[AppName("web")].machines
    table.set_app(app(machine("m1"), machine("m3"), hosts=("www.test",)))
    assert table.apps[AppName("web")].machines[MachineId("m1")] is machines[MachineId("m1")]
    assert heard.gone == ["m2"] and running(table) == ["m1", "m3"]
    assert table.hosts["www.test"] is table.hosts["web.test"] is table.apps[AppName("web")]


async def test_an_app_replaced_keeps_the_connections_to_its_machines(edge: EdgeHarness) -> None:
    kept, dropped = await edge.origin(answers(OK)), await edge.origin(answers(OK))
    stays = edge.machine(kept.port, "m1")
    edge.set_app(edge.app(stays, edge.machine(dropped.port, "m2", slot=2)))
    for name in (b"m1", b"m2"):
        assert (await edge.request(GET % name)).endswith(b"ok")
    assert kept.open_connections == dropped.open_connections == 1
    edge.set_app(edge.app(stays))
    await dropped.all_closed()
    assert (await edge.request(GET % b"m1")).endswith(b"ok") and kept.connections == 1


@pytest.mark.parametrize(
    "change", [{"endpoints": ()}, {"state": STOPPED}, {"netns_pid": 7}], ids=["moved", "stopped", "another namespace"]
)
async def test_connections_to_where_a_machine_no_longer_is_are_closed(
    edge: EdgeHarness, change: dict[str, Any]
) -> None:
    origin = await edge.origin(answers(OK))
    machine = edge.machine(origin.port)
    edge.set_app(edge.app(machine))
    assert (await edge.request(GET % b"m1")).endswith(b"ok") and origin.open_connections == 1
    edge.edge.table.set_machine(AppName("hello"), dataclasses.replace(machine, version=2, **change))
    await origin.all_closed()


def test_a_host_that_moves_to_another_app_stays_there(table: Table) -> None:
    table.set_app(app(machine(), hosts=("shop.test",)))
    table.set_app(app(machine("n1"), name="new", hosts=("shop.test",)))
    table.set_app(app(machine()))  # the old one no longer has it, and must not take it along
    assert table.hosts["shop.test"].name == "new"
    table.remove_app(AppName("new"))
    assert set(table.hosts) == {"web.test"}


def test_a_whole_table_removes_what_it_does_not_name(table: Table, heard: Heard) -> None:
    table.set_app(app(machine()))
    table.set_app(app(machine("n1"), name="new"))
    table.start_load()
    table.set_app(app(machine("n1"), name="new"))
    assert set(table.apps) == {"web", "new"}, "until the end both are served"
    table.end_load()
    assert set(table.apps) == {"new"} and set(table.hosts) == {"new.test"} and heard.gone == ["m1"]
    table.end_load()
    assert set(table.apps) == {"new"}


def test_a_cordoned_machine_takes_nothing_until_a_newer_word(table: Table) -> None:
    table.set_app(app(machine("m1"), machine("m2")))
    table.soft_cordon(AppName("web"), MachineId("m1"), True)
    assert running(table) == ["m2"]
    table.soft_cordon(AppName("web"), MachineId("m1"), False)
    assert running(table) == ["m1", "m2"]
    table.soft_cordon(AppName("web"), MachineId("m1"), True)
    table.set_machine(AppName("web"), machine("m1", version=2))
    assert running(table) == ["m1", "m2"], "a new version has been decided on since"
    table.set_machine(AppName("web"), machine("m1", version=3, cordoned=True))
    assert running(table) == ["m2"]


def test_who_waits_hears_of_a_cordon_that_is_lifted(table: Table, heard: Heard) -> None:
    table.set_app(app(machine()))
    table.soft_cordon(AppName("web"), MachineId("m1"), True)
    assert heard.changed == [("m1", 1)]
    table.soft_cordon(AppName("web"), MachineId("m1"), False)
    assert heard.changed == [("m1", 1), ("m1", 1)] and running(table) == ["m1"]


def test_only_machines_of_the_services_groups_that_have_its_port_take_its_requests(table: Table) -> None:
    table.set_app(app(machine("m1"), machine("m2", group="worker"), machine("m3", port=0), machine("m4", STOPPED)))
    assert running(table) == ["m1"]


def test_a_public_port_is_plain_tls_or_mixed_as_its_apps_have_it(table: Table) -> None:
    assert table.port_kind(443) == "plain"
    table.set_app(app(machine()))
    assert (table.port_kind(80), table.port_kind(443)) == ("plain", "tls")
    table.set_app(app(machine("n1"), name="bare", ports=(Port(443, 443, ("http",)),)))
    assert table.port_kind(443) == "mixed"
    table.remove_app(AppName("bare"))
    assert table.port_kind(443) == "tls"


def test_the_first_service_that_has_a_public_port_gets_it_and_ranges_are_served(table: Table) -> None:
    first = Service("tcp", 8080, (Port(80, 80, ("http",)),))
    second = Service("tcp", 9090, (Port(1, 1000, ("http",)),))
    table.set_app(App(AppName("web"), ("web.test",), (first, second), (machine(),)))
    ports = table.apps[AppName("web")].ports
    assert {port: view.service.internal_port for port, view in ports.items()} == {80: 8080, 443: 9090}

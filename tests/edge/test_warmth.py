"""Connections made ahead to suspended machines: who takes them, and what becomes of those nobody takes."""

from __future__ import annotations

import asyncio
import dataclasses

from proxy.edge.warmth import Warmth
from proxy.ipc import Wake, WakeDone
from proxy.model import AppName, Machine, MachineState
from tests.support.edge import EdgeHarness, Origin, read_head

SUSPENDED, STARTED = MachineState.SUSPENDED, MachineState.STARTED
HELLO = AppName("hello")


async def frozen(edge: EdgeHarness, answers: int = 1 << 30) -> tuple[Origin, Machine]:
    """A suspended machine that a wake resumes; each of its connections gives so many answers, then closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(answers):
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    origin = await edge.origin(handle)
    machine = edge.machine(origin.port, state=SUSPENDED)
    edge.set_app(edge.app(machine))
    resumed = dataclasses.replace(machine, state=STARTED, version=2)

    def resume(message: object) -> None:
        if isinstance(message, Wake):
            asyncio.get_running_loop().call_soon(edge.edge.table.set_machine, HELLO, resumed)

    edge.sent.on_send = resume
    return origin, machine


async def until_connected(origin: Origin, count: int = 1) -> None:
    async with asyncio.timeout(5):
        while origin.connections < count:
            await asyncio.sleep(0.005)


async def ask(edge: EdgeHarness, method: bytes = b"GET", more: bytes = b"\r\n") -> bytes:
    return await edge.request(method + b" / HTTP/1.1\r\nHost: hello.apps.test\r\n" + more)


async def test_the_first_request_after_a_resume_goes_over_the_connection_that_waits(edge: EdgeHarness) -> None:
    origin, _ = await frozen(edge)
    await until_connected(origin)
    assert origin.received == [bytearray()], "connected, and nothing sent"
    assert (await ask(edge)).endswith(b"ok")
    assert origin.connections == 1


async def test_the_same_record_again_closes_no_connection_that_waits(edge: EdgeHarness) -> None:
    origin, machine = await frozen(edge)
    await until_connected(origin)
    edge.edge.table.start_load()
    edge.set_app(edge.app(machine))
    edge.edge.table.end_load()
    assert (await ask(edge)).endswith(b"ok")
    assert origin.connections == 1


async def test_a_request_lies_in_the_machines_socket_before_it_is_resumed(edge: EdgeHarness) -> None:
    origin, machine = await frozen(edge)
    edge.sent.on_send = None
    await until_connected(origin)
    async with asyncio.timeout(5):  # the scripted machine is not frozen: it answers what it was sent ahead
        assert (await ask(edge)).endswith(b"ok")
    assert [message for message in edge.sent.messages if isinstance(message, Wake)]
    assert machine.state is SUSPENDED and edge.edge.in_flight(machine.slot) == 0
    assert edge.edge.waker.waiting == 0, "nobody waits for the start any more"


async def test_a_request_sent_ahead_that_is_lost_is_sent_again_once_the_machine_runs(edge: EdgeHarness) -> None:
    origin, machine = await frozen(edge, answers=0)
    edge.sent.on_send = None
    await until_connected(origin)
    answer = asyncio.create_task(ask(edge))
    async with asyncio.timeout(5):
        while not edge.edge.waker.waiting or edge.edge.in_flight(machine.slot):
            await asyncio.sleep(0.005)
    assert not answer.done(), "what was lost on the way is nobody's to hear of yet"
    await origin.stop()
    again = Origin(_answer_ok)
    await again.start(origin.port)
    edge.edge.table.set_machine(HELLO, dataclasses.replace(machine, state=STARTED, version=2))
    assert (await asyncio.wait_for(answer, 5)).endswith(b"ok")
    await again.stop()


async def test_a_machine_that_is_not_resumed_has_had_the_request_in_vain_and_the_client_is_told(
    edge: EdgeHarness,
) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    origin = await edge.origin(deaf)
    machine = edge.machine(origin.port, state=SUSPENDED)
    edge.set_app(edge.app(machine))
    await until_connected(origin)
    answer = asyncio.create_task(ask(edge))
    async with asyncio.timeout(5):
        while not edge.edge.in_flight(machine.slot):
            await asyncio.sleep(0.005)
    edge.edge.waker.on_wake_done(WakeDone(HELLO, machine.id, 1, "PM07", "it would not start"))
    assert (await asyncio.wait_for(answer, 5)).startswith(b"HTTP/1.1 503 ")
    assert edge.edge.in_flight(machine.slot) == 0


async def _answer_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_head(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


async def test_what_may_not_be_sent_twice_gets_a_connection_of_its_own(edge: EdgeHarness) -> None:
    origin, _ = await frozen(edge)
    await until_connected(origin)
    assert (await ask(edge, b"POST", b"Content-Length: 0\r\n\r\n")).endswith(b"ok")
    assert origin.connections == 2


async def test_one_that_the_machine_drops_when_it_goes_on_costs_nobody_an_answer(edge: EdgeHarness) -> None:
    origin, _ = await frozen(edge, answers=0)
    await until_connected(origin)
    await origin.stop()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    again = Origin(handle)
    await again.start(origin.port)
    assert (await ask(edge)).endswith(b"ok")
    await again.stop()


async def test_a_machine_that_is_stopped_while_suspended_has_none_left(edge: EdgeHarness) -> None:
    origin, machine = await frozen(edge)
    await until_connected(origin)
    assert len(edge.edge.warmth) == 1
    edge.edge.table.set_machine(HELLO, dataclasses.replace(machine, state=MachineState.STOPPED, version=2))
    assert len(edge.edge.warmth) == 0
    edge.edge.table.set_machine(HELLO, dataclasses.replace(machine, version=3))
    await until_connected(origin, 2)
    edge.edge.table.remove_app(HELLO)
    assert len(edge.edge.warmth) == 0


async def test_a_suspended_machine_whose_record_changes_keeps_one_ahead(edge: EdgeHarness) -> None:
    """As when its metadata is set: its pools are closed with each of its records."""
    origin, machine = await frozen(edge)
    await until_connected(origin)
    edge.edge.table.set_machine(HELLO, dataclasses.replace(machine, version=2))
    await until_connected(origin, 2)
    edge.sent.on_send = lambda message: (
        asyncio.get_running_loop().call_soon(
            edge.edge.table.set_machine, HELLO, dataclasses.replace(machine, state=STARTED, version=3)
        )
        if isinstance(message, Wake)
        else None
    )
    assert (await ask(edge)).endswith(b"ok")
    assert origin.connections == 2 and len(edge.edge.warmth) == 0


async def test_a_machine_that_no_request_wakes_any_more_has_none_left(edge: EdgeHarness) -> None:
    origin, machine = await frozen(edge)
    await until_connected(origin)
    app = edge.edge.table.apps[HELLO].record
    services = tuple(dataclasses.replace(one, autostart=False) for one in app.services)
    edge.set_app(dataclasses.replace(app, services=services, machines=(dataclasses.replace(machine, version=2),)))
    assert len(edge.edge.warmth) == 0


async def test_one_whose_record_changes_counts_as_suspended_last(edge: EdgeHarness) -> None:
    origin, machine = await frozen(edge)
    await until_connected(origin)
    warmth = Warmth(edge.edge, most=2)
    first, second, third = (dataclasses.replace(machine, id=f"s{at}", slot=10 + at) for at in range(3))
    edge.set_app(edge.app(first, second, third))
    for one in (first, second, first, third):
        warmth.on_machine(HELLO, one)
    assert list(warmth._pools) == ["s0", "s2"]


async def test_only_so_many_are_kept_those_suspended_last(edge: EdgeHarness) -> None:
    origin, machine = await frozen(edge)
    await until_connected(origin)
    warmth = Warmth(edge.edge, most=2)
    machines = [dataclasses.replace(machine, id=f"s{at}", slot=10 + at) for at in range(4)]
    edge.set_app(edge.app(*machines))
    for one in machines:
        warmth.on_machine(HELLO, one)
    assert len(warmth) == 2
    await until_connected(origin, 3)

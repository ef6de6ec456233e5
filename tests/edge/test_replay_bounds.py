"""Replays where something changes, is forbidden or misbehaves meanwhile: records, a target's rules, a wrong 101."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from proxy.ipc import Wake, WakeDone
from proxy.model import AccessRules, App, AppName, MachineId, MachineState, StickyCookie
from tests.edge.test_replay import Answer, Machine, app_of, ok, replay, run
from tests.support.edge import EdgeHarness, Origin, read_head

GET = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"


def post(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size


def tenant_of(edge: EdgeHarness, tenant: Machine) -> App:
    return edge.app(edge.machine(tenant.port, "t1", slot=7), name="tenant", slot=1)


async def routed(edge: EdgeHarness, first: Answer = lambda h, b: replay("app=tenant")) -> tuple[Machine, Machine, App]:
    router, tenant = await run(edge, first, lambda h, b: ok(b"tenant"))
    edge.set_app(app_of(edge, [router]))
    return router, tenant, tenant_of(edge, tenant)


# --- the target's rules


@pytest.mark.parametrize("rules", [AccessRules(deny=("127.0.0.1",)), AccessRules(allow=("10.0.0.0/8",))])
async def test_who_an_app_keeps_out_does_not_come_in_by_a_replay(edge: EdgeHarness, rules: AccessRules) -> None:
    router, tenant, target = await routed(edge)
    edge.set_app(dataclasses.replace(target, access=rules))
    answer = await edge.request(GET)
    assert answer.startswith(b"HTTP/1.1 403 ") and b"WA01" in answer
    assert len(router.heads) == 1 and tenant.heads == []
    assert edge.edge.in_flight(1) == edge.edge.in_flight(7) == 0


async def test_a_remembered_replay_gets_round_no_rule_either(edge: EdgeHarness) -> None:
    order = b"fly-replay-cache: /*\r\nfly-replay-cache-ttl-secs: 60\r\n"
    router, tenant, target = await routed(edge, lambda h, b: replay("app=tenant", order))
    edge.set_app(target)
    assert (await edge.request(GET)).endswith(b"tenant")
    edge.set_app(dataclasses.replace(target, access=AccessRules(deny=("127.0.0.1",))))
    assert (await edge.request(GET)).startswith(b"HTTP/1.1 403 ")
    assert len(router.heads) == len(tenant.heads) == 1


async def test_a_target_gets_no_larger_body_than_it_takes_and_no_more_requests(edge: EdgeHarness) -> None:
    _, tenant, target = await routed(edge)
    edge.set_app(dataclasses.replace(target, access=AccessRules(max_body_bytes=1000)))
    assert (await edge.request(post(1001))).startswith(b"HTTP/1.1 413 ")
    assert (await edge.request(post(1000))).endswith(b"tenant")
    edge.set_app(dataclasses.replace(target, access=AccessRules(requests_per_s=0.5, requests_burst=1)))
    assert (await edge.request(GET)).endswith(b"tenant")
    assert (await edge.request(GET)).startswith(b"HTTP/1.1 429 ")
    assert len(tenant.heads) == 2 and edge.edge.bodies.memory_used == 0


async def test_a_body_that_grows_past_what_the_target_takes_is_cut_off(edge: EdgeHarness) -> None:
    router, tenant = Machine(lambda h, b: b""), (await run(edge, lambda h, b: ok(b"tenant")))[0]

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(replay("app=tenant"))
        await reader.read()

    router.port = (await edge.origin(early)).port
    edge.set_app(app_of(edge, [router]))
    edge.set_app(dataclasses.replace(tenant_of(edge, tenant), access=AccessRules(max_body_bytes=1000)))
    head = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    reader, writer = await edge.connect()
    writer.write(head)
    async with asyncio.timeout(5):
        while not edge.edge.in_flight(7):
            await asyncio.sleep(0.005)
    writer.write(b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n")
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)).startswith(b"HTTP/1.1 413 ")
    assert tenant.bodies == [] and edge.edge.in_flight(7) == 0


# --- records that change meanwhile


async def test_a_fallback_goes_by_the_newest_record_of_the_app_that_handed_it_on(edge: EdgeHarness) -> None:
    old, new = await run(edge, lambda h, b: replay("app=tenant;fallback=prefer_self"), lambda h, b: ok(b"new"))
    app = app_of(edge, [old, new])
    edge.set_app(dataclasses.replace(app, machines=app.machines[:1]))
    sleeping = edge.machine(1, "t1", MachineState.STOPPED, slot=7)
    edge.set_app(edge.app(sleeping, name="tenant", slot=1))
    asked = asyncio.Event()
    edge.sent.on_send = lambda message: asked.set() if isinstance(message, Wake) else None
    answer = asyncio.create_task(edge.request(GET))
    await asyncio.wait_for(asked.wait(), 5)
    edge.set_app(dataclasses.replace(app, machines=app.machines[1:]))
    edge.edge.waker.on_wake_done(WakeDone(AppName("tenant"), MachineId("t1"), 1, "PM05", "it failed"))
    assert (await asyncio.wait_for(answer, 5)).endswith(b"new")
    assert len(old.heads) == 1, "it belongs to the app no more"
    assert new.field(b"fly-replay-failed") is not None
    assert edge.edge.in_flight(1) == edge.edge.in_flight(2) == 0


# --- cookies


async def test_an_app_pins_nobody_who_asked_for_another(edge: EdgeHarness) -> None:
    _, _, target = await routed(edge)
    edge.set_app(dataclasses.replace(target, sticky=StickyCookie("fly-sticky", 600)))
    answer = await edge.request(GET)
    assert answer.endswith(b"tenant")
    assert b"set-cookie" not in answer.lower(), "the router would be sent it, and can't read it"


# --- machines that misbehave


async def test_a_switch_that_nobody_asked_for_before_the_machine_runs_leaves_nobody_waiting(edge: EdgeHarness) -> None:
    async def switches(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
        await reader.read()

    origin = await edge.origin(switches)
    machine = edge.machine(origin.port, state=MachineState.SUSPENDED)
    edge.set_app(edge.app(machine))
    await _until_connected(origin)
    answer = asyncio.create_task(edge.request(GET))
    async with asyncio.timeout(5):
        while not edge.edge.waker.waiting or edge.edge.in_flight(machine.slot):
            await asyncio.sleep(0.005)
    running = dataclasses.replace(machine, state=MachineState.STARTED, version=2)
    edge.edge.table.set_machine(AppName("hello"), running)
    assert (await asyncio.wait_for(answer, 5)).startswith(b"HTTP/1.1 502 ")
    assert edge.edge.in_flight(machine.slot) == 0


async def _until_connected(origin: Origin) -> None:
    async with asyncio.timeout(5):
        while not origin.connections:
            await asyncio.sleep(0.005)

"""Which machine a request comes to: what the client asks for, checks, failures, loads; and when one more is started."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from collections import Counter
from typing import Any

import pytest

from proxy.ipc import Wake
from proxy.model import App, AppLimits, AppName, Balance, MachineState, WakeRules
from tests.support.edge import EdgeHarness, read_head

STOPPED, SUSPENDED = MachineState.STOPPED, MachineState.SUSPENDED


async def _origin(edge: EdgeHarness, name: bytes, seen: list[bytes] | None = None, fields: bytes = b"") -> int:
    """A machine that answers with its name."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            if seen is not None:
                seen.append(head)
            writer.write(b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (fields, len(name), name))

    return (await edge.origin(handle)).port


def _with_service(app: App, **changes: Any) -> App:
    return dataclasses.replace(app, services=(dataclasses.replace(app.services[0], **changes),))


async def _ask(edge: EdgeHarness, fields: bytes = b"") -> tuple[int, bytes]:
    answer = await edge.request(b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n%b\r\n" % fields)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head[9:12]), body


async def test_a_client_that_forces_a_machine_gets_that_one_even_if_its_checks_fail(edge: EdgeHarness) -> None:
    one, two = await _origin(edge, b"one"), await _origin(edge, b"two")
    edge.set_app(edge.app(edge.machine(one, "m1", slot=1), edge.machine(two, "m2", slot=2, failing_ports=(8080,))))
    for _ in range(5):
        assert await _ask(edge, b"fly-force-instance-id: m2\r\n") == (200, b"two")
        assert await _ask(edge) == (200, b"one")


async def test_a_forced_machine_that_is_not_there_is_an_error_and_no_other_takes_its_place(edge: EdgeHarness) -> None:
    one = await _origin(edge, b"one")
    edge.set_app(edge.app(edge.machine(one)))
    for wanted in (b"m9", b"no such id!", b"x" * 200):
        status, body = await _ask(edge, b"fly-force-instance-id: %b\r\n" % wanted)
        assert status == 502 and body.startswith(b"WR02")


async def test_a_forced_machine_that_sleeps_is_woken(edge: EdgeHarness) -> None:
    one, two = await _origin(edge, b"one"), await _origin(edge, b"two")
    sleeping = edge.machine(two, "m2", STOPPED, slot=2)
    edge.set_app(edge.app(edge.machine(one, "m1", slot=1), sleeping))
    edge.start_when_asked(sleeping)
    assert await _ask(edge, b"fly-force-instance-id: m2\r\n") == (200, b"two")


async def test_naming_a_machine_does_not_get_round_the_rules_of_who_wakes(edge: EdgeHarness) -> None:
    sleeping = edge.machine(await _origin(edge, b"one"), "m1", STOPPED)
    rules = WakeRules(ignore_agents=("bot",))
    edge.set_app(dataclasses.replace(edge.app(sleeping), wake_rules=rules))
    status, body = await _ask(edge, b"fly-force-instance-id: m1\r\nUser-Agent: a-bot/1\r\n")
    assert status == 503 and body.startswith(b"WM04")
    assert not any(isinstance(message, Wake) for message in edge.sent.messages)


async def test_a_preferred_machine_is_taken_where_it_can_and_its_absence_is_told(edge: EdgeHarness) -> None:
    seen: list[bytes] = []
    one, two = await _origin(edge, b"one", seen), await _origin(edge, b"two")
    edge.set_app(edge.app(edge.machine(one, "m1", slot=1), edge.machine(two, "m2", slot=2)))
    for _ in range(5):
        assert await _ask(edge, b"fly-prefer-instance-id: m2\r\n") == (200, b"two")
    edge.set_app(edge.app(edge.machine(one, "m1", slot=1)))
    assert await _ask(edge, b"fly-prefer-instance-id: m2\r\n") == (200, b"one")
    assert b"\r\nfly-preferred-instance-unavailable: m2\r\n" in seen[-1]
    assert await _ask(edge) == (200, b"one")
    assert b"unavailable" not in seen[-1]


async def test_a_machine_whose_checks_fail_gets_nothing_until_they_pass(edge: EdgeHarness) -> None:
    one, two = await _origin(edge, b"one"), await _origin(edge, b"two")
    failing = edge.machine(two, "m2", slot=2, failing_ports=(8080,))
    edge.set_app(edge.app(edge.machine(one, "m1", slot=1), failing))
    assert Counter([(await _ask(edge))[1] for _ in range(20)]) == {b"one": 20}
    edge.edge.table.set_machine(AppName("hello"), dataclasses.replace(failing, failing_ports=(), version=2))
    assert set([(await _ask(edge))[1] for _ in range(40)]) == {b"one", b"two"}


async def test_a_request_waits_for_a_machine_to_become_healthy(edge: EdgeHarness) -> None:
    one = await _origin(edge, b"one")
    failing = edge.machine(one, failing_ports=(8080,))
    edge.set_app(edge.app(failing))
    asking = [asyncio.get_running_loop().create_task(_ask(edge)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(task.done() for task in asking)
    edge.edge.table.set_machine(AppName("hello"), dataclasses.replace(failing, failing_ports=(), version=2))
    assert [await task for task in asking] == [(200, b"one")] * 3


async def test_a_request_for_which_none_becomes_healthy_is_told_so(edge: EdgeHarness) -> None:
    failing = edge.machine(1, failing_ports=(8080,))
    edge.set_app(edge.app(failing, limits=AppLimits(queue_timeout_s=0.2, max_queued=1)))
    first = asyncio.get_running_loop().create_task(_ask(edge))
    await asyncio.sleep(0.05)
    status, body = await _ask(edge)
    assert status == 503 and body.startswith(b"PR01"), "one more than may wait is refused at once"
    assert not first.done()
    status, body = await first
    assert status == 503 and body.startswith(b"PR01")


async def test_one_more_machine_is_started_when_all_that_run_are_at_their_soft_limit(edge: EdgeHarness) -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await go.wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\none")

    one = (await edge.origin(handle)).port
    app = edge.app(edge.machine(one, "m1", slot=1), edge.machine(one, "m2", STOPPED, slot=2))
    edge.set_app(_with_service(app, soft_limit=2))
    asking = [asyncio.get_running_loop().create_task(_ask(edge))]
    await asyncio.sleep(0.05)
    assert edge.sent.messages == []
    asking += [asyncio.get_running_loop().create_task(_ask(edge)) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert edge.sent.messages == [Wake(AppName("hello"), app.machines[1].id, hint=True)], "once, and nobody waits"
    go.set()
    assert [await task for task in asking] == [(200, b"one")] * 6


async def test_a_machine_that_refuses_is_left_alone_for_a_while(edge: EdgeHarness) -> None:
    one = await _origin(edge, b"one")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()[1]
    edge.set_app(edge.app(edge.machine(one, "m1", slot=1), edge.machine(dead, "m2", slot=2)))
    for _ in range(60):
        assert await _ask(edge) == (200, b"one")
    told = [message for message in edge.sent.messages if type(message).__name__ == "PassiveFailure"]
    assert 1 <= len(told) <= 10, "of sixty requests about half would have tried it"


async def test_by_response_time_a_slow_machine_gets_few_requests(edge: EdgeHarness) -> None:
    counts: Counter[str] = Counter()

    async def serve(name: str, seconds: float) -> int:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_head(reader)
                counts[name] += 1
                await asyncio.sleep(seconds)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

        return (await edge.origin(handle)).port

    fast, slow = await serve("fast", 0.0), await serve("slow", 0.1)
    app = edge.app(edge.machine(fast, "m1", slot=1), edge.machine(slow, "m2", slot=2))
    edge.set_app(dataclasses.replace(app, balance=Balance.PEAK_EWMA))
    for _ in range(60):
        await _ask(edge)
    assert counts["slow"] <= 5 and counts["fast"] >= 55


async def test_by_reported_load_the_one_that_says_less_gets_the_requests_and_clients_see_nothing_of_it(
    edge: EdgeHarness,
) -> None:
    one = await _origin(edge, b"one", fields=b"wakefront-machine-load: 0.9\r\n")
    two = await _origin(edge, b"two", fields=b"wakefront-machine-load: 0.1\r\n")
    app = edge.app(edge.machine(one, "m1", slot=1), edge.machine(two, "m2", slot=2))
    edge.set_app(dataclasses.replace(app, balance=Balance.APP_LOAD))
    for _ in range(20):
        await _ask(edge)
    assert Counter([(await _ask(edge))[1] for _ in range(30)]) == {b"two": 30}
    answer = await edge.request(b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n")
    assert b"machine-load" not in answer


async def test_bodies_held_for_machines_that_start_are_bounded_in_sum_too(
    edge: EdgeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.edge.exchange.HELD_MAX_BYTES", 50_000)
    edge.set_app(edge.app(edge.machine(1, state=STOPPED)))
    head = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 40000\r\n\r\n"
    _, first = await edge.connect()
    first.write(head + b"x" * 40_000)
    async with asyncio.timeout(5):
        while edge.edge.held_bytes < 40_000:
            await asyncio.sleep(0.005)
    answer = await edge.request(head + b"x" * 40_000)
    assert answer.startswith(b"HTTP/1.1 503") and b"WM02" in answer and b"retry-after: 1" in answer
    assert edge.edge.held_bytes == 40_000
    first.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    first.transport.abort()
    async with asyncio.timeout(5):
        while edge.edge.held_bytes:
            await asyncio.sleep(0.005)

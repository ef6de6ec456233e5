"""Standing in line for a machine below its hard limit: order, bounds, and who makes room."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket
import struct
from typing import Any

import pytest

from proxy.model import AppLimits, AppName, Machine
from proxy.state import W_QUEUED
from tests.support.edge import EdgeHarness, read_head


class Gated:
    """A machine that answers when it is let to, in the order of arrival, and knows how many it had at once."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.now = self.most = 0
        self.go = asyncio.Semaphore(0)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            self.now += 1
            self.most = max(self.most, self.now)
            self.order.append(head.split(b" ")[1].decode())
            await self.go.acquire()
            self.now -= 1
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


async def limited(edge: EdgeHarness, limit: int, machines: int = 1, **limits: Any) -> tuple[Gated, list[Machine]]:
    gated = Gated()
    port = (await edge.origin(gated.handle)).port
    records = [edge.machine(port, f"m{at}", slot=at) for at in range(1, machines + 1)]
    app = edge.app(*records, limits=AppLimits(**limits))
    service = dataclasses.replace(app.services[0], soft_limit=limit, hard_limit=limit)
    edge.set_app(dataclasses.replace(app, services=(service,)))
    return gated, records


def ask(edge: EdgeHarness, path: str, fields: bytes = b"") -> asyncio.Task[bytes]:
    request = b"GET %b HTTP/1.1\r\nHost: hello.apps.test\r\n%b\r\n" % (path.encode(), fields)
    return asyncio.get_running_loop().create_task(edge.request(request), name=path)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def queued(edge: EdgeHarness) -> int:
    return edge.memory.worker_total(W_QUEUED)


async def in_line(edge: EdgeHarness, count: int) -> list[asyncio.Task[bytes]]:
    asking = []
    for number in range(count):
        asking.append(ask(edge, f"/{number}"))
        await until(lambda: len(edge.edge.queue) + edge.edge.in_flight(1) > number)  # noqa: B023
    return asking


async def test_no_more_than_the_limit_are_sent_and_the_rest_follow_in_the_order_they_came(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 2)
    asking = await in_line(edge, 10)
    await until(lambda: gated.now == 2)
    assert queued(edge) == 8
    for _ in range(10):
        gated.go.release()
    for task in asking:
        assert (await task).endswith(b"ok")
    assert gated.most == 2
    assert gated.order[2:] == [f"/{number}" for number in range(2, 10)] and set(gated.order[:2]) == {"/0", "/1"}
    assert queued(edge) == 0 and len(edge.edge.queue) == 0


async def test_one_more_than_may_wait_is_refused_at_once(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 1, max_queued=2)
    asking = await in_line(edge, 3)
    answer = await ask(edge, "/too-many")
    assert answer.startswith(b"HTTP/1.1 503") and b"wakefront-error: WQ01" in answer
    assert re.search(rb"retry-after: \d+", answer)
    for _ in range(3):
        gated.go.release()
    for task in asking:
        assert (await task).endswith(b"ok")


async def test_who_waited_too_long_is_told_so_and_the_others_go_on(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 1, queue_timeout_s=0.3)
    first, second = await in_line(edge, 2)
    answer = await second
    assert answer.startswith(b"HTTP/1.1 503") and b"wakefront-error: WQ02" in answer
    assert not first.done() and queued(edge) == 0
    gated.go.release()
    assert (await first).endswith(b"ok")


@pytest.mark.parametrize("first_waits", [True, False], ids=["closed in line", "closed before"])
async def test_a_client_that_closed_as_programs_do_keeps_no_place_in_line(edge: EdgeHarness, first_waits: bool) -> None:
    gated, _ = await limited(edge, 1)
    first = ask(edge, "/first")
    await until(lambda: gated.now == 1)
    _, writer = await edge.connect()
    writer.write(b"GET /gone HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n")
    if first_waits:
        await until(lambda: len(edge.edge.queue) == 1)
    writer.close()  # no reset: to us it looks as if it might still read
    second = ask(edge, "/second")
    await until(lambda: len(edge.edge.queue) == 2)  # the one that has gone is found out when its turn comes
    gated.go.release()
    assert (await first).endswith(b"ok")
    gated.go.release()
    assert (await second).endswith(b"ok")
    assert gated.order == ["/first", "/second"]


async def test_a_client_that_only_finished_sending_keeps_its_place_and_is_asked_once(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 1)
    first = ask(edge, "/first")
    await until(lambda: gated.now == 1)
    reader, writer = await edge.connect()
    writer.write(b"GET /half HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n")
    writer.write_eof()
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    for _ in range(2):
        gated.go.release()
    assert (await first).endswith(b"ok")
    rest = await asyncio.wait_for(reader.read(), 5)
    assert rest.startswith(b"HTTP/1.1 200 OK\r\n") and rest.endswith(b"ok")


async def test_a_client_that_leaves_the_line_leaves_its_place_to_the_next(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 1)
    first = ask(edge, "/first")
    await until(lambda: gated.now == 1)
    _, writer = await edge.connect()
    writer.write(b"GET /gone HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n")
    await until(lambda: queued(edge) == 1)
    last = ask(edge, "/last")
    await until(lambda: queued(edge) == 2)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    await until(lambda: queued(edge) == 1)
    gated.go.release()
    gated.go.release()
    assert (await first).endswith(b"ok") and (await last).endswith(b"ok")
    assert gated.order == ["/first", "/last"]


async def test_a_new_request_does_not_pass_by_those_who_wait(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 1)
    asking = await in_line(edge, 3)
    gated.go.release()  # a place is free for a moment; who comes now is not to take it
    late = ask(edge, "/late")
    for _ in range(3):
        gated.go.release()
    for task in [*asking, late]:
        assert (await task).endswith(b"ok")
    assert gated.order == ["/0", "/1", "/2", "/late"]


async def test_a_machine_that_starts_takes_who_waits(edge: EdgeHarness) -> None:
    gated, (one, two) = await limited(edge, 1, machines=2)
    edge.edge.table.set_machine(AppName("hello"), dataclasses.replace(two, cordoned=True, version=2))
    first, second = await in_line(edge, 2)
    await until(lambda: queued(edge) == 1)
    edge.edge.table.set_machine(AppName("hello"), dataclasses.replace(two, version=3))
    await until(lambda: gated.now == 2)
    gated.go.release()
    gated.go.release()
    assert (await first).endswith(b"ok") and (await second).endswith(b"ok")
    assert edge.edge.in_flight(one.slot) == edge.edge.in_flight(two.slot) == 0


async def test_a_request_for_one_machine_waits_for_that_one(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 1, machines=2)
    first = ask(edge, "/first", b"fly-force-instance-id: m1\r\n")
    await until(lambda: gated.now == 1)
    second = ask(edge, "/second", b"fly-force-instance-id: m1\r\n")
    await until(lambda: queued(edge) == 1)
    assert edge.edge.in_flight(1) == 1 and edge.edge.in_flight(2) == 0
    gated.go.release()
    gated.go.release()
    assert (await first).endswith(b"ok") and (await second).endswith(b"ok")


async def test_who_waits_for_one_machine_holds_up_nobody_who_may_go_to_another(edge: EdgeHarness) -> None:
    gated, _ = await limited(edge, 1, machines=2)
    held = ask(edge, "/held", b"fly-force-instance-id: m1\r\n")
    await until(lambda: gated.now == 1)
    forced = ask(edge, "/forced", b"fly-force-instance-id: m1\r\n")
    await until(lambda: queued(edge) == 1)
    free = ask(edge, "/free")
    await until(lambda: gated.now == 2)
    behind = ask(edge, "/behind")
    await until(lambda: queued(edge) == 2)
    assert gated.order == ["/held", "/free"]
    for _ in range(4):
        gated.go.release()
    for task in (held, forced, free, behind):
        assert (await task).endswith(b"ok")

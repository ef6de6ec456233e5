"""A connection that the machine has accepted already, offered to whoever connects to it next."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import socket
from collections.abc import Callable

import pytest

from proxy.edge.upstream import UpstreamConnection, offered, pool_for
from proxy.errors import ProxyError
from proxy.ipc import Wake
from proxy.model import AppName, ConcurrencyType, Machine, MachineState
from tests.support.edge import EdgeHarness, Origin, answers

HELLO = AppName("hello")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 5\r\n\r\nhello"


class Started:
    """A stopped machine; a wake has it started, and a connection to it is offered with the record that says so."""

    def __init__(self, edge: EdgeHarness, origin: Origin, kind: ConcurrencyType) -> None:
        self.edge, self.origin = edge, origin
        machine = edge.machine(origin.port, state=MachineState.STOPPED)
        edge.set_app(edge.app(machine, kind=kind))
        self.running = dataclasses.replace(machine, state=MachineState.STARTED, version=2)
        self.port = 8080
        self.made: socket.socket | None = None
        tell = edge.edge.table.on_machine
        assert tell is not None

        def known(app: AppName, machine: Machine) -> None:
            self.made = socket.create_connection(("127.0.0.1", origin.port))
            with offered(edge.edge, app, machine.id, self.port, self.made):
                tell(app, machine)

        edge.edge.table.on_machine = known
        self.on_wake: Callable[[], None] = self.start

        def on_send(message: object) -> None:
            if isinstance(message, Wake):
                asyncio.get_running_loop().call_soon(self.on_wake)

        edge.sent.on_send = on_send

    def start(self) -> None:
        self.edge.edge.table.set_machine(HELLO, self.running)


async def started(edge: EdgeHarness, kind: ConcurrencyType = ConcurrencyType.REQUESTS) -> Started:
    return Started(edge, await edge.origin(answers(OK)), kind)


@pytest.mark.parametrize("kind", list(ConcurrencyType))
@pytest.mark.parametrize("request_bytes", [GET, POST])
async def test_the_first_request_goes_over_it_whatever_its_method(
    edge: EdgeHarness, request_bytes: bytes, kind: ConcurrencyType
) -> None:
    one = await started(edge, kind)
    assert (await edge.request(request_bytes)).endswith(b"ok")
    assert one.origin.connections == 1


async def test_of_two_that_wait_one_gets_it_and_the_other_makes_one(edge: EdgeHarness) -> None:
    one = await started(edge)
    one.on_wake = lambda: None
    asked = [asyncio.get_running_loop().create_task(edge.request(GET), name=f"client {at}") for at in range(2)]
    async with asyncio.timeout(5):
        while edge.edge.waker.waiting < 2:
            await asyncio.sleep(0.001)
    one.start()
    for answer in await asyncio.gather(*asked):
        assert answer.endswith(b"ok")
    assert one.origin.connections == 2


async def test_one_that_nobody_takes_is_closed(edge: EdgeHarness) -> None:
    one = await started(edge)
    for port in (8080, 9090):  # no service has the other
        one.port = port
        one.running = dataclasses.replace(one.running, version=one.running.version + 1)
        one.start()
        assert one.made is not None and one.made.fileno() == -1


@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_client_who_leaves_at_that_moment_leaves_no_descriptor_open(edge: EdgeHarness, turns: int) -> None:
    origin = await edge.origin(answers(OK))
    machine = edge.machine(origin.port)
    edge.set_app(edge.app(machine))
    app = edge.edge.table.apps[HELLO]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        sock = socket.create_connection(server.getsockname())
        end, _ = server.accept()
        pool = pool_for(edge.edge, app.machines[machine.id], app.services[0], app)
        with pool.offer(sock):
            connecting = pool.connect(_Leaver())
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        del sock
        with end:
            end.setblocking(False)
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(end, 1), 5) == b""
    gc.collect()  # a warning would fail the test


class _Leaver:
    """A client that has gone by the time it is told."""

    def on_connected(self, connection: UpstreamConnection) -> None:
        connection.abort()

    def on_connect_failed(self, error: ProxyError) -> None:
        raise AssertionError(error)


async def test_one_that_the_machine_has_reset_is_told_like_any_other(edge: EdgeHarness) -> None:
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    one = Started(edge, await edge.origin(drop), ConcurrencyType.REQUESTS)
    answer = await edge.request(POST)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert one.origin.connections == 1

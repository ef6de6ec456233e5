"""Peers that do not read, do not stop, or lie: every buffer has a bound and every wait an end."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from proxy.edge.downstream import A_TURN, HttpConnection
from proxy.edge.exchange import HELD_MAX_BYTES
from proxy.ipc import Wake
from proxy.model import AppLimits, AppName, MachineId, MachineState
from proxy.state import A_LATENCY, A_LATENCY_SUM_US
from tests.support.edge import EdgeHarness, Handler, answers, read_head

GET = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def waits_for(go: asyncio.Event) -> Handler:
    """An origin that answers once it may."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await go.wait()
            writer.write(OK)

    return handle


def held(edge: EdgeHarness) -> int:
    """Bytes that wait in the edge to be taken by clients."""
    return sum(one._transport.get_write_buffer_size() for one in edge.listener.connections)  # type: ignore[attr-defined]


async def flood(port: int, data: bytes, seconds: float) -> socket.socket:
    """Send for a while and read nothing."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", port))

    async def send() -> None:
        while True:
            await loop.sock_sendall(client, data)

    try:
        await asyncio.wait_for(send(), seconds)
    except (TimeoutError, ConnectionError):  # the edge may end it
        pass
    return client


async def test_a_client_that_reads_nothing_is_not_answered_without_bound(edge: EdgeHarness) -> None:
    client = await flood(edge.port, b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n" * 500, 1.0)
    assert held(edge) < 2 * 1024 * 1024
    client.close()


async def test_a_client_that_reads_nothing_holds_back_the_machines_of_its_later_requests(edge: EdgeHarness) -> None:
    body = b"x" * 200_000
    origin = await edge.origin(answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    edge.set_app(edge.app(edge.machine(origin.port)))
    client = await flood(edge.port, GET * 16, 1.0)
    assert held(edge) < 4 * 1024 * 1024
    client.close()


async def test_all_pipelined_requests_are_answered_once_a_slow_client_reads(edge: EdgeHarness) -> None:
    body = b"x" * 300_000
    origin = await edge.origin(answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(GET * 10)
    await asyncio.sleep(0.3)
    data = b""
    while data.count(b"HTTP/1.1 200 OK") < 10 or not data.endswith(body):
        piece = await asyncio.wait_for(reader.read(1 << 20), 5)
        assert piece, "closed before all were answered"
        data += piece


async def test_a_machine_that_takes_no_body_is_given_up_and_its_client_told(edge: EdgeHarness) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    origin = await edge.origin(deaf)
    edge.set_app(edge.app(edge.machine(origin.port), limits=AppLimits(first_byte_timeout_s=0.3), idle_timeout_s=0.3))
    reader, writer = await edge.connect()
    size = 64 * 1024 * 1024
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: %d\r\n\r\n" % size)
    writer.write(b"x" * (32 * 1024 * 1024))
    answer = await asyncio.wait_for(reader.read(100), 10)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert edge.memory.in_flight(1) == 0


async def test_a_connection_to_a_machine_that_never_reads_is_let_go(edge: EdgeHarness) -> None:
    lost = asyncio.Event()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await asyncio.sleep(3.5)
        try:
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            while await reader.read(65_536):
                pass
        except (ConnectionResetError, RuntimeError):  # the loop has seen the reset already
            pass
        lost.set()  # kept open, it would still wait for the body's rest

    origin = await edge.origin(early)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 8_000_000)
    assert (await asyncio.wait_for(reader.read(100), 10)).startswith(b"HTTP/1.1 413 ")
    await asyncio.wait_for(lost.wait(), 10)


async def test_an_interim_answer_does_not_shorten_the_wait_for_the_final_one(edge: EdgeHarness) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await asyncio.sleep(0.6)
        writer.write(OK)
        await reader.read()

    origin = await edge.origin(slow)
    edge.set_app(edge.app(edge.machine(origin.port), limits=AppLimits(first_byte_timeout_s=10), idle_timeout_s=0.2))
    reader, writer = await edge.connect()
    writer.write(GET)
    assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).endswith(b"\r\n\r\nok")


async def test_an_upload_that_goes_on_is_not_cut_because_the_answer_began_early(edge: EdgeHarness) -> None:
    async def eager(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        got = 0
        while got < 10:
            got += len(await reader.read(100))
        writer.write(b"2\r\n10\r\n0\r\n\r\n")
        await reader.read()

    origin = await edge.origin(eager)
    edge.set_app(edge.app(edge.machine(origin.port), idle_timeout_s=0.3))
    reader, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 10\r\n\r\n")
    for _ in range(10):
        await asyncio.sleep(0.1)
        writer.write(b"x")
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.endswith(b"2\r\n10\r\n0\r\n\r\n")


async def test_garbage_behind_a_request_that_ends_the_connection_gets_no_second_answer(edge: EdgeHarness) -> None:
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED), force_https=True))
    answer = await edge.request(
        b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\nNONSENSE\r\n\r\n"
    )
    assert answer.count(b"HTTP/1.1 ") == 1


async def test_thousands_of_requests_answered_at_once_leave_other_connections_their_turn(edge: EdgeHarness) -> None:
    """A read of 256 KiB holds 5,000 of them: in one turn they kept everybody waiting for all of them."""
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED), force_https=True))
    first = edge.edge.table.apps[AppName("hello")].cells + A_LATENCY
    cells = edge.memory.cells
    reader, writer = await edge.connect()
    answers = asyncio.create_task(reader.read())
    writer.write(GET * 5000)
    writer.write_eof()
    most = before = 0
    async with asyncio.timeout(30):
        while not answers.done():
            await asyncio.sleep(0)
            answered = sum(cells[first : first + A_LATENCY_SUM_US - A_LATENCY])
            most, before = max(most, answered - before), answered
    assert (await answers).count(b"HTTP/1.1 301") == before == 5000
    assert 0 < most <= 2 * A_TURN


@pytest.mark.parametrize("count", [A_TURN - 1, A_TURN, A_TURN + 1, 3 * A_TURN + 5])
@pytest.mark.parametrize(
    "tail", [b"GET / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 9\r\n\r\nabc"]
)
async def test_what_comes_behind_many_requests_answered_at_once_is_judged_after_them(
    edge: EdgeHarness, count: int, tail: bytes
) -> None:
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED), force_https=True))
    answer = await edge.request(GET * count + tail)
    statuses = [int(piece[:3]) for piece in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [301] * count + ([400] if tail.startswith(b"GET") else [301])
    assert edge.edge.held_bytes == 0


@pytest.mark.parametrize("count", [17, 30, 3000])
async def test_more_pipelined_requests_than_are_held_wait_unread_for_their_turn(edge: EdgeHarness, count: int) -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            target = (await read_head(reader)).split(b" ")[1]
            await go.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(target) + target)

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(b"".join(GET.replace(b"/ ", b"/%d " % number) for number in range(count)))
    writer.write_eof()
    while not origin.received:
        await asyncio.sleep(0)
    (one,) = edge.listener.connections
    assert isinstance(one, HttpConnection) and len(one._queue or ()) < 100
    go.set()
    answer = await asyncio.wait_for(reader.read(), 10)
    bodies = [piece.partition(b"\r\n\r\n")[2] for piece in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert bodies == [b"/%d" % number for number in range(count)]
    assert edge.edge.held_bytes == 0


async def test_what_waits_unread_may_hold_bodies_and_end_in_the_middle(edge: EdgeHarness) -> None:
    seen: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or b"0")
            body = b""
            while len(body) < length:
                body += await reader.read(length - len(body))
            seen.append(head.split(b" ")[1] + body)
            writer.write(OK)

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    data, meant = b"", []
    for number in range(200):
        body = b"%d" % number * (number % 7 * 100)
        data += b"POST /%d HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: %d\r\n\r\n" % (number, len(body)) + body
        meant.append(b"/%d" % number + body)
    reader, writer = await edge.connect()
    writer.write(data + GET[:20])
    async with asyncio.timeout(10):
        while len(seen) < 200:
            await reader.read(65_536)
        writer.write(GET[20:])
        while len(seen) < 201:
            await reader.read(65_536)
    assert seen == [*meant, b"/"]


async def test_a_fault_in_what_waits_unread_is_answered_after_the_requests_before_it(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(GET * 300 + b"NONSENSE\r\n\r\n" + GET * 100)
    answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.count(b"HTTP/1.1 200 OK") == 300 and answer.count(b"HTTP/1.1 ") == 301
    assert answer.endswith(b"method unknown\n")


async def test_what_all_connections_hold_unread_has_a_bound_in_sum(
    edge: EdgeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()

    origin = await edge.origin(waits_for(go))
    edge.set_app(edge.app(edge.machine(origin.port)))
    monkeypatch.setattr(edge.edge, "held_bytes", HELD_MAX_BYTES - 1000)
    reader, writer = await edge.connect()
    writer.write(GET * 300)
    while not origin.received:
        await asyncio.sleep(0)
    assert edge.edge.held_bytes == HELD_MAX_BYTES - 1000
    go.set()
    answer = await asyncio.wait_for(reader.read(), 10)
    assert 17 <= answer.count(b"HTTP/1.1 200 OK") < 100 and answer.count(b"HTTP/1.1 503 ") == 1


async def test_bodies_of_requests_that_wait_are_counted_until_nobody_waits(edge: EdgeHarness) -> None:
    go = asyncio.Event()
    origin = await edge.origin(waits_for(go))
    edge.set_app(edge.app(edge.machine(origin.port)))
    _, writer = await edge.connect()
    writer.write(GET + b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 9000\r\n\r\n" + b"b" * 8000)
    async with asyncio.timeout(5):
        while edge.edge.held_bytes < 8000:
            await asyncio.sleep(0)
    assert edge.edge.held_bytes == 8000
    writer.transport.abort()
    go.set()  # while it waits nothing is read of it, and so its end not seen
    await asyncio.wait_for(edge.gate.wait_empty(), 5)
    assert edge.edge.held_bytes == 0


@pytest.mark.parametrize("tail", [b"", GET])
async def test_a_body_that_is_too_much_to_hold_is_refused_in_its_turn(
    edge: EdgeHarness, monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    go = asyncio.Event()
    origin = await edge.origin(waits_for(go))
    edge.set_app(edge.app(edge.machine(origin.port)))
    monkeypatch.setattr(edge.edge, "held_bytes", HELD_MAX_BYTES - 1000)
    reader, writer = await edge.connect()
    post = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 3000\r\n\r\n" + b"b" * 3000
    writer.write(GET + GET + post + tail)
    async with asyncio.timeout(5):
        while not origin.received:
            await asyncio.sleep(0)
    assert edge.edge.held_bytes == HELD_MAX_BYTES - 1000
    go.set()
    answer = await asyncio.wait_for(reader.read(), 10)
    assert [int(one[:3]) for one in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 503]
    assert edge.edge.held_bytes == HELD_MAX_BYTES - 1000


async def test_pipelined_requests_received_whole_are_answered_while_draining(edge: EdgeHarness) -> None:
    go = asyncio.Event()

    origin = await edge.origin(waits_for(go))
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(GET * 3)
    while not origin.received:
        await asyncio.sleep(0)
    edge.edge.draining = True
    edge.listener.drain()
    go.set()
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.count(b"HTTP/1.1 200 OK") == 3 and answer.count(b"connection: close\r\n") == 1


async def test_a_soft_cordon_whose_end_was_lost_ends_with_the_next_table(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    app = edge.app(edge.machine(origin.port))
    edge.set_app(app)
    edge.edge.table.soft_cordon(AppName("hello"), MachineId("m1"), True)
    edge.edge.table.start_load()
    edge.set_app(app)
    edge.edge.table.end_load()
    assert (await edge.request(GET)).startswith(b"HTTP/1.1 200 OK")


async def test_requests_that_wait_for_a_machine_that_is_replaced_go_to_the_new_one(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED)))
    request = asyncio.ensure_future(edge.request(GET))
    while not any(isinstance(message, Wake) for message in edge.sent.messages):
        await asyncio.sleep(0)
    edge.set_app(edge.app(edge.machine(origin.port, machine_id="m2", slot=2)))
    assert (await request).startswith(b"HTTP/1.1 200 OK")


async def test_connect_reaches_no_machine_in_any_form(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    for target in (b"hello.apps.test:443", b"/x", b"*"):
        answer = await edge.request(b"CONNECT " + target + b" HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 501 ") or answer.startswith(b"HTTP/1.1 400 ")
    assert origin.connections == 0


async def test_a_body_never_passes_as_what_follows_an_ignored_upgrade(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    for version in (b"1.1", b"1.0"):
        answer = await edge.request(
            b"POST / HTTP/" + version + b"\r\nHost: hello.apps.test\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
            b"Content-Length: %d\r\n\r\n" % len(GET) + GET
        )
        assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 400 ")
    assert origin.connections == 0


async def test_an_answer_broken_off_by_a_client_that_never_reads_is_let_go(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 8_000_000)
        await writer.drain()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    client = await flood(edge.port, GET, 0.5)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    await asyncio.wait_for(edge.gate.wait_empty(), 5)
    assert edge.memory.in_flight(1) == 0


async def test_a_request_of_a_client_that_reset_before_it_was_accepted_reaches_no_machine(edge: EdgeHarness) -> None:
    """It has no address any more: the app would have it from nobody, and no limit would know its sender."""
    heads: list[bytes] = []
    origin = await edge.origin(answers(OK, heads.append))
    edge.set_app(edge.app(edge.machine(origin.port)))
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", edge.port)) as client:  # the loop accepts after this turn
            client.sendall(GET.replace(b"GET / ", b"GET /nobodys "))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert (await edge.request(GET)).startswith(b"HTTP/1.1 200")
    await asyncio.wait_for(edge.gate.wait_empty(), 5)
    assert [head.split()[1] for head in heads] == [b"/"]
    assert len(edge.edge.sources) == 0

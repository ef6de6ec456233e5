"""How things end: tunnels, answers given early, apps that change or go meanwhile; and that nothing is left over."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import struct

import pytest

from proxy.clock import unix
from proxy.edge import upstream
from proxy.edge.downstream import HttpConnection
from proxy.edge.exchange import Exchange
from proxy.edge.relay import Tunnel
from proxy.edge.upstream import UpstreamConnection
from proxy.model import AppName, ConcurrencyType, MachineState
from proxy.state import W_CONNECTIONS
from tests.support.edge import EdgeHarness, answers, read_head

GET = b"GET /x HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
UPGRADE = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: raw\r\n\r\n"
POST_HEAD = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: %d\r\n\r\n"


async def eventually(what: object, seconds: float = 5.0) -> None:
    """Until a condition holds."""
    assert callable(what)
    end = asyncio.get_running_loop().time() + seconds
    while not what():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.005)


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_an_answer_is_not_lost_to_the_request_that_a_client_sends_behind_it(edge: EdgeHarness) -> None:
    """It was told `Connection: close` only in that answer: a reset for what it sent meanwhile would destroy it."""
    body = b"a" * 1_500_000
    origin = await edge.origin(answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    edge.set_app(edge.app(edge.machine(origin.port)))
    edge.edge.draining = True
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, limit=1024)  # the rest stays in the kernel
    writer.write(GET)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert b"connection: close\r\n" in head
    await eventually(lambda: not edge.memory.in_flight(1))
    writer.write(GET)
    await writer.drain()
    await asyncio.sleep(0.1)  # for a reset to come
    assert len(await asyncio.wait_for(reader.read(), 10)) == len(body)
    writer.close()


# --- answers given early


async def test_a_client_that_goes_on_sending_reads_its_early_answer_and_no_reset(edge: EdgeHarness) -> None:
    reader, writer = await edge.connect()
    writer.write(POST_HEAD % 500_000)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 404 ") and b"connection: close\r\n" in head
    for _ in range(50):
        writer.write(b"x" * 10_000)
        await writer.drain()
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"WD09 ")
    writer.write_eof()
    await eventually(lambda: not edge.gate.open)


async def test_a_client_that_never_stops_sending_is_cut_off(edge: EdgeHarness) -> None:
    reader, writer = await edge.connect()
    writer.write(POST_HEAD % 1_000_000_000)
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)

    async def send_on() -> None:
        for _ in range(2000):
            writer.write(b"x" * 65_536)
            await writer.drain()

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send_on(), 10)
    await eventually(lambda: not edge.gate.open)


async def test_a_client_that_just_stays_after_an_early_answer_is_ended(edge: EdgeHarness) -> None:
    reader, writer = await edge.connect()
    writer.write(POST_HEAD % 10)
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 404 ")
    await eventually(lambda: not edge.gate.open)


# --- tunnels


async def test_the_client_may_end_a_tunnel_first_and_still_hear_the_machine(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH)
        heard = await reader.read()
        writer.write(b"you said " + heard)

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(UPGRADE + b"early ")
    assert answer.endswith(b"\r\n\r\nyou said early ")
    await eventually(lambda: not edge.gate.open and not edge.memory.in_flight(1))


async def test_the_machine_may_end_a_tunnel_first_and_still_hear_the_client(edge: EdgeHarness) -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH + b"bye")
        writer.write_eof()
        heard.set_result(await reader.read())

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(UPGRADE)
    assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"\r\n\r\nbye")
    for _ in range(3):
        writer.write(b"more")
        await asyncio.sleep(0.01)
    writer.write_eof()
    assert await asyncio.wait_for(heard, 5) == b"more" * 3
    await eventually(lambda: not edge.gate.open and not edge.memory.in_flight(1))


@pytest.mark.parametrize("who", ["client", "machine"])
async def test_a_reset_of_one_end_of_a_tunnel_ends_the_other(edge: EdgeHarness, who: str) -> None:
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH)
        await reader.read(1)
        if who == "machine":
            reset(writer)
            return
        try:
            await reader.read()
        except ConnectionError:
            pass
        ended.set()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(UPGRADE)
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"!")
    if who == "client":
        await asyncio.sleep(0.02)
        reset(writer)
        await asyncio.wait_for(ended.wait(), 5)
    else:
        assert await asyncio.wait_for(reader.read(), 5) == b""
    await eventually(lambda: not edge.gate.open and not edge.memory.in_flight(1))


async def test_a_tunnel_holds_back_whoever_sends_too_fast(edge: EdgeHarness) -> None:
    size = 32 * 1024 * 1024
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_head(reader)
        writer.write(SWITCH)
        while sent < size:
            writer.write(b"x" * 65_536)
            sent += 65_536
            await writer.drain()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    reader._limit = 65_536  # type: ignore[attr-defined]  # what the stream itself would hold
    writer.write(UPGRADE)
    await reader.readuntil(b"\r\n\r\n")
    before = -1
    while sent != before:
        before = sent
        await asyncio.sleep(0.1)
    assert sent < size * 3 // 4
    left = size
    while left:
        piece = await asyncio.wait_for(reader.read(1 << 20), 5)
        assert piece
        left -= len(piece)


async def test_draining_ends_tunnels_when_told_to(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH)
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(UPGRADE)
    await reader.readuntil(b"\r\n\r\n")
    edge.edge.draining = True
    edge.listener.drain()
    await asyncio.sleep(0.05)
    assert edge.gate.open == 1, "a tunnel is not cut at once"
    edge.listener.end_tunnels()
    assert await asyncio.wait_for(reader.read(), 5) == b""


# --- machines that are about to be stopped

WEBSOCKET = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH_WS = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
GOING_AWAY = b"\x88\x0c\x03\xe9going away"


async def test_a_websocket_is_told_1001_between_two_frames_and_then_hears_no_more(edge: EdgeHarness) -> None:
    go_on = asyncio.Event()
    heard = bytearray()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH_WS + b"\x81\x05hel")  # a frame that has not come whole
        await go_on.wait()
        writer.write(b"lo\x81\x03too")
        writer.write(b"\x81\x04late")
        heard.extend(await reader.read())

    origin = await edge.origin(handle)
    machine = edge.machine(origin.port)
    edge.set_app(edge.app(machine))
    reader, writer = await edge.connect()
    writer.write(WEBSOCKET)
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(5) == b"\x81\x05hel"
    edge.edge.table.end_tunnels(AppName("hello"), machine.id)
    go_on.set()
    told = await asyncio.wait_for(reader.readuntil(GOING_AWAY), 5)
    assert told[: -len(GOING_AWAY)] in (b"lo", b"lo\x81\x03too", b"lo\x81\x03too\x81\x04late")
    writer.write(b"\x88\x82\x00\x00\x00\x00\x03\xe9")  # the client says goodbye too, and leaves
    writer.close()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    async with asyncio.timeout(5):
        while not heard:
            await asyncio.sleep(0.01)
    assert bytes(heard) == b"\x88\x82\x00\x00\x00\x00\x03\xe9"


async def test_a_client_that_does_not_close_after_1001_is_cut_off(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH_WS)
        await reader.read()

    origin = await edge.origin(handle)
    machine = edge.machine(origin.port)
    edge.set_app(edge.app(machine))
    reader, writer = await edge.connect()
    writer.write(WEBSOCKET)
    await reader.readuntil(b"\r\n\r\n")
    edge.edge.table.end_tunnels(AppName("hello"), machine.id)
    assert await asyncio.wait_for(reader.read(), 5) == GOING_AWAY
    assert edge.edge.in_flight(machine.slot) == 0


async def test_a_tunnel_of_another_protocol_is_just_closed_when_its_machine_stops(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(SWITCH)
        await reader.read()

    origin = await edge.origin(handle)
    machine = edge.machine(origin.port)
    edge.set_app(edge.app(machine))
    reader, writer = await edge.connect()
    writer.write(UPGRADE)
    await reader.readuntil(b"\r\n\r\n")
    edge.edge.table.end_tunnels(AppName("hello"), machine.id)
    assert await asyncio.wait_for(reader.read(), 0.9) == b""


# --- apps that change meanwhile


async def test_a_request_goes_on_by_the_record_it_began_with(edge: EdgeHarness) -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await go.wait()
            writer.write(OK)

    origin = await edge.origin(handle)
    machine = edge.machine(origin.port)
    edge.set_app(edge.app(machine, response_headers=(("x-record", ("old",)),)))
    reader, writer = await edge.connect()
    writer.write(GET)
    await eventually(lambda: origin.received and origin.received[0].endswith(b"\r\n\r\n"))
    edge.set_app(edge.app(machine, response_headers=(("x-record", ("new",)),)))
    go.set()
    assert b"x-record: old\r\n" in await reader.readuntil(b"ok")
    writer.write(GET)
    assert b"x-record: new\r\n" in await reader.readuntil(b"ok")
    assert origin.connections == 1, "the machine is the same, and so is the connection"


@pytest.mark.parametrize("how", ["app removed", "machine removed", "machine stopped"])
async def test_what_goes_away_finishes_its_requests_and_takes_no_more(edge: EdgeHarness, how: str) -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await go.wait()
            writer.write(OK)

    origin = await edge.origin(handle)
    machine = edge.machine(origin.port)
    edge.set_app(edge.app(machine))
    reader, writer = await edge.connect()
    writer.write(GET)
    await eventually(lambda: origin.received and origin.received[0].endswith(b"\r\n\r\n"))
    if how == "app removed":
        edge.edge.table.remove_app(AppName("hello"))
    elif how == "machine removed":
        edge.set_app(edge.app())
    else:
        hold = {"hold_reason": "x", "hold_until": unix() + 60}
        stopping = edge.machine(origin.port, state=MachineState.STOPPED, version=2, **hold)
        edge.edge.table.set_machine(AppName("hello"), stopping)
    go.set()
    assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.write(GET)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 404 " if how == "app removed" else b"HTTP/1.1 503 ")
    assert origin.connections == 1 and edge.memory.in_flight(1) == 0


async def test_a_kept_connection_to_a_machine_ends_when_it_was_idle_for_long(
    edge: EdgeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "IDLE_S", 0.2)
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK)
        assert await reader.read() == b""
        ended.set()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    assert (await edge.request(GET)).startswith(b"HTTP/1.1 200 OK\r\n")
    await asyncio.wait_for(ended.wait(), 5)


# --- nothing is left over


async def test_batch_after_batch_of_pipelined_requests_is_answered(edge: EdgeHarness) -> None:
    """Each batch pauses reading until it is worked off: a pause that is not undone would end the third."""

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await asyncio.sleep(0)
            writer.write(OK)

    origin = await edge.origin(slow)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    for size in (16, 1, 7, 16, 2, 16):
        writer.write(GET * size)
        for _ in range(size):
            assert (await asyncio.wait_for(reader.readuntil(b"ok"), 5)).startswith(b"HTTP/1.1 200 OK\r\n")


def left_over() -> dict[str, int]:
    """Objects of the data plane that are still alive."""
    gc.collect()
    kinds = (HttpConnection, Exchange, UpstreamConnection, Tunnel)
    found = {kind.__name__: 0 for kind in kinds}
    for one in gc.get_objects():
        if type(one) in kinds:
            found[type(one).__name__] += 1
    return found


@pytest.mark.parametrize("kind", list(ConcurrencyType))
async def test_after_traffic_of_all_kinds_nothing_is_left(edge: EdgeHarness, kind: ConcurrencyType) -> None:
    rng = random.Random(5)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            match rng.randrange(8):
                case 0:
                    return
                case 1:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
                    return
                case 2:
                    writer.write(OK + b"more than was asked for")
                case 3 if b"Upgrade" in head:
                    writer.write(SWITCH + b"raw")
                    await reader.read(10)
                    return
                case 4:
                    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"y" * 300_000)
                    return
                case 5:
                    reset(writer)
                    return
                case _:
                    writer.write(OK)
            await writer.drain()

    async def client() -> None:
        _, writer = await edge.connect()
        data = rng.choice(
            [GET, GET * 5, UPGRADE, POST_HEAD % 100 + b"part", POST_HEAD % 4 + b"full", b"NONSENSE\r\n\r\n", GET[:20]]
        )
        writer.write(data)
        await asyncio.sleep(rng.random() * 0.02)
        if rng.random() < 0.5:
            reset(writer)
        else:
            writer.close()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port), kind=kind))
    before = left_over()
    for _ in range(20):
        await asyncio.gather(*(client() for _ in range(15)))
    await eventually(lambda: not edge.gate.open, 10)
    assert edge.memory.in_flight(1) == 0
    assert edge.edge.cells[edge.edge.worker_base + W_CONNECTIONS] == 0
    edge.set_app(edge.app())  # the machine goes, and with it what is kept to it
    await eventually(lambda: left_over() == before, 10)
    assert edge.listener.connections == set() and edge.edge.waker.waiting == 0

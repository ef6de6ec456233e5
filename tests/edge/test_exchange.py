"""One request through the data plane: what the client sees, what the machine sees."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from proxy.ipc import PassiveFailure, Wake, WakeDone
from proxy.model import AppLimits, AppName, ConcurrencyType, MachineId, MachineState
from tests.support.edge import EdgeHarness, answers, read_head

GET = b"GET /x?y=1 HTTP/1.1\r\nHost: hello.apps.test\r\nAccept: */*\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-App: yes\r\n\r\nok"


def fields(head: bytes) -> dict[bytes, bytes]:
    lines = head.split(b"\r\n\r\n", 1)[0].split(b"\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}


async def test_a_request_reaches_the_machine_and_its_answer_the_client(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(GET)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\nok")
    got = fields(answer)
    assert got[b"x-app"] == b"yes" and got[b"server"] == b"wakefront" and b"fly-request-id" in got
    seen = bytes(origin.received[0])
    assert seen.startswith(b"GET /x?y=1 HTTP/1.1\r\nHost: hello.apps.test\r\nAccept: */*\r\n")
    told = fields(seen)
    assert told[b"fly-client-ip"] == b"127.0.0.1" and told[b"x-forwarded-proto"] == b"http"
    assert told[b"fly-region"] == b"ams" and told[b"fly-request-id"] == got[b"fly-request-id"]


async def test_trust_headers_of_a_client_never_reach_the_machine(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    await edge.request(
        b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\nFly-Client-IP: 6.6.6.6\r\nX-Forwarded-For: 6.6.6.6\r\n"
        b"x_forwarded_for: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\nFly-Region: zzz\r\n"
        b"Fly-Replay-Src: 6.6.6.6\r\nConnection: X-Secret\r\nX-Secret: 6.6.6.6\r\nfly-prefer-region: ams\r\n\r\n"
    )
    seen = bytes(origin.received[0])
    assert b"6.6.6.6" not in seen and b"zzz" not in seen and b"fly-prefer-region: ams\r\n" in seen


async def test_pooled_connections_carry_many_requests_in_order(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(GET * 10)
    assert answer.count(b"HTTP/1.1 200 OK") == 10
    assert origin.connections == 1


async def test_services_of_type_connections_get_a_new_connection_for_each_request(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port), kind=ConcurrencyType.CONNECTIONS))
    answer = await edge.request(GET * 3)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert origin.connections == 3
    assert b"connection: close\r\n" in bytes(origin.received[0])


async def test_a_body_of_known_length_arrives_whole(edge: EdgeHarness) -> None:
    body = bytes(range(256)) * 4096  # 1 MiB

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        data = b""
        while len(data) < len(body):
            data += await reader.read(65_536)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        await writer.drain()
        await reader.read()

    origin = await edge.origin(echo)
    edge.set_app(edge.app(edge.machine(origin.port)))
    head = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = await edge.request(head + body + GET.replace(b"GET", b"HEAD")[:0])
    assert answer.split(b"\r\n\r\n", 1)[1] == body


async def test_chunks_and_trailers_pass_both_ways(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b""
        while not data.endswith(b"X-Sum: 7\r\n\r\n"):
            data += await reader.read(4096)
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Check: 9\r\nHost: evil\r\n\r\n"
        )
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(
        b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2;ext=1\r\nhi\r\n0\r\nX-Sum: 7\r\n\r\n"
    )
    assert answer.endswith(b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Check: 9\r\n\r\n")
    assert bytes(origin.received[0]).endswith(b"\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 7\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "response", "end"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"content-length: 5\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", b"\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", b"\r\n\r\n"),
    ],
)
async def test_answers_without_a_body_leave_the_connection_usable(
    edge: EdgeHarness, method: bytes, response: bytes, end: bytes
) -> None:
    origin = await edge.origin(answers(response))
    edge.set_app(edge.app(edge.machine(origin.port)))
    request = GET.replace(b"GET", method)
    answer = await edge.request(request * 2)
    assert answer.count(b"HTTP/1.1 ") == 2 and answer.endswith(end)
    assert origin.connections == 1


async def test_an_answer_that_ends_with_the_connection_is_sent_in_chunks(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nsome")

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(GET)
    assert answer.endswith(b"4\r\nsome\r\n0\r\n\r\n")


async def test_interim_responses_pass_before_the_final_one(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.read(2) == b"ab"
        writer.write(OK)
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"ab")
    assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_no_byte_passes_raw_before_the_101_and_all_after(edge: EdgeHarness) -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        assert b"connection: upgrade\r\nupgrade: websocket\r\n" in head
        await go.wait()
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello ")
        while data := await reader.read(100):
            writer.write(data.upper())

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(b"GET /ws HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")
    await asyncio.sleep(0.05)
    assert b"early" not in bytes(origin.received[0])
    go.set()
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ") and b"upgrade: websocket\r\n" in head
    assert await reader.readexactly(11) == b"hello EARLY"
    assert edge.memory.in_flight(1) == 1, "an open tunnel is load"
    writer.write(b"more")
    assert await reader.readexactly(4) == b"MORE"
    writer.write_eof()
    assert await reader.read() == b""


async def test_a_refused_upgrade_closes_the_connection_and_passes_nothing(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(
        b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        b"GET /smuggled HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
    )
    assert answer.count(b"HTTP/1.1 200") == 1 and b"connection: close\r\n" in answer
    assert b"smuggled" not in b"".join(bytes(one) for one in origin.received)


async def test_unknown_hosts_and_bad_requests_get_a_status_and_a_code(edge: EdgeHarness) -> None:
    edge.set_app(edge.app())
    for request, status, code in (
        (b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n", b"404", b"WD09"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400", b"WD01"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400", b"WD01"),
        (b"NONSENSE\r\n\r\n", b"501", b"WD04"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"431", b"WD02"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", b"414", b"WD03"),
        (b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n", b"503", b"PR04"),
    ):
        answer = await edge.request(request)
        assert answer.startswith(b"HTTP/1.1 " + status), (request[:40], answer)
        assert fields(answer)[b"wakefront-error"] == code


async def test_a_bad_request_after_a_good_one_does_not_take_its_answer_away(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(GET + b"NONSENSE\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and b"HTTP/1.1 501 " in answer


async def test_a_sleeping_machine_is_asked_for_once_and_all_requests_are_answered(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED)))
    requests = [asyncio.ensure_future(edge.request(GET)) for _ in range(20)]
    while edge.edge.waker.waiting < 20:
        await asyncio.sleep(0)
    assert [type(message) for message in edge.sent.messages] == [Wake]
    edge.edge.table.set_machine(AppName("hello"), edge.machine(origin.port, version=2))
    edge.edge.waker.on_wake_done(WakeDone(AppName("hello"), MachineId("m1"), 2))
    for answer in await asyncio.gather(*requests):
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_failed_start_is_told_with_its_reason_and_when_to_come_again(edge: EdgeHarness) -> None:
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED)))
    request = asyncio.ensure_future(edge.request(GET))
    while not edge.edge.waker.waiting:
        await asyncio.sleep(0)
    edge.edge.waker.on_wake_done(
        WakeDone(AppName("hello"), MachineId("m1"), 1, "PM07", "exited with 3", retry_after_s=2)
    )
    answer = await request
    got = fields(answer)
    assert answer.startswith(b"HTTP/1.1 503 ") and got[b"wakefront-error"] == b"PM07" and got[b"retry-after"] == b"2"


async def test_a_client_that_leaves_cancels_nobody_elses_wake(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED)))
    _, leaver = await edge.connect()
    leaver.write(GET)
    stayer = asyncio.ensure_future(edge.request(GET))
    while edge.edge.waker.waiting < 2:
        await asyncio.sleep(0)
    leaver.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    leaver.transport.abort()  # a reset: an end alone could be a half-close that waits for its answer
    while edge.edge.waker.waiting > 1:
        await asyncio.sleep(0)
    edge.edge.table.set_machine(AppName("hello"), edge.machine(origin.port, version=2))
    assert (await stayer).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_machine_that_refuses_is_reported_and_looked_after(edge: EdgeHarness) -> None:
    edge.set_app(edge.app(edge.machine(1)))  # nothing listens on port 1
    request = asyncio.ensure_future(edge.request(GET))
    while not any(isinstance(message, Wake) for message in edge.sent.messages):
        await asyncio.sleep(0)
    assert isinstance(edge.sent.messages[0], PassiveFailure) and edge.sent.messages[0].code == "PC01"
    origin = await edge.origin(answers(OK))
    edge.edge.table.set_machine(AppName("hello"), edge.machine(origin.port, version=2))
    assert (await request).startswith(b"HTTP/1.1 200 OK\r\n")
    assert edge.memory.in_flight(1) == 0


async def test_a_safe_request_is_sent_again_when_a_kept_connection_had_closed(edge: EdgeHarness) -> None:
    served = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await read_head(reader)
        writer.write(OK)
        await writer.drain()
        await read_head(reader)  # the second request on a kept connection is left unanswered
        served += 1

    origin = await edge.origin(once)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    for _ in range(2):
        writer.write(GET)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 OK\r\n")
    assert origin.connections == 2 and served == 1


async def test_an_unsafe_request_is_never_sent_twice(edge: EdgeHarness) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK)
        await writer.drain()
        await read_head(reader)

    origin = await edge.origin(once)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    post = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 0\r\n\r\n"
    writer.write(post)
    assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.write(post)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 502 ")
    assert origin.connections == 1


async def test_a_broken_off_answer_ends_the_connection_without_its_last_chunk(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    answer = await edge.request(GET)
    assert answer.endswith(b"3\r\nabc\r\n")


async def test_a_slow_reader_holds_the_machine_back_and_gets_every_byte(edge: EdgeHarness) -> None:
    size = 32 * 1024 * 1024
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 65_536)
            sent += 65_536
            await writer.drain()
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    reader._limit = 65_536  # type: ignore[attr-defined]
    writer.write(GET)
    await reader.readuntil(b"\r\n\r\n")
    for _ in range(50):
        await asyncio.sleep(0.01)
    held = sent
    assert held < 24 * 1024 * 1024, "the machine ran ahead of a client that does not read"
    left = size
    while left:
        left -= len(await reader.read(1 << 20))
    assert sent == size


async def test_a_first_byte_that_never_comes_is_a_504(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port), limits=AppLimits(first_byte_timeout_s=0.2)))
    reader, writer = await edge.connect()
    writer.write(GET)
    answer = await reader.readuntil(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 504 ") and b"wakefront-error: WU02\r\n" in answer


async def test_response_rules_and_pristine_hold(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(b"HTTP/1.1 200 OK\r\nServer: mine\r\nX-Gone: 1\r\nContent-Length: 0\r\n\r\n"))
    edge.set_app(
        edge.app(
            edge.machine(origin.port),
            response_headers=(("x-gone", None), ("X-New", ("a", "b")), ("fly-request-id", None)),
        )
    )
    answer = await edge.request(GET)
    assert b"X-Gone" not in answer and b"X-New: a\r\nX-New: b\r\n" in answer
    assert b"fly-request-id" not in answer and b"server: wakefront" in answer and b"mine" not in answer
    edge.set_app(edge.app(edge.machine(origin.port), pristine=True))
    answer = await edge.request(GET)
    assert b"Server: mine\r\n" in answer and b"via" not in answer and b"fly-request-id" not in answer


async def test_force_https_redirects_and_wakes_nothing(edge: EdgeHarness) -> None:
    edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED), force_https=True))
    answer = await edge.request(GET)
    assert answer.startswith(b"HTTP/1.1 301 ") and b"location: https://hello.apps.test/x?y=1\r\n" in answer
    assert edge.sent.messages == []


async def test_an_answer_before_the_body_ends_closes_the_connection(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 1000\r\n\r\nsome")
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and b"connection: close\r\n" in answer


async def test_idle_connections_end_and_slow_heads_get_a_408() -> None:
    async with EdgeHarness(head_timeout_s=0.3, idle_timeout_s=0.3) as edge:
        origin = await edge.origin(answers(OK))
        edge.set_app(edge.app(edge.machine(origin.port)))
        reader, writer = await edge.connect()
        writer.write(GET)
        await reader.readuntil(b"ok")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        reader, writer = await edge.connect()
        writer.write(GET[:20])
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 408 ")


async def test_a_head_that_begins_in_the_read_of_the_request_before_it_has_the_time_of_a_head() -> None:
    async with EdgeHarness(head_timeout_s=0.3, idle_timeout_s=0.9) as edge:
        origin = await edge.origin(answers(OK))
        edge.set_app(edge.app(edge.machine(origin.port)))
        reader, writer = await edge.connect()
        writer.write(GET + GET[:20])
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(OK[:15]) and b"HTTP/1.1 408 " in answer


async def test_draining_ends_keep_alive_after_the_answer_under_way(edge: EdgeHarness) -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await go.wait()
        writer.write(OK)
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    idle_reader, _ = await edge.connect()
    writer.write(GET)
    while not origin.received:
        await asyncio.sleep(0)
    edge.edge.draining = True
    edge.listener.stop()
    edge.listener.drain()
    assert await asyncio.wait_for(idle_reader.read(), 5) == b""
    go.set()
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and b"connection: close\r\n" in answer


@pytest.mark.parametrize(
    "more", [b"HTTP/1.1 200 OK\r\n\r\nevil", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"HTT", b"x"]
)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_bytes_after_an_answer_are_never_taken_for_the_next_ones(
    edge: EdgeHarness, more: bytes, method: bytes
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(OK + more)
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    request = GET.replace(b"GET", method).replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n")
    for data in (request * 3, request, request):
        answer = await edge.request(data)
        assert b"evil" not in answer and answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.count(b"HTTP/1.1 ") == data.count(method) == answer.count(b"fly-request-id: ")
    assert edge.memory.in_flight(1) == 0


async def test_a_ports_idle_timeout_ends_an_answer_that_stalls(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nsome")
        await reader.read()

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port), idle_timeout_s=0.2))
    reader, writer = await edge.connect()
    writer.write(GET)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\nsome")

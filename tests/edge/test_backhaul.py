"""Requests that cross from one edge to another: what the client, the machine and the other edge see."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import ssl
from collections.abc import AsyncIterator

import pytest
import trustme

from proxy.model import AppLimits, ConcurrencyType, Machine, MachineId, MachineState, RemoteLoad, RemoteMachine
from proxy.state import W_BACKHAUL_REQUESTS, W_PEER_CONNECTS, W_PEER_REFUSALS, W_PEER_REQUESTS
from tests.support.edge import Handler, answers, read_head
from tests.support.fleet_edge import NodeHarness, client_context, fleet_ca

GET = b"GET /x HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nserver: origin\r\n\r\nok"
SAYS_OK = answers(OK)


@pytest.fixture
async def ams() -> AsyncIterator[NodeHarness]:
    async with NodeHarness("ams-1", "ams") as made:
        yield made


@pytest.fixture
async def iad() -> AsyncIterator[NodeHarness]:
    async with NodeHarness("iad-1", "iad") as made:
        yield made


@pytest.fixture
async def syd() -> AsyncIterator[NodeHarness]:
    async with NodeHarness("syd-1", "syd") as made:
        yield made


async def put(node: NodeHarness, handler: Handler = SAYS_OK, name: str = "m1", **more: object) -> Machine:
    """Have the app run at a node, with one machine."""
    origin = await node.origin(handler)
    machine = node.machine(origin.port, name)
    node.set_app(node.app(machine, **more))  # type: ignore[arg-type]  # as the caller has it
    return machine


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> bytes:
    return next((line[17:] for line in answer.split(b"\r\n") if line.lower().startswith(b"wakefront-error: ")), b"")


def counted(node: NodeHarness, cell: int) -> int:
    return node.edge.cells[node.edge.worker_base + cell]


async def test_a_machine_of_another_node_gets_the_request_as_the_first_edge_wrote_it(
    ams: NodeHarness, iad: NodeHarness
) -> None:
    heads: list[bytes] = []
    await put(iad, answers(OK, heads.append))
    app = ams.app()
    ams.set_app(app)
    ams.know(iad, app)
    answer = await ams.request(
        GET.replace(b"\r\n\r\n", b"\r\nX-Own: yes\r\nFly-Client-IP: 6.6.6.6\r\nwakefront-hop: v=1;app=other\r\n\r\n")
    )
    assert status(answer) == 200 and answer.endswith(b"\r\n\r\nok")
    lines = heads[0].lower().split(b"\r\n")
    assert lines[0] == b"get /x http/1.1"
    for line in (b"host: hello.apps.test", b"x-own: yes", b"fly-client-ip: 127.0.0.1", b"fly-region: ams"):
        assert lines.count(line) == 1
    assert sum(line.startswith(b"fly-request-id: ") for line in lines) == 1
    assert not any(line.startswith(b"wakefront-") for line in lines)
    fields = answer.split(b"\r\n\r\n")[0].lower()
    assert b"\r\nserver: wakefront" in fields and b"wakefront-machine" not in fields
    assert fields.count(b"\r\nvia: ") == 1
    request_id = next(line for line in lines if line.startswith(b"fly-request-id: "))
    assert request_id in fields.split(b"\r\n")


async def test_connections_between_edges_are_used_again(ams: NodeHarness, iad: NodeHarness) -> None:
    await put(iad)
    app = ams.app()
    ams.set_app(app)
    ams.know(iad, app)
    for _ in range(50):
        assert status(await ams.request(GET)) == 200
    assert counted(ams, W_PEER_CONNECTS) == 1 and counted(ams, W_PEER_REQUESTS) == 50
    assert counted(iad, W_BACKHAUL_REQUESTS) == 50


async def test_a_machine_here_goes_before_one_elsewhere(ams: NodeHarness, iad: NodeHarness) -> None:
    await put(iad, answers(OK.replace(b"ok", b"no")), "m2")
    machine = await put(ams)
    ams.know(iad, ams.app(machine))
    for _ in range(5):
        assert (await ams.request(GET)).endswith(b"ok")
    assert counted(ams, W_PEER_REQUESTS) == 0


async def echo_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with the digest of a body of known length, and its length."""
    while True:
        head = await read_head(reader)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        digest = hashlib.sha256()
        left = length
        while left:
            data = await reader.read(min(left, 65_536))
            digest.update(data)
            left -= len(data)
        body = digest.hexdigest().encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize("size", [1, 100_000, 5_000_000])
async def test_bodies_arrive_whole(ams: NodeHarness, iad: NodeHarness, size: int) -> None:
    await put(iad, echo_body)
    app = ams.app()
    ams.set_app(app)
    ams.know(iad, app)
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    answer = await ams.request(
        b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: %d\r\n\r\n%b" % (size, body)
    )
    assert status(answer) == 200
    assert answer.endswith(hashlib.sha256(body).hexdigest().encode())


async def test_chunks_and_trailers_pass_both_ways(ams: NodeHarness, iad: NodeHarness) -> None:
    got = bytearray()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.extend(await read_head(reader))
        got.extend(await reader.readuntil(b"\r\nx-sum: 7\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-end: 9\r\n\r\n")
        await reader.read()

    await put(iad, handle)
    app = ams.app()
    ams.set_app(app)
    ams.know(iad, app)
    answer = await ams.request(
        b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n"
        b"4\r\nwiki\r\n0\r\nx-sum: 7\r\n\r\n"
    )
    assert answer.endswith(b"3\r\nabc\r\n0\r\nx-end: 9\r\n\r\n")
    assert b"\r\n\r\n4\r\nwiki\r\n0\r\n" in got


async def test_an_upgrade_is_a_tunnel_through_both_edges(ams: NodeHarness, iad: NodeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        while data := await reader.read(65_536):
            writer.write(data.upper())
            await writer.drain()

    await put(iad, handle)
    app = ams.app()
    ams.set_app(app)
    ams.know(iad, app)
    reader, writer = await ams.connect()
    writer.write(GET.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ") and b"upgrade: echo" in head
    total = 0
    for _ in range(20):
        writer.write(b"x" * 50_000)
        await writer.drain()
        total += len(await reader.readexactly(50_000))
    assert total == 1_000_000
    writer.close()


async def test_a_node_whose_machines_are_full_refuses_and_the_next_serves(
    ams: NodeHarness, iad: NodeHarness, syd: NodeHarness
) -> None:
    busy = asyncio.Event()
    release = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        busy.set()
        await release.wait()
        writer.write(OK)
        await reader.read()

    origin = await iad.origin(slow)
    app = iad.app(iad.machine(origin.port))
    limited = dataclasses.replace(app, services=(dataclasses.replace(app.services[0], hard_limit=1),))
    iad.set_app(limited)
    await put(syd, answers(OK.replace(b"ok", b"SY")), "m2")
    here = ams.app()
    ams.set_app(here)
    ams.edge.region_ranks = {"ams": 0, "iad": 1, "syd": 2}  # type: ignore[dict-item]  # codes are strings
    ams.know(iad, here)
    ams.know(syd, here)
    first = asyncio.create_task(ams.request(GET))
    await busy.wait()
    assert (await ams.request(GET)).endswith(b"SY")
    assert counted(ams, W_PEER_REFUSALS) == 1
    release.set()
    assert (await first).endswith(b"ok")


async def test_a_machine_that_sleeps_elsewhere_is_woken_there(ams: NodeHarness, iad: NodeHarness) -> None:
    origin = await iad.origin(answers(OK))
    machine = dataclasses.replace(iad.machine(origin.port), state=MachineState.STOPPED)
    iad.set_app(iad.app(machine))
    iad.start_when_asked(machine)
    app = ams.app()
    ams.set_app(app)
    ams.know(iad, app)
    assert (await ams.request(GET)).endswith(b"ok")
    assert iad.woken == {machine.id} and not ams.woken


async def test_a_body_too_large_to_keep_is_sent_only_where_a_machine_takes_it(
    ams: NodeHarness, iad: NodeHarness, syd: NodeHarness
) -> None:
    """The nearest node refuses; the next gets the whole body, of which nothing was kept."""
    stopped = dataclasses.replace(iad.machine(9), state=MachineState.STOPPED)
    iad.set_app(iad.app(stopped))
    await put(syd, echo_body, "m2")
    app = ams.app(limits=AppLimits(replay_memory_bytes=1000))
    ams.set_app(app)
    ams.edge.region_ranks = {"ams": 0, "iad": 1, "syd": 2}  # type: ignore[dict-item]
    runs = RemoteMachine(MachineId("m1"), "app", MachineState.STARTED)
    ams.know(iad, app, machines=(runs,))  # it stopped just now
    ams.know(syd, app)
    body = b"y" * 300_000
    answer = await ams.request(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 300000\r\n\r\n" + body)
    assert status(answer) == 200 and answer.endswith(hashlib.sha256(body).hexdigest().encode())
    assert counted(ams, W_PEER_REFUSALS) == 1


async def test_a_small_body_is_sent_again_after_a_refusal(ams: NodeHarness, iad: NodeHarness, syd: NodeHarness) -> None:
    stopped = dataclasses.replace(iad.machine(9), state=MachineState.STOPPED)
    iad.set_app(iad.app(stopped))
    await put(syd, echo_body, "m2")
    app = ams.app()
    ams.set_app(app)
    ams.edge.region_ranks = {"ams": 0, "iad": 1, "syd": 2}  # type: ignore[dict-item]
    ams.know(iad, app, machines=(RemoteMachine(MachineId("m1"), "app", MachineState.STARTED),))
    ams.know(syd, app)
    body = b"z" * 50_000
    answer = await ams.request(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 50000\r\n\r\n" + body)
    assert status(answer) == 200 and answer.endswith(hashlib.sha256(body).hexdigest().encode())


async def test_a_node_that_is_gone_costs_no_request(ams: NodeHarness, iad: NodeHarness, syd: NodeHarness) -> None:
    await put(syd, answers(OK.replace(b"ok", b"SY")), "m2")
    app = ams.app()
    ams.set_app(app)
    ams.edge.region_ranks = {"ams": 0, "iad": 1, "syd": 2}  # type: ignore[dict-item]
    runs = RemoteMachine(MachineId("m1"), "app", MachineState.STARTED)
    ams.know(iad, app, port=1, machines=(runs,))  # nothing listens there
    ams.know(syd, app)
    for method in (b"GET", b"POST"):
        answer = await ams.request(GET.replace(b"GET", method).replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n"))
        assert status(answer) == 200 and answer.endswith(b"SY")


class HalfDead:
    """A peer that shakes hands, reads, and closes without an answer."""

    def __init__(self, node: NodeHarness) -> None:
        self.requests = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.set_alpn_protocols(["wakefront/1"])
        fleet_ca().issue_cert(f"{node.node}.node.wakefront").configure_cert(self._context)

    async def __aenter__(self) -> HalfDead:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        if self.requests == 1:
            writer.write(b"HTTP/1.1 200 OK\r\nwakefront-machine: m1\r\ncontent-length: 2\r\n\r\nok")
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
        writer.close()

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()


@pytest.mark.parametrize(("method", "expected"), [(b"GET", 200), (b"POST", 502)])
async def test_only_what_is_safe_is_sent_again_when_a_node_dies_with_it(
    ams: NodeHarness, iad: NodeHarness, syd: NodeHarness, method: bytes, expected: int
) -> None:
    await put(syd, answers(OK.replace(b"ok", b"SY")), "m2")
    app = ams.app()
    ams.set_app(app)
    ams.edge.region_ranks = {"ams": 0, "iad": 1, "syd": 2}  # type: ignore[dict-item]
    async with HalfDead(iad) as dying:
        runs = RemoteMachine(MachineId("m1"), "app", MachineState.STARTED)
        ams.know(iad, app, port=dying.port, machines=(runs,))
        ams.know(syd, app)
        assert (await ams.request(GET)).endswith(b"ok")
        answer = await ams.request(GET.replace(b"GET", method).replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n"))
        assert status(answer) == expected
        assert dying.requests == 2


async def test_a_replay_leads_to_a_machine_of_another_node(ams: NodeHarness, iad: NodeHarness) -> None:
    heads: list[bytes] = []
    remote = await put(iad, answers(OK, heads.append), "m2")
    replay = b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2;state=here\r\ncontent-length: 0\r\n\r\n"
    machine = await put(ams, answers(replay))
    ams.know(iad, ams.app(machine))
    answer = await ams.request(GET)
    assert status(answer) == 200 and answer.endswith(b"ok")
    assert b"fly-replay-src: instance=m1;region=ams;t=" in heads[0] and b";state=here\r\n" in heads[0]
    assert remote.id == "m2"


async def test_a_replay_of_a_machine_elsewhere_is_followed_by_the_edge_that_its_client_reached(
    ams: NodeHarness, iad: NodeHarness
) -> None:
    heads: list[bytes] = []
    local = await put(ams, answers(OK, heads.append))
    replay = b"HTTP/1.1 409 Conflict\r\nfly-replay: instance=m1\r\ncontent-length: 3\r\n\r\nxyz"
    await put(iad, answers(replay), "m2")
    ams.know(iad, ams.app(local))
    answer = await ams.request(GET.replace(b"\r\n\r\n", b"\r\nfly-force-instance-id: m2\r\n\r\n"))
    assert status(answer) == 200 and answer.endswith(b"ok")
    assert b"fly-replay-src: instance=m2;region=iad;t=" in heads[0]


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (b"fly-prefer-region: iad", b"IA"), (b"fly-force-region: iad,ams", b"IA"), (b"fly-prefer-region: eu", b"ok"),
        (b"fly-prefer-region: xyz", b"ok"), (b"fly-force-region: us", b"IA"), (b"fly-prefer-instance-id: m2", b"IA"),
        (b"fly-force-instance-id: m2", b"IA"), (b"fly-force-region: xyz", b""), (b"fly-force-instance-id: m9", b""),
    ],
)  # fmt: skip
async def test_what_a_client_asks_for_leads_to_other_nodes(
    ams: NodeHarness, iad: NodeHarness, fields: bytes, body: bytes
) -> None:
    await put(iad, answers(OK.replace(b"ok", b"IA")), "m2")
    machine = await put(ams)
    ams.know(iad, ams.app(machine))
    answer = await ams.request(GET.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n\r\n"))
    if body:
        assert answer.endswith(body)
    else:
        assert status(answer) == 502 and error(answer) == b"WR02"


async def test_a_machine_cannot_pose_as_an_edge(ams: NodeHarness, iad: NodeHarness) -> None:
    said = b"wakefront-refused: code=WB01;sent=0\r\nwakefront-machine: m9\r\nwakefront-error: WD01\r\n"
    await put(iad, answers(OK.replace(b"server: origin\r\n", said)))
    app = ams.app()
    ams.set_app(app)
    ams.know(iad, app)
    answer = await ams.request(GET)
    assert (
        status(answer) == 200
        and answer.endswith(b"ok")
        and b"wakefront-"
        not in answer.split(b"\r\n\r\n")[0].replace(b"server: wakefront", b"").replace(b"via: 1.1 wakefront", b"")
    )


async def test_load_soft_limits_do_not_push_out_of_a_region_hard_ones_do(ams: NodeHarness, iad: NodeHarness) -> None:
    await put(iad, answers(OK.replace(b"ok", b"IA")), "m2")
    release = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await release.wait()
        writer.write(OK)
        await reader.read()

    origin = await ams.origin(slow)
    app = ams.app(ams.machine(origin.port))
    app = dataclasses.replace(app, services=(dataclasses.replace(app.services[0], soft_limit=1, hard_limit=2),))
    ams.set_app(app)
    ams.know(iad, app)
    held = [asyncio.create_task(ams.request(GET)) for _ in range(2)]
    async with asyncio.timeout(5):
        while ams.edge.in_flight(1) < 2:
            await asyncio.sleep(0.005)
    assert (await ams.request(GET)).endswith(b"IA")
    release.set()
    assert all(one.endswith(b"ok") for one in await asyncio.gather(*held))


@pytest.mark.parametrize("where", ["here", "there"])
async def test_with_all_full_a_request_waits_in_line_and_is_served(
    ams: NodeHarness, iad: NodeHarness, where: str
) -> None:
    """At this node if it has machines, else at the nearest that has."""
    release = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await release.wait()
            writer.write(OK)

    async def one_at_a_time(node: NodeHarness, name: str) -> None:
        origin = await node.origin(slow)
        app = node.app(node.machine(origin.port, name))
        node.set_app(dataclasses.replace(app, services=(dataclasses.replace(app.services[0], hard_limit=1),)))

    await one_at_a_time(iad, "m2")
    if where == "here":
        await one_at_a_time(ams, "m1")
    else:
        app = ams.app()
        ams.set_app(dataclasses.replace(app, services=(dataclasses.replace(app.services[0], hard_limit=1),)))
    ams.know(iad, ams.app())
    asked = [asyncio.create_task(ams.request(GET)) for _ in range(5)]
    await asyncio.sleep(0.1)
    ams.know(iad, ams.app(), RemoteLoad(ams.app().name, 8080, 0, 0, 1))
    asked += [asyncio.create_task(ams.request(GET)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(one.done() for one in asked)
    release.set()
    answers = await asyncio.gather(*asked)
    assert [status(one) for one in answers] == [200] * 8, [error(one) for one in answers]


async def test_a_node_that_failed_several_requests_is_the_last_to_be_asked(
    ams: NodeHarness, iad: NodeHarness, syd: NodeHarness
) -> None:
    await put(syd, answers(OK.replace(b"ok", b"SY")), "m2")
    app = ams.app()
    ams.set_app(app)
    ams.edge.region_ranks = {"ams": 0, "iad": 1, "syd": 2}  # type: ignore[dict-item]
    ams.know(iad, app, port=1, machines=(RemoteMachine(MachineId("m1"), "app", MachineState.STARTED),))
    ams.know(syd, app)
    for _ in range(10):
        assert (await ams.request(GET)).endswith(b"SY")
    assert counted(ams, W_PEER_REQUESTS) < 10 + 5  # the first few found out


async def test_a_node_that_has_come_back_gets_its_share(ams: NodeHarness, iad: NodeHarness, syd: NodeHarness) -> None:
    await put(iad, answers(OK.replace(b"ok", b"IA")), "m1")
    await put(syd, answers(OK.replace(b"ok", b"SY")), "m2")
    app = ams.app()
    ams.set_app(app)
    ams.edge.region_ranks = {"ams": 0, "iad": 1, "syd": 2}  # type: ignore[dict-item]
    ams.know(iad, app)
    ams.know(syd, app)
    ams.edge.table.set_peer(dataclasses.replace(iad.peer, share=0.3))
    bodies = [(await ams.request(GET))[-2:] for _ in range(100)]
    assert 10 < bodies.count(b"IA") < 55
    ams.edge.table.set_peer(dataclasses.replace(iad.peer, is_up=False))
    assert {(await ams.request(GET))[-2:] for _ in range(10)} == {b"SY"}


# --- who is no peer


async def talk(node: NodeHarness, context: ssl.SSLContext, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", node.backhaul_port, ssl=context, server_hostname=f"{node.node}.node.wakefront"
    )
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


@pytest.mark.parametrize("kind", ["none", "foreign", "no node", "two names", "old"])
async def test_who_shows_no_certificate_of_a_node_gets_no_answer(iad: NodeHarness, kind: str) -> None:
    await put(iad)
    ca = fleet_ca()
    leaf: trustme.LeafCert | None = ca.issue_cert("ams-1.node.wakefront")
    if kind == "none":
        leaf = None
    elif kind == "foreign":
        leaf = trustme.CA().issue_cert("ams-1.node.wakefront")
    elif kind == "no node":
        leaf = ca.issue_cert("hello.apps.test")
    elif kind == "two names":
        leaf = ca.issue_cert("ams-1.node.wakefront", "iad-1.node.wakefront")
    context = client_context(ca, leaf)
    if kind == "old":
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    hop = b"wakefront-hop: v=1;app=hello;port=80;id=abc;ip=1.2.3.4;tls=0;hops=1;may=w\r\n\r\n"
    try:
        answer = await talk(iad, context, GET.replace(b"\r\n\r\n", b"\r\n" + hop))
    except (ssl.SSLError, ConnectionError):
        answer = b""
    assert answer == b""
    assert counted(iad, W_BACKHAUL_REQUESTS) == 0


@pytest.mark.parametrize(
    "hop",
    [
        b"", b"wakefront-hop: \r\n", b"wakefront-hop: v=2;app=hello\r\n", b"wakefront-hop: v=1\r\n",
        b"wakefront-hop: v=1;app=hello;port=80;id=a;ip=1.2.3.4;tls=0;hops=1\r\n" * 2,
        b"wakefront-hop: v=1;app=hello;port=99999;id=a;ip=1.2.3.4;tls=0;hops=1\r\n",
        b"wakefront-hop: v=1;app=hello;app=x;port=80;id=a;ip=1.2.3.4;tls=0;hops=1\r\n",
        b"wakefront-hop: v=1;app=../x;port=80;id=a;ip=1.2.3.4;tls=0;hops=1\r\n",
        b"wakefront-hop: v=1;app=hello;port=80;id=a b;ip=1.2.3.4;tls=0;hops=1\r\n",
        b"wakefront-hop: v=1;app=unknown;port=80;id=a;ip=1.2.3.4;tls=0;hops=1\r\n",
        b"wakefront-hop: v=1;app=hello;port=81;id=a;ip=1.2.3.4;tls=0;hops=1\r\n",
        b"wakefront-hop: v=1;app=hello;port=80;id=a;ip=1.2.3.4;tls=0;hops=1;via=nowhere\r\n",
        b"wakefront-hop: v=1;app=hello;port=80;id=a;ip=1.2.3.4;tls=0;hops=1;not=" + b"a," * 3000 + b"a\r\n",
    ],
)  # fmt: skip
async def test_a_peer_that_lies_is_refused(iad: NodeHarness, hop: bytes) -> None:
    await put(iad)
    context = client_context(fleet_ca(), fleet_ca().issue_cert("ams-1.node.wakefront"))
    head = b"GET /x HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: close\r\n"
    answer = await talk(iad, context, head + hop + b"\r\n")
    assert status(answer) == 502 and b"wakefront-refused: code=WB02;sent=0" in answer


async def test_a_request_that_goes_in_a_circle_is_refused(ams: NodeHarness, iad: NodeHarness) -> None:
    """Each is told that the other is the way: it ends after as many edges as may be."""
    app = ams.app()
    ams.set_app(app)
    iad.set_app(iad.app())
    runs = (RemoteMachine(MachineId("m1"), "app", MachineState.STARTED),)
    ams.know(iad, app, machines=runs)
    iad.know(ams, app, machines=runs)
    answer = await ams.request(GET)
    assert status(answer) == 503
    assert counted(ams, W_PEER_REQUESTS) + counted(iad, W_PEER_REQUESTS) <= 3


async def test_connections_over_the_bound_are_cut_and_room_comes_back(
    iad: NodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(iad)
    monkeypatch.setattr("proxy.edge.backhaul.MAX_CONNECTIONS", 20)
    context = client_context(fleet_ca(), fleet_ca().issue_cert("ams-1.node.wakefront"))
    writers: list[asyncio.StreamWriter] = []
    cut = 0
    for _ in range(30):
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", iad.backhaul_port, ssl=context, server_hostname="iad-1.node.wakefront"
            )
            writers.append(writer)
        except OSError:
            cut += 1
    assert (len(writers), cut) == (20, 10)
    for writer in writers:
        writer.close()
    async with asyncio.timeout(5):
        while iad.backhaul.connections:
            await asyncio.sleep(0.01)
    head = b"GET /x HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: close\r\n"
    hop = b"wakefront-hop: v=1;app=hello;port=80;id=a;ip=1.2.3.4;tls=0;hops=1\r\n\r\n"
    assert status(await talk(iad, context, head + hop)) == 200


async def test_a_word_for_control_is_relayed_with_the_name_of_who_says_it(iad: NodeHarness) -> None:
    heard: list[bytes] = []

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readline())
        while data := await reader.read(65_536):
            writer.write(data[::-1])
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(control, iad.run_path / "peers.sock")
    leaf = fleet_ca().issue_cert("ams-1.node.wakefront")
    for alpn, known in (("wakefront-control/1", True), ("wakefront-join/1", False)):
        context = client_context(fleet_ca(), leaf if known else None, (alpn,))
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", iad.backhaul_port, ssl=context, server_hostname="iad-1.node.wakefront"
        )
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"olleh"
        writer.close()
    server.close()
    told = [json.loads(line) for line in heard]
    assert [(one["alpn"], one["peer"], one["from"]) for one in told] == [
        ("wakefront-control/1", "ams-1", "127.0.0.1"), ("wakefront-join/1", "", "127.0.0.1")
    ]  # fmt: skip
    assert base64.b64decode(told[0]["certificate"]) and not told[1]["certificate"]


async def test_who_joins_cannot_send_requests(iad: NodeHarness) -> None:
    """It shows no certificate, and may speak the one protocol only."""
    await put(iad)
    context = client_context(fleet_ca(), None, ("wakefront-join/1", "wakefront/1"))
    try:
        answer = await talk(iad, context, GET)
    except (ssl.SSLError, ConnectionError):
        answer = b""
    assert answer == b"" and counted(iad, W_BACKHAUL_REQUESTS) == 0


async def test_services_that_count_connections_get_a_new_one_at_the_machine(ams: NodeHarness, iad: NodeHarness) -> None:
    heads: list[bytes] = []
    await put(
        iad,
        answers(OK.replace(b"server", b"connection: close\r\nserver"), heads.append),
        kind=ConcurrencyType.CONNECTIONS,
    )
    app = ams.app(kind=ConcurrencyType.CONNECTIONS)
    ams.set_app(app)
    ams.know(iad, app, RemoteLoad(app.name, 8080, 1, 0, 0))
    for _ in range(3):
        assert (await ams.request(GET)).endswith(b"ok")
    assert all(b"\r\nconnection: close\r\n" in head.lower() for head in heads)
    assert counted(ams, W_PEER_CONNECTS) == 1

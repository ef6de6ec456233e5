"""A14: thousands of clients that give one byte at a time, in each phase of a connection, from many addresses.

The timeouts of config.toml are scaled down, 2 s instead of 10 to 75, and the drip with them. Every one of them is ended
by its phase's deadline or for being too slow, and who comes new meanwhile is served at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode
from tests.support.recording import Seen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TIMEOUT_S = 2.0
DRIP_S = 0.3
SLACK_S = 4.0  # of a busy machine
CROWD = 1000  # in each phase
READERS = 100  # each of them holds an answer in our buffers
BIG = 8 * 1024 * 1024
SECTIONS = f"""[limits]
handshake_timeout = "{TIMEOUT_S}s"
head_timeout = "{TIMEOUT_S}s"
idle_timeout = "{TIMEOUT_S}s"
source_connections = 500
exempt_sources = []
"""


@pytest.fixture(scope="module")
def slow_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedNode]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with AttackedNode(
        tmp_path_factory.mktemp("slow"), sections=SECTIONS, web=f'stream_idle_timeout = "{TIMEOUT_S}s"\n'
    ) as one:
        one.client_context()
        yield one


@dataclass
class Phase:
    """What a slow client has sent when it begins to drip, what it drips, and where."""

    name: str
    first: bytes
    drip: bytes
    tls: bool = False
    app: str = "web"


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
HEAD = b"GET / HTTP/1.1\r\nHost: web.apps.localhost\r\nX-Slow: "
POST = b"POST / HTTP/1.1\r\nHost: web.apps.localhost\r\n"
PHASES = [
    Phase("silence", b"", b""),
    Phase("hello", HELLO, b"\0", tls=True),
    Phase("head", HEAD, b"a"),
    Phase("body", POST + b"Content-Length: 1000000\r\n\r\n", b"b"),
    Phase("chunks", POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nb\r\n"),
    Phase("idle", b"GET / HTTP/1.1\r\nHost: web.apps.localhost\r\n\r\n", b""),
]


def address(number: int) -> str:
    """Sources of the attack: a few connections each, none of them the bystander's."""
    return f"127.{1 + number % 50}.{number // 50 % 250}.7"


async def drip(node: AttackedNode, phase: Phase, number: int, ended: Counter[str]) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.bind((address(number), 0))
        await loop.sock_connect(sock, ("127.0.0.1", node.https_port if phase.tls else node.http_port))
        began = loop.time()
        reader = asyncio.ensure_future(until_the_end(sock))
        try:
            await loop.sock_sendall(sock, phase.first)
            while not reader.done() and loop.time() - began < TIMEOUT_S + SLACK_S:
                await asyncio.wait({reader}, timeout=DRIP_S)
                if phase.drip and not reader.done():
                    await loop.sock_sendall(sock, phase.drip)
        except ConnectionError:
            await asyncio.wait({reader}, timeout=1.0)
        ended[phase.name] += reader.done()
        reader.cancel()


async def until_the_end(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        while await asyncio.get_running_loop().sock_recv(sock, 65_536):
            pass


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_crowd_that_drips_is_ended_in_time_and_others_are_served_at_once(
    slow_node: AttackedNode, attack: Begin, phase: Phase
) -> None:
    ended: Counter[str] = Counter()

    async def crowd() -> None:
        clients = []
        for number in range(CROWD):
            run.case(phase.name)
            clients.append(asyncio.ensure_future(drip(slow_node, phase, number, ended)))
            if number % 20 == 0:
                await asyncio.sleep(0.01)  # no flood of connects: that is another attack
        await asyncio.gather(*clients)

    with attack("A14", f"slow {phase.name}", slow_node, p99_ms=50) as run:
        asyncio.run(crowd())
        assert ended[phase.name] == CROWD, f"{CROWD - ended[phase.name]} were still connected"


async def big(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BIG)
    with contextlib.suppress(ConnectionError):
        for _ in range(BIG // 65_536):
            writer.write(bytes(65_536))
            await writer.drain()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_readers_that_take_a_byte_at_a_time_are_ended_and_hold_little(
    slow_node: AttackedNode, attack: Begin, tls: bool
) -> None:
    slow_node.origin.respond = big
    ended: Counter[str] = Counter()

    async def read_slowly(number: int) -> None:
        loop = asyncio.get_running_loop()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.bind((address(number), 0))
        sock: socket.socket = raw
        try:
            await asyncio.to_thread(raw.connect, ("127.0.0.1", slow_node.https_port if tls else slow_node.http_port))
            if tls:
                sock = await asyncio.to_thread(
                    slow_node.client_context().wrap_socket, raw, server_hostname=slow_node.host("web")
                )
            await asyncio.to_thread(sock.sendall, b"GET / HTTP/1.1\r\nHost: web.apps.localhost\r\n\r\n")
            raw_end = loop.time() + TIMEOUT_S * 2 + SLACK_S
            while loop.time() < raw_end:
                await asyncio.sleep(DRIP_S)
                if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1:  # no longer established
                    ended["reader"] += 1
                    return
                with contextlib.suppress(ssl.SSLError, BlockingIOError):
                    sock.settimeout(0)
                    sock.recv(1)
        except ConnectionError:
            ended["reader"] += 1
        finally:
            sock.close()

    async def crowd() -> None:
        readers = []
        for number in range(READERS):
            readers.append(asyncio.ensure_future(read_slowly(number)))
            await asyncio.sleep(0.02)  # no flood of answers: that is another attack
        await asyncio.gather(*readers)

    with attack("A14", f"slow readers {'TLS' if tls else 'plain'}", slow_node, p99_ms=50, growth_mib=128) as run:
        for _ in range(READERS):
            run.case()
        asyncio.run(crowd())
        assert ended["reader"] == READERS


def test_an_upload_that_is_slow_but_steady_goes_through(slow_node: AttackedNode) -> None:
    """500 bytes a second on average is enough of an announced body; and small messages of a chunked stream."""
    with slow_node.peer() as peer:
        peer.send(slow_node.head("/steady", "Content-Length: 4000", method="POST"))
        for _ in range(20):
            asyncio.run(asyncio.sleep(0.25))  # 800 bytes a second, for longer than the timeout
            peer.send(b"x" * 200)
        assert peer.read_answer().status == 200
    with slow_node.peer() as peer:
        peer.send(slow_node.head("/stream", "Transfer-Encoding: chunked", method="POST"))
        for _ in range(20):
            asyncio.run(asyncio.sleep(0.25))
            peer.send(b"14\r\n" + b"m" * 20 + b"\r\n")
        peer.send(b"0\r\n\r\n")
        assert peer.read_answer().status == 200

"""A8: a raw tunnel before its 101. What is behind an Upgrade is nobody's until the machine has said 101.

The client hides a second request behind the head of an upgrade; the machine answers with something else. No raw byte
may have reached it, and the connection ends: nobody has read those bytes, and nobody may take them for a request later.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode
from tests.support.recording import Seen

pytestmark = pytest.mark.slow
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: web.apps.localhost\r\n\r\n"
PROTOCOLS = [
    b"websocket", b"WebSocket", b"WEBSOCKET", b"foo", b"websocket, foo", b"h2c", b"h2c, websocket", b"HTTP/2.0",
    b"HTTP/1.1", b"TLS/1.0", b"connect-udp", b"\xff", b"a" * 200,
]  # fmt: skip
CONNECTIONS = [b"Upgrade", b"upgrade", b"keep-alive, Upgrade", b"UPGRADE", b"upgrade, close", b"close, upgrade"]
ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"HTTP/1.1 204 No\r\n\r\n",
    b"HTTP/1.1 304 Same\r\n\r\n",
    b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 426 Upgrade\r\nUpgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 302 There\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n",
]  # fmt: skip
NO_SWITCH = [  # 101s that are none
    b"HTTP/1.1 101 S\r\n\r\n",
    b"HTTP/1.1 101 S\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\n\r\n",
    b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.0 101 S\r\nUpgrade: websocket\r\n\r\n",
]


def upgrade(protocol: bytes, connection: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    fields = b"Connection: " + connection + b"\r\nUpgrade: " + protocol + b"\r\n"
    return method + b" /x HTTP/" + version + b"\r\nHost: web.apps.localhost\r\n" + fields + b"\r\n"


def answering(node: AttackedNode, answer: bytes) -> list[Seen]:
    """Have the origin answer so; what it was asked."""
    asked: list[Seen] = []

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        asked.append(seen)
        writer.write(answer)

    node.origin.reset()
    node.origin.respond = respond
    return asked


def reached(node: AttackedNode, data: bytes) -> bool:
    """Whether these bytes are among those of any connection."""
    return any(data in bytes(one.data) for one in node.origin.connections)


def test_behind_an_upgrade_that_is_refused_nothing_passes(node: AttackedNode, attack: Begin) -> None:
    with attack("A8", "Upgrade, and an answer other than 101", node) as run:
        for answer, protocol, connection in itertools.product(ANSWERS, PROTOCOLS, CONNECTIONS[:3]):
            run.case((answer[:30], protocol, connection))
            asked = answering(node, answer)
            got = node.attempt(upgrade(protocol, connection) + HIDDEN, half_close=protocol == b"h2c")
            is_passed = any(one.all("upgrade") for one in asked)
            if protocol == b"h2c":
                assert not is_passed  # as if it had not been said: what follows is the next request, in the open
                assert [one.target for one in asked] == ["/x", "/hidden"] and got.statuses[-1] >= 200
                continue
            assert [one.target for one in asked] == ["/x"], "the hidden request reached the machine"
            assert is_passed and not reached(node, HIDDEN), "raw bytes before a 101"
            assert got.closed and len(got.answers) == 1 and got.answers[0].all("connection") == ["close"]


def test_a_101_that_is_none_opens_nothing(node: AttackedNode, attack: Begin) -> None:
    with attack("A8", "a 101 that switches to nothing", node) as run:
        for answer, behind in itertools.product(NO_SWITCH, (HIDDEN, b"\x81\x00" * 100, b"")):
            run.case((answer, behind[:10]))
            asked = answering(node, answer)
            got = node.attempt(upgrade(b"websocket", b"Upgrade") + behind, half_close=False)
            assert got.closed and got.statuses == [502], got
            assert {one.target for one in asked} == {"/x"} and not (behind and reached(node, behind))


def test_a_101_to_who_asked_for_none_is_an_error_and_opens_nothing(node: AttackedNode, attack: Begin) -> None:
    switch = b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nraw bytes of the machine"
    with attack("A8", "a 101 nobody asked for", node) as run:
        heads = [
            b"GET /x HTTP/1.1\r\nHost: web.apps.localhost\r\n\r\n",
            b"GET /x HTTP/1.1\r\nHost: web.apps.localhost\r\nUpgrade: websocket\r\n\r\n",
            b"GET /x HTTP/1.1\r\nHost: web.apps.localhost\r\nConnection: upgrade\r\n\r\n",
            upgrade(b"websocket", b"Upgrade", version=b"1.0"),
            upgrade(b"h2c", b"Upgrade"),
            b"POST /x HTTP/1.1\r\nHost: web.apps.localhost\r\nContent-Length: 3\r\n\r\nabc",
        ]
        for head in heads:
            run.case(head)
            asked = answering(node, switch)
            got = node.attempt(head)
            assert got.statuses[0] == 502 and b"raw bytes" not in got.rest
            assert {one.target for one in asked} == {"/x"}


def test_an_upgrade_with_a_body_is_refused_in_every_form(node: AttackedNode, attack: Begin) -> None:
    bodies = [
        (b"Content-Length: %d\r\n" % len(HIDDEN), HIDDEN),
        (b"Transfer-Encoding: chunked\r\n", b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"),
    ]
    with attack("A8", "Upgrade with a body", node) as run:
        for (framing, body), protocol, version in itertools.product(bodies, PROTOCOLS, (b"1.1", b"1.0")):
            run.case((framing, protocol, version))
            asked = answering(node, ANSWERS[0])
            data = upgrade(protocol, b"Upgrade", b"POST", version).replace(b"\r\n\r\n", b"\r\n" + framing + b"\r\n")
            node.attempt(data + body, half_close=False).assert_refused(400)
            assert asked == []


def test_the_control_an_upgrade_that_is_granted_carries_what_was_sent_ahead(node: AttackedNode, attack: Begin) -> None:
    async def switch(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nhello")
        await asyncio.sleep(0.1)
        writer.close()

    with attack("A8", "the control: granted", node) as run:
        run.case()
        node.origin.reset()
        node.origin.respond = switch
        with node.peer() as peer:
            peer.send(upgrade(b"websocket", b"Upgrade") + b"ahead")
            assert peer.read_answer().status == 101
            assert peer.read_exactly(5) == b"hello"
            assert peer.is_closed()
        assert any(b"\r\n\r\nahead" in bytes(one.data) for one in node.origin.connections)

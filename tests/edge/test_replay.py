"""fly-replay as machines and clients see it: where a request goes next, with what, and what happens when it can't."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from proxy.ipc import Wake
from proxy.model import App, AppLimits, AppName, MachineState
from tests.support.edge import EdgeHarness, read_head

Answer = Callable[[bytes, bytes], bytes]  # head and body of a request -> the bytes of an answer


def ok(body: bytes, fields: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (fields, len(body), body)


def replay(directive: str, fields: bytes = b"", status: int = 200, body: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nfly-replay: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
        status, directive.encode(), fields, len(body), body,
    )  # fmt: skip


def replay_json(directive: dict[str, Any]) -> bytes:
    body = json.dumps(directive).encode()
    return ok(body, b"content-type: application/vnd.fly.replay+json\r\n")


class Machine:
    """A scripted machine: what it was sent, and how it answers."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            body = await _body(reader, head)
            self.heads.append(head)
            self.bodies.append(body)
            writer.write(self.answer(head, body))
            await writer.drain()

    def field(self, name: bytes, at: int = -1) -> bytes | None:
        found = re.search(rb"\r\n" + name + rb": ([^\r]*)\r\n", self.heads[at], re.IGNORECASE)
        return found[1] if found else None


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head, re.IGNORECASE)
    if length:
        data = b""
        while len(data) < int(length[1]):
            piece = await reader.read(int(length[1]) - len(data))
            if not piece:
                raise asyncio.IncompleteReadError(data, None)
            data += piece
        return data
    if b"transfer-encoding: chunked" not in head.lower():
        return b""
    data = b""
    while True:
        size = int((await reader.readuntil(b"\r\n")).strip(), 16)
        data += (await reader.readexactly(size + 2))[:-2]
        if size == 0:
            return data


async def run(edge: EdgeHarness, *answers: Answer) -> list[Machine]:
    """Machines m1, m2, ... and what they answer."""
    machines = [Machine(answer) for answer in answers]
    for one in machines:
        one.port = (await edge.origin(one.handle)).port
    return machines


def app_of(edge: EdgeHarness, machines: list[Machine], **more: Any) -> App:
    records = [edge.machine(one.port, f"m{at}", slot=at) for at, one in enumerate(machines, 1)]
    return edge.app(*records, **more)


async def ask(edge: EdgeHarness, fields: bytes = b"", method: bytes = b"GET", body: bytes = b"") -> tuple[int, bytes]:
    answer = await edge.request(b"%b /path?q=1 HTTP/1.1\r\nHost: hello.apps.test\r\n%b\r\n%b" % (method, fields, body))
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head[9:12]), rest


FORCE_M1 = b"fly-force-instance-id: m1\r\n"


async def test_a_request_goes_on_to_the_machine_that_is_named_with_the_facts_of_where_it_was(edge: EdgeHarness) -> None:
    one, two = await run(
        edge, lambda h, b: replay("instance=m2;state=captured_write", status=409), lambda h, b: ok(b"two")
    )
    edge.set_app(app_of(edge, [one, two]))
    status, body = await ask(edge, FORCE_M1 + b"X-Own: kept\r\n")
    assert (status, body) == (200, b"two")
    assert two.heads[0].startswith(b"GET /path?q=1 HTTP/1.1\r\n") and two.field(b"x-own") == b"kept"
    source = two.field(b"fly-replay-src")
    assert source is not None
    assert re.fullmatch(rb"instance=m1;region=ams;t=\d{16};state=captured_write", source)
    assert one.field(b"fly-replay-src") is None


async def test_the_client_sees_one_answer_and_nothing_of_the_replay(edge: EdgeHarness) -> None:
    one, two = await run(
        edge, lambda h, b: replay("instance=m2", b"set-cookie: a=b\r\n", 307, b"x" * 5000), lambda h, b: ok(b"two")
    )
    edge.set_app(app_of(edge, [one, two]))
    answer = await edge.request(b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n" + FORCE_M1 + b"\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.endswith(b"\r\n\r\ntwo")
    assert b"fly-replay" not in answer.lower() and b"set-cookie" not in answer


async def test_the_body_goes_along_byte_for_byte(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("instance=m2"), lambda h, b: ok(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    body = bytes(range(256)) * 2000
    for framing, sent in (
        (b"Content-Length: %d\r\n" % len(body), body),
        (
            b"Transfer-Encoding: chunked\r\n",
            b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in _pieces(body)) + b"0\r\n\r\n",
        ),
    ):
        assert await ask(edge, FORCE_M1 + framing, b"POST", sent) == (200, b"two")
    assert one.bodies == [body, body] and two.bodies == [body, body]


def _pieces(body: bytes) -> list[bytes]:
    return [body[at : at + 40_000] for at in range(0, len(body), 40_000)]


async def test_a_body_over_every_budget_goes_through_but_cannot_be_replayed(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("instance=m2"), lambda h, b: ok(b"two"))
    limits = AppLimits(replay_memory_bytes=100_000, replay_spool_bytes=0)
    edge.set_app(app_of(edge, [one, two], limits=limits))
    body = b"x" * 300_000
    length = b"Content-Length: %d\r\n" % len(body)
    status, answer = await ask(edge, FORCE_M1 + length, b"POST", body)
    assert status == 502 and answer.startswith(b"PA01")
    assert one.bodies == [body] and two.bodies == []
    assert (await ask(edge, b"fly-force-instance-id: m2\r\n" + length, b"POST", body)) == (200, b"two")


async def test_elsewhere_leaves_out_the_machine_that_said_so(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("elsewhere=true"), lambda h, b: ok(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    for _ in range(10):
        assert await ask(edge, FORCE_M1) == (200, b"two")


async def test_prefer_falls_back_to_others_and_says_who_was_not_there(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("prefer_instance=m9;elsewhere=true"), lambda h, b: ok(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    assert await ask(edge, FORCE_M1) == (200, b"two")
    assert two.field(b"fly-preferred-instance-unavailable") == b"m9"


async def test_a_replay_may_go_to_another_app_of_the_organization_and_to_others_that_allow_it(
    edge: EdgeHarness,
) -> None:
    router, tenant = await run(edge, lambda h, b: replay("app=tenant"), lambda h, b: ok(b"tenant"))
    edge.set_app(app_of(edge, [router]))
    there = edge.machine(tenant.port, "t1", slot=7)
    for target, expected in (
        ({}, (200, b"tenant")),
        ({"organization": "other"}, (502, b"PA05")),
        ({"organization": "other", "replay_sources": ("personal",)}, (200, b"tenant")),
    ):
        edge.set_app(dataclasses.replace(edge.app(there, name="tenant", slot=1), **target))
        status, body = await ask(edge)
        assert (status, body[:4]) == (expected[0], expected[1][:4])
    edge.edge.table.remove_app(AppName("tenant"))
    status, body = await ask(edge)
    assert status == 502 and body.startswith(b"PA04")


async def test_a_stopped_target_is_woken(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("instance=m2"), lambda h, b: ok(b"two"))
    sleeping = edge.machine(two.port, "m2", MachineState.STOPPED, slot=2)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), sleeping))
    edge.start_when_asked(sleeping)
    assert await ask(edge, FORCE_M1) == (200, b"two")


async def test_a_request_is_replayed_ten_times_and_no_more(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("instance=m2"), lambda h, b: replay("instance=m1"))
    edge.set_app(app_of(edge, [one, two]))
    status, body = await ask(edge)
    assert status == 502 and body.startswith(b"PA02")
    assert len(one.heads) + len(two.heads) == 11


@pytest.mark.parametrize(
    "answer",
    [
        replay("instance"), replay("instance=m2;instance=m3"), replay("timeout=soon"), replay("fallback=maybe"),
        b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\nfly-replay: instance=m1\r\ncontent-length: 0\r\n\r\n",
        ok(b"{", b"content-type: application/vnd.fly.replay+json\r\n"),
        ok(b"[" * 50_000, b"content-type: application/vnd.fly.replay+json\r\n"),
        ok(b'"' + b"x" * 70_000, b"content-type: application/vnd.fly.replay+json\r\n"),
        replay_json({"instance": "m2", "transform": {"set_headers": [{"name": "a\r\nb", "value": "c"}]}}),
    ],
)  # fmt: skip
async def test_a_replay_that_makes_no_sense_is_an_error_with_its_code(edge: EdgeHarness, answer: bytes) -> None:
    one, two = await run(edge, lambda h, b: answer, lambda h, b: ok(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    status, body = await ask(edge, FORCE_M1)
    assert status == 502 and body.startswith(b"PA03")
    assert two.heads == []


async def test_json_may_transform_what_is_sent_on(edge: EdgeHarness) -> None:
    directive = {
        "instance": "m2",
        "transform": {
            "path": "/other?x=2",
            "delete_headers": ["Cookie", "x-own"],
            "set_headers": [{"name": "X-Tenant", "value": "acme"}],
        },
    }
    one, two = await run(edge, lambda h, b: replay_json(directive), lambda h, b: ok(b"two"))
    edge.set_app(app_of(edge, [one, two]))
    assert await ask(edge, FORCE_M1 + b"Cookie: a=b\r\nX-Own: y\r\nX-Tenant: forged\r\nAccept: z\r\n") == (200, b"two")
    assert two.heads[0].startswith(b"GET /other?x=2 HTTP/1.1\r\n")
    assert two.field(b"cookie") is None and two.field(b"x-own") is None
    assert two.field(b"x-tenant") == b"acme" and two.field(b"accept") == b"z"
    assert two.heads[0].lower().count(b"x-tenant") == 1


async def test_what_cannot_be_reached_is_told_fast_and_with_its_reason(edge: EdgeHarness) -> None:
    (one,) = await run(edge, lambda h, b: replay("instance=m9"))
    edge.set_app(app_of(edge, [one]))
    began = asyncio.get_running_loop().time()
    status, body = await ask(edge)
    assert status == 502 and body.startswith(b"WR01")
    assert asyncio.get_running_loop().time() - began < 1


async def test_a_fallback_gives_the_request_back_to_who_handed_it_on_and_that_is_the_end(edge: EdgeHarness) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()[1]

    def answer(head: bytes, body: bytes) -> bytes:
        if b"fly-replay-failed" in head:
            return ok(b"still here")
        return replay("instance=m2;fallback=force_self")

    (one,) = await run(edge, answer)
    dead_machine = edge.machine(dead, "m2", slot=2)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), dead_machine))
    body = b"some body"
    length = b"Content-Length: %d\r\n" % len(body)
    assert await ask(edge, FORCE_M1 + length, b"POST", body) == (200, b"still here")
    failed = one.field(b"fly-replay-failed")
    assert failed is not None
    assert re.search(rb"(^|;)replay_source=m1(;|$)", failed) and b"instance=m2" in failed and b"reason=" in failed
    assert one.bodies == [body, body]
    assert one.field(b"fly-replay-src") is None


async def test_a_timeout_ends_the_try_for_a_target_that_does_not_wake(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("instance=m2;timeout=300ms"), lambda h, b: ok(b"two"))
    edge.set_app(
        edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", MachineState.STOPPED, slot=2))
    )
    began = asyncio.get_running_loop().time()
    status, body = await ask(edge, FORCE_M1)
    assert status == 502 and body.startswith(b"WR01")
    assert 0.2 < asyncio.get_running_loop().time() - began < 1.5


async def test_an_upgrade_is_replayed_and_done_by_its_target(edge: EdgeHarness) -> None:
    one = (await run(edge, lambda h, b: replay("instance=m2")))[0]

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        while data := await reader.read(1000):
            writer.write(data)

    two = await edge.origin(echo)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2)))
    reader, writer = await edge.connect()
    writer.write(
        b"GET /ws HTTP/1.1\r\nHost: hello.apps.test\r\n"
        + FORCE_M1
        + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert head.startswith(b"HTTP/1.1 101 ")
    writer.write(b"ping")
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"ping"


async def test_an_answer_without_end_that_is_a_replay_holds_up_nobody(edge: EdgeHarness) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\n\r\n")
        while True:
            writer.write(b"x" * 1000)
            await writer.drain()

    one = await edge.origin(endless)
    (two,) = await run(edge, lambda h, b: ok(b"two"))
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2)))
    assert await ask(edge, FORCE_M1) == (200, b"two")


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["silent", "dripping"])
async def test_an_answer_that_never_ends_is_cut_off_after_two_seconds_and_the_replay_followed(
    edge: EdgeHarness, piece: bytes
) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\ncontent-length: 1000\r\n\r\n")
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.1)

    one = await edge.origin(slow)
    (two,) = await run(edge, lambda h, b: ok(b"two"))
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2)))
    began = asyncio.get_running_loop().time()
    assert await ask(edge, FORCE_M1) == (200, b"two")
    assert 1.5 < asyncio.get_running_loop().time() - began < 4.0
    assert edge.edge.in_flight(1) == edge.edge.in_flight(2) == 0


async def test_json_that_never_ends_is_an_error_after_two_seconds(edge: EdgeHarness) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.fly.replay+json\r\ncontent-length: 90\r\n\r\n{")
        await reader.read()

    one = await edge.origin(slow)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1)))
    began = asyncio.get_running_loop().time()
    status, body = await ask(edge)
    assert status == 502 and body.startswith(b"PA03")
    assert asyncio.get_running_loop().time() - began < 4.0


async def test_a_replay_said_before_the_upload_is_read_lets_the_rest_of_it_go_to_the_target(edge: EdgeHarness) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Says where to go once it stands still: nothing of the body is taken from its socket."""
        await read_head(reader)
        await until(lambda: edge.edge.bodies.memory_used > 600_000 or paused())
        writer.write(b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\ncontent-length: 3\r\n\r\nbye")
        await asyncio.sleep(10)

    def paused() -> bool:
        return sent == len(pieces)

    one = await edge.origin(deaf)
    (two,) = await run(edge, lambda h, b: ok(b"%d" % len(b)))
    limits = AppLimits(replay_memory_bytes=32 << 20)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2), limits=limits))
    pieces = [b"x" * 65536] * 256
    total, sent = sum(map(len, pieces)), 0
    reader, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\n" + FORCE_M1 + b"Content-Length: %d\r\n\r\n" % total)
    async with asyncio.timeout(15):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            sent += 1
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(len(str(total))) == b"%d" % total
    assert two.bodies == [b"".join(pieces)]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.01)


async def test_elsewhere_wakes_the_one_that_sleeps_where_all_others_do(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("elsewhere=true"), lambda h, b: ok(b"two"))
    sleeping = edge.machine(two.port, "m2", MachineState.STOPPED, slot=2)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), sleeping))
    edge.start_when_asked(sleeping)
    assert await ask(edge, FORCE_M1) == (200, b"two")
    assert edge.woken == {"m2"}


async def test_elsewhere_where_there_is_no_other_is_told_at_once(edge: EdgeHarness) -> None:
    (one,) = await run(edge, lambda h, b: replay("elsewhere=true"))
    edge.set_app(app_of(edge, [one]))
    status, body = await ask(edge)
    assert status == 502 and body.startswith(b"WR01")
    assert not any(isinstance(message, Wake) for message in edge.sent.messages)


async def test_a_body_that_outgrows_what_is_kept_while_the_target_wakes_reaches_no_machine_in_part(
    edge: EdgeHarness,
) -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await reader.read(1)
        writer.write(b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(10)

    one = await edge.origin(early)
    (two,) = await run(edge, lambda h, b: ok(b"two"))
    sleeping = edge.machine(two.port, "m2", MachineState.STOPPED, slot=2)
    limits = AppLimits(replay_memory_bytes=4096, replay_spool_bytes=0)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), sleeping, limits=limits))
    reader, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\n" + FORCE_M1 + b"Content-Length: 20000\r\n\r\n")
    writer.write(b"x" * 100)
    await until(lambda: edge.edge.waker.waiting == 1)
    writer.write(b"x" * 10_000)
    await until(lambda: edge.edge.held_bytes > 9_000)
    edge.edge.table.set_machine(AppName("hello"), dataclasses.replace(sleeping, state=MachineState.STARTED, version=2))
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 502 ") and b"wakefront-error: PA01" in answer
    assert two.heads == []


async def test_a_client_that_leaves_in_the_middle_of_a_replay_leaves_nothing_behind(edge: EdgeHarness) -> None:
    one, two = await run(edge, lambda h, b: replay("instance=m2"), lambda h, b: ok(b"two"))
    sleeping = edge.machine(two.port, "m2", MachineState.STOPPED, slot=2)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), sleeping))
    _, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\n" + FORCE_M1 + b"Content-Length: 5\r\n\r\nhello")
    async with asyncio.timeout(5):
        while not edge.edge.waker.waiting:
            await asyncio.sleep(0.01)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        while edge.edge.waker.waiting or edge.edge.bodies.memory_used:
            await asyncio.sleep(0.01)
    assert edge.edge.in_flight(1) == edge.edge.in_flight(2) == 0


async def test_trust_headers_of_replays_cannot_be_set_by_clients(edge: EdgeHarness) -> None:
    (one,) = await run(edge, lambda h, b: ok(b"one"))
    edge.set_app(app_of(edge, [one]))
    forged = b"fly-replay-src: instance=x;state=secret\r\nfly-replay-failed: a\r\nfly-replay-cache-status: hit\r\n"
    assert await ask(edge, forged + b"Fly_Replay_Src: y\r\n") == (200, b"one")
    assert b"replay" not in one.heads[0].lower()

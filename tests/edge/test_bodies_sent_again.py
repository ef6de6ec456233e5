"""Bodies on their way to a machine, once more or empty: what a machine has only a part of spoils no other request."""

from __future__ import annotations

import asyncio
import re

import pytest

from proxy.model import AppLimits, MachineState
from tests.edge.test_replay import FORCE_M1, ask, ok, replay
from tests.support.edge import EdgeHarness, read_head

SIZE = 6 << 20
POST = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\n"
EMPTY = b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"


async def _hands_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads a request whole, and sends it to m2."""
    while True:
        head = (await read_head(reader)).lower()
        if length := re.search(rb"content-length: (\d+)", head):
            await reader.readexactly(int(length[1]))
        elif b"transfer-encoding: chunked" in head:
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(replay("instance=m2"))
        await writer.drain()


async def test_a_machine_that_answers_early_gets_nobody_elses_request_into_the_rest_of_a_body(
    edge: EdgeHarness,
) -> None:
    connections: list[bytearray] = []

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = bytearray(await read_head(reader))
        connections.append(received)
        writer.write(ok(b"early"))
        await writer.drain()
        while data := await reader.read(1 << 20):
            received += data

    one, two = await edge.origin(_hands_on), await edge.origin(early)
    limits = AppLimits(replay_memory_bytes=SIZE + (2 << 20))
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2), limits=limits))
    answer = await edge.request(POST + FORCE_M1 + b"Content-Length: %d\r\n\r\n" % SIZE + b"\xaa" * SIZE)
    assert answer.endswith(b"early")
    assert await ask(edge, b"fly-force-instance-id: m2\r\nCookie: secret\r\n") == (200, b"early")
    assert len(connections) == 2 and b"secret" not in connections[0] and b"secret" in connections[1]


@pytest.mark.parametrize("where", ["new", "kept", "replayed", "woken"])
async def test_an_empty_body_in_chunks_is_ended_at_the_machine(edge: EdgeHarness, where: str) -> None:
    seen: list[bytes] = []

    async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            if b"transfer-encoding: chunked" in head.lower():
                seen.append(await asyncio.wait_for(reader.readexactly(5), 3))
            writer.write(ok(b"fine"))
            await writer.drain()

    one, two = await edge.origin(_hands_on), await edge.origin(whole)
    state = MachineState.STOPPED if where == "woken" else MachineState.STARTED
    second = edge.machine(two.port, "m2", state, slot=2)
    edge.set_app(edge.app(edge.machine(one.port, "m1", slot=1), second))
    edge.start_when_asked(second)
    force = FORCE_M1 if where == "replayed" else b"fly-force-instance-id: m2\r\n"
    if where == "kept":
        assert (await ask(edge, force))[0] == 200
    answer = await edge.request(POST + force + EMPTY)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"fine")
    assert seen == [b"0\r\n\r\n"]


async def test_a_machine_that_has_all_of_a_body_sent_again_may_take_its_time(edge: EdgeHarness) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await asyncio.sleep(0.3)  # so that the sender has to pause
        await reader.readexactly(SIZE)
        await asyncio.sleep(1.5)
        writer.write(ok(b"slow"))

    one, two = await edge.origin(_hands_on), await edge.origin(slow)
    limits = AppLimits(replay_memory_bytes=SIZE + (2 << 20), first_byte_timeout_s=None)
    machines = edge.machine(one.port, "m1", slot=1), edge.machine(two.port, "m2", slot=2)
    edge.set_app(edge.app(*machines, idle_timeout_s=0.7, limits=limits))
    answer = await edge.request(POST + FORCE_M1 + b"Content-Length: %d\r\n\r\n" % SIZE + b"\xaa" * SIZE)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"slow")

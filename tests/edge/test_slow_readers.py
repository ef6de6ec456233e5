"""Clients that take their answers late: what they asked for whole is answered, and no connection is theirs for ever."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.edge import downstream
from proxy.edge.downstream import HttpConnection
from proxy.model import AccessRules, AppLimits
from tests.support.edge import EdgeHarness, answers, read_head

GET = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BODY = b"x" * 60_000  # whole in one read of the machine's, so that an answer ends in the write that is too much


@pytest_asyncio.fixture
async def hasty() -> AsyncIterator[EdgeHarness]:
    """With little patience, and an app of middling answers."""
    edge = EdgeHarness(head_timeout_s=0.3, idle_timeout_s=0.5)
    await edge.start()
    origin = await edge.origin(answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)))
    edge.set_app(edge.app(edge.machine(origin.port)))
    yield edge
    await edge.stop()


async def stuffed(edge: EdgeHarness) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, HttpConnection, int]:
    """A connection on which so many answers lie unread that none is under way and nothing more is written."""
    reader, writer = await edge.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    asked = 0
    async with asyncio.timeout(10):
        while True:
            writer.write(GET)
            asked += 1
            await asyncio.sleep(0.005)
            (connection,) = edge.listener.connections
            assert isinstance(connection, HttpConnection)
            while connection._exchange is not None:
                await asyncio.sleep(0.005)
            if connection._write_paused:
                return reader, writer, connection, asked


async def count_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    data = await asyncio.wait_for(reader.read(), 10)
    assert len(data) > data.count(b"HTTP/1.1 200 OK") * len(BODY), "the last one is whole"
    return data.count(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("after", [b"", b"garbage\r\n\r\n"], ids=["nothing", "garbage"])
async def test_a_second_head_in_two_parts_does_not_keep_a_connection_for_a_client_that_reads_nothing(
    hasty: EdgeHarness, monkeypatch: pytest.MonkeyPatch, after: bytes
) -> None:
    monkeypatch.setattr(downstream, "CLOSE_S", 0.3)
    _, writer, connection, _ = await stuffed(hasty)
    writer.write(GET[:20])
    async with asyncio.timeout(5):
        while connection._phase is not downstream.Phase.HEAD:
            await asyncio.sleep(0.005)
        writer.write(GET[20:] + after)
        while hasty.listener.connections:
            await asyncio.sleep(0.01)


async def test_a_request_received_whole_is_answered_though_its_client_reads_after_the_drain_began(
    hasty: EdgeHarness,
) -> None:
    reader, writer, connection, asked = await stuffed(hasty)
    writer.write(GET)
    async with asyncio.timeout(5):
        while not connection._queue:
            await asyncio.sleep(0.005)
    hasty.edge.draining = True
    hasty.listener.drain()
    assert await count_answers(reader, writer) == asked + 1


async def test_a_pipelined_upload_that_came_whole_may_be_answered_late(edge: EdgeHarness) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        await asyncio.sleep(0.1)  # so that the upload has to wait for its turn
        writer.write(OK)
        await read_head(reader)
        await reader.readexactly(4)
        await asyncio.sleep(0.8)
        writer.write(OK)

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port), limits=AppLimits(idle_timeout_s=0.3)))
    post = b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody"
    reader, writer = await edge.connect()
    writer.write(GET + post)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.count(b"HTTP/1.1 200 OK") == 2 and b"408" not in answer


async def test_who_uploads_on_after_a_refusal_is_not_cut_off_before_it_has_read_that(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    app = edge.app(edge.machine(origin.port))
    edge.set_app(dataclasses.replace(app, access=AccessRules(max_body_bytes=10)))
    reader, writer = await edge.connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: hello.apps.test\r\nContent-Length: 16777216\r\n\r\n" + b"x" * (8 << 20))
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert edge.listener.connections, "it has a moment to hear that nobody reads on"

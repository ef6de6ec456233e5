"""What is measured, and what a stage of overload does to connections and requests of a worker."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from proxy.edge import pressure as module
from proxy.edge.pressure import PressureGauge, host_memory_bytes, open_statm, resident_bytes
from proxy.state import W_OVERLOAD_STAGE, W_SHED_CONNECTIONS, W_SHED_REQUESTS
from tests.support.edge import EdgeHarness, answers

REQUEST = b"GET / HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def gauge(edge: EdgeHarness) -> PressureGauge:
    return PressureGauge(edge.edge, edge.gate, 1, edge.listener.drain)


def overload(one: PressureGauge, lag_s: float, at: float) -> None:
    for number in range(3):
        one.judge(lag_s, at + number / 10)


async def serve(edge: EdgeHarness) -> None:
    origin = await edge.origin(answers(OK))
    edge.set_app(edge.app(edge.machine(origin.port)))


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(REQUEST)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head.lower() + await reader.readexactly(length)


async def test_lag_refuses_new_connections_first_and_then_new_requests_and_lets_go_again(edge: EdgeHarness) -> None:
    await serve(edge)
    one, cells = gauge(edge), edge.edge.worker_base
    kept = await edge.connect()
    assert (await ask(*kept)).startswith(b"http/1.1 200")
    overload(one, 0.6, 0.0)
    reader, writer = await edge.connect()
    writer.write(REQUEST)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await ask(reader, writer)
    assert edge.memory.cells[cells + W_SHED_CONNECTIONS] == 1 and edge.memory.cells[cells + W_OVERLOAD_STAGE] == 2
    answer = await ask(*kept)
    assert answer.startswith(b"http/1.1 200") and b"connection: close" in answer, "and makes room"
    overload(one, 0.0, 10.0)
    kept = await edge.connect()
    assert (await ask(*kept)).startswith(b"http/1.1 200")
    overload(one, 2.0, 20.0)
    answer = await ask(*kept)
    assert answer.startswith(b"http/1.1 503") and b"wakefront-error: wo01" in answer and b"retry-after: 1" in answer
    assert edge.memory.cells[cells + W_SHED_REQUESTS] == 1
    overload(one, 0.0, 30.0)
    assert (await ask(*await edge.connect())).startswith(b"http/1.1 200")
    assert edge.memory.cells[cells + W_OVERLOAD_STAGE] == 0


async def test_a_request_under_way_is_answered_whatever_the_stage(edge: EdgeHarness) -> None:
    go_on = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        writer.write(OK)

    origin = await edge.origin(slow)
    edge.set_app(edge.app(edge.machine(origin.port)))
    reader, writer = await edge.connect()
    writer.write(REQUEST)
    while edge.memory.in_flight(1) == 0:
        await asyncio.sleep(0.001)
    overload(gauge(edge), 5.0, 0.0)
    go_on.set()
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_where_connections_run_short_those_that_rest_go_and_answers_end_theirs(
    edge: EdgeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CROWDED_LINGER_S", 0.05)
    await serve(edge)
    edge.gate.limit = 10
    crowd = [await edge.connect() for _ in range(9)]
    for one in crowd:
        assert b"connection: close" not in await ask(*one)
    gauge(edge).judge(0.0, 0.0)
    assert edge.edge.is_crowded and not edge.edge.sheds_connections
    assert b"connection: close" in await ask(*crowd[0])
    for reader, _ in crowd:
        assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_memory_over_its_limit_sheds_requests(edge: EdgeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resident_bytes", lambda statm: edge.edge.settings.max_memory_bytes or 1 << 50)
    gauge(edge).judge(0.0, 0.0)
    assert edge.edge.sheds_requests


def test_resident_memory_is_this_processes() -> None:
    statm = open_statm()
    before = resident_bytes(statm)
    held = bytearray(64 << 20)
    assert (60 << 20) < resident_bytes(statm) - before < (70 << 20)
    del held
    os.close(statm)


def test_a_control_group_may_leave_less_than_the_host_has(tmp_path: Path) -> None:
    whole = host_memory_bytes()
    assert whole > 1 << 28
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/wakefront.service\n")
    folder = tmp_path / "sys/fs/cgroup/system.slice/wakefront.service"
    folder.mkdir(parents=True)
    assert host_memory_bytes(str(tmp_path)) == whole, "no limit is set"
    (folder / "memory.max").write_text("max\n")
    assert host_memory_bytes(str(tmp_path)) == whole
    (folder / "memory.max").write_text("268435456\n")
    assert host_memory_bytes(str(tmp_path)) == 1 << 28
    (folder.parent / "memory.max").write_text("134217728\n")
    assert host_memory_bytes(str(tmp_path)) == 1 << 27, "the narrowest one counts"

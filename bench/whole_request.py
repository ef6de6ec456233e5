"""One request from the client's bytes to the answer's, through a worker's own objects, sockets apart.

Gives `micro` the Python share of a request: what `load` shows beyond it is the kernel's and the event loop's. Leaves
out the access log, whose writer is a thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import uvloop

from bench.peers import HOST
from proxy.edge.context import EdgeContext
from proxy.edge.downstream import HttpConnection
from proxy.edge.upstream import UpstreamConnection, pool_for
from proxy.ipc import PROTOCOL, Message, Settings
from proxy.model import (
    App,
    AppName,
    ConcurrencyType,
    Endpoint,
    Machine,
    MachineId,
    MachineState,
    Port,
    RegionCode,
    Service,
)
from proxy.state import SharedMemory


class FakeTransport:
    """Keeps the last bytes written."""

    written = b""

    def write(self, data: bytes) -> None:
        self.written = data

    def close(self) -> None: ...

    def abort(self) -> None:
        raise RuntimeError("the connection was aborted")

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 40000)


class FakeListener:
    """What a connection asks of its listener."""

    public_port = 80

    def __init__(self) -> None:
        self.connections: set[object] = set()

    def admits(self, ip: str) -> bool:
        return True

    def on_closed(self, ip: str) -> None: ...


class FakeLink:
    def send(self, message: Message) -> bool:
        return True


def whole_request(request: bytes, response: bytes, hard_limit: int | None = None) -> Callable[[], object]:
    """A function that carries `request` to a machine on a kept connection, and `response` back."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    _, memory = SharedMemory.create(1)
    settings = Settings(PROTOCOL, "bench", "ams", "apps.localhost")
    edge = EdgeContext(loop, memory, 0, settings, {80: 8080}, FakeLink(), Path(os.devnull), lambda worker: None)
    edge.table.start_load()
    edge.table.set_app(_app(hard_limit))
    edge.table.end_load()
    app = edge.table.hosts[HOST]
    service = app.services[0]
    pool = pool_for(edge, service.running[0], service, app)
    # Any: the fakes have what the two connections use, not all that their types promise
    client, machine = FakeTransport(), FakeTransport()
    downstream = HttpConnection(edge, cast(Any, FakeListener()), False, None)
    downstream.connection_made(cast(Any, client))
    upstream = UpstreamConnection(pool, lambda connection: None)
    upstream.connection_made(cast(Any, machine))
    upstream.reused = True
    pool.keep(upstream)

    def once() -> None:
        downstream.data_received(request)
        upstream.data_received(response)

    once()
    if not machine.written.startswith(b"GET ") or not client.written.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"the request did not pass: {machine.written!r}, {client.written!r}")
    return once


def _app(hard_limit: int | None) -> App:
    port = Port(80, 80, ("http",))
    service = Service(
        "tcp", 8080, (port,), concurrency_type=ConcurrencyType.REQUESTS, soft_limit=100_000, hard_limit=hard_limit
    )
    endpoints = (Endpoint(8080, "127.0.0.1", 1),)
    machine = Machine(MachineId("bench-1"), RegionCode("ams"), "app", MachineState.STARTED, 1, 0, endpoints)
    return App(AppName("bench"), (HOST,), (service,), (machine,))

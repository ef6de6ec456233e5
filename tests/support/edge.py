"""A worker's data plane on loopback, in the test's own loop: real sockets both sides, control replaced by the test.

`EdgeHarness` serves apps whose machines are scripted origins; what it would tell control is in `sent`. Raw bytes go in
and come out, so that tests assert what a peer sees.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from proxy.edge.context import EdgeContext
from proxy.edge.listener import Gate, Listener
from proxy.ipc import PROTOCOL, Message, Settings, Wake
from proxy.model import (
    App,
    AppLimits,
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

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Origin:
    """A scripted server: every connection is given to `handler`; what it received is kept, per connection."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.received: list[bytearray] = []
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        record = bytearray()
        self.received.append(record)
        reader_read = reader.read

        async def read(n: int = -1) -> bytes:
            data = await reader_read(n)
            record.extend(data)
            return data

        reader.read = read  # type: ignore[method-assign]
        try:
            await self._handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    @property
    def open_connections(self) -> int:
        return len(self._tasks)

    async def all_closed(self) -> None:
        async with asyncio.timeout(5):
            while self._tasks:
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for task in list(self._tasks):
            with suppress(asyncio.CancelledError):
                await task


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """The bytes of one head; the origin's own framing is up to the test."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = await reader.read(1)
        if not piece:
            raise asyncio.IncompleteReadError(data, None)
        data += piece
    return data


def answers(response: bytes, after: Callable[[bytes], None] | None = None) -> Handler:
    """An origin that answers every bodiless request with the same bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            if after is not None:
                after(head)
            writer.write(response)
            await writer.drain()

    return handle


class SentMessages:
    """Stands where the link to control is: keeps what the worker says."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.is_up = True
        self.on_send: Callable[[Message], None] | None = None

    def send(self, message: Message) -> bool:
        if not self.is_up:
            return False
        self.messages.append(message)
        if self.on_send is not None:
            self.on_send(message)
        return True


class EdgeHarness:
    """One worker's edge with plain listeners."""

    def __init__(self, node: str = "n1", region: str = "ams", **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        self.node, self.region = node, region
        self._spool = tempfile.TemporaryDirectory(prefix="wakefront-spool-")
        self._fd, self.memory = SharedMemory.create(1)
        self.sent = SentMessages()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.edge = EdgeContext(
            loop, self.memory, 0, Settings(PROTOCOL, node, region, "apps.test", **settings), {80: self.port}, self.sent,
            Path(self._spool.name), lambda worker: None,
        )  # fmt: skip
        self.gate = Gate(1000)
        self.listener = Listener(self.edge, self.gate, 80, self.socket, None, None)  # type: ignore[arg-type]
        self._writers: list[asyncio.StreamWriter] = []
        self._origins: list[Origin] = []

    async def start(self) -> None:
        await self.listener.start()

    async def __aenter__(self) -> EdgeHarness:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def origin(self, handler: Handler) -> Origin:
        origin = Origin(handler)
        await origin.start()
        self._origins.append(origin)
        return origin

    def machine(
        self,
        port: int,
        machine_id: str = "m1",
        state: MachineState = MachineState.STARTED,
        version: int = 1,
        slot: int = 1,
        **more: Any,
    ) -> Machine:
        return Machine(
            MachineId(machine_id), RegionCode(self.region), "app", state, version, slot,
            (Endpoint(8080, "127.0.0.1", port),) if port else (), **more,
        )  # fmt: skip

    def app(
        self,
        *machines: Machine,
        name: str = "hello",
        kind: ConcurrencyType = ConcurrencyType.REQUESTS,
        limits: AppLimits | None = None,
        wake_timeout_s: float = 5.0,
        slot: int = 0,
        **port: Any,
    ) -> App:
        service = Service("tcp", 8080, (Port(80, 80, ("http",), **port),), concurrency_type=kind)
        return App(
            AppName(name), (f"{name}.apps.test",), (service,), machines, slot=slot, limits=limits or AppLimits(),
            wake_timeout_s=wake_timeout_s,
        )  # fmt: skip

    def set_app(self, app: App) -> None:
        self.edge.table.set_app(app)

    def start_when_asked(self, machine: Machine, app: str = "hello") -> None:
        """Be control towards a machine that does not run: a wake of it has it told started in the next turn."""

        def hear(message: Message) -> None:
            if isinstance(message, Wake) and message.machine == machine.id:
                started = dataclasses.replace(machine, state=MachineState.STARTED, version=machine.version + 1)
                asyncio.get_running_loop().call_soon(self.edge.table.set_machine, AppName(app), started)

        self.sent.on_send = hear

    @property
    def woken(self) -> set[MachineId]:
        """The machines that control was asked to start."""
        return {message.machine for message in self.sent.messages if isinstance(message, Wake)}

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        self._writers.append(writer)
        return reader, writer

    async def request(self, data: bytes) -> bytes:
        """Send `data` on a new connection, half-close, and read all that comes back.

        Less the 100 that one gets who waits in line and sends no more: see HttpConnection.probe.
        """
        reader, writer = await self.connect()
        writer.write(data)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
        return answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def stop(self) -> None:
        self.listener.stop()
        for writer in self._writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        await asyncio.wait_for(self.gate.wait_empty(), 10)
        for app in list(self.edge.table.apps):
            self.edge.table.remove_app(app)
        for origin in self._origins:
            await origin.stop()
        self.edge.close()
        self._spool.cleanup()
        self.socket.close()
        os.close(self._fd)

"""Steady load from kept and from fresh connections. Every failure is on record with its connection.

    with Load(node, "web") as load:                    # every kept connection has had its first answer
        victim = load.ports_of(pid)                    # which of our connections a worker serves
        ...
    assert [one for one in load.failures if one.port not in victim] == []

A request is sent at its time, whatever became of those before; a kept connection that failed is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import wait_for
from tests.support.serve import ServedNode

ANSWER_S = 15.0
_CAUSES = (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError, ValueError)


@dataclass(frozen=True)
class Failure:
    """A request that got no good answer."""

    port: int  # ours, of its connection; 0: none was made
    cause: str
    at: float  # monotonic
    kept: bool

    def __str__(self) -> str:
        return f"{'kept' if self.kept else 'fresh'} connection {self.port}: {self.cause} at {self.at:.3f}"


class Load:
    """`kept_per_s` requests a second over `kept` connections, and `fresh_per_s` on a connection each."""

    def __init__(
        self, node: ServedNode, app: str, *, kept: int = 16, tls: int = 4, kept_per_s: float = 520.0,
        fresh_per_s: float = 30.0,
    ) -> None:  # fmt: skip
        self.failures: list[Failure] = []
        self.answers = 0
        self._node = node
        self._head = f"GET / HTTP/1.1\r\nHost: {node.host(app)}\r\n".encode()
        self._host = node.host(app)
        self._context = node.client_context() if tls else None
        self._tls = [place < tls for place in range(kept)]
        self._pause_s = kept / kept_per_s
        self._fresh_pause_s = 1 / fresh_per_s if fresh_per_s else 0.0
        self._ports: set[int] = set()
        self._begun = 0
        self._first_at = self._last_at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> Load:
        self._thread.start()
        try:
            wait_for(lambda: self._begun == len(self._tls), 30, lambda: f"load to begin: {self.told()}")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send nothing more, and wait for what was sent."""
        self._over.set()
        self._thread.join(ANSWER_S * 3)
        assert not self._thread.is_alive(), "the load client hangs"

    @property
    def per_s(self) -> float:
        """Good answers a second, from the first to the last."""
        return self.answers / max(0.001, self._last_at - self._first_at)

    def run_for(self, seconds: float) -> None:
        """Let it go on: returns when that many seconds' worth of answers has come."""
        wanted = self.answers + int(seconds * len(self._tls) / self._pause_s)
        wait_for(lambda: self.answers >= wanted, seconds * 3 + ANSWER_S, lambda: f"answers: {self.told()}")

    def ports_of(self, pid: int) -> set[int]:
        """Our ends of the connections that this process holds now."""
        return client_ports_of(pid, {self._node.http_port, self._node.https_port})

    def told(self) -> str:
        first = "; ".join(str(one) for one in self.failures[:10])
        return f"{self.answers} answers, {len(self.failures)} failures: {first}"

    # --- the client's thread

    async def _run(self) -> None:
        # a test has no need of the task helper of the product: the group keeps its tasks
        async with asyncio.TaskGroup() as group:
            for place, tls in enumerate(self._tls):
                group.create_task(self._keep(place, tls))
            if self._fresh_pause_s:
                group.create_task(self._refresh(group))

    async def _keep(self, place: int, tls: bool) -> None:
        """One kept connection, its requests spread evenly and apart from the others'."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._pause_s * place / len(self._tls)
        connection: _Connection | None = None
        first = True
        while not self._over.is_set():
            await asyncio.sleep(max(0.0, due - loop.time()))
            due = max(due + self._pause_s, loop.time() - 1.0)  # what could not be sent in time is not sent in a burst
            connection = await self._ask(connection, tls, b"\r\n")
            if first and connection is not None:
                first = False
                self._begun += 1
        if connection is not None:
            connection.close()

    async def _refresh(self, group: asyncio.TaskGroup) -> None:
        while not self._over.is_set():
            await asyncio.sleep(self._fresh_pause_s)
            group.create_task(self._ask_once())

    async def _ask_once(self) -> None:
        connection = await self._ask(None, False, b"Connection: close\r\n\r\n")
        if connection is not None:
            connection.close()

    async def _ask(self, connection: _Connection | None, tls: bool, rest: bytes) -> _Connection | None:
        """One request; returns the connection if it is good for another."""
        kept = rest == b"\r\n"
        try:
            async with asyncio.timeout(ANSWER_S):
                if connection is None:
                    connection = await _Connection.make(self._node, self._host, self._context if tls else None)
                await connection.ask(self._head + rest)
        except _CAUSES as error:
            port = connection.port if connection is not None else 0
            self.failures.append(Failure(port, f"{type(error).__name__}: {error}", time.monotonic(), kept))
            if connection is not None:
                connection.close()
            return None
        self.answers += 1
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at
        if connection.is_over:
            connection.close()
            return None
        return connection


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.port: int = writer.get_extra_info("sockname")[1]
        self.is_over = False  # the server has said that it closes

    @staticmethod
    async def make(node: ServedNode, host: str, context: ssl.SSLContext | None) -> _Connection:
        if context is None:
            return _Connection(*await asyncio.open_connection("127.0.0.1", node.http_port))
        made = asyncio.open_connection("127.0.0.1", node.https_port, ssl=context, server_hostname=host)
        return _Connection(*await made)

    async def ask(self, request: bytes) -> None:
        """Raises ValueError for any answer but a whole 200."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        fields = head.lower()
        length = int(fields.partition(b"content-length:")[2].split(b"\r\n")[0])
        body = await self._reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ValueError(f"{head.splitlines()[0].decode()} {body[:80].decode()}")
        self.is_over = b"\r\nconnection: close\r\n" in fields

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.transport.abort()


def client_ports_of(pid: int, server_ports: set[int]) -> set[int]:
    """The far ends of the IPv4 connections to these ports that a process holds."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.add(str(entry.readlink()))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        local, remote, inode = words[1], words[2], words[9]
        if int(local.rpartition(":")[2], 16) in server_ports and f"socket:[{inode}]" in held:
            found.add(int(remote.rpartition(":")[2], 16))
    return found - {0}


def connect_to(pid: int, node: ServedNode, connect: Callable[[], socket.socket]) -> socket.socket:
    """A connection that this very worker accepted: others are made and given up until one is."""
    ports = {node.http_port, node.https_port}
    for _ in range(200):
        sock = connect()
        port = sock.getsockname()[1]
        owners = {one for one in node.worker_pids if port in client_ports_of(one, ports)}
        if pid in owners:
            return sock
        sock.close()
    raise AssertionError(f"no connection reached worker pid {pid}")

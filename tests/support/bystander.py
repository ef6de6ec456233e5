"""The bystander of an attack: a process of its own that asks honest requests at a steady rate and times them.

It is client and origin in one, so that neither shares a thread with the attacker. It asks that origin directly, too:
what such a request meets is the host's doing, not the node's. A request's time counts from the
moment it was due, not from when it could be sent: a server that stands still for a second is seen to do so.

    python -m tests.support.bystander SOURCE        its first line of output: {"port": OF_ITS_ORIGIN}

Commands are lines of JSON on standard input, each answered by one line: `aim` (port, host, kept, kept_per_s,
fresh_per_s) begins, `take` tells what happened since the last `take`, `rest` stops. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import uvloop

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 20.0
TIMER_S = 0.003  # what a timer may be late by and is no server's doing
SOURCE = "127.0.0.9"  # an address of its own: limits of the attacker's address are not its
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
DIRECT_PER_S = 50.0
_CAUSES = (OSError, EOFError, ValueError, TimeoutError)


@dataclass
class Tally:
    """What became of requests since the last look: times in milliseconds."""

    kept_ms: list[float] = field(default_factory=list)
    fresh_ms: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    direct_ms: list[float] = field(default_factory=list)  # past the node, straight to the origin

    @property
    def answers(self) -> int:
        return len(self.kept_ms) + len(self.fresh_ms)

    @property
    def p99_ms(self) -> float:
        """Of all requests; 0 if there were none."""
        return quantile(self.kept_ms + self.fresh_ms, 0.99)

    @property
    def direct_p99_ms(self) -> float:
        """Of those that went past the node."""
        return quantile(self.direct_ms, 0.99)

    @property
    def fresh_p99_ms(self) -> float:
        """Of those that needed a new connection, which is in their time."""
        return quantile(self.fresh_ms, 0.99)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] if ordered else 0.0


class Bystander:
    """The test's end of that process."""

    def __init__(self, source: str = SOURCE) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.bystander", source],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.port = int(self._read()["port"])

    def aim(self, port: int, host: str, *, kept: int = 4, kept_per_s: float = 100.0, fresh_per_s: float = 50.0) -> None:
        """Begin to ask for `host` at this port of loopback. Returns when every kept connection has had an answer."""
        told = {"port": port, "host": host, "kept": kept, "kept_per_s": kept_per_s, "fresh_per_s": fresh_per_s}
        self._ask(do="aim", **told)

    def take(self) -> Tally:
        """What happened since `aim` or the last `take`. A request counts when it ends."""
        return Tally(**self._ask(do="take"))

    def rest(self) -> None:
        """Stop asking; what is under way is let go and not counted."""
        self._ask(do="rest")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)

    def __enter__(self) -> Bystander:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the bystander has ended"
        told = json.loads(line)
        assert "error" not in told, told["error"]
        return told


# --- the process


class _Asker:
    """Asks at a rate while `run` runs."""

    def __init__(self, source: str, tally: Callable[[], Tally], command: dict[str, Any], is_direct: bool) -> None:
        self._source = source
        self._tally = tally
        self._is_direct = is_direct
        self._port = command["port"]
        self._head = f"GET /bystander HTTP/1.1\r\nHost: {command['host']}\r\n".encode()
        self._kept = command["kept"]
        self._kept_pause_s = command["kept"] / command["kept_per_s"]
        self._fresh_pause_s = 1 / command["fresh_per_s"] if command["fresh_per_s"] else 0.0
        self._warm = 0
        self.ready = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for place in range(self._kept):
                group.create_task(self._keep(place))
            if self._fresh_pause_s:
                group.create_task(self._refresh(group))

    async def _keep(self, place: int) -> None:
        connection = await self._ask(None, b"\r\n", time.monotonic(), None)
        self._warm += 1
        if self._warm == self._kept:
            self.ready.set()
        await self.ready.wait()
        due = time.monotonic() + self._kept_pause_s * place / self._kept
        try:
            while True:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                connection = await self._ask(connection, b"\r\n", due, self._kept_times())
                due += self._kept_pause_s
        finally:
            if connection is not None:
                connection[1].transport.abort()

    def _kept_times(self) -> list[float]:
        tally = self._tally()
        return tally.direct_ms if self._is_direct else tally.kept_ms

    async def _refresh(self, group: asyncio.TaskGroup) -> None:
        await self.ready.wait()
        due = time.monotonic()
        while True:
            due += self._fresh_pause_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(self._ask_once(due))

    async def _ask_once(self, due: float) -> None:
        connection = await self._ask(None, b"Connection: close\r\n\r\n", due, self._tally().fresh_ms)
        if connection is not None:
            connection[1].transport.abort()

    async def _ask(
        self,
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None,
        rest: bytes,
        due: float,
        times: list[float] | None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """One request; returns its connection, unless that failed or the answer ends it."""
        made = connection
        begun = time.monotonic()
        begun = due if begun - due > TIMER_S else begun
        try:
            async with asyncio.timeout(ANSWER_S):
                if made is None:
                    made = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(self._source, 0))
                made[1].write(self._head + rest)
                head = await made[0].readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                body = await made[0].readexactly(length)
                if (head[:13], body) != (b"HTTP/1.1 200 ", b"ok"):
                    raise ValueError(f"{head.splitlines()[0]!r} {body[:80]!r}")
        except _CAUSES as error:
            kind = "fresh" if connection is None else "kept"
            self._tally().failures.append(f"{kind}: {type(error).__name__}: {error}")
            if made is not None:
                made[1].transport.abort()
            return None
        except asyncio.CancelledError:
            if made is not None and connection is None:
                made[1].transport.abort()
            raise
        if times is not None:
            times.append((time.monotonic() - begun) * 1000)
        if b"\r\nconnection: close\r\n" in head.lower():
            made[1].transport.abort()
            return None
        return made


class _Origin(asyncio.Protocol):
    """Answers every bodiless request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        *whole, self._tail = (self._tail + data).split(b"\r\n\r\n")
        self._transport.write(_ANSWER * len(whole))


class _Process:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tally = Tally()
        self._tasks: list[asyncio.Task[None]] = []
        self._port = 0  # our origin's

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Origin, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        say({"port": self._port})
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command = json.loads(line)
            try:
                say(await getattr(self, f"_{command.pop('do')}")(command))
            except (OSError, TimeoutError, ValueError) as error:
                say({"error": repr(error)})
        await self._rest({})
        server.close()

    async def _aim(self, command: dict[str, Any]) -> dict[str, Any]:
        await self._rest({})
        self._tally = Tally()
        direct = {"port": self._port, "host": "direct", "kept": 1, "kept_per_s": DIRECT_PER_S, "fresh_per_s": 0}
        for told, is_direct in ((direct, True), (command, False)):
            asker = _Asker(self._source, lambda: self._tally, told, is_direct)
            self._tasks.append(asyncio.get_running_loop().create_task(asker.run()))
            async with asyncio.timeout(ANSWER_S):
                await asker.ready.wait()
        if self._tally.failures:
            raise ValueError(f"the bystander cannot reach its app: {self._tally.failures[0]}")
        return {}

    async def _take(self, command: dict[str, Any]) -> dict[str, Any]:
        taken, self._tally = self._tally, Tally()
        return vars(taken)

    async def _rest(self, command: dict[str, Any]) -> dict[str, Any]:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
        return {}


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    socket.setdefaulttimeout(ANSWER_S)
    uvloop.run(_Process(sys.argv[1]).run())

"""A wide-area network on loopback: relays that delay, stall and cut, for the demo and for tests.

`Wan` runs a process of its own (`python -m proxy.cli.wan`), told by JSON lines on its standard input, so that neither
its work nor its delays touch whoever uses it; it ends with whoever started it. A *link* is one way to reach one
address: it listens on loopback, and what comes there is passed on, both ways, as late as the link says.

    with Wan() as wan:
        there = wan.link("ams", "iad", ("127.0.0.1", backhaul_of_iad))   # what ams dials to reach iad
        wan.set("ams", "iad", rtt_s=0.08)                                # at once, for bytes that come from then on
        wan.set("ams", "iad", is_stalled=True)                           # nothing is closed, nothing arrives
        wan.set("ams", "iad", is_cut=True)                               # connections are reset, new ones too

Each direction has half of the round trip. The handshake of TCP is the kernel's, and takes none: what a protocol above
sends and awaits, as TLS does, takes all of it. What is on its way is bounded (`_ON_WAY_BYTES` a direction), past that
the sender is held up, as by a full pipe. A stalled link takes up to that much more and then holds up the sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
from collections import deque
from typing import Any, Final, Self

Address = tuple[str, int]

_ON_WAY_BYTES: Final = 4 * 1024 * 1024
_READY_S: Final = 10.0
_RESET: Final = struct.pack("ii", 1, 0)


class Wan:
    """All links between named places. Blocking, a fraction of a millisecond a call."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "proxy.cli.wan"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        return self

    def __exit__(self, *exc: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def link(self, source: str, target: str, address: Address) -> Address:
        """Make the way by which `source` reaches `target`, which is at `address`; what `source` is to dial."""
        answer = self._ask({"op": "link", "name": f"{source}>{target}", "address": address})
        return (str(answer["host"]), int(answer["port"]))

    def set(
        self, source: str, target: str, *, rtt_s: float | None = None, jitter_s: float | None = None,
        is_stalled: bool | None = None, is_cut: bool | None = None,
    ) -> None:  # fmt: skip
        """Change a link; what is not named stays."""
        said = {"rtt_s": rtt_s, "jitter_s": jitter_s, "is_stalled": is_stalled, "is_cut": is_cut}
        changes = {key: value for key, value in said.items() if value is not None}
        self._ask({"op": "set", "name": f"{source}>{target}", **changes})

    def both(self, one: str, other: str, **changes: Any) -> None:  # Any: as `set` takes them
        """`set` for the links there are between two places, whoever dials."""
        for source, target in ((one, other), (other, one)):
            with contextlib.suppress(KeyError):
                self.set(source, target, **changes)

    def stats(self, source: str, target: str) -> dict[str, int]:
        """Connections open, and bytes passed on."""
        return dict(self._ask({"op": "stats", "name": f"{source}>{target}"})["stats"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise OSError("the emulator of the wide-area network has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise KeyError(answer["error"])
        return answer


# --- the process


class _Link:
    """One way: how late and whether at all, and the connections that go it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.rtt_s = 0.0
        self.jitter_s = 0.0
        self.is_stalled = False
        self.is_cut = False
        self.pipes: set[_Pipe] = set()
        self.bytes = 0
        self.server: asyncio.Server | None = None

    def change(self, changes: dict[str, Any]) -> None:
        for key, value in changes.items():
            setattr(self, key, value)
        for pipe in list(self.pipes):
            if self.is_cut:
                pipe.reset()
            else:
                pipe.go_on()

    def accept(self) -> asyncio.Protocol:
        return _End(self, None)


class _Pipe:
    """One direction of one connection: bytes wait here until their time has come."""

    def __init__(self, link: _Link, source: asyncio.Transport, sink: asyncio.Transport) -> None:
        self._link = link
        self.source, self.sink = source, sink
        self._waiting: deque[tuple[float, bytes | None]] = deque()
        self._size = 0
        self._last_due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.is_full = False  # the sink takes no more for now
        link.pipes.add(self)

    def put(self, data: bytes | None) -> None:
        """Bytes, or None for the end of them."""
        link, loop = self._link, asyncio.get_running_loop()
        late = link.rtt_s / 2 + (random.random() * link.jitter_s if link.jitter_s else 0.0)
        self._last_due = max(self._last_due, loop.time() + late)  # in order
        self._waiting.append((self._last_due, data))
        self._size += len(data or b"")
        if self._size > _ON_WAY_BYTES:
            self.source.pause_reading()
        self.go_on()

    def go_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._waiting and not self._link.is_stalled and not self.is_full:
            due, data = self._waiting[0]
            if due > loop.time() + 0.0001:
                self._timer = loop.call_at(due, self.go_on)
                break
            self._waiting.popleft()
            if data is None:
                if self.sink.can_write_eof():
                    self.sink.write_eof()
            else:
                self._size -= len(data)
                self._link.bytes += len(data)
                self.sink.write(data)
        if self._size <= _ON_WAY_BYTES // 2 and not self.source.is_closing():
            with contextlib.suppress(RuntimeError):
                self.source.resume_reading()

    def reset(self) -> None:
        for transport in (self.source, self.sink):
            sock = transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._link.pipes.discard(self)


class _End(asyncio.Protocol):
    """One end of a connection through a link; the accepted one makes the other."""

    def __init__(self, link: _Link, other: _End | None) -> None:
        self.link = link
        self.other = other
        self.out: _Pipe | None = None  # from here to the other end
        self.early: list[bytes | None] = []
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's has its methods
        if self.link.is_cut:
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        elif self.other is None:
            self._task = asyncio.get_running_loop().create_task(self._connect())
        else:
            self.out = _Pipe(self.link, self.transport, self.other.transport)
            self.other.out = _Pipe(self.link, self.other.transport, self.transport)
            for piece in self.other.early:
                self.other.out.put(piece)
            self.other.early.clear()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(self._meet, *self.link.address)
        except OSError:
            self.transport.abort()

    def _meet(self) -> _End:
        self.other = _End(self.link, self)
        return self.other

    def data_received(self, data: bytes) -> None:
        if self.out is not None:
            self.out.put(data)
        else:
            self.early.append(data)

    def eof_received(self) -> bool:
        if self.out is not None:
            self.out.put(None)
        else:
            self.early.append(None)
        return True

    def pause_writing(self) -> None:
        if self.other is not None and self.other.out is not None:
            self.other.out.is_full = True

    def resume_writing(self) -> None:
        if self.other is not None and self.other.out is not None:
            self.other.out.is_full = False
            self.other.out.go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        other = self.other
        for pipe in (self.out, other.out if other is not None else None):
            if pipe is not None:
                pipe.end()
        if other is not None and not other.is_lost and hasattr(other, "transport"):
            if self.link.is_stalled:
                return  # the other side hears nothing of it either
            # what is on its way to it is late by as much as its end is
            asyncio.get_running_loop().call_later(self.link.rtt_s / 2, _abort, other.transport)


def _abort(transport: asyncio.Transport) -> None:
    if transport.get_write_buffer_size():
        transport.close()
    else:
        transport.abort()


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    links: dict[str, _Link] = {}
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        question = json.loads(line)
        op, name = question.pop("op"), question.pop("name")
        answer: dict[str, Any] = {}
        if op == "link":
            link = links[name] = _Link((question["address"][0], int(question["address"][1])))
            link.server = await loop.create_server(link.accept, "127.0.0.1", 0)
            host, port = link.server.sockets[0].getsockname()[:2]
            answer = {"host": host, "port": port}
        elif name not in links:
            answer = {"error": f"there is no link {name}"}
        elif op == "set":
            links[name].change(question)
        else:
            found = links[name]
            answer = {"stats": {"connections": len(found.pipes) // 2, "bytes": found.bytes}}
        print(json.dumps(answer), flush=True)


def main() -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())


if __name__ == "__main__":
    main()

"""A machine that does as each request says: the scripted origin of the data plane's tests. Standard library only.

The query of a request is its script, one step for each `do=`, in order (tests write it with tests.support.script):

    read            take the request's body to its end            read:N      take at least N bytes of it
    tell            answer with what was received, as JSON         send:B64    send these bytes, whatever they mean
    wait:NAME       until somebody pokes NAME                      poke:NAME   let one waiter of NAME go on
    spray:N         send N bytes of the known pattern              echo        send the body back, chunk by chunk
    tunnel          send back all that comes, to its end           quiet:S     close if anything comes within S seconds
    until:B64       read until these bytes have come
    end             half-close     close   close     reset         close with a reset

A request without steps gets `read`, `tell`. Between requests the connection is kept.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

BLOCK = bytes(value % 251 for value in range(251 * 256))


class Ended(Exception):
    """The script has ended the connection."""


class Origin:
    """What all connections share."""

    def __init__(self) -> None:
        self.connections = 0
        self.pokes: dict[str, asyncio.Semaphore] = {}
        self.targets: list[str] = []  # of all requests so far
        self.leftovers: list[str] = []  # what came after the last whole request of a connection

    def gate(self, name: str) -> asyncio.Semaphore:
        return self.pokes.setdefault(name, asyncio.Semaphore(0))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = Connection(self, self.connections, reader, writer)
        try:
            await connection.run()
        except (Ended, ConnectionError):
            pass
        except asyncio.IncompleteReadError as error:
            if error.partial:
                self.leftovers.append(error.partial.decode("latin-1"))
        finally:
            writer.close()


class Connection:
    def __init__(self, origin: Origin, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.origin = origin
        self.number = number
        self.reader = reader
        self.writer = writer
        self.served = 0
        self.head = ""
        self.target = ""
        self.trailers = ""
        self.size = 0
        self.sum = hashlib.sha256()
        self.start = b""
        self.body: AsyncIterator[bytes] | None = None

    async def run(self) -> None:
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            self.head = head.decode("latin-1")
            self.target = self.head.split(" ", 2)[1]
            self.origin.targets.append(self.target)
            self.served += 1
            self.size, self.sum, self.trailers, self.start = 0, hashlib.sha256(), "", b""
            self.body = self._pieces()
            await self._play()

    async def _play(self) -> None:
        steps = [one[3:] for one in self.target.partition("?")[2].split("&") if one.startswith("do=")]
        for step in steps or ["read", "tell"]:
            name, _, argument = unquote(step).partition(":")
            await getattr(self, f"do_{name}")(argument)
            await self.writer.drain()

    def _field(self, name: str) -> str:
        for line in self.head.split("\r\n"):
            if line.lower().startswith(f"{name}:"):
                return line.partition(":")[2].strip()
        return ""

    async def _pieces(self) -> AsyncIterator[bytes]:
        if self._field("transfer-encoding") == "chunked":
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            while (line := await self.reader.readuntil(b"\r\n")) != b"\r\n":
                self.trailers += line.decode("latin-1")
            return
        left = int(self._field("content-length") or 0)
        while left:
            piece = await self.reader.read(min(left, 65_536))
            if not piece:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(piece)
            yield piece

    async def _take(self) -> bytes:
        assert self.body is not None
        piece = await anext(self.body, b"")
        self.size += len(piece)
        self.sum.update(piece)
        if len(self.start) < 1000:
            self.start += piece
        return piece

    # --- steps

    async def do_read(self, least: str) -> None:
        while not least or self.size < int(least):
            if not await self._take():
                return

    async def do_tell(self, _: str) -> None:
        told: dict[str, Any] = {
            "connection": self.number, "served": self.served, "head": self.head, "trailers": self.trailers,
            "size": self.size, "sha256": self.sum.hexdigest(), "start": self.start.decode("latin-1"),
            "targets": self.origin.targets, "leftovers": self.origin.leftovers,
        }  # fmt: skip
        body = json.dumps(told).encode()
        self.writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        if not self.head.startswith("HEAD "):
            self.writer.write(body)

    async def do_send(self, data: str) -> None:
        self.writer.write(base64.urlsafe_b64decode(data))

    async def do_wait(self, name: str) -> None:
        await self.origin.gate(name).acquire()

    async def do_poke(self, name: str) -> None:
        self.origin.gate(name).release()

    async def do_quiet(self, seconds: str) -> None:
        try:
            came = await asyncio.wait_for(self.reader.read(1), float(seconds))
        except TimeoutError:
            return
        self.origin.leftovers.append(f"not quiet: {came!r}")
        raise Ended

    async def do_until(self, data: str) -> None:
        await self.reader.readuntil(base64.urlsafe_b64decode(data))

    async def do_spray(self, size: str) -> None:
        left = int(size)
        while left > 0:
            self.writer.write(BLOCK[:left])
            left -= len(BLOCK)
            await self.writer.drain()

    async def do_echo(self, _: str) -> None:
        while piece := await self._take():
            self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await self.writer.drain()
        self.writer.write(b"0\r\n\r\n")

    async def do_tunnel(self, _: str) -> None:
        while piece := await self.reader.read(65_536):
            self.writer.write(piece)
            await self.writer.drain()

    async def do_end(self, _: str) -> None:
        self.writer.write_eof()

    async def do_close(self, _: str) -> None:
        raise Ended

    async def do_reset(self, _: str) -> None:
        await self.writer.drain()
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise Ended


async def main() -> None:
    server = await asyncio.start_server(Origin().serve, "127.0.0.1", int(os.environ["PORT"]), limit=1 << 20)
    await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(0)

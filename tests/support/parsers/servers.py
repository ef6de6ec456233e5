"""Parsers that are servers of their own: each answers a request with its digest in a field and no body."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httptools

from tests.support.parsers import DIGEST_FIELD, Reading, digest_of
from tests.support.processes import wait_for
from tests.support.serve import free_ports

_PROGRAMS = Path(__file__).parent / "programs"
_PROGRAMS_MODULE = "tests.support.parsers.programs"
_ANSWER = re.compile(rb"HTTP/1\.[01] (\d\d\d)[^\r]*\r\n(?:[^\r]*\r\n)*?\r\n")
_DIGEST = re.compile(rb"\r\n" + DIGEST_FIELD.encode() + rb": ([0-9a-f]{40})\r\n", re.IGNORECASE)
_DIGEST_MARK = b"x-digest: "
_READ_S = 10.0
_MORE_S = 0.02  # for an answer that nobody should give


class Server:
    """A server that listens on loopback; `read` is one connection to it."""

    def __init__(self, name: str, port: int, drops: bool = False) -> None:
        self.name = name
        self.drops = drops
        self.port = port

    async def read(self, data: bytes, expected: int, may_have_more: bool) -> Reading:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        sending = asyncio.ensure_future(_send(writer, data))
        got, answers = bytearray(), 0
        try:
            async with asyncio.timeout(_READ_S):
                with contextlib.suppress(ConnectionError):
                    while answers < expected and (piece := await reader.read(1 << 20)):
                        answers += (got[-len(_DIGEST_MARK) + 1 :] + piece).count(_DIGEST_MARK)
                        got += piece
                    await sending
                    if may_have_more:
                        got += await _more(reader)
                    writer.write_eof()  # only now: some servers give up whoever half-closes
                    while piece := await reader.read(1 << 20):
                        got += piece
        except TimeoutError:
            return Reading(_reading(bytes(got)).found, False, "it waits for more")
        finally:
            sending.cancel()
            writer.transport.abort()
        return _reading(bytes(got))


async def _more(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(_MORE_S):
            return await reader.read(1 << 20)
    except TimeoutError:
        return b""


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()


def _reading(got: bytes) -> Reading:
    found: list[str] = []
    for answer in _ANSWER.finditer(got):
        if answer[1].startswith(b"1"):
            continue
        digest = _DIGEST.search(answer[0])
        if digest is None:
            return Reading(found, True, answer[0].split(b"\r\n")[0].decode("latin-1"))
        found.append(digest[1].decode())
    return Reading(found, False)


@contextlib.contextmanager
def node() -> Iterator[Server | None]:
    """Node's http; None where there is no node."""
    binary = shutil.which("node")
    if binary is None:
        yield None
        return
    with _program([binary, str(_PROGRAMS / "origin.js")]) as port:
        yield Server("node", port)


@contextlib.contextmanager
def aiohttp_server() -> Iterator[Server]:
    with _program([sys.executable, "-m", f"{_PROGRAMS_MODULE}.aiohttp_origin"]) as port:
        yield Server("aiohttp", port, drops=True)


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[Server | None]:
    """nginx, which hands on to a backend that says what it was sent; None where there is no nginx."""
    binary = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if binary is None:
        yield None
        return
    with _program([sys.executable, "-m", f"{_PROGRAMS_MODULE}.backend"]) as backend:
        (port,) = free_ports(1)
        config = folder / "nginx.conf"
        config.write_text(_NGINX.format(folder=folder, port=port, backend=backend))
        process = subprocess.Popen([binary, "-p", str(folder), "-c", str(config), "-g", "daemon off;"])
        try:
            wait_for(lambda: _listens(port) or process.poll() is not None, 10, "nginx listens")
            assert process.poll() is None, (folder / "error.log").read_text()
            yield Server("nginx", port)
        finally:
            process.terminate()
            process.wait(10)


_NGINX = """
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  large_client_header_buffers 8 128k;
  client_max_body_size 0;
  upstream backend {{ server 127.0.0.1:{backend}; keepalive 32; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} reuseport;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }}
  }}
}}
"""


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def _program(command: list[str]) -> Iterator[int]:
    """A program that prints its port and runs until its input ends."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"{command[0]} ended with {process.wait(10)}"
        yield int(line)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        process.stdout.close()


class Backend(asyncio.Protocol):
    """What stands behind nginx: answers each request that nginx wrote with its digest."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._parser = httptools.HttpRequestParser(self)
        self.on_message_begin()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError:
            self._transport.close()  # nginx answers 502

    def on_message_begin(self) -> None:
        self._url = b""
        self._body: list[bytes] = []

    def on_url(self, piece: bytes) -> None:
        self._url += piece

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        digest = digest_of(self._parser.get_method(), self._url, b"".join(self._body))
        self._transport.write(f"HTTP/1.1 200 OK\r\n{DIGEST_FIELD}: {digest}\r\nContent-Length: 0\r\n\r\n".encode())

"""A TLS echo server in a process of its own, whose memory a test can look at: `python -m tests.support.tls_echo PEM`.

Prints its port, then serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from typing import Any

import uvloop

from proxy.edge.tls import TlsAcceptor
from proxy.errors import Code
from proxy.tickets import new_base_context, new_leaf_context


class OneLeaf:
    """A certificate source that has the same answer for all."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def find(self, name: str | None) -> ssl.SSLContext | None:
        return self.context

    def need(self, name: str | None, waiter: Any) -> None:
        raise AssertionError(f"{name} was found")

    def forget(self, name: str | None, waiter: Any) -> None:
        raise AssertionError(f"nobody waits for {name}")

    def challenge(self, name: str | None) -> ssl.SSLContext:
        raise AssertionError(f"no CA looks for {name}")


class NoEvents:
    def on_handshake(self, version: str, resumed: bool, seconds: float) -> None:
        pass

    def on_error(self, code: Code, server_name: str | None, detail: str, peer: Any) -> None:
        pass

    def on_connected(self, peer: Any) -> bool:
        return True

    def on_unfinished(self, peer: Any) -> None:
        pass


class Echo(asyncio.Protocol):
    """As small as can be: what is measured is the TLS layer."""

    __slots__ = ("transport",)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def serve(base: ssl.SSLContext, leaf_path: str, listener: socket.socket) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    source = OneLeaf(new_leaf_context((leaf_path,), ("http/1.1",)))
    acceptor = TlsAcceptor(base, source, lambda *_: Echo(), lambda *_: None, loop, NoEvents())
    return await loop.create_server(acceptor, sock=listener, backlog=1024)


def run_until_killed(base: ssl.SSLContext, leaf_path: str, listener: socket.socket) -> None:
    async def run() -> None:
        await (await serve(base, leaf_path, listener)).serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def main(leaf_path: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = await serve(new_base_context(), leaf_path, listener)
    print(listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1]))

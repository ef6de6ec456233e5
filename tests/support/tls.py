"""A TLS server of our own on loopback, and what its tests need around it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certs import Certificate, InternalCA, PackReader, PackWriter, Seal, SealedFolder
from proxy.edge.certificates import Certificates
from proxy.edge.tls import TlsAcceptor, TlsConnection, TlsTransport
from proxy.errors import Code
from proxy.tickets import new_base_context
from proxy.wire.client_hello import ClientHello

NAME = "app.apps.localhost"
SECRET = bytes(range(32))


class Events:
    """Records what the layer counts."""

    def __init__(self) -> None:
        self.handshakes: list[tuple[str, bool, float]] = []
        self.errors: list[tuple[Code, str | None, str]] = []
        self.error_came = asyncio.Event()
        self.unfinished = 0

    def on_handshake(self, version: str, resumed: bool, seconds: float) -> None:
        self.handshakes.append((version, resumed, seconds))

    def on_error(self, code: Code, server_name: str | None, detail: str, peer: Any) -> None:
        self.errors.append((code, server_name, detail))
        self.error_came.set()

    def on_connected(self, peer: Any) -> bool:
        return True

    def on_unfinished(self, peer: Any) -> None:
        self.unfinished += 1

    @property
    def codes(self) -> list[Code]:
        return [code for code, _, _ in self.errors]


class Echo(asyncio.Protocol):
    """Sends back what comes, under back-pressure both ways; records its life."""

    def __init__(self) -> None:
        self.received = 0
        self.writing_paused = False
        self.most_buffered = 0
        self.got_eof = False
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.transport: TlsTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, TlsTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.transport.write(data)
        self.most_buffered = max(self.most_buffered, self.transport.get_write_buffer_size())

    def pause_writing(self) -> None:
        self.writing_paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.writing_paused = False
        self.transport.resume_reading()

    def eof_received(self) -> bool:
        self.got_eof = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


def make_authority(folder: Path) -> InternalCA:
    authority = InternalCA(SealedFolder(folder / "certs", Seal(SECRET)), folder / "certs" / "ca.pem", time.time)
    authority.open()
    return authority


@dataclass
class Server:
    """A listening TlsAcceptor with its parts within reach."""

    acceptor: TlsAcceptor
    port: int
    ca_path: Path
    events: Events
    certificates: Certificates
    authority: InternalCA
    pack: PackWriter
    inners: list[Any] = field(default_factory=list)
    hellos: list[ClientHello] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    hello_came: asyncio.Event = field(default_factory=asyncio.Event)

    def client_context(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca_path)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context

    def issue(self, name: str) -> Certificate:
        certificate = self.authority.issue(name)
        self.pack.append(name, certificate.chain_pem, certificate.key_pem)
        return certificate

    async def connect(
        self, name: str = NAME, version: ssl.TLSVersion | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.client_context(version), server_hostname=name
        )


@asynccontextmanager
async def serve(
    folder: Path,
    inner: Callable[[], asyncio.Protocol] = Echo,
    on_hello: Callable[[ClientHello, Any], bool | None] | None = None,
    names: tuple[str, ...] = (NAME,),
    **settings: float,
) -> AsyncIterator[Server]:
    loop = asyncio.get_running_loop()
    authority = make_authority(folder)
    pack = PackWriter(folder / "certificates", SECRET)
    reader = PackReader(folder / "certificates", SECRET)
    events = Events()
    server: Server

    def make_inner(transport: TlsTransport, hello: ClientHello) -> asyncio.Protocol:
        made = inner()
        server.inners.append(made)
        connections[:] = [one for one in connections if one._outer is not transport._outer]
        return made

    def hear(hello: ClientHello, peer: Any) -> ssl.SSLContext | None:
        server.hellos.append(hello)
        server.hello_came.set()
        is_old = on_hello is not None and on_hello(hello, peer)
        return acceptor.old_base() if is_old else None

    certificates = Certificates(reader, lambda name: server.asked.append(name), time.monotonic)
    acceptor = TlsAcceptor(new_base_context(), certificates, make_inner, hear, loop, events, **settings)
    connections: list[TlsConnection] = []  # whose handshake is not over

    def accept() -> TlsConnection:
        connections.append(acceptor())
        return connections[-1]

    listening = await loop.create_server(accept, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    server = Server(acceptor, port, folder / "certs" / "ca.pem", events, certificates, authority, pack)
    for name in names:
        server.issue(name)
    certificates.refresh()
    try:
        yield server
    finally:
        listening.close()
        for connection in connections:
            connection._outer.abort()
        for one in server.inners:
            one.transport.abort()
            await one.lost
        await asyncio.sleep(0.02)  # the loop closes the handles of what was aborted
        pack.close()
        reader.close()

"""Accepting connections: on which port, with TLS or without, and how many.

One `Listener` per public port and bind address of this worker's slot. The kind of port follows from the apps' handlers;
where some apps take TLS and others plain HTTP on one public port, the first byte tells (22 opens a TLS record).
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from proxy.clock import unix
from proxy.decide.wake import choose_to_wake
from proxy.edge.downstream import HttpConnection, plain_ip
from proxy.edge.tls import ACME_TLS, CertificateSource, TlsAcceptor, TlsConnection, TlsTransport
from proxy.errors import Code, ProxyError
from proxy.model import WakeOn
from proxy.state import (
    W_ACCEPTED,
    W_REFUSED,
    W_SHED_CONNECTIONS,
    W_SOURCE_REFUSED,
    W_TLS_ERRORS,
    W_TLS_HANDSHAKES,
    W_TLS_RESUMED,
    W_TLS_TIME_US,
)
from proxy.wire.client_hello import PROTOCOL_VERSION, TLS_1_3, ClientHello, HelloError

if TYPE_CHECKING:
    import ssl

    from proxy.edge.context import EdgeContext
    from proxy.edge.table import AppView

BACKLOG = 4096


class Gate:
    """How many client connections a worker may have, over all its listeners."""

    __slots__ = ("_closed", "limit", "open")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open = 0
        self._closed: asyncio.Event = asyncio.Event()

    def enter(self) -> None:
        self.open += 1

    def leave(self) -> None:
        self.open -= 1
        if not self.open:
            self._closed.set()

    async def wait_empty(self) -> None:
        """Return when no client connection is open any more."""
        while self.open:
            self._closed.clear()
            await self._closed.wait()


class Listener:
    """A listening socket and the connections that came through it."""

    def __init__(
        self,
        edge: EdgeContext,
        gate: Gate,
        public_port: int,
        sock: socket.socket,
        base_context: ssl.SSLContext | None,
        certificates: CertificateSource,
    ) -> None:
        self._edge = edge
        self._gate = gate
        self._socket = sock
        self.public_port = public_port
        self.connections: set[HttpConnection] = set()
        self._server: asyncio.Server | None = None
        self._acceptor: TlsAcceptor | None = None
        if base_context is not None:
            self._acceptor = TlsAcceptor(
                base_context,
                certificates,
                self._after_handshake,
                self._on_hello,
                edge.wheel,
                self,
                handshake_timeout_s=edge.settings.handshake_timeout_s,
            )

    async def start(self) -> None:
        self._server = await self._edge.loop.create_server(self._accept, sock=self._socket, backlog=BACKLOG)

    def stop(self) -> None:
        """Accept no more. What waits in the kernel's queue is another process's, or the next worker's, to take."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def drain(self, linger_s: float = 0.0) -> None:
        for connection in list(self.connections):
            connection.drain(linger_s)

    def end_tunnels(self) -> None:
        for connection in list(self.connections):
            connection.end_tunnel()

    # --- accepting

    def _accept(self) -> asyncio.Protocol:
        edge = self._edge
        if self._gate.open >= self._gate.limit:
            edge.count(W_REFUSED)
            return _Refused()
        if edge.sheds_connections:
            edge.count(W_SHED_CONNECTIONS)
            return _Refused()
        edge.count(W_ACCEPTED)
        kind = edge.table.port_kind(self.public_port)
        if kind == "plain" or self._acceptor is None:
            return self.plain()
        if kind == "tls":
            return self.tls()
        return _Sniffer(self)

    def plain(self) -> HttpConnection:
        self._gate.enter()
        return HttpConnection(self._edge, self, False, None)

    def tls(self) -> TlsConnection:
        assert self._acceptor is not None
        self._gate.enter()
        return self._acceptor()

    def admits(self, ip: str) -> bool:
        """Count a connection with its source; whether that may have it. `on_closed` must follow in any case.

        One that was reset before it was accepted has no address any more, but can have brought a whole request: that
        would reach the app as nobody's, past what limits its sender.
        """
        if not ip:
            return False
        if self._edge.sources.enter(ip):
            return True
        self._edge.count(W_SOURCE_REFUSED)
        return False

    def hand_on(self, ip: str) -> None:
        """The protocol that asks next to be let in has the connection of this one, which was."""
        self._gate.leave()
        self._edge.sources.hand_on(ip)

    def on_closed(self, ip: str) -> None:
        """A connection has ended that had come as far as HTTP."""
        self._gate.leave()
        self._edge.sources.leave(ip)

    def on_rejected(self, connection: HttpConnection, error: ProxyError) -> None:
        """Bytes came that made no request; the connection has answered."""
        self._edge.log_rejected(connection.client_ip, connection.is_tls, self.public_port, error)

    # --- TLS

    def _on_hello(self, hello: ClientHello, peer: Any) -> ssl.SSLContext | None:
        """Refuse names that nobody serves here; start the app that a name means if it sleeps.

        Returns what to offer where the app's port has nothing above TLS 1.2.
        """
        if hello.alpn == ACME_TLS:  # a CA looks: it wakes nobody, and the name may have no app on this port
            self._count_handshake(plain_ip(peer))
            return None
        app = self._edge.table.find(hello.server_name or "")
        port = app.ports.get(self.public_port) if app is not None else None
        is_new = app is None and self._edge.settings.on_demand and hello.server_name is not None
        if not is_new and (app is None or port is None or not port.tls):
            raise ProxyError(Code.TLS_NO_CERTIFICATE, detail=f"no app serves {hello.server_name} with TLS here")
        ip = plain_ip(peer)
        self._count_handshake(ip)
        if app is None or port is None:
            return None  # control decides, when the certificate is asked for
        if app.gate is not None and not app.gate.handshake(ip, self._edge.wheel.now):
            raise ProxyError(Code.TLS_RATE_SOURCE, detail=f"{ip} begins handshakes more often than {app.name} allows")
        versions = port.record.tls_versions
        if versions == ("TLSv1.3",) and TLS_1_3 not in hello.versions:
            raise HelloError(PROTOCOL_VERSION, f"{app.name} speaks TLS 1.3 alone, the client does not")
        assert self._acceptor is not None
        base = self._acceptor.old_base() if versions == ("TLSv1.2",) else None
        service = port.service
        if service.running or not service.record.autostart or app.record.wake_on is not WakeOn.HELLO:
            return base
        if not app.wake_filter.ignores_source(ip) and not (app.gate is not None and app.gate.denies(ip)):
            self._hint(app, service.record.processes, ip)
        return base

    def _count_handshake(self, ip: str) -> None:
        if not self._edge.sources.may_shake_hands(ip):
            self._edge.count(W_SOURCE_REFUSED)
            raise ProxyError(Code.TLS_RATE_SOURCE, detail=f"{ip} begins handshakes more often than the node allows")

    def _hint(self, app: AppView, groups: tuple[str, ...], source: str) -> None:
        choice = choose_to_wake((one.record for one in app.machines.values()), groups, unix())
        if isinstance(choice, str):
            self._edge.waker.hint(app, choice, source)

    def _after_handshake(self, transport: TlsTransport, hello: ClientHello) -> asyncio.Protocol:
        app = self._edge.table.find(hello.server_name or "")
        return HttpConnection(self._edge, self, True, app.record.name if app is not None else None)

    def on_handshake(self, version: str, resumed: bool, seconds: float) -> None:
        edge = self._edge
        edge.count(W_TLS_HANDSHAKES)
        edge.count(W_TLS_TIME_US, int(seconds * 1_000_000))
        if resumed:
            edge.count(W_TLS_RESUMED)

    def on_connected(self, peer: Any) -> bool:
        return self.admits(plain_ip(peer))

    def on_unfinished(self, peer: Any) -> None:
        self.on_closed(plain_ip(peer))

    def on_error(self, code: Code, server_name: str | None, detail: str, peer: Any) -> None:
        self._edge.count(W_TLS_ERRORS)
        self._edge.log_failed_tls(plain_ip(peer), self.public_port, server_name, code, detail)


class _Refused(asyncio.Protocol):
    """More than is served: closed before a byte is read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Sniffer(asyncio.Protocol):
    """Waits for the first byte of a connection to a port on which both TLS and plain HTTP are spoken."""

    __slots__ = ("_ip", "_listener", "_timer", "_transport")

    _transport: asyncio.Transport

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport, but has its methods
        edge = self._listener._edge
        self._listener._gate.enter()
        self._ip = plain_ip(transport.get_extra_info("peername"))
        if not self._listener.admits(self._ip):
            self._transport.abort()
        self._timer = edge.wheel.call_later(edge.settings.handshake_timeout_s, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        self._timer.cancel()
        self._listener.hand_on(self._ip)
        inner = self._listener.tls() if data[:1] == b"\x16" else self._listener.plain()
        self._transport.set_protocol(inner)
        inner.connection_made(self._transport)
        inner.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._listener.on_closed(self._ip)

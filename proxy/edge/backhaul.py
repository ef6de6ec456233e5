"""The listener for other edges: requests that they send on, and what their controls tell ours.

One listener a worker, TLS 1.3, both sides with a certificate of the cluster's CA. What the ALPN names is spoken:

    wakefront/1           requests, HTTP/1.1 with the field `wakefront-hop` (wire/backhaul.py): a BackhaulConnection
    wakefront-control/1   control to control: relayed, decrypted, to a Unix socket of our control's
    wakefront-join/1      a node that does not belong to the fleet yet, and shows no certificate: relayed likewise

A request that comes this way has passed the access rules, redirects and steering of the edge that its client reached;
here it is served by a machine of this node, or refused with a word about why (Exchange.run_for_peer).
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from proxy.clock import spawn
from proxy.decide.headers import SENT_ON_RULES, answer_to_peer
from proxy.descriptors import adopt
from proxy.edge.downstream import HttpConnection, plain_ip
from proxy.edge.flow import ReadGate
from proxy.edge.peer_tls import ALPN, ALPN_CONTROL, ALPN_JOIN
from proxy.edge.table import PortView
from proxy.edge.tls import TlsAcceptor, TlsTransport, Waiter
from proxy.errors import Code, ProxyError, Source
from proxy.process import unix_address
from proxy.wire.backhaul import FIELD, HopError, Refusal, parse_hop, refused_value
from proxy.wire.client_hello import NO_APPLICATION_PROTOCOL, ClientHello, HelloError
from proxy.wire.http1 import Limits, RequestReader, ResponseHead

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext
    from proxy.edge.exchange import Exchange

PEER_IDLE_S: Final = 120.0  # longer than the other edge keeps a connection (upstream.PEER_IDLE_S)
MAX_CONNECTIONS = 4_096  # of all peers, in a worker
MAX_RELAYS: Final = 256  # of those, to control
MAX_JOINING: Final = 8  # of those, of nodes that nobody knows yet
RELAY_HIGH: Final = 256 * 1024
_CONTROL_WAIT_S: Final = 5.0
_JOIN_S: Final = 60.0  # and then a node that joins has failed
_LIMITS: Final = Limits(max_head_bytes=131_072, max_headers=250, max_target_bytes=65_536)
_KNOWN: Final = frozenset({ALPN, ALPN_CONTROL, ALPN_JOIN})

log = logging.getLogger("wakefront.backhaul")


class BackhaulIdentity:
    """The contexts in which this node shows its certificate: `mutual` wants the peer's, `joining` does not.

    `judge` says which node a certificate (DER) that was verified is of; ValueError, with the reason, if it is of none.
    """

    __slots__ = ("joining", "judge", "mutual")

    def __init__(self, mutual: ssl.SSLContext, joining: ssl.SSLContext, judge: Callable[[bytes], str]) -> None:
        self.mutual = mutual
        self.joining = joining
        self.judge = judge


class _OneContext:
    """A CertificateSource with one certificate, whatever name is asked for: peers ask for the node's."""

    def __init__(self, identity: BackhaulIdentity) -> None:
        self.identity = identity

    def find(self, name: str | None) -> ssl.SSLContext | None:
        return self.identity.mutual

    def need(self, name: str | None, waiter: Waiter) -> None:
        waiter(self.identity.mutual, None)

    def forget(self, name: str | None, waiter: Waiter) -> None:
        pass

    def challenge(self, name: str | None) -> ssl.SSLContext:
        raise ProxyError(Code.TLS_NO_CERTIFICATE, detail="the backhaul answers no ACME challenges")


class BackhaulListener:
    """A listening socket for peers and the connections that came through it."""

    public_port: Final = 0  # none: clients do not come here

    def __init__(self, edge: EdgeContext, sock: socket.socket, run_dir: str) -> None:
        self._edge = edge
        self._socket = sock
        self._run_dir = run_dir
        self.connections: set[HttpConnection] = set()
        self._relays: set[_Relay] = set()
        self._joining = 0
        self._open = 0
        self._server: asyncio.Server | None = None
        self._is_stopped = False
        self._identity: BackhaulIdentity | None = None
        self._acceptor: TlsAcceptor | None = None

    async def set_identity(self, identity: BackhaulIdentity) -> None:
        """Accept, with this certificate: the first, or a renewed one for connections that come from now on."""
        is_first = self._identity is None
        self._identity = identity
        self._acceptor = TlsAcceptor(
            identity.mutual, _OneContext(identity), self._after_handshake, self._on_hello, self._edge.wheel, self,
            handshake_timeout_s=self._edge.settings.handshake_timeout_s,
        )  # fmt: skip
        if is_first and not self._is_stopped:
            self._server = await self._edge.loop.create_server(self._accept, sock=self._socket, backlog=1024)

    def stop(self) -> None:
        self._is_stopped = True
        if self._server is not None:
            self._server.close()
            self._server = None

    def drain(self, linger_s: float = 0.0) -> None:
        for connection in list(self.connections):
            connection.drain(linger_s)

    def end_tunnels(self) -> None:
        for connection in list(self.connections):
            connection.end_tunnel()
        for relay in list(self._relays):
            relay.abort()

    def _accept(self) -> asyncio.Protocol:
        if self._open >= MAX_CONNECTIONS:
            return _Refused()
        self._open += 1
        assert self._acceptor is not None
        return self._acceptor()

    # --- TLS

    def _on_hello(self, hello: ClientHello, peer: Any) -> ssl.SSLContext | None:
        offered = frozenset(one.decode("latin-1") for one in hello.alpn)
        if not offered & _KNOWN:
            raise HelloError(NO_APPLICATION_PROTOCOL, "not an edge of ours: no ALPN that the backhaul speaks")
        return self._identity.joining if self._identity is not None and offered == {ALPN_JOIN} else None

    def _after_handshake(self, transport: TlsTransport, hello: ClientHello) -> asyncio.Protocol:
        tls = transport.get_extra_info("ssl_object")
        spoken = tls.selected_alpn_protocol()
        address = plain_ip(transport.get_extra_info("peername"))
        if spoken == ALPN_JOIN:
            if self._joining >= MAX_JOINING:
                return self._turned_away(address, "too many nodes join at once")
            return self._relay(ALPN_JOIN, "", address, b"")
        der = tls.getpeercert(True) or b""
        try:
            node = self._identity.judge(der) if self._identity is not None else ""
        except ValueError as error:
            return self._turned_away(address, str(error))
        if spoken == ALPN_CONTROL:
            return self._relay(ALPN_CONTROL, node, address, der)
        if spoken != ALPN:
            return self._turned_away(address, "it names no protocol of ours")
        return BackhaulConnection(self._edge, self, node)

    def _turned_away(self, address: str, why: str) -> asyncio.Protocol:
        log.warning("a peer at %s was turned away: %s", address, why)
        return _TurnedAway(self)

    def _relay(self, alpn: str, node: str, address: str, der: bytes) -> asyncio.Protocol:
        if len(self._relays) >= MAX_RELAYS:
            return self._turned_away(address, "too many of its kind")
        said = {"alpn": alpn, "peer": node, "from": address, "certificate": base64.b64encode(der).decode("ascii")}
        preface = json.dumps(said).encode() + b"\n"
        relay = _Relay(self, preface, self._run_dir, is_joining=alpn == ALPN_JOIN)
        self._relays.add(relay)
        self._joining += alpn == ALPN_JOIN
        return relay

    def on_relay_closed(self, relay: _Relay) -> None:
        self._relays.discard(relay)
        self._joining -= relay.is_joining
        self._open -= 1

    def on_handshake(self, version: str, resumed: bool, seconds: float) -> None:
        pass

    def on_connected(self, peer: Any) -> bool:
        return True

    def on_unfinished(self, peer: Any) -> None:
        self._open -= 1

    def on_error(self, code: Code, server_name: str | None, detail: str, peer: Any) -> None:
        log.warning("a connection from %s to the backhaul failed: %s", plain_ip(peer), detail)

    # --- downstream.Acceptor

    def admits(self, ip: str) -> bool:
        return True

    def on_closed(self, ip: str) -> None:
        self._open -= 1

    def on_rejected(self, connection: HttpConnection, error: ProxyError) -> None:
        assert isinstance(connection, BackhaulConnection)
        log.warning("node %s sent what is no request: %s", connection.node, error)


class BackhaulConnection(HttpConnection):
    """A connection over which another edge sends requests, one at a time."""

    __slots__ = ("node",)

    def __init__(self, edge: EdgeContext, listener: BackhaulListener, node: str) -> None:
        super().__init__(edge, listener, True, None)
        self.node = node
        self._reader = RequestReader(self, _LIMITS, SENT_ON_RULES)

    def _idle_s(self) -> float:
        return PEER_IDLE_S

    def _begin(self, exchange: Exchange) -> None:
        noted = exchange.head.noted
        try:
            if len(noted) != 1 or noted[0][0] != FIELD:
                raise HopError("not exactly one")
            hop = parse_hop(noted[0][1])
        except HopError as error:
            log.warning("node %s sent a request whose field wakefront-hop is wrong: %s", self.node, error)
            exchange.refuse(ProxyError(Code.HOP_INVALID, Source.DOWNSTREAM, detail=str(error)))
            return
        self.client_ip = hop.client_ip
        self.public_port = hop.port
        exchange.run_for_peer(hop)

    def identity(self, minor: int, keep: bool) -> bytes:
        return b""  # the edge that sent it on has written it

    def probe(self) -> None:
        """Who sends it on looks after its client."""

    def send_go(self) -> None:
        self._out.append(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.flush()

    def send_head(self, head: ResponseHead, port: PortView, request_id: bytes, framing: bytes, close: bool) -> None:
        self._out.append(answer_to_peer(head, self._machine(), framing, self._connection_field(close)))

    def send_switch(self, head: ResponseHead, port: PortView, request_id: bytes) -> None:
        upgrade = b"connection: upgrade\r\nupgrade: " + head.upgrade + b"\r\n"
        self._out.append(answer_to_peer(head, self._machine(), b"", upgrade))
        self.flush()

    def send_answer(self, status: int, fields: tuple[tuple[bytes, bytes], ...], body: bytes, request_id: bytes) -> None:
        """Our own answers are refusals, but for the page that a browser is shown while an app starts."""
        exchange = self._exchange
        if exchange is None or exchange.code is None or exchange.code is Code.WAKE_PAGE:
            super().send_answer(status, fields, body, request_id)
            return
        after = next((int(value) for name, value in fields if name == b"retry-after"), None)
        value = refused_value(Refusal(exchange.code.value, exchange.sent_ns == 0, after, exchange.detail))
        self._out.append(
            b"HTTP/1.1 %d Refused\r\nwakefront-refused: %b\r\ncontent-length: 0\r\n%b\r\n"
            % (status, value, self._connection_field(not exchange.body_done))
        )

    def _machine(self) -> str:
        exchange = self._exchange
        return exchange.served_by if exchange is not None else ""


class _Refused(asyncio.Protocol):
    """More than is served: closed before a byte is read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _TurnedAway(asyncio.Protocol):
    """Whoever it is, it is not one of ours."""

    def __init__(self, listener: BackhaulListener) -> None:
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.on_closed("")


class _Relay(asyncio.Protocol):
    """A peer's connection to our control, both ways, each pausing the other. Ends when either does."""

    def __init__(self, listener: BackhaulListener, preface: bytes, run_dir: str, is_joining: bool) -> None:
        self._listener = listener
        self._preface = preface
        self._run_dir = run_dir
        self.is_joining = is_joining
        self._control: _ToControl | None = None
        self._early: list[bytes] = []
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TlsTransport
        self.gate = ReadGate(self.transport)
        self.transport.set_write_buffer_limits(high=RELAY_HIGH)
        self.gate.pause()  # until control is there
        self._task = spawn(self._connect(), "relay-to-control")
        self._timer = asyncio.get_running_loop().call_later(_JOIN_S, self.abort) if self.is_joining else None

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(_CONTROL_WAIT_S):
                address = unix_address(self._run_dir, "peers.sock")
                try:
                    await loop.sock_connect(sock, address)
                finally:
                    if address.startswith("/proc/self/fd/"):
                        os.close(int(address.split("/")[4]))
        except (OSError, TimeoutError) as error:
            sock.close()
            log.warning("control takes no word from peers: %s", error)
            self.transport.close()
            return
        except BaseException:
            sock.close()
            raise
        _, self._control = await adopt(loop, lambda: _ToControl(self), sock)
        if self._is_over:
            self._control.transport.abort()
            return
        self._control.transport.write(self._preface)
        for piece in self._early:
            self._control.transport.write(piece)
        self._early.clear()
        self.gate.resume()

    def data_received(self, data: bytes) -> None:
        if self._control is not None:
            self._control.transport.write(data)
        else:
            self._early.append(data)  # of the read that ended the handshake: one at the most, reading has stopped

    def eof_received(self) -> bool:
        if self._control is not None and self._control.transport.can_write_eof():
            self._control.transport.write_eof()
            return True
        return False

    def pause_writing(self) -> None:
        if self._control is not None:
            self._control.gate.pause()

    def resume_writing(self) -> None:
        if self._control is not None:
            self._control.gate.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._task.cancel()
        if self._control is not None:
            self._control.transport.close()
        self._listener.on_relay_closed(self)

    def abort(self) -> None:
        self.transport.abort()


class _ToControl(asyncio.Protocol):
    """The other half of a relay."""

    def __init__(self, relay: _Relay) -> None:
        self._relay = relay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's has its methods
        self.gate = ReadGate(self.transport)
        self.transport.set_write_buffer_limits(high=RELAY_HIGH)

    def data_received(self, data: bytes) -> None:
        self._relay.transport.write(data)

    def eof_received(self) -> bool:
        self._relay.transport.close()
        return False

    def pause_writing(self) -> None:
        self._relay.gate.pause()

    def resume_writing(self) -> None:
        self._relay.gate.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._relay.transport.close()

"""TLS towards another edge: both sides show a certificate of the cluster's CA, ALPN says what is spoken.

The counterpart of tls.py for connections that we make. `PeerDialer` is the protocol of one connection up to the end of
its handshake; then it hands the outer transport to a TlsTransport, as an accepted connection does.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any, Final, cast

from proxy.edge.tls import TlsEnds, TlsTransport
from proxy.errors import Code

ALPN: Final = "wakefront/1"  # requests
ALPN_CONTROL: Final = "wakefront-control/1"  # what controls tell each other
ALPN_JOIN: Final = "wakefront-join/1"  # a node that does not belong to the fleet yet

_PIECE: Final = 8_192
log = logging.getLogger("wakefront.backhaul")


def tls_name(node: str) -> str:
    """The name in a node's certificate."""
    return f"{node}.node.wakefront"


class PeerEvents:
    """TLS towards peers is counted by whom it serves; what goes wrong is said in the log."""

    def on_connected(self, peer: Any) -> bool:
        return True

    def on_handshake(self, version: str, resumed: bool, seconds: float) -> None:
        pass

    def on_error(self, code: Code, server_name: str | None, detail: str, peer: Any) -> None:
        log.warning("the connection to %s (%s) broke: %s", server_name, peer, detail)

    def on_unfinished(self, peer: Any) -> None:
        pass


class PeerTls:
    """How connections to one node are made."""

    __slots__ = ("context", "ends", "node")

    def __init__(self, ends: TlsEnds, context: ssl.SSLContext, node: str) -> None:
        self.ends = ends
        self.context = context
        self.node = node

    def dialer(self, inner: asyncio.Protocol) -> PeerDialer:
        return PeerDialer(self.ends, self.context, self.node, inner)


class PeerDialer(asyncio.Protocol):
    """One connection to a peer, from connect to the end of its handshake, well or not: `done` is set then.

    Whoever waits for `done` bounds the time, and aborts the transport if it is over.
    """

    __slots__ = ("_ends", "_incoming", "_inner", "_is_over", "_name", "_object", "_outer", "_outgoing", "done")

    _outer: asyncio.Transport

    def __init__(self, ends: TlsEnds, context: ssl.SSLContext, node: str, inner: asyncio.Protocol) -> None:
        self._ends = ends
        self._name = tls_name(node)
        self._inner = inner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=False, server_hostname=self._name)
        self._is_over = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._outer = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self._shake(b"")

    def data_received(self, data: bytes) -> None:
        if not self._is_over:
            self._shake(data)

    def _shake(self, data: bytes) -> None:
        at = 0
        while True:
            if at < len(data):
                self._incoming.write(data[at : at + _PIECE])
                at += _PIECE
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                if at < len(data):
                    continue
                if self._outgoing.pending:
                    self._outer.write(self._outgoing.read())
                return
            except ssl.SSLError as error:
                if self._outgoing.pending:
                    self._outer.write(self._outgoing.read())  # OpenSSL's alert
                self._fail(ConnectionError(f"TLS with {self._name}: {_why(error)}"))
                return
            break
        if self._object.selected_alpn_protocol() != ALPN:
            self._fail(ConnectionError(f"{self._name} does not speak {ALPN}"))
            return
        self._is_over = True
        transport = TlsTransport(self._ends, self._outer, self._object, self._incoming, self._outgoing, self._name)
        self._outer.set_protocol(transport)
        if not self.done.done():
            self.done.set_result(None)
        transport.start(self._inner, data[at:])

    def _fail(self, error: OSError) -> None:
        self._is_over = True
        if not self.done.done():
            self.done.set_exception(error)
        self._outer.close()

    def abort(self) -> None:
        """Nobody waits for it any more."""
        self._is_over = True
        self._outer.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        # called only while the handshake is not over: afterwards the outer transport's protocol is another
        self._is_over = True
        if not self.done.done():
            self.done.set_exception(ConnectionResetError(f"{self._name} ended the connection during the handshake"))


def _why(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return error.reason or str(error)

"""The HTTP/1.1 connection with a client: framing, timers, keep-alive, pipelining. It is the Stream of its exchange.

Bytes of an answer gather in `_out` and leave in one write a turn. Requests that arrive while one is served wait, in
order, with reading paused; where one read holds many, its rest waits unread. A connection whose request body was not
read to its end is closed after the answer, but lingers a moment and throws away what still comes: a reset would destroy
the answer on its way (RFC 9112 §9.6).

    IDLE -> HEAD (first byte) -> EXCHANGE (head whole) -> IDLE | LINGER | TUNNEL -> CLOSED
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol, cast

from proxy.decide.headers import (
    REQUEST_RULES,
    identity_fields,
    interim_head,
    response_head,
    switching_head,
    trailer_block,
)
from proxy.edge.access import AccessGate
from proxy.edge.error_page import error_page
from proxy.edge.exchange import HELD_MAX_BYTES, Exchange
from proxy.edge.flow import ReadGate
from proxy.edge.relay import Tunnel
from proxy.edge.table import PortView
from proxy.edge.timers import NEVER
from proxy.edge.tls import TlsTransport
from proxy.errors import Code, ProxyError, http_status
from proxy.model import AppName
from proxy.state import A_CONNECTS, A_DISCONNECTS, W_CONNECTIONS
from proxy.wire.http1 import Headers, RequestHead, RequestReader, ResponseHead

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext

WRITE_HIGH: Final = 256 * 1024
WRITE_LOW: Final = 64 * 1024
MAX_PIPELINED: Final = 16  # requests that wait, after which no further slice of a read is looked at
A_TURN: Final = 32  # requests answered without waiting for anything, after which it is the turn of other connections
JOIN_BYTES: Final = 16 * 1024  # below this one joined write is cheaper than several
LINGER_S: Final = 2.0
CLOSE_S = 60.0  # a closing connection's last bytes get this long to leave
LINGER_BYTES: Final = 1024 * 1024
UPGRADE_HELD_BYTES: Final = 64 * 1024
# What a client that owes a body has to bring. Of an announced one: so many bytes a second, or such a part of it, on
# average over `BODY_WAIT_S`, or over the app's idle timeout if that is less. Of a chunked one, which may be a stream of
# small messages: so many bytes in each idle timeout.
BODY_WAIT_S: Final = 60.0
BODY_RATE: Final = 500
BODY_PARTS: Final = 16
STREAM_LEAST: Final = 64
_NO_LINGER: Final = struct.pack("ii", 1, 0)  # close(2) then resets (socket(7), SO_LINGER)
_TCP_CLOSE: Final = 7  # tcpi_state of a connection that was reset (linux/tcp_states.h)


class Transport(Protocol):
    """What a connection needs of its transport: uvloop's own, or the TLS layer's."""

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def write_eof(self) -> None: ...
    def can_write_eof(self) -> bool: ...
    def get_extra_info(self, name: str, default: object = None) -> object: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


class Acceptor(Protocol):
    """Whose connection it is: a listener."""

    @property
    def public_port(self) -> int: ...

    @property
    def connections(self) -> set[HttpConnection]: ...

    def admits(self, ip: str) -> bool: ...
    def on_closed(self, ip: str) -> None: ...
    def on_rejected(self, connection: HttpConnection, error: ProxyError) -> None: ...


class Phase(enum.Enum):
    IDLE = "idle"
    HEAD = "head"
    EXCHANGE = "exchange"
    TUNNEL = "tunnel"
    LINGER = "linger"
    CLOSED = "closed"


class _Queued:
    """A pipelined request whose turn has not come."""

    __slots__ = ("body", "ended", "head", "size", "trailers")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.body: list[bytes] = []
        self.size = 0  # of the body so far
        self.ended = False
        self.trailers: Headers = []


class HttpConnection(asyncio.Protocol):
    """One client connection. Satisfies `exchange.Stream` and `wire.http1.RequestSink`."""

    __slots__ = (
        "_answered", "_app_cells", "_broken", "_edge", "_entered", "_eof", "_exchange", "_gate", "_held",
        "_held_upgrade", "_identities", "_lingered", "_listener", "_local_ip", "_long_read", "_out", "_owed", "_phase",
        "_queue", "_queue_paused", "_reader", "_transport", "_tunnel", "_turn", "_unread", "_write_paused", "client_ip",
        "deadline", "is_tls", "public_port", "sni_app", "wheel_tick",
    )  # fmt: skip

    _transport: Transport
    _gate: ReadGate

    def __init__(self, edge: EdgeContext, listener: Acceptor, is_tls: bool, sni_app: AppName | None) -> None:
        self._edge = edge
        self._listener = listener
        self.public_port = listener.public_port
        self.is_tls = is_tls
        self.sni_app = sni_app
        self.client_ip = ""
        self._local_ip = ""
        self._identities: dict[tuple[int, bool], bytes] = {}
        self._reader = RequestReader(self, edge.limits, REQUEST_RULES)
        self._exchange: Exchange | None = None
        self._queue: deque[_Queued] | None = None
        self._queue_paused = False
        self._unread = b""  # of a read, behind the requests that wait; not without one
        self._held = 0  # bytes of that, and of the bodies of requests that wait
        self._broken: ProxyError | None = None
        self._eof = False  # the client sends no more
        self._held_upgrade: bytearray | None = None
        self._tunnel: Tunnel | None = None
        self._out: list[bytes] = []
        self._phase = Phase.IDLE
        self._write_paused = False
        self._lingered = 0
        self._owed = 0  # bytes of the body that have to come before its deadline moves
        self._app_cells = -1  # counters of the app whose request came first
        self._entered: AccessGate | None = None  # the gate that counts this connection
        self._turn = False  # inside data_received: a finished exchange need not look for the next
        self._answered = 0  # requests that began and ended in this turn of the loop
        self._long_read = False  # between read_begins and read_ends
        self.deadline = NEVER
        self.wheel_tick = 0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports have what Transport asks for
        self._gate = ReadGate(self._transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH, low=WRITE_LOW)
        peer = self._transport.get_extra_info("peername")
        local = self._transport.get_extra_info("sockname")
        self.client_ip = plain_ip(peer)
        self._local_ip = plain_ip(local)
        if not self.is_tls and not self._listener.admits(self.client_ip):  # TLS has asked before its handshake
            self._phase = Phase.CLOSED
            self._transport.abort()
        self._edge.count(W_CONNECTIONS)
        self._listener.connections.add(self)
        self._edge.wheel.arm(self, self._edge.settings.head_timeout_s)

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase is Phase.LINGER:
            self._linger(len(data))
            return
        if phase is Phase.CLOSED or self._broken is not None:
            return
        if self._unread:
            self._hold_unread(self._unread + data)
            return
        if self._exchange is not None and not self._exchange.body_done:
            self._exchange.cork()
        self._turn = True
        try:
            rest = self._reader.feed(data)
        except ProxyError as error:
            self._turn = False
            if not self._long_read:
                self._uncork()
            self._on_broken(error)
            if self._exchange is None and self._queue:  # their turn had not come
                self._edge.loop.call_soon(self._next)
            return
        finally:
            self._turn = False
        if not self._long_read:
            self._uncork()
        if rest:
            self._hold_unread(rest)
        if self._exchange is None and self._phase is not Phase.CLOSED and self._phase is not Phase.LINGER:
            if self._queue:
                self._serve_queue()
            else:
                self._after_turn()
                self._answered = 0

    def eof_received(self) -> bool:
        """The client sends no more. What it asked for is still answered."""
        self._eof = True
        if self._tunnel is not None:
            return self._tunnel.client_eof()
        exchange = self._exchange
        if exchange is None:
            return False
        if not exchange.body_done:
            self._exchange = None
            exchange.on_client_gone()
            return False
        self._broken = self._broken or ProxyError(Code.CLIENT_GONE)
        if exchange.is_in_line:
            self.probe()
        return not self.is_tls

    def connection_lost(self, error: Exception | None) -> None:
        self._phase = Phase.CLOSED
        self._edge.wheel.drop(self)
        self._edge.count(W_CONNECTIONS, -1)
        if self._app_cells >= 0:
            self._edge.cells[self._app_cells + A_DISCONNECTS] += 1
        self._listener.connections.discard(self)
        self._listener.on_closed(self.client_ip)
        if self._entered is not None:
            self._entered.leave(self.client_ip)
            self._entered = None
        exchange, self._exchange = self._exchange, None
        self._drop_waiting()
        self._out.clear()
        if exchange is not None:
            exchange.on_client_gone()
        if not self._turn:  # else the parser is on the stack
            self._reader.close()

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._exchange is not None:
            self._exchange.on_client_pause()
        self._set_deadline()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._exchange is not None:
            self._exchange.on_client_resume()
        elif self._queue and not self._turn and self._phase is not Phase.CLOSED:
            self._next()
        self._set_deadline()

    def on_deadline(self) -> None:
        if self._phase is Phase.HEAD and not self._queue:
            self._on_broken(ProxyError(Code.HEAD_TIMEOUT, detail="the request head did not arrive in time"))
        elif self._phase is Phase.EXCHANGE and not self._write_paused and self._exchange is not None:
            self._exchange.on_client_timeout()
        elif self._exchange is not None:
            self._exchange.on_client_gone(Code.IDLE_TIMEOUT)
            self._reset()
        elif self._phase is Phase.CLOSED:
            self._reset()
        else:
            self._close()

    # --- what the reader found

    def on_head(self, head: RequestHead) -> None:
        if self._phase is Phase.LINGER or self._phase is Phase.CLOSED:
            return
        # paused: its answer would pile up here
        if self._exchange is not None or self._queue or self._write_paused or self._answered >= A_TURN:
            self._enqueue(head)
            return
        self._start(head)

    def _start(self, head: RequestHead) -> None:
        self._phase = Phase.EXCHANGE
        self.deadline = NEVER
        exchange = Exchange(self._edge, self, head)
        exchange.corked = self._turn and head.length != 0
        self._exchange = exchange
        self._begin(exchange)
        if head.length and not exchange.ended:
            self._set_deadline()
        if self._app_cells < 0 and exchange.app is not None:
            self._app_cells = exchange.app.cells
            self._edge.cells[self._app_cells + A_CONNECTS] += 1

    def _begin(self, exchange: Exchange) -> None:
        exchange.run()

    def _idle_s(self) -> float:
        """How long it may rest between two requests."""
        return self._edge.settings.idle_timeout_s

    def read_begins(self) -> None:
        """From the TLS layer: all that it delivers until `read_ends` came in one read."""
        self._long_read = True

    def read_ends(self) -> None:
        self._long_read = False
        self._uncork()

    def _uncork(self) -> None:
        """The client's bytes of this turn have been read: what gathered of them for the machine goes there."""
        if self._exchange is not None and self._exchange.corked:
            self._exchange.uncork()

    def on_body(self, data: bytes) -> None:
        if self._queue:
            queued = self._queue[-1]
            queued.body.append(data)
            queued.size += len(data)
            self._hold(len(data))
        elif self._exchange is not None:
            self._exchange.on_body(data)
            self._owed -= len(data)
            if self._owed <= 0 or self.deadline == NEVER:  # else it has not earned more time
                self._set_deadline()
        elif self._phase is Phase.LINGER:
            self._linger(len(data))

    def on_end(self, trailers: Headers) -> None:
        if self._queue:
            self._queue[-1].ended = True
            self._queue[-1].trailers = trailers
        elif self._exchange is not None and not self._exchange.body_done:
            self._exchange.on_body_end(trailers)
            self._set_deadline()

    def on_upgrade_bytes(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.from_client(data)
            return
        if self._phase is Phase.LINGER:
            self._linger(len(data))
            return
        if self._held_upgrade is None:
            self._held_upgrade = bytearray()
        self._held_upgrade += data
        if len(self._held_upgrade) > UPGRADE_HELD_BYTES and not self._queue_paused:
            self._queue_paused = True
            self._gate.pause()

    def _enqueue(self, head: RequestHead) -> None:
        if self._queue is None:
            self._queue = deque()
        self._queue.append(_Queued(head))
        if len(self._queue) >= MAX_PIPELINED:
            self._reader.is_held = True
        if not self._queue_paused:
            self._queue_paused = True
            self._gate.pause()

    def _after_turn(self) -> None:
        """No request is being served after what was read: wait for one, or for the rest of its head."""
        if self._reader.is_between_requests:
            if self._phase is not Phase.IDLE:
                self._phase = Phase.IDLE
                self._edge.wheel.arm(self, self._idle_s())
        elif self._phase is not Phase.HEAD:
            self._phase = Phase.HEAD
            self._edge.wheel.arm(self, self._edge.settings.head_timeout_s)

    def _on_broken(self, error: ProxyError) -> None:
        """What the client sent can't be read on. Requests that were whole before are still answered."""
        if self._phase is Phase.LINGER or self._phase is Phase.CLOSED:
            return  # it has had its last answer
        exchange, queue = self._exchange, self._queue
        if queue and not queue[-1].ended and queue[-1].head.length:
            self._hold(-queue.pop().size)
        elif exchange is not None and not exchange.body_done:
            self._broken = error
            exchange.on_request_broken(error)
            return
        self._broken = error
        if exchange is None and not queue:
            self._reject(error)

    def _reject(self, error: ProxyError) -> None:
        """Answer bytes that made no request. There is no app to account it to."""
        self._phase = Phase.EXCHANGE
        self.send_answer(
            http_status(error.code),
            ((b"wakefront-error", error.code.value.encode()),),
            error_page(error),
            self._edge.new_request_id(),
        )
        self._listener.on_rejected(self, error)
        self.finish(close=True)

    # --- Stream: what the exchange sends

    def enter(self, gate: AccessGate) -> ProxyError | None:
        """Count the connection with the app that its first request is for; why it may not stay, else None."""
        if self._entered is not None:
            return None
        error = gate.enter(self.client_ip)
        if error is None:
            self._entered = gate
        return error

    def identity(self, minor: int, keep: bool) -> bytes:
        fields = self._identities.get((minor, keep))
        if fields is None:
            fields = self._identities[minor, keep] = identity_fields(
                self.client_ip, self._local_ip, self.public_port, self.is_tls, self._edge.region, minor, keep
            )
        return fields

    def probe(self) -> None:
        """Ask a client that sends no more whether it is still there: who has closed resets the connection at the first
        byte, who has only finished sending passes over a 100. Only before any byte of its answer."""
        if self._eof and not self.is_tls and self._exchange is not None and self._exchange.head.minor:
            self.flush()
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def has_left(self) -> bool:
        """Whether the client was asked, and has gone: then it is let go. Nothing is read any more that would tell."""
        if not self._eof:
            return False
        if not self._transport.is_closing():
            sock = cast(socket.socket, self._transport.get_extra_info("socket"))  # uvloop's, which has its methods
            if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_CLOSE:
                return False
            self._transport.abort()
        return True

    def send_interim(self, head: ResponseHead) -> None:
        self._out.append(interim_head(head))
        self.flush()
        self._set_deadline()

    def send_go(self) -> None:
        """A client waits for no edge's word."""

    def send_head(self, head: ResponseHead, port: PortView, request_id: bytes, framing: bytes, close: bool) -> None:
        self._out.append(
            response_head(head, port.rules, request_id, framing, self._edge.server, self._connection_field(close))
        )

    def _connection_field(self, close: bool) -> bytes:
        exchange = self._exchange
        ends = self._edge.draining or self._edge.is_crowded
        draining = ends and not self._queue and not self._unread  # what was received is still answered
        if close or exchange is None or not exchange.head.keep_alive or draining:
            if exchange is not None:
                exchange.close_after = True
            return b"connection: close\r\n"
        return b"" if exchange.head.minor else b"connection: keep-alive\r\n"

    def send_switch(self, head: ResponseHead, port: PortView, request_id: bytes) -> None:
        self._out.append(switching_head(head, port.rules, request_id, self._edge.server))
        self.flush()

    def send_data(self, data: bytes) -> None:
        self._out.append(data)

    def send_chunk(self, data: bytes) -> None:
        if data:
            self._out += (b"%x\r\n" % len(data), data, b"\r\n")

    def send_last_chunk(self, trailers: Headers) -> None:
        self._out.append(trailer_block(trailers))

    def send_answer(self, status: int, fields: tuple[tuple[bytes, bytes], ...], body: bytes, request_id: bytes) -> None:
        """A whole response of our own."""
        exchange = self._exchange
        close = exchange is None or not exchange.body_done or exchange.head.upgrade is not None
        parts = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Error"))]
        for name, value in fields:
            parts += (name, b": ", value, b"\r\n")
        if body and not any(name == b"content-type" for name, _ in fields):
            parts.append(b"content-type: text/plain; charset=utf-8\r\n")
        parts += (
            b"content-length: %d\r\nserver: " % len(body), self._edge.server, b"\r\nfly-request-id: ", request_id,
            b"\r\n", self._connection_field(close), b"\r\n", body,
        )  # fmt: skip
        self._out.append(b"".join(parts))

    def flush(self) -> None:
        """Write what has gathered."""
        out = self._out
        if not out:
            return
        transport = self._transport
        if len(out) == 1:
            data = out[0]
            out.clear()
            transport.write(data)
            return
        if len(out) == 2 and len(out[1]) <= JOIN_BYTES:  # a head and the whole of a small body: the usual answer
            data = out[0] + out[1]
            out.clear()
            transport.write(data)
            return
        if sum(map(len, out)) <= JOIN_BYTES:
            data = b"".join(out)
            out.clear()
            transport.write(data)
            return
        pieces = out[:]
        out.clear()
        for piece in pieces:
            transport.write(piece)

    def finish(self, close: bool) -> None:
        """The exchange is over; `close` if its connection can carry no other."""
        exchange, self._exchange = self._exchange, None
        if self._phase is Phase.CLOSED:
            return
        if self._tunnel is not None:
            self.flush()
            self._close()
            return
        if (
            close
            or (self._edge.draining and not self._queue and not self._unread)
            or (exchange is not None and (exchange.close_after or not exchange.head.keep_alive))
        ):
            self._close_after(exchange)
            return
        self.flush()
        if self._turn:
            self._answered += 1
        if self._queue:
            if not self._turn:
                self._next()
        elif self._broken is not None:
            self._finish_broken(self._broken)
        elif not self._turn:
            self._after_turn()

    def _finish_broken(self, error: ProxyError) -> None:
        if error.code is Code.CLIENT_GONE:
            self._close()
        else:
            self._reject(error)

    def _close_after(self, exchange: Exchange | None) -> None:
        """Close at once if the client owes us nothing, else let it read our answer first."""
        self._drop_waiting()
        if self._eof or (exchange is not None and self._is_whole(exchange)):
            asked = self._eof or exchange is None or not exchange.head.keep_alive  # it sends no more
            transport = self._transport
            if isinstance(transport, TlsTransport) and sum(map(len, self._out)) <= JOIN_BYTES:
                self._end_phase()
                data = b"".join(self._out)
                self._out.clear()
                transport.write_last(data, awaits_peer=not asked)
                return
            if asked or self.is_tls:
                self.flush()
                self._close()
                return
            # its next request may be on its way: closed, the socket would answer that with a reset
        self.flush()
        self._phase = Phase.LINGER
        self._held_upgrade = None
        while self._gate.pauses:
            self._gate.resume()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._edge.wheel.arm(self, LINGER_S)

    def _is_whole(self, exchange: Exchange) -> bool:
        """Whether the client owes nothing of this request, and has sent nothing behind it.

        Answered while its head is being read, it is whole too if its client has announced that nothing follows.
        """
        if not exchange.body_done or self._broken is not None or self._held_upgrade:
            return False
        head = exchange.head
        return self._reader.is_between_requests or (head.length == 0 and not head.keep_alive)

    def _linger(self, size: int) -> None:
        self._lingered += size
        if self._lingered > LINGER_BYTES and not self._gate.pauses:
            self._gate.pause()  # a reset could destroy the answer; what is left of LINGER_S ends it

    def _next(self) -> None:
        """In a new turn of the loop, serve the pipelined requests whose turn has come."""
        self._answered = 0
        if self._queue and self._exchange is None:
            self._serve_queue()

    def _serve_queue(self) -> None:
        while self._queue and self._exchange is None and self._phase is not Phase.CLOSED and not self._write_paused:
            if self._answered >= A_TURN:  # thousands may have come in one read: others wait no longer for them
                self._edge.loop.call_soon(self._next)
                return
            queued = self._queue.popleft()
            self._turn = True
            try:
                self._serve(queued)
                if self._unread and not self._queue:
                    self._read_on()
            finally:
                self._turn = False
                self._uncork()
        if self._exchange is not None or self._phase in (Phase.CLOSED, Phase.LINGER):
            return
        if self._queue:  # the client takes nothing: it has this long
            self._edge.wheel.arm(self, self._edge.settings.idle_timeout_s)
            return
        if self._broken is not None:
            self._finish_broken(self._broken)
            return
        self._after_turn()

    def _read_on(self) -> None:
        """None waits any more: look at what is left of the read."""
        self._resume_queue()  # what this brings comes behind what is unread
        data = self._unread
        self._hold_unread(b"")
        try:
            self._hold_unread(self._reader.feed(data))
        except ProxyError as error:
            self._on_broken(error)

    def _resume_queue(self) -> None:
        self._reader.is_held = False
        if self._queue_paused:
            self._queue_paused = False
            self._gate.resume()

    def _hold(self, size: int) -> None:
        """So many more bytes wait here, or fewer; they count with the bodies that are held for machines.

        Raises ProxyError (TOO_MANY_WAITERS) where that is too much. They are counted then, too.
        """
        self._held += size
        self._edge.held_bytes += size
        if size > 0 and self._edge.held_bytes > HELD_MAX_BYTES:
            detail = "too much is held for requests that wait"
            raise ProxyError(Code.TOO_MANY_WAITERS, detail=detail, retry_after_s=1)

    def _hold_unread(self, data: bytes) -> None:
        """This is what waits unread, in place of what did."""
        before, self._unread = len(self._unread), data
        try:
            self._hold(len(data) - before)
        except ProxyError as error:
            self._hold_unread(b"")
            self._on_broken(error)

    def _drop_waiting(self) -> None:
        """Nothing that waits here has its turn any more."""
        self._queue = None
        self._unread = b""
        self._hold(-self._held)

    def _serve(self, queued: _Queued) -> None:
        self._hold(-queued.size)
        if not self._queue and not self._unread:
            self._resume_queue()
        self._start(queued.head)
        exchange = self._exchange
        if exchange is None or exchange.head is not queued.head:
            return
        for piece in queued.body:
            exchange.on_body(piece)
        if queued.ended:
            exchange.on_body_end(queued.trailers)
        self._set_deadline()

    def abort(self, hard: bool) -> None:
        """The answer was broken off: end the connection so that the client sees it.

        `hard` where an orderly end would look like the end of the answer: what is still unsent is given up.
        """
        self._exchange = None
        self._drop_waiting()
        if self._phase is not Phase.CLOSED:
            self._phase = Phase.CLOSED
            self._edge.wheel.arm(self, CLOSE_S)
            self._reset() if self._write_paused or hard else self._transport.close()

    def pause_body(self) -> None:
        self._gate.pause()
        self._set_deadline()

    def resume_body(self) -> None:
        if self._gate.pauses:
            self._gate.resume()
        self._set_deadline()

    def open_tunnel(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._phase = Phase.TUNNEL
        self.deadline = NEVER
        held, self._held_upgrade = self._held_upgrade, None
        if held:
            tunnel.from_client(bytes(held))
        if self._eof:
            tunnel.client_eof()
        if self._queue_paused:
            self._queue_paused = False
            self._gate.resume()

    def end_output(self) -> bool:
        self.flush()
        if self.is_tls or not self._transport.can_write_eof() or self._transport.is_closing():
            return False
        self._transport.write_eof()
        return True

    # --- timers and the end

    def _set_deadline(self) -> None:
        """While a request is served, the client is on the clock only where it is the slow side."""
        if self._phase is not Phase.EXCHANGE or self._exchange is None:
            return
        exchange = self._exchange
        owes_body = not exchange.body_done and not self._gate.pauses and not exchange.head.expects_continue
        if self._write_paused or owes_body:
            app = exchange.app
            seconds = app.record.limits.idle_timeout_s if app is not None else 60.0
            length = exchange.head.length
            if length < 0:
                self._owed = STREAM_LEAST
            else:
                seconds = min(seconds, BODY_WAIT_S) if owes_body else seconds
                self._owed = min(length // BODY_PARTS, int(seconds * BODY_RATE))
            self._edge.wheel.arm(self, seconds)
        else:
            self.deadline = NEVER

    def drain(self, linger_s: float) -> None:
        """Be done with this connection: after the answer under way, or that of a request on its way; if idle, now.

        An idle one may linger: a client that is just sending its next request is answered, and told to come anew.
        """
        is_idle = self._exchange is None and not self._queue and self._phase in (Phase.IDLE, Phase.HEAD)
        if is_idle and self._reader.is_between_requests:
            if linger_s:
                self._edge.wheel.arm(self, linger_s)
            else:
                self._close()

    def end_tunnel(self) -> None:
        if self._tunnel is not None:
            self._tunnel.going_away()

    def _reset(self) -> None:
        """End the connection at once, and what the kernel still holds for it: a peer that takes nothing would keep that
        for minutes, and one that gets the end of a broken answer in order would take it for whole."""
        sock = cast(socket.socket, self._transport.get_extra_info("socket"))  # uvloop's, which has its methods
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        except OSError:  # it has ended meanwhile
            pass
        self._transport.abort()

    def _close(self) -> None:
        if self._phase is not Phase.CLOSED:
            self._end_phase()
            self._transport.close()

    def _end_phase(self) -> None:
        self._phase = Phase.CLOSED
        self._edge.wheel.arm(self, CLOSE_S)


def plain_ip(address: object) -> str:
    ip = str(address[0]) if isinstance(address, tuple) and address else ""
    return ip.removeprefix("::ffff:") if "." in ip else ip


_REASONS: Final = {
    301: b"Moved Permanently", 400: b"Bad Request", 403: b"Forbidden", 404: b"Not Found", 413: b"Content Too Large",
    429: b"Too Many Requests", 408: b"Request Timeout",
    414: b"URI Too Long", 417: b"Expectation Failed", 421: b"Misdirected Request",
    431: b"Request Header Fields Too Large", 500: b"Internal Server Error", 501: b"Not Implemented",
    502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout", 505: b"HTTP Version Not Supported",
}  # fmt: skip

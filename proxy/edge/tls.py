"""TLS for client connections: memory BIOs inside a plain protocol, the ClientHello read before OpenSSL sees it.

    bytes -> ClientHello -> on_hello -> certificate -> handshake -> TlsTransport <-> inner protocol

`TlsAcceptor` is what a listener has; called, it makes the protocol of one connection. `TlsConnection` is that protocol
up to the end of the handshake; then it hands the outer transport to a `TlsTransport`, which is at once the outer
transport's protocol and the inner protocol's transport, so that a read passes through one Python frame.

States of a TlsConnection, each bounded by the one handshake timeout:

    HELLO -> CERTIFICATE -> HANDSHAKE -> (handed over)
    any of them -> REFUSED: an alert was sent, input is discarded until the peer ends or the shutdown timeout does

Why not the loop's own TLS: 8.5 us a request against 27, and this needs the hello before the certificate (libraries
notes; bench/results). Memory BIOs keep the largest size they ever had, so only small pieces are written into one
before it is drained.

Which name may be served, and what a hello starts, is `on_hello`'s matter; where certificates come from, the
`CertificateSource`'s. HTTP is unknown here, but for one line to those who speak it without TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import ssl
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, cast

from proxy import clock
from proxy.errors import Code, ProxyError
from proxy.tickets import new_base_context
from proxy.wire.client_hello import (
    ACCESS_DENIED,
    INTERNAL_ERROR,
    MAX_RAW_BYTES,
    UNRECOGNIZED_NAME,
    ClientHello,
    HelloError,
    HelloReader,
)

# The most that is written into a BIO before it is drained, ciphertext in and plaintext out. A BIO keeps a third more
# than the largest content it ever had. Measured, with no inner protocol's memory: a connection that has moved 10 MB
# each way and is idle weighs 42 KB, with 16 KiB for both 70 KB; 64 KB cost 7 us more each way (24 -> 31 us out,
# 35 -> 42 us in).
_PIECE_IN: Final = 8_192
_PIECE_OUT: Final = 6_144
_RECORD: Final = 16_384  # the most plaintext that one read of OpenSSL's gives
_STALL_TIMEOUT_S: Final = 30.0  # while closing, a peer that takes no byte of what is left for this long is given up
_ALERT: Final = b"\x15\x03\x03\x00\x02\x02"
_PLAIN_HTTP_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 47\r\nConnection: close\r\n\r\n"
    b"This port speaks TLS: use https:// in the URL.\n"
)
_HTTP_STARTS = (b"GET ", b"HEAD", b"POST", b"PUT ", b"DELE", b"OPTI", b"PATC", b"TRAC", b"CONN", b"PRI ")


class TimerHandle(Protocol):
    def cancel(self) -> None: ...


class Timers(Protocol):
    """What is needed of a clock: an event loop is one, a coarse wheel is cheaper."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> TimerHandle: ...


Waiter = Callable[[ssl.SSLContext | None, ProxyError | None], None]


class CertificateSource(Protocol):
    """Leaf contexts by name: at once for known names, by callback for others."""

    def find(self, name: str | None) -> ssl.SSLContext | None:
        """The context for a server name (None: the client named no host), if it needs no waiting."""

    def need(self, name: str | None, waiter: Waiter) -> None:
        """Get it; `waiter` is called once, perhaps before this returns, with a context or an error."""

    def forget(self, name: str | None, waiter: Waiter) -> None:
        """The waiter has gone; it is not called any more."""

    def challenge(self, name: str | None) -> ssl.SSLContext:
        """The context that proves a name to a CA (RFC 8737). Raises ProxyError where no such proof is under way."""


class TlsEvents(Protocol):
    """Who counts."""

    def on_connected(self, peer: Any) -> bool:
        """A connection was made, by this peername; False has it cut before a byte is read."""

    def on_handshake(self, version: str, resumed: bool, seconds: float) -> None: ...

    def on_error(self, code: Code, server_name: str | None, detail: str, peer: Any) -> None:
        """A handshake or connection failed. `peer` is the transport's peername."""

    def on_unfinished(self, peer: Any) -> None:
        """A connection has ended whose handshake was never over."""


OnHello = Callable[[ClientHello, Any], ssl.SSLContext | None]
ACME_TLS: Final = (b"acme-tls/1",)  # the whole ALPN list of a CA that looks for a challenge (RFC 8737 §3)


class TlsEnds:
    """What an open connection needs of whoever made it, at either end."""

    __slots__ = ("events", "shutdown_timeout_s", "timers")

    def __init__(self, timers: Timers, events: TlsEvents, shutdown_timeout_s: float) -> None:
        self.timers = timers
        self.events = events
        self.shutdown_timeout_s = shutdown_timeout_s


class TlsAcceptor:
    """What all connections of a listener share; calling it makes the protocol for one more.

    `on_hello(hello, peername)` is called as soon as the hello is read, before any other work; it refuses by raising
    ProxyError or HelloError, and may return a context that the connection is made from in the place of `base`.
    `inner_factory(transport, hello)` is called when the handshake is done.
    """

    __slots__ = ("_old_base", "base", "ends", "handshake_timeout_s", "inner_factory", "on_hello", "source")

    def __init__(
        self,
        base: ssl.SSLContext,
        source: CertificateSource,
        inner_factory: Callable[[TlsTransport, ClientHello], asyncio.Protocol],
        on_hello: OnHello,
        timers: Timers,
        events: TlsEvents,
        *,
        handshake_timeout_s: float = 10.0,
        shutdown_timeout_s: float = 2.0,
    ) -> None:
        self.ends = TlsEnds(timers, events, shutdown_timeout_s)
        self.base = base
        self._old_base: ssl.SSLContext | None = None
        self.source = source
        self.inner_factory = inner_factory
        self.on_hello = on_hello
        self.handshake_timeout_s = handshake_timeout_s

    def __call__(self) -> TlsConnection:
        return TlsConnection(self)

    def old_base(self) -> ssl.SSLContext:
        """For ports that offer TLS 1.2 alone; its tickets are this worker's own."""
        if self._old_base is None:
            self._old_base = new_base_context(ssl.TLSVersion.TLSv1_2)
        return self._old_base


class _State(enum.Enum):
    HELLO = enum.auto()
    CERTIFICATE = enum.auto()
    HANDSHAKE = enum.auto()
    REFUSED = enum.auto()


class TlsConnection(asyncio.Protocol):
    """One connection from accept to the end of its handshake."""

    __slots__ = (
        "_acceptor",
        "_base",
        "_hello",
        "_hello_at",
        "_incoming",
        "_object",
        "_outer",
        "_outgoing",
        "_peer",
        "_reader",
        "_received",
        "_state",
        "_timer",
    )

    _outer: asyncio.Transport
    _timer: TimerHandle
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    _object: ssl.SSLObject

    def __init__(self, acceptor: TlsAcceptor) -> None:
        self._acceptor = acceptor
        self._peer: Any = None
        self._state = _State.HELLO
        self._reader: HelloReader | None = HelloReader()
        self._hello: ClientHello | None = None
        self._base = acceptor.base
        self._hello_at = 0.0
        self._received = bytearray()  # what came while the certificate was waited for

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._outer = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self._peer = transport.get_extra_info("peername")
        if not self._acceptor.ends.events.on_connected(self._peer):
            self._state = _State.REFUSED
            self._outer.abort()
        self._timer = self._acceptor.ends.timers.call_later(self._acceptor.handshake_timeout_s, self._on_timeout)

    def data_received(self, data: bytes) -> None:
        match self._state:
            case _State.HANDSHAKE:
                self._handshake(data)
            case _State.HELLO:
                self._read_hello(data)
            case _State.CERTIFICATE:
                self._received += data
                if len(self._received) > MAX_RAW_BYTES:
                    self._refuse(Code.TLS_FAILED, INTERNAL_ERROR, "much data before our answer to the hello")
            case _State.REFUSED:
                pass

    def _read_hello(self, data: bytes) -> None:
        reader = self._reader
        assert reader is not None
        try:
            hello = reader.feed(data)
        except HelloError as unreadable:  # not `error`: compiled, one name has one type
            if bytes(reader.raw[:4]) in _HTTP_STARTS:
                self._end_with(_PLAIN_HTTP_ANSWER, Code.TLS_FAILED, "plain HTTP")
            else:
                self._refuse(Code.TLS_FAILED, unreadable.alert, str(unreadable))
            return
        if hello is None:
            return
        self._hello = hello
        self._hello_at = clock.monotonic()
        try:
            base = self._acceptor.on_hello(hello, self._peer)
            if base is not None:
                self._base = base
            if hello.alpn == ACME_TLS:
                self._start_handshake(self._acceptor.source.challenge(hello.server_name))
                return
            context = self._acceptor.source.find(hello.server_name)
        except ProxyError as error:
            self._refuse(error.code, _alert_for(error.code), error.detail)
            return
        except HelloError as unwanted:
            self._refuse(Code.TLS_FAILED, unwanted.alert, str(unwanted))
            return
        if context is not None:
            self._start_handshake(context)
        else:
            self._state = _State.CERTIFICATE
            self._acceptor.source.need(hello.server_name, self._on_certificate)

    def _on_certificate(self, context: ssl.SSLContext | None, error: ProxyError | None) -> None:
        if self._state is not _State.CERTIFICATE:
            return
        if context is not None:
            self._start_handshake(context)
        elif error is not None:
            self._refuse(error.code, _alert_for(error.code), error.detail)

    def _start_handshake(self, leaf: ssl.SSLContext) -> None:
        assert self._reader is not None
        first: bytes | bytearray = self._reader.raw
        if self._received:
            first = bytes(first) + self._received
        self._reader = None
        self._received = bytearray()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        # Made from the base context, whose ticket keys every worker has, and only then lent the leaf's certificate.
        self._object = self._base.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._object.context = leaf
        self._state = _State.HANDSHAKE
        self._handshake(first)

    def _handshake(self, data: bytes | bytearray) -> None:
        at = 0
        while at < len(data):
            self._incoming.write(data[at : at + _PIECE_IN] if len(data) > _PIECE_IN else data)
            at += _PIECE_IN
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                # OpenSSL has put its own alert into the BIO.
                self._end_with(self._outgoing.read(), Code.TLS_FAILED, error.reason or str(error))
                return
            if self._hello is not None and self._hello.alpn == ACME_TLS:
                self._end_challenge()
            else:
                self._hand_over(data[at:])
            return
        if self._outgoing.pending:
            self._outer.write(self._outgoing.read())

    def _hand_over(self, rest: bytes | bytearray) -> None:
        self._timer.cancel()
        hello, acceptor, tls = self._hello, self._acceptor, self._object
        assert hello is not None
        seconds = clock.monotonic() - self._hello_at
        acceptor.ends.events.on_handshake(tls.version() or "", bool(tls.session_reused), seconds)
        transport = TlsTransport(acceptor.ends, self._outer, tls, self._incoming, self._outgoing, hello.server_name)
        inner = acceptor.inner_factory(transport, hello)
        self._outer.set_protocol(transport)
        transport.start(inner, bytes(rest))

    def _end_challenge(self) -> None:
        """The CA has seen what it came for: nothing is exchanged over the connection (RFC 8737 §3)."""
        seconds = clock.monotonic() - self._hello_at
        self._acceptor.ends.events.on_handshake(
            self._object.version() or "", bool(self._object.session_reused), seconds
        )
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()  # leaves close_notify in the BIO, and wants the peer's
        self._part(self._outgoing.read())

    def _on_timeout(self) -> None:
        if self._state is not _State.REFUSED:
            self._leave_source()
            phase = self._state.name.lower()
            self._state = _State.REFUSED
            self._count(Code.TLS_TIMEOUT, f"still in phase {phase}")
        self._outer.abort()

    def _refuse(self, code: Code, alert: int, detail: str) -> None:
        self._end_with(_ALERT + bytes((alert,)), code, detail)

    def _end_with(self, last_words: bytes, code: Code, detail: str) -> None:
        self._part(last_words)
        self._count(code, detail)

    def _part(self, last_words: bytes) -> None:
        """Say why, end our side, and let the peer read it: closing at once would reset what it has not read yet."""
        self._leave_source()
        self._state = _State.REFUSED
        self._timer.cancel()
        self._received = bytearray()
        self._reader = None
        self._timer = self._acceptor.ends.timers.call_later(self._acceptor.ends.shutdown_timeout_s, self._on_timeout)
        if last_words:
            self._outer.write(last_words)
        if not self._outer.is_closing():
            self._outer.write_eof()

    def _count(self, code: Code, detail: str) -> None:
        name = self._hello.server_name if self._hello is not None else None
        self._acceptor.ends.events.on_error(code, name, detail, self._peer)

    def _leave_source(self) -> None:
        if self._state is _State.CERTIFICATE and self._hello is not None:
            self._acceptor.source.forget(self._hello.server_name, self._on_certificate)

    def eof_received(self) -> None:
        self._lost(Code.TLS_CANCELLED, "the client left during the handshake")

    def connection_lost(self, exc: Exception | None) -> None:
        # called only while the handshake is not over: afterwards the outer transport's protocol is another
        self._timer.cancel()
        self._acceptor.ends.events.on_unfinished(self._peer)
        self._lost(Code.TLS_IO, str(exc) if exc is not None else "closed")

    def _lost(self, code: Code, detail: str) -> None:
        """The connection has ended, or is about to. One that never sent a byte (a port scan) is no error."""
        if self._state is _State.REFUSED:
            return
        self._leave_source()
        is_silent = self._reader is not None and not self._reader.raw
        self._state = _State.REFUSED
        if not is_silent:
            self._count(code, detail)


def _alert_for(code: Code) -> int:
    if code is Code.TLS_NO_CERTIFICATE:
        return UNRECOGNIZED_NAME
    if code is Code.TLS_RATE_SOURCE:
        return ACCESS_DENIED
    return INTERNAL_ERROR


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """An open TLS connection: the outer transport's protocol and the inner protocol's transport.

    Reading stops as a whole: while the inner protocol has paused, nothing is decrypted and the outer transport is
    paused too; what one read had already brought is held, encrypted. It also stops while our answers to what the peer
    sends (key updates, for one) find the outer buffer above its mark.

    The end. `close` sends what is left and close_notify, ends the outer side and waits for the peer's end, so that
    data still on its way to us does not reset the connection before the peer has read ours. An end without
    close_notify reaches the inner protocol as ConnectionResetError; with it, as `eof_received`.
    """

    __slots__ = (
        "_closing",
        "_corked",
        "_decrypt",
        "_deliver",
        "_encrypt",
        "_ends",
        "_error",
        "_has_written",
        "_held",
        "_incoming",
        "_inner",
        "_inner_paused",
        "_left_at_tick",
        "_must_stop",
        "_object",
        "_outer",
        "_outer_write",
        "_outgoing",
        "_peer_ended",
        "_reading_paused",
        "_resume_scheduled",
        "_said_goodbye",
        "_server_name",
        "_stalled_s",
        "_timer",
        "_unsent",
        "_waits_for_writing",
        "_writing_paused",
    )

    _inner: asyncio.Protocol
    _deliver: Callable[[bytes], None]

    def __init__(
        self,
        ends: TlsEnds,
        outer: asyncio.Transport,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_name: str | None,
    ) -> None:
        self._ends = ends
        self._outer = outer
        self._outer_write = outer.write
        self._object = tls
        self._decrypt = tls.read
        self._encrypt = tls.write
        self._incoming = incoming
        self._outgoing = outgoing
        self._server_name = server_name
        self._held: memoryview | None = None  # ciphertext of the last read that was not decrypted because of a pause
        self._unsent = b""  # plaintext that OpenSSL cannot take in the middle of a key update
        self._error: Exception | None = None
        self._corked = False  # within data_received: its end writes once
        self._reading_paused = False
        self._resume_scheduled = False
        self._writing_paused = False
        self._inner_paused = False
        self._waits_for_writing = False
        self._peer_ended = False  # close_notify came, or nothing that matters does any more
        self._has_written = False  # the inner protocol, anything
        self._said_goodbye = False  # close_notify went
        self._closing = False
        self._must_stop = False  # any of: reading paused, waits for writing, closing
        self._timer: TimerHandle | None = None
        self._left_at_tick = 0
        self._stalled_s = 0.0

    def start(self, inner: asyncio.Protocol, rest: bytes) -> None:
        """Begin to pass data on; `rest` came in the same read as the end of the handshake."""
        self.set_protocol(inner)
        self._corked = True
        try:
            inner.connection_made(self)
        finally:
            self._corked = False
            if rest or self._incoming.pending:
                self._start_with(rest)
            elif self._outgoing.pending:
                self._flush()

    def _start_with(self, rest: bytes) -> None:
        """The first request came with the end of the handshake: TLS 1.3's ticket leaves with its answer.

        The client waits for no ticket. One write less is 5 us of some 500 (Envoy's library does the same).
        """
        if self._object.version() != "TLSv1.3" or len(rest) > _PIECE_IN or self._must_stop:
            self.data_received(rest)
            return
        self._incoming.write(rest)
        self._corked = True
        try:
            self._pass_on()
        finally:
            self._corked = False
            if self._has_written and self._outgoing.pending:
                self._flush()

    # the outer transport's protocol

    def data_received(self, data: bytes) -> None:
        incoming = self._incoming
        if len(data) > _PIECE_IN or self._held is not None or self._must_stop or self._peer_ended:
            self._receive_in_pieces(data)
            return
        incoming.write(data)
        self._corked = True
        try:
            self._pass_on()
        finally:
            self._corked = False
            if self._outgoing.pending:
                self._flush()

    def _pass_on(self) -> None:
        """Decrypt and deliver what is in the BIO, until it is empty, the inner protocol pauses, or the end."""
        incoming = self._incoming
        while incoming.pending and not self._must_stop:
            try:
                data = self._decrypt(_RECORD)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                data = b""
            except ssl.SSLError as error:
                self._fail(error)
                return
            if not data:
                self._on_close_notify()
                return
            self._deliver(data)
        if self._unsent and not self._closing:
            self._send_unsent()

    def _receive_in_pieces(self, data: bytes) -> None:
        if self._closing or self._peer_ended:
            return
        view = memoryview(data)
        if self._held is not None:
            # The outer transport is paused; what it delivers all the same is bounded by one read.
            view = memoryview(b"".join((self._held, view)))
            self._held = None
        # Several deliveries of one read: who is told so may write on what is in them as one.
        begins = getattr(self._inner, "read_begins", None)
        ends = getattr(self._inner, "read_ends", None)
        self._corked = True
        try:
            if begins is not None:
                begins()
            while not self._must_stop and not self._peer_ended:
                if self._incoming.pending:
                    self._pass_on()
                elif view:
                    self._incoming.write(view[:_PIECE_IN])
                    view = view[_PIECE_IN:]
                else:
                    break
        finally:
            if ends is not None:
                ends()
            self._corked = False
            if view and not self._closing and not self._peer_ended:
                self._held = view
            if self._outgoing.pending:
                self._flush()

    def _on_close_notify(self) -> None:
        self._peer_ended = True
        self._held = None
        wants_to_write = self._inner.eof_received()
        if self._said_goodbye or not wants_to_write:
            self.close()

    def _fail(self, error: ssl.SSLError) -> None:
        """A record that does not authenticate, an alert from the peer: OpenSSL's own alert, then the end."""
        self._error = error
        self._said_goodbye = True
        peer = self._outer.get_extra_info("peername")
        self._ends.events.on_error(Code.TLS_IO, self._server_name, error.reason or str(error), peer)
        self._begin_close()

    def eof_received(self) -> bool:
        if self._closing:
            return False
        if self._peer_ended:
            return True  # clean: it said so before; the inner protocol may still have to answer
        self._error = ConnectionResetError("the peer ended the connection without close_notify")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = self._must_stop = True
        self._held = None
        self._unsent = b""
        if self._timer is not None:
            self._timer.cancel()
        inner, self._inner = self._inner, _GONE  # no cycle is left for the collector
        self._deliver = _discard
        inner.connection_lost(self._error or exc)

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._tell_inner()

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._waits_for_writing:
            self._waits_for_writing = False
            self._must_stop = self._reading_paused or self._closing
            self._continue_reading()
        self._tell_inner()

    def _tell_inner(self) -> None:
        """There are two reasons to stop writing, and the inner protocol hears of each change once."""
        is_paused = self._writing_paused or bool(self._unsent)
        if is_paused != self._inner_paused:
            self._inner_paused = is_paused
            if is_paused:
                self._inner.pause_writing()
            else:
                self._inner.resume_writing()

    # the inner protocol's transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._said_goodbye or self._closing or not data:
            return
        self._has_written = True
        if self._unsent:
            self._unsent += data
            return
        if len(data) > _PIECE_OUT:
            self._write_in_pieces(memoryview(data))
            return
        if self._corked and self._outgoing.pending + len(data) > _PIECE_OUT:
            self._flush()
        try:
            self._encrypt(data)
        except ssl.SSLError as error:
            self._on_write_error(error, data)
            return
        if not self._corked:
            self._outer_write(self._outgoing.read())

    def write_last(self, data: bytes, awaits_peer: bool) -> None:
        """Write and close: the data and close_notify leave together.

        Without `awaits_peer`, for a peer that has sent all it will, the socket is closed behind them: what it still
        sends is its own close_notify, and the reset that answers that finds our bytes read.
        """
        self._corked = True
        try:
            self.write(data)
        finally:
            self._corked = False
            self._peer_ended = self._peer_ended or not awaits_peer
            self.close()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def _write_in_pieces(self, view: memoryview) -> None:
        # The BIO is drained after each record, the outer transport is given all of them at once.
        records = [self._outgoing.read()] if self._outgoing.pending else []
        try:
            for at in range(0, len(view), _PIECE_OUT):
                self._encrypt(view[at : at + _PIECE_OUT])
                records.append(self._outgoing.read())
        except ssl.SSLError as error:
            self._on_write_error(error, view[at:])
        self._outer.writelines(records)
        if self._corked:
            self._heed_outer()

    def _flush(self) -> None:
        """Write what OpenSSL has made. Above the outer buffer's mark, hear no more of a peer that makes us answer."""
        self._outer_write(self._outgoing.read())
        self._heed_outer()

    def _heed_outer(self) -> None:
        if self._writing_paused and not self._waits_for_writing and not self._closing:
            self._waits_for_writing = self._must_stop = True
            if not self._reading_paused:
                self._outer.pause_reading()

    def _on_write_error(self, error: ssl.SSLError, data: bytes | bytearray | memoryview) -> None:
        if not isinstance(error, ssl.SSLWantReadError):
            self._fail(error)
            return
        # OpenSSL is within a message of the peer's (a key update in two records): it writes again when it has the rest.
        self._unsent = bytes(data)
        self._tell_inner()

    def _send_unsent(self) -> None:
        data, self._unsent = self._unsent, b""
        self.write(data)
        self._tell_inner()

    def pause_reading(self) -> None:
        if not self._reading_paused and not self._closing:
            self._reading_paused = self._must_stop = True
            if not self._waits_for_writing:
                self._outer.pause_reading()

    def resume_reading(self) -> None:
        if self._reading_paused and not self._closing:
            self._reading_paused = False
            self._must_stop = self._waits_for_writing or self._closing
            self._continue_reading()

    def _continue_reading(self) -> None:
        if self._must_stop:
            return
        if self._corked or (self._held is None and not self._incoming.pending):
            self._outer.resume_reading()  # corked: the caller's loop goes on with what is held
        elif not self._resume_scheduled:
            # Never from within the inner protocol's own call: it would be entered twice.
            self._resume_scheduled = True
            asyncio.get_running_loop().call_soon(self._deliver_held)

    def _deliver_held(self) -> None:
        self._resume_scheduled = False
        if self._must_stop:
            return
        self._receive_in_pieces(b"")
        if not self._must_stop:
            self._outer.resume_reading()

    def is_reading(self) -> bool:
        return not self._reading_paused and not self._closing

    def close(self) -> None:
        if self._closing:
            return
        self._goodbye()
        self._begin_close()

    def write_eof(self) -> None:
        """End our side with close_notify; the peer's data still comes."""
        self._goodbye()
        if self._outgoing.pending:
            self._outer_write(self._outgoing.read())

    def can_write_eof(self) -> bool:
        return False  # many peers take close_notify for the end of both directions

    def _goodbye(self) -> None:
        if self._said_goodbye:
            return
        self._said_goodbye = True
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # it wants the peer's close_notify, for which we do not wait; ours is in the BIO

    def _begin_close(self) -> None:
        self._closing = self._must_stop = True
        self._held = None
        self._unsent = b""
        if self._outgoing.pending:
            self._outer_write(self._outgoing.read())
        if self._outer.is_closing():
            return
        if self._peer_ended:
            # It sends no more, so nothing of it can be lost.
            self._outer.close()
            self._watch_closing()
            return
        self._outer.write_eof()
        if self._reading_paused or self._waits_for_writing:
            self._outer.resume_reading()  # else its end is not seen
        self._watch_closing()

    def _watch_closing(self) -> None:
        self._left_at_tick = self._outer.get_write_buffer_size()
        self._timer = self._ends.timers.call_later(self._ends.shutdown_timeout_s, self._on_shutdown_tick)

    def _on_shutdown_tick(self) -> None:
        """The peer did not end. It gets more time only as long as it still takes what we had written before."""
        left = self._outer.get_write_buffer_size()
        tick = self._ends.shutdown_timeout_s
        self._stalled_s = self._stalled_s + tick if left == self._left_at_tick else 0.0
        if self._left_at_tick == 0 or self._stalled_s >= _STALL_TIMEOUT_S:
            self._outer.abort()
        else:
            self._watch_closing()

    def abort(self) -> None:
        self._closing = self._must_stop = True
        self._held = None
        self._outer.abort()

    def is_closing(self) -> bool:
        return self._closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        match name:
            case "ssl_object":
                return self._object
            case "server_name":
                return self._server_name
            case _:
                return self._outer.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._inner = cast(asyncio.Protocol, protocol)
        self._deliver = self._inner.data_received

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._outer.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._outer.get_write_buffer_size() + len(self._unsent)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._outer.get_write_buffer_limits()


def _discard(data: bytes) -> None:
    """What arrives after the end."""


_GONE: Final = asyncio.Protocol()

"""Connections to machines and to other edges: made, kept, and taken again only after a cleanly finished exchange.

A `Pool` serves one machine and internal port, or one peer. Services of type `requests` keep connections for about 4 s
of idleness (spec routing §5.2), below the 5 s at which common app servers close theirs; services of type `connections`
get a new one for each request. Those to peers are kept for long: each costs a handshake across the world.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from proxy import namespace
from proxy.clock import monotonic_ns, spawn
from proxy.decide.headers import PEER_RESPONSE_RULES, RESPONSE_RULES
from proxy.descriptors import adopt
from proxy.edge import table
from proxy.edge.flow import ReadGate
from proxy.edge.peer_tls import PeerTls
from proxy.edge.timers import NEVER, Call
from proxy.errors import Code, ProxyError, Retry, Source
from proxy.model import AppName, Endpoint, MachineId
from proxy.state import W_PEER_CONNECTS
from proxy.wire.http1 import FieldRules, Headers, Limits, ResponseHead, ResponseReader

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext

IDLE_S = 4.0
PEER_IDLE_S: Final = 100.0  # the other edge waits longer (backhaul.py)
CLOSE_S: Final = 2.0
MAX_IDLE: Final = 256
READ_HIGH: Final = 256 * 1024  # written to a machine and not yet taken by the kernel: the client is paused
READ_LOW: Final = 64 * 1024
JOIN_BYTES: Final = 16 * 1024  # below this one joined write is cheaper than a list of pieces
_LIMITS: Final = Limits(max_head_bytes=131_072, max_headers=200)


class Connecting(Protocol):
    """Who is told how the making of a connection ended."""

    def on_connected(self, connection: UpstreamConnection) -> None: ...
    def on_connect_failed(self, error: ProxyError) -> None: ...


class UpstreamUser(Connecting, Protocol):
    """Who an upstream connection works for: an exchange."""

    def on_response_head(self, head: ResponseHead) -> None: ...
    def on_response_body(self, data: bytes) -> None: ...
    def on_response_end(self, trailers: Headers) -> None: ...
    def on_upgrade_bytes(self, data: bytes) -> None: ...
    def on_upstream_read(self) -> None: ...
    def on_upstream_eof(self) -> bool: ...
    def on_upstream_failed(self, error: ProxyError) -> None: ...

    @property
    def may_be_sent_twice(self) -> bool: ...

    def on_upstream_pause(self) -> None: ...
    def on_upstream_resume(self) -> None: ...


class _Nobody:
    """Takes what is still read from a connection whose exchange has gone."""

    def on_response_head(self, head: ResponseHead) -> None:
        pass

    def on_response_body(self, data: bytes) -> None:
        pass

    def on_response_end(self, trailers: Headers) -> None:
        pass

    def on_upgrade_bytes(self, data: bytes) -> None:
        pass


_NOBODY: Final = _Nobody()


class UpstreamConnection(asyncio.Protocol):
    """One connection to a machine, HTTP/1.1, one exchange at a time."""

    __slots__ = (
        "_corked", "_made", "_out", "_reader", "_user", "_wheel", "answered", "deadline", "gate", "pool", "reused",
        "transport", "wheel_tick",
    )  # fmt: skip

    transport: asyncio.Transport
    gate: ReadGate

    def __init__(self, pool: Pool, made: Callable[[UpstreamConnection], None]) -> None:
        self.pool = pool
        self._made: Callable[[UpstreamConnection], None] | None = made
        self._wheel = pool.edge.wheel
        self._user: UpstreamUser | None = None
        self.reused = False
        self._corked = False  # what is written waits for `uncork`
        self._out: list[bytes] = []
        self.answered = False  # some byte of the answer under way has arrived
        self.deadline = NEVER
        self.wheel_tick = 0
        self._reader = ResponseReader(_NOBODY, _LIMITS, pool.rules)

    # --- for the exchange

    def begin(self, user: UpstreamUser, head_only: bool) -> None:
        self._user = user
        self.answered = False
        if self.pool.in_use is not None:
            self.pool.in_use.add(self)
        reader = self._reader
        reader.sink = user
        reader.expect(head_only)

    def write(self, data: bytes) -> None:
        if self._corked:
            self._out.append(data)
        else:
            self.transport.write(data)

    def cork(self) -> None:
        """Gather what is written until `uncork`, which must come within this turn of the loop."""
        self._corked = True

    def uncork(self) -> None:
        """Send what has gathered in one write: each costs 5 us and more, whatever its size."""
        self._corked = False
        out = self._out
        if not out:
            return
        if len(out) == 1:
            self.transport.write(out[0])
        elif sum(map(len, out)) <= JOIN_BYTES:
            self.transport.write(b"".join(out))
        else:
            self.transport.writelines(out)
        self._out = []

    def arm(self, seconds: float) -> None:
        self._wheel.arm(self, seconds)

    def disarm(self) -> None:
        self.deadline = NEVER

    def release(self, clean: bool) -> None:
        """The exchange is over. `clean`: request and response were whole and the machine keeps the connection."""
        if self._corked:
            self.uncork()
        self._user = None
        if self.pool.in_use is not None:
            self.pool.in_use.discard(self)
        self._reader.sink = _NOBODY
        self.reused = True
        if clean and not self.gate.pauses and self.pool.keep(self):
            self._wheel.arm(self, self.pool.idle_s)
            return
        self._wheel.arm(self, CLOSE_S)  # what it has not taken by then is given up
        self.transport.close()

    def give_up(self) -> None:
        """Nothing may ever come back: end it, if who waits can ask elsewhere."""
        user = self._user
        if user is None or self.answered or not user.may_be_sent_twice:
            return
        self.abort()
        error = ProxyError(Code.REQUEST_UNFINISHED, Source.UPSTREAM, Retry.REUSED_CONNECTION, "the node is silent")
        user.on_upstream_failed(error)

    def abort(self) -> None:
        """End it at once: what it carried is of no use to anybody."""
        self._corked = False
        self._out = []
        self._user = None
        if self.pool.in_use is not None:
            self.pool.in_use.discard(self)
        self._reader.sink = _NOBODY
        self.transport.abort()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport, but has its methods
        self.gate = ReadGate(self.transport)
        self.transport.set_write_buffer_limits(high=READ_HIGH, low=READ_LOW)
        made, self._made = self._made, None
        if made is not None:
            made(self)

    def data_received(self, data: bytes) -> None:
        user = self._user
        if user is None:
            self.pool.discard(self)  # bytes that nobody asked for: the next answer could not be told from them
            self.transport.abort()
            return
        self.answered = True
        try:
            self._reader.feed(data)
        except ProxyError as error:
            self._on_invalid(user, error)
            return
        user.on_upstream_read()

    def _on_invalid(self, reader: UpstreamUser, error: ProxyError) -> None:
        """What was read is no answer. `reader` is whom it was for; another may have the connection by now."""
        user = self._user
        if user is None:
            self.pool.discard(self)
            self.transport.abort()
            return
        self.abort()
        if user is not reader:
            error = ProxyError(Code.REQUEST_UNFINISHED, Source.UPSTREAM, Retry.REUSED_CONNECTION, error.detail)
        user.on_upstream_failed(error)

    def eof_received(self) -> bool:
        user = self._user
        if user is None:
            return False
        if self._reader.feed_eof():
            user.on_upstream_read()
            return False
        return user.on_upstream_eof()

    def connection_lost(self, error: Exception | None) -> None:
        self._wheel.drop(self)
        if self.pool.in_use is not None:
            self.pool.in_use.discard(self)
        self.pool.count_disconnect()
        user, self._user = self._user, None
        self._reader.close()
        if user is None:
            self.pool.discard(self)
            return
        user.on_upstream_failed(self._lost(error))

    def _lost(self, error: Exception | None) -> ProxyError:
        detail = str(error) if error is not None else "the machine closed the connection"
        if self.answered:
            return ProxyError(Code.BODY_UNFINISHED, Source.UPSTREAM, detail=detail)
        retry = Retry.REUSED_CONNECTION if self.reused else Retry.NEVER
        code = Code.CONNECT_RESET if error is not None else Code.REQUEST_UNFINISHED
        return ProxyError(code, Source.UPSTREAM, retry, detail)

    def pause_writing(self) -> None:
        if self._user is not None:
            self._user.on_upstream_pause()

    def resume_writing(self) -> None:
        if self._user is not None:
            self._user.on_upstream_resume()

    def on_deadline(self) -> None:
        user, self._user = self._user, None
        if self.pool.in_use is not None:
            self.pool.in_use.discard(self)
        if user is None:
            self.pool.discard(self)
            self.transport.abort()
            return
        self._reader.sink = _NOBODY
        self.transport.abort()
        if self._reader.has_answer:
            user.on_upstream_failed(ProxyError(Code.RESPONSE_STALLED, Source.UPSTREAM, detail="no byte for too long"))
        else:
            user.on_upstream_failed(ProxyError(Code.FIRST_BYTE_TIMEOUT, Source.UPSTREAM, detail="no answer in time"))


class Pool:
    """Kept connections to one endpoint of one machine, or to one peer."""

    __slots__ = (
        "_app_base", "_closed", "_given", "_idle", "_keeps", "_warm", "_warming", "connect_timeout_s", "edge",
        "endpoint", "idle_s", "in_use", "netns_pid", "rules", "tls",
    )  # fmt: skip

    def __init__(
        self,
        edge: EdgeContext,
        endpoint: Endpoint,
        netns_pid: int,
        keeps: bool,
        connect_timeout_s: float,
        app_base: int,
        tls: PeerTls | None = None,
    ) -> None:
        """`app_base`: the app's counters, -1 for a peer's pool, which has `tls`."""
        self.tls = tls
        self.in_use: set[UpstreamConnection] | None = None if tls is None else set()  # a peer's, while they carry one
        self.idle_s = IDLE_S if tls is None else PEER_IDLE_S
        self.rules: FieldRules = RESPONSE_RULES if tls is None else PEER_RESPONSE_RULES
        self.edge = edge
        self.endpoint = endpoint
        self.netns_pid = netns_pid
        self._keeps = keeps
        self.connect_timeout_s = connect_timeout_s
        self._app_base = app_base
        self._idle: deque[UpstreamConnection] = deque()
        self._closed = False
        self._warm: UpstreamConnection | None = None  # made ahead, while the machine is frozen
        self._warming: asyncio.Task[None] | None = None
        self._given: socket.socket | None = None  # connected, as good as new: for the next `connect`

    def take(self) -> UpstreamConnection | None:
        """A kept connection, the latest used first; None if a new one is needed."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.deadline = NEVER
                return connection
        return None

    def take_warm(self) -> UpstreamConnection | None:
        """The connection made ahead, for a request that may be sent again: nobody knows how the machine has it."""
        connection, self._warm = self._warm, None
        if connection is None or connection.transport.is_closing():
            return None
        connection.deadline = NEVER
        connection.reused = True
        return connection

    def warm(self) -> None:
        """Connect ahead to a machine that is frozen: the kernel accepts for it. Waits for its resume or its end."""
        if self._warm is None and self._warming is None and not self._closed:
            self._warming = self.connect(_Warmer(self))

    def warmed(self, connection: UpstreamConnection | None) -> None:
        """How `warm` ended. Whoever needs a connection and finds none makes one, and hears of faults from that."""
        self._warming = None
        if connection is not None and self._closed:
            connection.abort()
        else:
            self._warm = connection

    def cool(self) -> None:
        """The machine runs: who does not take the connection within the time of kept ones does without."""
        if self._warming is not None:  # comes too late to be of use
            self._warming.cancel()
            self._warming = None
        if self._warm is not None:
            self.edge.wheel.arm(self._warm, IDLE_S)

    def drop_warm(self) -> None:
        """It is not to be kept any more."""
        if self._warming is not None:
            self._warming.cancel()
            self._warming = None
        connection, self._warm = self._warm, None
        if connection is not None:
            connection.abort()

    def keep(self, connection: UpstreamConnection) -> bool:
        if self._closed or not self._keeps or len(self._idle) >= MAX_IDLE or connection.transport.is_closing():
            return False
        self._idle.append(connection)
        return True

    def discard(self, connection: UpstreamConnection) -> None:
        if connection is self._warm:
            self._warm = None
            return
        try:
            self._idle.remove(connection)
        except ValueError:
            pass

    def close(self) -> None:
        """Close what is idle; what is in use closes when it comes back."""
        self._closed = True
        self.drop_warm()
        while self._idle:
            self._idle.pop().transport.close()

    def give_up(self) -> None:
        """The peer has gone silent: what it has not begun to answer goes elsewhere, where that is safe."""
        while self._idle:
            self._idle.pop().transport.abort()
        for connection in list(self.in_use or ()):
            connection.give_up()

    def count_connect(self, us: int) -> None:
        if self._app_base >= 0:
            self.edge.count_app(self._app_base, upstream_connects=1, upstream_connect_us=us)
        else:
            self.edge.count(W_PEER_CONNECTS)

    def count_disconnect(self) -> None:
        if self._app_base >= 0:
            self.edge.count_app(self._app_base, upstream_disconnects=1)

    def connect(self, user: Connecting) -> asyncio.Task[None]:
        """Make a connection for `user`, who is told how it ended unless the task is cancelled."""
        given, self._given = self._given, None
        task = spawn(_Connect(self, user, given).run(), "upstream-connect")
        if given is not None:
            task.add_done_callback(lambda _: given.close())  # if it ended before the loop took it
        return task

    @contextlib.contextmanager
    def offer(self, sock: socket.socket) -> Iterator[None]:
        """Whoever connects first within the block gets this connection, which the machine has just accepted; if
        nobody does it is closed, for it keeps a program busy that serves one connection after the other."""
        self._given = sock
        try:
            yield
        finally:
            given, self._given = self._given, None
            if given is not None:
                given.close()

    def refusal(self, cause: OSError) -> ProxyError:
        """A connection that could not be made, for whoever waits for it."""
        code = Code.CONNECT_IO
        if isinstance(cause, ConnectionRefusedError):
            code = Code.CONNECT_REFUSED
        elif isinstance(cause, ConnectionResetError):
            code = Code.CONNECT_RESET
        elif isinstance(cause, TimeoutError):
            code = Code.CONNECT_TIMEOUT
        return ProxyError(code, Source.UPSTREAM, Retry.NOTHING_SENT, f"{self.where}: {cause}")

    @property
    def where(self) -> str:
        return f"{self.endpoint.host}:{self.endpoint.port}"


@contextlib.contextmanager
def offered(
    edge: EdgeContext, name: AppName, machine: MachineId, internal_port: int, sock: socket.socket
) -> Iterator[None]:
    """Within the block, `sock` is offered to whoever connects to this port of the machine; then it is closed."""
    app = edge.table.apps.get(name)
    view = app.machines.get(machine) if app is not None else None
    services = app.services if app is not None else ()
    service = next((one for one in services if one.internal_port == internal_port and view in one.running), None)
    if app is None or view is None or service is None:
        sock.close()
        yield
        return
    with pool_for(edge, view, service, app).offer(sock):
        yield


class _Connect:
    """One connection being made. On loopback it stands when connect(2) returns, and the loop need not be asked."""

    __slots__ = ("_expired", "_family", "_given", "_pool", "_started", "_task", "_timer", "_user")

    def __init__(self, pool: Pool, user: Connecting, given: socket.socket | None = None) -> None:
        self._pool = pool
        self._user = user
        self._given = given
        self._started = monotonic_ns()
        self._expired = False
        self._timer: Call | None = None
        self._task: asyncio.Task[None] | None = None
        self._family = socket.AF_INET6 if ":" in pool.endpoint.host else socket.AF_INET

    async def run(self) -> None:
        pool = self._pool
        self._task = asyncio.current_task()
        self._timer = pool.edge.wheel.call_later(pool.connect_timeout_s, self._expire)
        try:
            await self._open()
            return
        except asyncio.CancelledError:
            if not self._expired:
                raise
            error = ProxyError(Code.CONNECT_TIMEOUT, Source.UPSTREAM, Retry.NOTHING_SENT, pool.where)
        except OSError as cause:
            error = pool.refusal(cause)
        except Exception as cause:  # whatever it was, the request that waits must hear of it
            pool.edge.loop.call_exception_handler({"message": "connecting to a machine failed", "exception": cause})
            error = ProxyError(Code.CONNECT_IO, Source.UPSTREAM, Retry.NOTHING_SENT, repr(cause))
        finally:
            self._timer.cancel()
        self._user.on_connect_failed(error)

    def _expire(self) -> None:
        assert self._task is not None
        self._expired = True
        self._task.cancel()

    async def _open(self) -> None:
        pool, loop = self._pool, self._pool.edge.loop
        if self._given is not None:
            await adopt(loop, self._connection, self._given)
            return
        sock = self._socket()
        try:
            address = (pool.endpoint.host, pool.endpoint.port)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code and not _is_connected(sock):
                    await loop.sock_connect(sock, address)
            if code:
                raise OSError(code, os.strerror(code))
            if sock.getsockname() == sock.getpeername():  # a connect to a free port of the ephemeral range met itself
                raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
        except BaseException:
            sock.close()
            raise
        if pool.tls is None:
            await adopt(loop, self._connection, sock)
            return
        dialer = pool.tls.dialer(self._connection())
        await adopt(loop, lambda: dialer, sock)
        try:
            await dialer.done
        except BaseException:
            dialer.abort()
            raise

    def _connection(self) -> UpstreamConnection:
        return UpstreamConnection(self._pool, self._made)

    def _socket(self) -> socket.socket:
        if self._pool.netns_pid:
            return namespace.socket_in(self._pool.netns_pid, self._family)
        return socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def _made(self, connection: UpstreamConnection) -> None:
        """Called by the connection itself: the task hears of it two turns of the loop later."""
        pool = self._pool
        assert self._timer is not None and self._task is not None
        if self._task.cancelling():  # it ends with the task's next step
            connection.abort()
            return
        self._timer.cancel()
        pool.count_connect((monotonic_ns() - self._started) // 1000)
        self._user.on_connected(connection)


class _Warmer:
    """Asks for a connection on behalf of nobody yet."""

    __slots__ = ("_pool",)

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def on_connected(self, connection: UpstreamConnection) -> None:
        self._pool.warmed(connection)

    def on_connect_failed(self, error: ProxyError) -> None:
        self._pool.warmed(None)


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def pool_for(edge: EdgeContext, machine: table.MachineView, service: table.ServiceView, app: table.AppView) -> Pool:
    """The pool of a machine's endpoint for a service, made on first use."""
    port = service.record.internal_port
    found = machine.pools.get(port)
    if found is None:
        endpoint = machine.record.endpoint(port)
        assert endpoint is not None  # ServiceView.running holds only machines that have it
        found = machine.pools[port] = Pool(
            edge,
            endpoint,
            machine.record.netns_pid,
            service.pooled,
            app.record.limits.connect_timeout_s,
            app.cells,
        )
    return found

"""One request from its head to its log line. `run` is the list of phases; each answers, waits, or passes on.

An Exchange knows no HTTP version towards the client: it talks to a `Stream`. It is synchronous while nothing must be
waited for: a running machine with a kept connection costs no task. What is waited for calls back: a connection being
made (`on_connected`), a machine being woken (`_on_woken`).

    run (route, access, redirect, steer) -> choose -> _attempt -> [connect] -> _send -> answer's head -> relay -> _end
                                            |  ^                      |              |
                                    wake, queue+------- retry --------+--- replay ---+
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from proxy.clock import monotonic_ns, unix
from proxy.decide.balance import Preference, choose_machine
from proxy.decide.ewma import LOAD_HEADER
from proxy.decide.headers import redirect_target, request_head, response_framing, trailer_block
from proxy.decide.replay import MAX_JSON_BYTES, Directive, parse_headers, parse_json
from proxy.decide.replay_key import SessionKey
from proxy.decide.retry import SAFE_METHODS, Step, next_step
from proxy.decide.wake import Held, choose_to_wake
from proxy.edge.access import AccessGate
from proxy.edge.access_log import Record
from proxy.edge.body import KeptBody, Replayed
from proxy.edge.handover import Handover
from proxy.edge.queue import Ticket
from proxy.edge.relay import Tunnel
from proxy.edge.steering import steer, stick
from proxy.edge.table import AppView, MachineView, PortView, ServiceView
from proxy.edge.upstream import UpstreamConnection, pool_for
from proxy.edge.wake_rules import may_wake
from proxy.edge.waker import HealthWait
from proxy.errors import Code, ProxyError, Retry, Source, http_status
from proxy.ipc import PassiveFailure
from proxy.model import AppName, MachineId
from proxy.wire.http1 import CHUNKED, UNTIL_CLOSE, Headers, RequestHead, ResponseHead

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext

DISCARD_BYTES = 64 * 1024  # of an answer that is a replay, read to its end so that its connection can be kept
DISCARD_S = 2.0
_IN_JSON = Directive()  # stands for one that is still being read
_BLAMED = frozenset(
    {
        Code.CONNECT_REFUSED, Code.CONNECT_RESET, Code.CONNECT_TIMEOUT, Code.CONNECT_IO, Code.REQUEST_UNFINISHED,
        Code.RESPONSE_INVALID, Code.FIRST_BYTE_TIMEOUT,
    }
)  # fmt: skip
_RACES = 3  # lost against other workers for a place, before it stands in line
HOLD_BYTES = 64 * 1024  # of a body held while there is no machine to send it to
HELD_MAX_BYTES = 128 * 1024 * 1024  # of all such bodies of a worker


class Stream(Protocol):
    """The client's side of one request, in any HTTP version."""

    client_ip: str
    public_port: int
    is_tls: bool
    sni_app: AppName | None  # the app whose certificate was shown

    def enter(self, gate: AccessGate) -> ProxyError | None: ...
    def identity(self, minor: int, keep: bool) -> bytes: ...
    def send_interim(self, head: ResponseHead) -> None: ...
    def send_head(self, head: ResponseHead, port: PortView, request_id: bytes, framing: bytes, close: bool) -> None: ...
    def send_switch(self, head: ResponseHead, port: PortView, request_id: bytes) -> None: ...
    def send_data(self, data: bytes) -> None: ...
    def send_chunk(self, data: bytes) -> None: ...
    def send_last_chunk(self, trailers: Headers) -> None: ...
    def send_answer(
        self, status: int, fields: tuple[tuple[bytes, bytes], ...], body: bytes, request_id: bytes
    ) -> None: ...
    def flush(self) -> None: ...
    def finish(self, close: bool) -> None: ...
    def abort(self, hard: bool) -> None: ...
    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...
    def open_tunnel(self, tunnel: Tunnel) -> None: ...
    def end_output(self) -> bool:
        """Say that no more comes, and go on receiving. False where only both ways can be closed."""


class Exchange:
    """One request. Created by a stream when a head is whole; gone when the record is written."""

    __slots__ = (
        "app", "attempts", "body_done", "body_max", "bytes_in", "bytes_out", "cache_status", "chunked_out",
        "client_held", "close_after", "code", "collected", "connecting", "cookie", "counted_app", "counted_slot",
        "detail", "edge", "ended", "extra", "failed", "first_byte_ns", "handing", "handover", "head", "head_only",
        "health_wait", "held", "held_bytes", "kept", "machine", "port", "queue_ticket", "queued_since", "replayed",
        "request_id", "response", "sent_ns", "session", "started_ns", "started_unix", "status", "stream", "ticket",
        "trailers", "tried", "tunnel", "upstream", "upstream_full", "upstream_held", "wake_machine", "wake_ns",
        "wakes", "want",
    )  # fmt: skip

    def __init__(self, edge: EdgeContext, stream: Stream, head: RequestHead) -> None:
        self.edge = edge
        self.stream = stream
        self.head = head
        self.head_only = head.method == b"HEAD"
        self.started_ns = monotonic_ns()
        self.started_unix = unix()
        self.request_id = edge.new_request_id()
        self.app: AppView | None = None
        self.port: PortView | None = None
        self.machine: MachineView | None = None
        self.upstream: UpstreamConnection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.counted_slot = -1
        self.counted_app = -1  # slot of the app whose hard limit the count is under; -1: none
        self.queue_ticket: Ticket | None = None  # its place in line for a machine below its hard limit
        self.queued_since = 0
        self.want: Preference | None = None  # what the client asks for
        self.extra = b""  # header lines for the machine beside the usual ones
        self.health_wait: HealthWait | None = None
        self.handover: Handover | None = None  # once a replay, or the replay cache, has sent it elsewhere
        self.handing: Directive | None = None  # the answer under way is a replay, and not the client's
        self.collected: list[bytes] | None = None  # of a replay in JSON
        self.session: SessionKey | None = None  # under which a replay of it may be remembered
        self.cache_status = b"miss"  # what the next machine is told of the replay cache: also hit, bypass
        self.cookie: MachineId | None = None  # the machine that the client's sticky cookie names
        self.body_max = 0  # bytes of the request's body; 0 = any
        self.kept: KeptBody | None = None  # the request's body, for a replay
        self.replayed: Replayed | None = None  # it is being sent again
        self.attempts = 0
        self.wakes = 0
        self.tried: set[MachineId] | None = None
        self.held: list[bytes] | None = None
        self.held_bytes = 0
        self.client_held = False  # we paused the client because its body has nowhere to go
        self.upstream_held = False  # the client's side asked the machine's to stand still
        self.upstream_full = False  # the machine's side asked the client's to stand still
        self.body_done = head.length == 0
        self.trailers: Headers | None = None
        self.response: ResponseHead | None = None
        self.chunked_out = False
        self.close_after = False
        self.tunnel: Tunnel | None = None
        self.ticket = 0
        self.wake_machine: MachineId | None = None
        self.wake_ns = 0
        self.sent_ns = 0
        self.first_byte_ns = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.status = 0
        self.code: Code | None = None
        self.detail = ""
        self.failed = False
        self.ended = False

    # --- phases

    def run(self) -> None:
        """Go through the phases until something answers or has to be waited for."""
        stream, head = self.stream, self.head
        app = self.edge.table.hosts.get(head.host)
        port = app.ports.get(stream.public_port) if app is not None else None
        if (
            port is None
            or app is None
            or not port.http
            or port.tls is not stream.is_tls
            or (stream.sni_app is not None and stream.sni_app != app.name)
        ):
            self._misroute(app, port)
            return
        self.app = app
        self.port = port
        gate = app.gate
        if gate is not None:
            error = stream.enter(gate) or gate.admit(stream.client_ip, head.length, self.edge.wheel.now)
            if error is not None:
                self.refuse(error)
                return
            self.body_max = gate.rules.max_body_bytes or 0
        if port.force_https and not stream.is_tls:
            self._redirect()
            return
        if (head.noted or port.steers or app.has_replayed) and not steer(self):
            return
        self.choose()

    def choose(self) -> None:
        """Send it to a machine, or wait for one."""
        assert self.port is not None
        machine = self.port.service.sole
        if (
            machine is None
            or self.tried is not None
            or self.want is not None
            or not self._may_go(self.port.service)
            or not self._attempt(machine)
        ):
            self._choose()

    def _may_go(self, service: ServiceView) -> bool:
        """Whether it would pass by nobody who waits for a place at a hard limit."""
        if service.record.hard_limit is None or self.queued_since:
            return True
        assert self.app is not None
        return not self.edge.queue.is_contended(self.app.record.slot)

    def aim(self, app: AppView, port: PortView) -> None:
        """From here on it is for this app: a replay says so."""
        self.app, self.port = app, port
        self.response = None
        self.first_byte_ns = 0
        self.tried = None
        self.wakes = self.attempts = 0
        self.queued_since = 0
        self.choose()

    def _choose_again(self) -> None:
        """By the newest records: they may have been replaced while we waited."""
        old = self.app
        assert old is not None
        app = self.edge.table.apps.get(old.name)
        port = app.ports.get(self.stream.public_port) if app is not None else None
        if app is None or port is None or not port.http or port.tls is not self.stream.is_tls:
            self.fail(ProxyError(Code.MACHINE_GONE, detail="the app was removed meanwhile"))
            return
        self.app, self.port = app, port
        self.choose()

    def _misroute(self, app: AppView | None, port: PortView | None) -> None:
        """Nothing here serves this request: say which way."""
        stream = self.stream
        if app is None:
            error = ProxyError(Code.UNKNOWN_HOST, Source.DOWNSTREAM, detail="no app has this host name")
        elif stream.sni_app is not None and stream.sni_app != app.name:
            error = ProxyError(Code.MISDIRECTED, Source.DOWNSTREAM, detail="Host is another app's than the certificate")
        elif port is None or not port.http:
            error = ProxyError(Code.UNKNOWN_HOST, Source.DOWNSTREAM, detail="the app serves no HTTP on this port")
        elif port.tls:
            error = ProxyError(Code.BAD_REQUEST, Source.DOWNSTREAM, detail="this port speaks TLS, the request did not")
        else:
            error = ProxyError(Code.BAD_REQUEST, Source.DOWNSTREAM, detail="this port speaks no TLS, the request did")
        self.app = app
        self.refuse(error)

    def _redirect(self) -> None:
        stream, head, ports = self.stream, self.head, self.edge.public_ports
        location = redirect_target(
            head.authority,
            head.host,
            head.target,
            ports.get(stream.public_port, 0),
            stream.public_port,
            ports.get(443, 443),
        )
        self.status = 301
        stream.send_answer(301, ((b"location", location),), b"", self.request_id)
        self._end(close=not self.body_done)

    def _choose(self) -> None:
        port, app, edge, want = self.port, self.app, self.edge, self.want
        assert port is not None and app is not None
        service = port.service
        if want is not None and (want.force is not None or want.prefer is not None) and self._named(want):
            return
        running: Sequence[MachineView] = service.running
        if self.tried or (want is not None and want.exclude):
            gone = (self.tried or set()) | (want.exclude if want is not None else frozenset())
            running = [one for one in running if one.record.id not in gone]
        elif edge.wheel.now < app.avoided_until:
            running = app.without_failing(running, edge.wheel.now)
        record = service.record
        if not running:
            self._choose_to_wake(service)
            return
        if self._may_go(service):
            for _ in range(_RACES):
                machine = choose_machine(
                    running, edge.in_flight, record.soft_limit, record.hard_limit, edge.rng, app.record.balance,
                    edge.scores, edge.wheel.now,
                )  # fmt: skip
                if machine is None:
                    break
                if self._attempt(machine):
                    if len(service.machines) > len(service.running):
                        self._start_another(service, machine)
                    return
        self._start_another(service, None)
        self._wait_for_room(tuple(one.slot for one in running))

    def _named(self, want: Preference) -> bool:
        """The machine that was asked for, if it can take the request or be woken; else whether that ends it."""
        assert self.app is not None and self.port is not None
        service = self.port.service
        name = want.force or want.prefer
        view = self.app.machines.get(name) if name is not None else None
        if view is not None and view in service.machines and not (self.tried and view.record.id in self.tried):
            if view.takes_requests:
                if want.force or view in service.running:
                    if self._attempt(view):
                        return True
                    if want.force:
                        self._wait_for_room((view.slot,))
                        return True
            elif service.record.autostart and not view.record.cordoned and (want.force or not service.running):
                self._wake(view.record.id)
                return True
        if want.force is not None:
            self.fail(ProxyError(Code.FORCED_UNREACHED, Source.MACHINE, detail=f"machine {name} takes no requests"))
            return True
        if self.cookie != name:
            self.extra += b"fly-preferred-instance-unavailable: %b\r\n" % str(name).encode("ascii")
        self.want = Preference(None, None, want.exclude)
        return False

    def _wait_for_room(self, slots: tuple[int, ...]) -> None:
        """All are at their hard limit: stand in line, behind who came before, in whichever worker."""
        app, port = self.app, self.port
        assert app is not None and port is not None
        limit, limits = port.service.record.hard_limit, app.record.limits
        assert limit is not None
        try:
            self.queue_ticket = self.edge.queue.wait(
                app.record.slot, slots, limit, limits.queue_timeout_s, limits.max_queued, self._on_room,
                self.queued_since,
            )  # fmt: skip
        except ProxyError as error:
            self.fail(error)
            return
        self.queued_since = self.queue_ticket.since_ns

    def _on_room(self, error: ProxyError | None) -> None:
        self.queue_ticket = None
        if self.ended:
            return
        if error is not None:
            self.fail(error)
        else:
            self._go_on(self._choose_again)

    def _start_another(self, service: ServiceView, chosen: MachineView | None) -> None:
        """Have one more machine started where all that run are at their soft limit; nobody waits for it."""
        edge, record, app = self.edge, service.record, self.app
        if not record.autostart or app is None or not edge.waker.may_start_another(app):
            return
        if chosen is not None and edge.in_flight(chosen.slot) < record.soft_limit:
            return
        if all(edge.in_flight(one.slot) >= record.soft_limit for one in service.running):
            edge.waker.start_another(app, service)

    def _choose_to_wake(self, service: ServiceView) -> None:
        assert self.app is not None
        if service.is_failing:
            self._wait_for_health(service)
            return
        if not service.record.autostart:
            self.fail(ProxyError(Code.NO_CANDIDATE, detail="no machine runs and autostart is off"))
            return
        now = unix()
        choice = choose_to_wake((one.record for one in self.app.machines.values()), service.record.processes, now)
        if isinstance(choice, Held):
            self.fail(
                ProxyError(
                    Code.WAKE_HELD, Source.MACHINE, detail=choice.reason,
                    retry_after_s=max(1, round(choice.until - now)),
                )
            )  # fmt: skip
        elif choice is None:
            self.fail(ProxyError(Code.NO_CANDIDATE, detail="the app has no machine for this port"))
        elif may_wake(self, choice):
            self._wake(choice)

    def _wait_for_health(self, service: ServiceView) -> None:
        """Machines run, and the checks of none pass: wait for one that does (spec routing §5.4)."""
        assert self.app is not None
        edge, limits = self.edge, self.app.record.limits
        if service.record.autostart:
            edge.waker.start_another(self.app, service)
        try:
            self.health_wait = edge.waker.wait_for_health(service, self.app, limits.queue_timeout_s, self._on_healthy)
        except ProxyError as error:
            self.fail(error)

    def _on_healthy(self, error: ProxyError | None) -> None:
        self.health_wait = None
        if self.ended:
            return
        if error is not None:
            self.fail(error)
        else:
            self._go_on(self._choose_again)

    def _wake(self, machine: MachineId) -> None:
        assert self.app is not None
        self.wakes += 1
        if self.wakes > 3:
            self.fail(ProxyError(Code.NO_CANDIDATE_AFTER_RETRIES, detail="woken three times, reached never"))
            return
        self.tried = None
        self.wake_machine = machine
        self.wake_ns -= monotonic_ns()
        try:
            self.ticket = self.edge.waker.wait(self.app, machine, self._on_woken)
        except ProxyError as error:
            self._wake_over()
            self.fail(error)

    def _wake_over(self) -> None:
        self.wake_ns += monotonic_ns()
        self.wake_machine = None

    def _on_woken(self, error: ProxyError | None) -> None:
        self._wake_over()
        if self.ended:
            return
        if error is not None:
            self.fail(error)
        else:
            self._go_on(self._choose_again)

    def _go_on(self, step: Callable[[], None]) -> None:
        """Take a step that nobody's connection is on the stack of: a fault in it must end this client's wait too."""
        try:
            step()
        except Exception as error:
            self.edge.loop.call_exception_handler({"message": "an exchange failed", "exception": error})
            self.on_request_broken(ProxyError(Code.INTERNAL, detail=repr(error)))

    def _attempt(self, machine: MachineView) -> bool:
        """Send it to this machine. False, and nothing done, if that is at its hard limit by now."""
        app, port = self.app, self.port
        assert app is not None and port is not None
        service = port.service
        if self.counted_slot != machine.slot:
            self._release_load()
            limit = service.record.hard_limit
            if not self.edge.load.admit(machine.slot, limit):
                return False
            self.counted_slot = machine.slot
            self.counted_app = app.record.slot if limit is not None else -1
        self.machine = machine
        self.attempts += 1
        pool = machine.pools.get(service.internal_port) or pool_for(self.edge, machine, service, app)
        connection = pool.take()
        if connection is None and self.wakes and self.head.length == 0 and self.head.method in SAFE_METHODS:
            connection = pool.take_warm()
        if connection is None:
            self.connecting = pool.connect(self)
        else:
            self._send(connection)
        return True

    def on_connected(self, connection: UpstreamConnection) -> None:
        self.connecting = None
        if self.ended:
            connection.release(clean=True)
            return
        self._go_on(lambda: self._send(connection))

    def on_connect_failed(self, error: ProxyError) -> None:
        self.connecting = None
        if not self.ended:
            machine = self.machine
            assert machine is not None
            self.edge.link.send(
                PassiveFailure(machine.app, machine.record.id, machine.record.version, error.code.value)
            )
            self._go_on(lambda: self._after_failure(error))

    def _send(self, connection: UpstreamConnection) -> None:
        """Write the head and what is held of the body; from here on the body streams."""
        stream, head, port, app, edge = self.stream, self.head, self.port, self.app, self.edge
        assert port is not None and app is not None
        self.upstream = connection
        connection.begin(self, self.head_only)
        self.sent_ns = monotonic_ns()
        handover = self.handover
        if handover is not None:
            handover.opened()
        identity = stream.identity(head.minor, port.service.pooled or head.upgrade is not None)
        data = request_head(
            head,
            identity + self.extra if self.extra else identity,
            self.request_id,
            int(self.started_unix * 1_000_000),
            edge.traces.next(),
        )
        if self.body_done and self.held is None and self.kept is None:
            connection.transport.write(data)
            limit = app.record.limits.first_byte_timeout_s
            if limit is not None:
                edge.wheel.arm(connection, limit)
            return
        connection.transport.write(data)
        connection.disarm()
        limit = app.record.limits.first_byte_timeout_s
        if head.expects_continue and limit is not None:
            connection.arm(limit)  # the client waits for the machine's word, and sends no last byte before it
        held = self._take_held()
        if handover is not None and handover.sends_again and self.bytes_in:
            if self.kept is None or not self.kept.is_replayable:
                self.refuse(ProxyError(Code.REPLAY_BODY_GONE, detail="the body outgrew what is kept while it waited"))
                return
            self.replayed = self.kept.replay(_Again(self, connection))
        else:
            for piece in held or ():
                self._write_body(connection, piece)
            if self.body_done:
                self._finish_request(connection)
        if self.client_held:
            self.client_held = False
            stream.resume_body()

    def _write_body(self, connection: UpstreamConnection, data: bytes) -> None:
        if self.head.length == CHUNKED:
            connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            connection.write(data)

    def _finish_request(self, connection: UpstreamConnection) -> None:
        if self.head.length == CHUNKED:
            connection.write(trailer_block(self.trailers or []))
        assert self.app is not None
        limit = self.app.record.limits.first_byte_timeout_s
        if self.response is None and limit is not None:
            connection.arm(limit)

    # --- the request's body, from the stream

    def on_body(self, data: bytes) -> None:
        self.bytes_in += len(data)
        if self.body_max and self.bytes_in > self.body_max and self.app is not None and self.app.gate is not None:
            self.on_request_broken(self.app.gate.body_error(self.bytes_in))
            return
        if self.head.expects_continue:
            self._on_continue()
        if not self.ended and (self.response is None or self.replayed is not None):
            self._keep(data)
        connection = self.upstream
        if connection is not None:
            if self.replayed is None:
                self._write_body(connection, data)
            if self.response is not None and self.port is not None and not self.upstream_held:
                connection.arm(self.port.idle_s)
        elif not self.ended:
            if self.held is None:
                self.held = []
            self.held.append(data)
            self.held_bytes += len(data)
            self.edge.held_bytes += len(data)
            if self.edge.held_bytes > HELD_MAX_BYTES:
                detail = "too much is held for machines that start"
                self.on_request_broken(ProxyError(Code.TOO_MANY_WAITERS, detail=detail, retry_after_s=1))
            elif self.held_bytes > HOLD_BYTES and not self.client_held:
                self.client_held = True
                self.stream.pause_body()

    def _take_held(self) -> list[bytes] | None:
        """What was held of the body is somebody else's now, or nobody's."""
        held, self.held = self.held, None
        self.edge.held_bytes -= self.held_bytes
        self.held_bytes = 0
        return held

    def _keep(self, data: bytes) -> None:
        """A copy for a replay, as far as the budgets go."""
        kept = self.kept
        if kept is None:
            app, bodies = self.app, self.edge.bodies
            if app is None or self.bytes_in != len(data):
                return
            limits = app.record.limits
            spools = app.has_replayed or app.record.keeps_bodies
            kept = self.kept = KeptBody(
                bodies, app.name, limits.replay_memory_bytes, limits.replay_spool_bytes if spools else 0,
                self.stream.pause_body, self.stream.resume_body,
            )  # fmt: skip
        kept.add(data)

    @property
    def can_send_again(self) -> bool:
        """Whether all of the request's body that has come is kept."""
        return not self.bytes_in or (self.kept is not None and self.kept.is_replayable)

    def _release_body(self) -> None:
        if self.replayed is not None:
            self.replayed.cancel()
            self.replayed = None
        if self.kept is not None:
            self.kept.release()
            self.kept = None

    def write_again(self, connection: UpstreamConnection, data: bytes) -> None:
        if self.upstream is connection:
            self._write_body(connection, data)

    def on_sent_again(self, connection: UpstreamConnection) -> None:
        """All that was kept has gone to the machine; what still comes goes straight there."""
        self.replayed = None
        if self.upstream is connection and self.body_done:
            self._finish_request(connection)

    def on_keeping_failed(self, connection: UpstreamConnection, detail: str) -> None:
        """What was kept can't be read back: the machine has a part of the request, and gets no more."""
        self.replayed = None
        if self.upstream is connection and not self.ended:
            self._go_on(lambda: self._on_failure(ProxyError(Code.REPLAY_BODY_GONE, Source.EDGE, detail=detail)))

    def _on_continue(self) -> None:
        """A 100 came, or a client that would not wait for it has begun its body: now that is what is waited for."""
        self.head.expects_continue = False
        if self.upstream is not None and self.response is None and not self.body_done:
            self.upstream.disarm()

    def on_body_end(self, trailers: Headers) -> None:
        if self.body_done:
            return
        self.body_done = True
        self.trailers = trailers
        if self.upstream is not None and not self.ended and self.replayed is None:
            self._finish_request(self.upstream)

    # --- the answer, from the machine

    def on_response_head(self, head: ResponseHead) -> None:
        if head.status < 200:
            self._on_interim(head)
            return
        stream, request, port = self.stream, self.head, self.port
        assert port is not None
        self.first_byte_ns = monotonic_ns()
        if head.noted or port.watches:
            self._watch(head)
            if head.noted and self._on_noted(head):
                return
        if self.kept is not None:
            self.kept.stop_keeping()
        self.response = head
        self.status = head.status
        framing, self.chunked_out, must_close = response_framing(head, self.head_only, request.minor)
        # A body that is not whole yet may never be: then the connection's next byte is not a request.
        self.close_after = must_close or not self.body_done or request.upgrade is not None
        stream.send_head(head, port, self.request_id, framing, self.close_after)

    def _watch(self, head: ResponseHead) -> None:
        """What the answer tells of its machine."""
        app, machine, edge = self.app, self.machine, self.edge
        assert app is not None and machine is not None
        now = edge.wheel.now
        seconds = (self.first_byte_ns - self.sent_ns) / 1e9
        if head.status < 500:
            edge.scores.observe(machine.slot, now, seconds)
        else:
            edge.scores.observe_error(machine.slot, now, seconds)  # a machine that fails fast must not look fast
        for name, value in head.noted:
            if name == LOAD_HEADER:
                edge.scores.report(machine.slot, now, value)
        if app.record.sticky is not None and self.cookie != machine.record.id:
            stick(self, head, app.record.sticky, machine)

    def _on_noted(self, head: ResponseHead) -> bool:
        """What the machine says to us. True if that is a replay: then the answer is not the client's."""
        as_json = any(name == b"content-type" for name, _ in head.noted)
        try:  # JSON goes before a header beside it, which some apps send as `fly-replay: true`
            directive = None if as_json else parse_headers(head.noted)
        except ProxyError as error:
            self.refuse(error)
            return True
        if directive is None and not as_json:
            return False
        self.handing = directive or _IN_JSON
        told = directive is not None
        self.response = head
        self.collected = None if told else []
        connection = self.upstream
        assert connection is not None
        if not told and head.length > MAX_JSON_BYTES:
            self.refuse(ProxyError(Code.REPLAY_INVALID, Source.MACHINE, detail="a replay in JSON that is too long"))
        elif told and (head.length > DISCARD_BYTES or (head.length == UNTIL_CLOSE and not self.head_only)):
            connection.abort()
            self.upstream = None
            self._go_on(self._hand_on)
        else:
            connection.arm(DISCARD_S)
        return True

    def _hand_on(self) -> None:
        """The machine's answer is out of the way: follow the replay."""
        directive, self.handing = self.handing, None
        pieces, self.collected = self.collected, None
        response, self.response = self.response, None
        assert directive is not None and response is not None
        if pieces is not None:
            try:
                directive = parse_json(b"".join(pieces))
            except ProxyError as error:
                self.refuse(error)
                return
        self._take_held()
        if self.replayed is not None:
            self.replayed.cancel()
            self.replayed = None
        self._release_load()
        if self.handover is None:
            self.handover = Handover(self)
        self.handover.follow(directive)

    def _on_interim(self, head: ResponseHead) -> None:
        if head.status == 100 and self.head.expects_continue:
            self._on_continue()
        if head.status == 101:
            self._switch(head)
        elif self.head.minor == 1:
            self.stream.send_interim(head)

    def _switch(self, head: ResponseHead) -> None:
        connection, port = self.upstream, self.port
        assert connection is not None and port is not None
        if self.head.upgrade is None:
            self._on_failure(
                ProxyError(Code.UPGRADE_REFUSED, Source.UPSTREAM, detail="101 to a request without Upgrade")
            )
            return
        self.first_byte_ns = monotonic_ns()
        self.response = head
        self.status = 101
        connection.disarm()
        self.stream.send_switch(head, port, self.request_id)
        self.tunnel = Tunnel(self, connection, port.idle_s)
        self.stream.open_tunnel(self.tunnel)

    def on_upgrade_bytes(self, data: bytes) -> None:
        if self.tunnel is not None:
            self.bytes_out += len(data)
            self.tunnel.from_machine(data)

    def on_response_body(self, data: bytes) -> None:
        if self.handing is not None:
            self._on_handing_body(data)
            return
        self.bytes_out += len(data)
        if self.chunked_out:
            self.stream.send_chunk(data)
        else:
            self.stream.send_data(data)

    def _on_handing_body(self, data: bytes) -> None:
        """The body of an answer that is a replay: JSON to be read, or nothing to anybody."""
        if self.upstream is None:
            return
        self.bytes_out += len(data)
        if self.collected is not None:
            self.collected.append(data)
            if self.bytes_out > MAX_JSON_BYTES:
                self.refuse(ProxyError(Code.REPLAY_INVALID, Source.MACHINE, detail="a replay in JSON that is too long"))
        elif self.bytes_out > DISCARD_BYTES:
            self.upstream.abort()
            self.upstream = None
            self._go_on(self._hand_on)

    def on_response_end(self, trailers: Headers) -> None:
        if self.machine is not None and self.machine.passive is not None:
            self.machine.passive.succeeded(self.edge.wheel.now)
        connection, response = self.upstream, self.response
        if self.handing is not None and connection is None:
            return  # it was cut off, and the replay is under way
        if self.handing is None and self.chunked_out:
            self.stream.send_last_chunk(trailers)
        self.upstream = None
        assert connection is not None and response is not None
        if self.upstream_held:
            self.upstream_held = False
            connection.gate.resume()
        self.on_upstream_resume()
        connection.release(clean=response.keep_alive and self.body_done and self.head.upgrade is None)
        if self.handing is not None:
            self.bytes_out = 0
            self._go_on(self._hand_on)
        else:
            self._end(close=self.close_after or not self.body_done)

    def on_upstream_read(self) -> None:
        """The machine's bytes of this turn have been taken: pass on what gathered."""
        if self.ended:
            return
        self.stream.flush()
        connection, port = self.upstream, self.port
        if connection is None or port is None or self.response is None:
            return  # a 1xx moves no deadline: the first byte of the answer is still awaited
        if self.tunnel is None and not self.upstream_held:
            connection.arm(port.idle_s)

    def on_upstream_eof(self) -> bool:
        """The machine sends no more. True keeps our side to it open (a half-closed tunnel)."""
        return self.tunnel is not None and self.tunnel.machine_eof()

    def on_upstream_failed(self, error: ProxyError) -> None:
        self.upstream = None
        self.upstream_held = False
        if self.ended:
            return
        if self.handing is not None and self.collected is None:
            self._go_on(self._hand_on)  # the rest of its answer is of no use to anybody
        else:
            self._go_on(lambda: self._on_failure(error))

    # --- back-pressure

    def on_upstream_pause(self) -> None:
        if not self.upstream_full:
            self.upstream_full = True
            self.stream.pause_body()
            if self.replayed is not None:
                self.replayed.pause()
            if self.upstream is not None and self.port is not None and self.tunnel is None and not self.upstream_held:
                self.upstream.arm(self.port.idle_s)  # a machine that takes nothing has this long

    def on_upstream_resume(self) -> None:
        if self.upstream_full:
            self.upstream_full = False
            self.stream.resume_body()
            if self.replayed is not None:
                self.replayed.resume()
            if self.upstream is not None and self.response is None and not self.body_done:
                self.upstream.disarm()

    def on_client_pause(self) -> None:
        """The client does not take what we send: let the machine wait."""
        if self.upstream is not None and not self.upstream_held:
            self.upstream_held = True
            self.upstream.gate.pause()
            self.upstream.disarm()

    def on_client_resume(self) -> None:
        if self.upstream is not None and self.upstream_held:
            self.upstream_held = False
            self.upstream.gate.resume()
            if self.port is None or self.app is None or self.tunnel is not None:
                return
            limit = self.app.record.limits.first_byte_timeout_s if self.response is None else self.port.idle_s
            if limit is not None and self.body_done:
                self.upstream.arm(limit)

    # --- endings

    def _on_failure(self, error: ProxyError) -> None:
        if self.tunnel is not None:
            self.tunnel.machine_lost()
        elif self.handing is not None:
            self.refuse(ProxyError(Code.REPLAY_INVALID, Source.MACHINE, detail=f"a replay that was cut off: {error}"))
        elif self.response is not None:
            self._fail_midway(error)
        else:
            self._after_failure(error)

    def _after_failure(self, error: ProxyError) -> None:
        """An attempt failed before any answer: what next is decide/retry's to say."""
        machine, port = self.machine, self.port
        assert machine is not None and port is not None
        if self.app is not None and error.code in _BLAMED and error.retry is not Retry.REUSED_CONNECTION:
            self.app.failed(machine, self.edge.wheel.now)
            self.edge.scores.observe_failure(machine.slot, self.edge.wheel.now)
        has_body = self.head.length != 0
        tried = (self.tried or set()) | {machine.record.id}
        others = any(one.record.id not in tried for one in port.service.running) or self.wakes == 0
        step = next_step(self.head.method, has_body, error.code, error.retry, self.attempts, others)
        if step is Step.FRESH_CONNECTION and machine not in port.service.running:
            step = Step.ANOTHER if others else Step.GIVE_UP  # it is stopping, or answers elsewhere now
        if step is Step.FRESH_CONNECTION:
            self.connecting = self._fresh(machine)
        elif step is Step.ANOTHER:
            self.tried = tried
            self._another(machine)
        else:
            self.fail(error)

    def _fresh(self, machine: MachineView) -> asyncio.Task[None]:
        assert self.port is not None and self.app is not None
        self.attempts += 1
        return pool_for(self.edge, machine, self.port.service, self.app).connect(self)

    def _another(self, failed: MachineView) -> None:
        """Another running machine; with none left, have control look after the one that failed."""
        assert self.port is not None
        self._release_load()
        if any(one.record.id not in (self.tried or ()) for one in self.port.service.running):
            self._choose()
        elif failed.record.state.value == "started":
            self._wake(failed.record.id)
        else:
            self.tried = None
            self._choose()

    def fail(self, error: ProxyError) -> None:
        """No machine was reached. Where a replay pointed there, that is for its sender to hear of."""
        if self.handover is not None and self.handover.is_open:
            self.leave_target()
            self.handover.failed(error)
        else:
            self.refuse(error)

    def leave_target(self) -> None:
        """Stop trying to reach where a replay pointed."""
        self._drop_waits()
        self._release_load()

    def answer(self, code: Code, status: int, fields: tuple[tuple[bytes, bytes], ...], body: bytes) -> None:
        """An answer of ours that is no error page."""
        self.code, self.status = code, status
        self._drop_upstream()
        fields += ((b"wakefront-error", code.value.encode()),)
        self.stream.send_answer(status, fields, b"" if self.head_only else body, self.request_id)
        self._end(close=not self.body_done)

    def refuse(self, error: ProxyError) -> None:
        """Answer with an error of ours. Only before any byte of an answer has been sent."""
        self.handing = None
        self.code, self.detail, self.failed = error.code, error.detail, True
        self._drop_upstream()
        self.status = http_status(error.code)
        fields: tuple[tuple[bytes, bytes], ...] = ((b"wakefront-error", error.code.value.encode()),)
        if error.retry_after_s is not None:
            fields += ((b"retry-after", b"%d" % error.retry_after_s),)
        body = b"" if self.head_only else error_page(error)
        self.stream.send_answer(self.status, fields, body, self.request_id)
        close = not self.body_done or self.head.upgrade is not None
        self._end(close)

    def _fail_midway(self, error: ProxyError) -> None:
        """The answer is broken off. After its head went out, closing is the only honest signal."""
        self.code, self.detail, self.failed = error.code, error.detail, True
        self._drop_upstream()
        self.stream.flush()
        self._record()
        until_close = self.response is not None and self.response.length < 0 and not self.chunked_out
        self.stream.abort(hard=until_close)

    def on_client_gone(self, code: Code = Code.CLIENT_GONE) -> None:
        """The client left or its time is up; nobody else is harmed by it."""
        if self.ended:
            return
        if self.tunnel is not None:
            self.tunnel.client_lost()
            return
        if self.code is None:
            self.code = code
        self._drop_upstream()
        if self.status == 0:
            self.status = 499
        self._record()

    def on_client_timeout(self) -> None:
        """The rest of the request did not come."""
        error = ProxyError(Code.BODY_TIMEOUT, Source.DOWNSTREAM, detail="the request's body stopped arriving")
        self.on_request_broken(error)

    def on_request_broken(self, error: ProxyError) -> None:
        """The rest of the request can't be read. The machine must not take a part for the whole."""
        if self.ended:
            return
        if self.response is None:
            self.refuse(error)
        else:
            self._fail_midway(error)

    def on_tunnel_closed(self, bytes_in: int) -> None:
        self.bytes_in += bytes_in
        self.upstream = None
        self._record()

    def _drop_waits(self) -> None:
        """Whatever is waited for before a machine has the request, nobody waits for it any more."""
        if self.wake_machine is not None:
            self.edge.waker.cancel(self.wake_machine, self.ticket)
            self._wake_over()
        if self.health_wait is not None:
            self.health_wait.cancel()
            self.health_wait = None
        if self.queue_ticket is not None:
            self.queue_ticket.cancel()
            self.queue_ticket = None
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None

    def _drop_upstream(self) -> None:
        self._drop_waits()
        if self.handover is not None:
            self.handover.stop()
        connection, self.upstream = self.upstream, None
        if connection is not None:
            connection.abort()
        self._take_held()
        self._release_body()
        self.on_upstream_resume()
        if self.client_held:
            self.client_held = False
            self.stream.resume_body()

    def _release_load(self) -> None:
        slot = self.counted_slot
        if slot < 0:
            return
        self.counted_slot = -1
        if self.counted_app < 0:
            self.edge.load.release(slot)
        else:
            self.edge.load.release_fenced(slot)
            self.edge.queue.freed(self.counted_app)

    def _end(self, close: bool) -> None:
        self._record()
        self.stream.finish(close)

    def _record(self) -> None:
        """Count and log; exactly once."""
        if self.ended:
            return
        self.ended = True
        self._release_load()
        if self.kept is not None:
            self._release_body()
        edge, app, head = self.edge, self.app, self.head
        now = monotonic_ns()
        us = (now - self.started_ns) // 1000
        first_us = (self.first_byte_ns - self.started_ns) // 1000 if self.first_byte_ns else 0
        if app is not None:
            upstream_us = (self.first_byte_ns - self.sent_ns) // 1000 if self.first_byte_ns else 0
            edge.count_request(
                app.cells,
                self.status,
                us,
                upstream_us,
                self.bytes_in,
                self.bytes_out,
                self.failed,
                self.wakes > 0,
            )
        if edge.log.is_on:
            edge.log.write(
                Record(
                    self.started_unix, app.record.name if app is not None else "", self.stream.client_ip,
                    head.method.decode("latin-1"), head.host, head.target.decode("latin-1"), self.status, us / 1000,
                    self.bytes_in, self.bytes_out, self.request_id.decode("ascii"), self.stream.public_port,
                    self.stream.is_tls, self.machine.record.id if self.machine is not None else "", first_us / 1000,
                    self.wake_ns // 1000 / 1000, self.attempts, self.code.value if self.code is not None else "",
                    self.detail, self.tunnel is not None,
                )
            )  # fmt: skip


class _Again:
    """Where a kept body goes when it is sent again."""

    __slots__ = ("_connection", "_exchange")

    def __init__(self, exchange: Exchange, connection: UpstreamConnection) -> None:
        self._exchange = exchange
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._exchange.write_again(self._connection, data)

    def done(self) -> None:
        self._exchange.on_sent_again(self._connection)

    def failed(self, error: Exception) -> None:
        self._exchange.on_keeping_failed(self._connection, repr(error))


def error_page(error: ProxyError) -> bytes:
    """What a person sees: the code, its name, and one sentence; never what the machine or the system said."""
    return f"{error.code.value} {_PHRASES.get(error.code, error.code.name.lower().replace('_', ' '))}\n".encode()


_PHRASES = {
    Code.UNKNOWN_HOST: "No app is served here under this name.",
    Code.MISDIRECTED: "This connection was made for another app.",
    Code.BAD_REQUEST: "The request could not be understood.",
    Code.WAKE_TIMEOUT: "The app was started but did not answer in time.",
    Code.START_FAILED: "The app could not be started.",
    Code.WAKE_HELD: "The app failed to start; it will be tried again shortly.",
    Code.NO_CANDIDATE: "No machine can take this request.",
    Code.CONTROL_UNAVAILABLE: "The app is asleep and can't be started right now.",
    Code.TOO_MANY_WAITERS: "Too many requests wait for this app to start.",
    Code.WAKE_IGNORED: "The app is asleep, and this request does not wake it.",
    Code.WAKE_BUDGET: "The app is asleep, and enough starts were asked for; try again shortly.",
    Code.NO_HEALTHY: "No machine of the app is well enough to take this request.",
    Code.ACCESS_DENIED: "You have no access to this app from here.",
    Code.SOURCE_CONNECTIONS: "Too many connections from your address.",
    Code.SOURCE_REQUESTS: "Too many requests from your address; try again shortly.",
    Code.BODY_TOO_LARGE: "The request is larger than this app takes.",
    Code.QUEUE_FULL: "The app is busy, and enough requests wait for it.",
    Code.QUEUE_TIMEOUT: "The app was busy for too long.",
    Code.REPLAY_UNREACHED: "The app handed this request on, but what it named could not be reached.",
    Code.REPLAY_LOOP: "The request was handed on too often.",
    Code.REPLAY_INVALID: "The app handed this request on in a way that makes no sense.",
    Code.REPLAY_BODY_GONE: "The app handed this request on, but it is too large to be sent again.",
    Code.REPLAY_APP_UNKNOWN: "The app handed this request on to one that is not here.",
    Code.REPLAY_APP_FORBIDDEN: "The app handed this request on to one that does not take it.",
    Code.FORCED_UNREACHED: "The machine asked for can't take this request.",
    Code.CONNECT_REFUSED: "The app does not accept connections.",
    Code.CONNECT_TIMEOUT: "The app did not accept the connection in time.",
    Code.REQUEST_UNFINISHED: "The app closed the connection without an answer.",
    Code.CONNECT_RESET: "The app closed the connection without an answer.",
    Code.RESPONSE_INVALID: "The app's answer could not be understood.",
    Code.FIRST_BYTE_TIMEOUT: "The app did not answer in time.",
}

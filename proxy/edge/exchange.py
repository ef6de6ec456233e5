"""One request from its head to its log line. `run` is the list of phases; each answers, waits, or passes on.

An Exchange knows no HTTP version towards the client: it talks to a `Stream`. It is synchronous while nothing must be
waited for: a running machine with a kept connection costs no task. What is waited for calls back: a connection being
made (`on_connected`), a machine's start, a check that passes or a place in line (`on_waited`). Which machine it goes to
is choice.py's, what comes of a replay handover.py's.

    run (route, access, redirect, steer) -> choose -> attempt -> [connect] -> _send -> answer's head -> relay -> _end
                                            |  ^                     |              |
                                    wake, queue+------- retry -------+--- replay ---+
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from proxy.clock import monotonic_ns, unix
from proxy.decide.balance import Preference
from proxy.decide.ewma import LOAD_HEADER
from proxy.decide.headers import redirect_target, request_head, response_framing, sent_on_head, trailer_block
from proxy.decide.region import RegionWish
from proxy.decide.replay import Directive
from proxy.decide.replay_key import SessionKey
from proxy.decide.retry import SAFE_METHODS, Step, next_step
from proxy.decide.steering import is_machine_id
from proxy.edge.access import AccessGate
from proxy.edge.access_record import Record
from proxy.edge.body import KeptBody, Replayed
from proxy.edge.choice import may_go, pick, wake
from proxy.edge.error_page import error_page
from proxy.edge.handover import Handover
from proxy.edge.relay import Tunnel
from proxy.edge.replay_answer import ReplayAnswer, replay_answer
from proxy.edge.sites import Trip, peer_pool, pick_site
from proxy.edge.steering import steer, stick
from proxy.edge.table import AppView, MachineView, PeerView, PortView, SiteView
from proxy.edge.upstream import UpstreamConnection, pool_for
from proxy.errors import Code, ProxyError, Retry, Source, http_status
from proxy.ipc import PassiveFailure
from proxy.model import AppName, MachineId, NodeName
from proxy.state import W_BACKHAUL_REQUESTS, W_PEER_REFUSALS, W_PEER_REQUESTS, W_SHED_REQUESTS
from proxy.wire.backhaul import MAX_HOPS, REFUSED, SERVED_BY, Hop, HopError, hop_line, parse_refused
from proxy.wire.http1 import CHUNKED, Headers, RequestHead, ResponseHead

ACME_PATH: Final = b"/.well-known/acme-challenge/"  # RFC 8555 §8.3
_is_token = re.compile(rb"[A-Za-z0-9_-]{16,128}").fullmatch

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext

_BLAMED: Final = frozenset(
    {
        Code.CONNECT_REFUSED, Code.CONNECT_RESET, Code.CONNECT_TIMEOUT, Code.CONNECT_IO, Code.REQUEST_UNFINISHED,
        Code.RESPONSE_INVALID, Code.FIRST_BYTE_TIMEOUT,
    }
)  # fmt: skip
HOLD_BYTES: Final = 64 * 1024  # of a body held while there is no machine to send it to
HELD_MAX_BYTES = 128 * 1024 * 1024  # of all such bodies of a worker


class Stream(Protocol):
    """The client's side of one request, in any HTTP version."""

    client_ip: str
    public_port: int
    is_tls: bool
    sni_app: AppName | None  # the app whose certificate was shown

    def enter(self, gate: AccessGate) -> ProxyError | None: ...
    def identity(self, minor: int, keep: bool) -> bytes: ...
    def probe(self) -> None: ...
    def has_left(self) -> bool: ...
    def send_interim(self, head: ResponseHead) -> None: ...
    def send_go(self) -> None:
        """Tell the edge that sent it on that a machine takes its body."""

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


class Wait(Protocol):
    """What a request waits for before a machine has it: a place in line, or a machine whose checks pass."""

    def cancel(self) -> None: ...


class Exchange:
    """One request. Created by a stream when a head is whole; gone when the record is written."""

    __slots__ = (
        "app", "attempts", "awaits_go", "body_done", "bytes_in", "bytes_out", "cache_status", "chunked_out",
        "client_held", "close_after", "code", "connecting", "cookie", "corked", "counted_app", "counted_slot",
        "detail", "edge",
        "ended", "extra", "failed", "first_byte_ns", "gate", "handing", "handover", "head", "head_only", "held",
        "held_bytes", "hop", "hop_out", "is_again", "kept", "machine", "may_wait", "may_wake", "peer_machine", "port",
        "queued_since", "refusal", "replayed", "request_id", "response", "sent_ns", "session", "started_ns",
        "started_unix", "status", "stream", "ticket", "trailers", "tried", "trip", "tunnel", "upstream",
        "upstream_full", "upstream_held", "wait", "wake_machine", "wake_ns", "wakes", "want", "wish",
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
        self.wait: Wait | None = None
        self.queued_since = 0  # since when it has its place in line for a machine below its hard limit
        self.want: Preference | None = None  # what the client asks for
        self.wish: RegionWish | None = None  # and in which regions
        self.extra = b""  # header lines for the machine beside the usual ones
        self.handover: Handover | None = None  # once a replay, or the replay cache, has sent it elsewhere
        self.handing: ReplayAnswer | None = None  # the answer under way is a replay, and not the client's
        self.session: SessionKey | None = None  # under which a replay of it may be remembered
        self.cache_status = b"miss"  # what the next machine is told of the replay cache: also hit, bypass
        self.cookie: MachineId | None = None  # the machine that the client's sticky cookie names
        self.gate: AccessGate | None = None  # of the app that the client asked for
        self.kept: KeptBody | None = None  # the request's body, for a replay
        self.replayed: Replayed | None = None  # it is being sent again
        self.hop: Hop | None = None  # another edge sent it on, with this
        self.hop_out = b""  # what the edge is told that it goes to
        self.peer_machine: MachineId | None = None  # that answered there
        self.trip: Trip | None = None  # which nodes it has been to, of an app that has machines at several
        self.may_wake = True  # a machine of this node may be started for it
        self.may_wait = True  # it may stand in line here
        self.refusal: ProxyError | None = None  # the answer under way is another edge's refusal
        self.awaits_go = False  # its body waits for the other edge's word that a machine takes it
        self.is_again = False  # some of its body has gone out before, to nobody's use
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
        self.corked = False  # the client's bytes are being read: what goes to the machine of them goes in one write
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
        if self.edge.sheds_requests:
            self._shed()
            return
        is_challenge = head.target.startswith(ACME_PATH)
        if is_challenge and self._answer_challenge():
            return
        app = self.edge.table.find(head.host)
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
            self.gate = gate
        if port.force_https and not stream.is_tls:
            self._redirect()
            return
        if is_challenge and not port.service.running:
            self.refuse(ProxyError(Code.NO_CHALLENGE, detail="no such challenge is under way, and no machine runs"))
            return
        if (head.noted or port.steers or app.has_replayed) and not steer(self):
            return
        self.choose()

    def _answer_challenge(self) -> bool:
        """What a CA looks for, before anything else: no redirect, no rule and no sleep stands in its way.

        Tokens that are not ours are the app's, which may have an ACME client of its own.
        """
        head = self.head
        token = head.target[len(ACME_PATH) :]
        if head.method not in (b"GET", b"HEAD") or _is_token(token) is None:
            return False
        answer = self.edge.http_challenge(token.decode("ascii"))
        if answer is None:
            return False
        self.status = 200
        self.stream.send_answer(200, (), b"" if self.head_only else answer, self.request_id)
        self._end(close=not self.body_done)
        return True

    def _shed(self) -> None:
        """More comes than this worker can do: what is new has to wait, for the sake of what is under way."""
        self.edge.count(W_SHED_REQUESTS)
        self.refuse(ProxyError(Code.OVERLOADED, detail="the worker is overloaded", retry_after_s=1))

    def run_for_peer(self, hop: Hop) -> None:
        """What another edge sent on: it has seen to the client; here a machine serves it, or it is refused."""
        edge = self.edge
        edge.count(W_BACKHAUL_REQUESTS)
        self.hop = hop
        self.request_id = hop.request_id
        self.may_wake, self.may_wait = hop.may_wake, hop.may_wait
        if edge.sheds_requests:
            self._shed()
            return
        app = edge.table.apps.get(AppName(hop.app))
        port = app.port(hop.port) if app is not None else None
        if app is None or port is None or not port.http:
            self.refuse(ProxyError(Code.HOP_INVALID, detail=f"app {hop.app} has no HTTP on port {hop.port} here"))
            return
        self.app, self.port = app, port
        if hop.force is not None or hop.prefer is not None or hop.exclude:
            self.want = Preference(hop.force, hop.prefer, frozenset(hop.exclude))
        if hop.via and hop.via != edge.settings.node:
            self._pass_through(hop)
        else:
            self.choose()

    def _pass_through(self, hop: Hop) -> None:
        """The edge that has it can't reach the node that it is for: we can, perhaps."""
        assert self.app is not None
        site = self.app.site(hop.via)
        if site is None or hop.hops >= MAX_HOPS:
            self.refuse(ProxyError(Code.HOP_INVALID, detail=f"no way to node {hop.via} from here"))
            return
        if site.peer.record.is_silent:
            self.refuse(ProxyError(Code.PEER_UNREACHED, detail=f"node {hop.via} is not heard of here either"))
            return
        self.attempt_peer(site, "")

    def choose(self) -> None:
        """Send it to a machine, or wait for one."""
        app, port = self.app, self.port
        assert app is not None and port is not None
        if app.sites and self.hop is None and (self.trip is None or not self.trip.is_here):
            pick_site(self)
            return
        machine = port.service.sole
        if (
            machine is None
            or self.tried is not None
            or self.want is not None
            or not may_go(self, port.service)
            or not self.attempt(machine)
        ):
            pick(self)

    def aim(self, app: AppView, port: PortView) -> None:
        """From here on it is for this app: a replay says so."""
        self.app, self.port = app, port
        self.first_byte_ns = 0
        self.tried = None
        self.trip = None
        self.wakes = self.attempts = 0
        self.queued_since = 0
        self.choose_again()

    def choose_again(self) -> None:
        """By the newest records: they may have been replaced while we waited."""
        old = self.app
        assert old is not None
        app = self.edge.table.apps.get(old.name)
        port = app.port(self.stream.public_port) if app is not None else None
        # a target need not have TLS where the app has it that hands on; the edge it comes from has looked
        is_other = self.handover is not None or self.hop is not None
        if app is None or port is None or not port.http or (port.tls is not self.stream.is_tls and not is_other):
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

    @property
    def is_in_line(self) -> bool:
        """Whether it waits for a place at a hard limit."""
        return self.wait is not None and self.queued_since > 0

    def on_waited(self, error: ProxyError | None) -> None:
        """What it waited for has come, or does not come."""
        self.wait = None
        if self.wake_machine is not None:
            self.end_wake()
        if self.ended:
            return
        if self.upstream is not None:
            self._on_woken_ahead(self.upstream, error)
        elif error is None and self.queued_since and self.stream.has_left():
            return  # its connection ends, and it with that
        elif error is None:
            self.go_on(self.choose_again)
        else:
            self.go_on(lambda: self.fail(error))

    def _on_woken_ahead(self, connection: UpstreamConnection, error: ProxyError | None) -> None:
        """The machine has had the request since before it ran."""
        if error is None:
            assert self.app is not None
            limit = self.app.record.limits.first_byte_timeout_s
            if limit is not None:
                connection.arm(limit)
            return
        self._let_go().abort()
        self.go_on(lambda: self.fail(error))

    def end_wake(self) -> None:
        """It waits for no start any more."""
        self.wake_ns += monotonic_ns()
        self.wake_machine = None

    def go_on(self, step: Callable[[], None]) -> None:
        """Take a step that nobody's connection is on the stack of: a fault in it must end this client's wait too."""
        try:
            step()
        except Exception as error:
            self.edge.loop.call_exception_handler({"message": "an exchange failed", "exception": error})
            self.on_request_broken(ProxyError(Code.INTERNAL, detail=repr(error)))

    def attempt(self, machine: MachineView) -> bool:
        """Send it to this machine. False, and nothing done, if that is at its hard limit by now."""
        app, port = self.app, self.port
        assert app is not None and port is not None
        service = port.service
        if not self._admit(machine, service.record.hard_limit):
            return False
        pool = machine.pools.get(service.internal_port) or pool_for(self.edge, machine, service, app)
        connection = pool.take()
        if connection is None and self.wakes and self.may_be_sent_twice:
            connection = pool.take_warm()
        if connection is None:
            self.connecting = pool.connect(self)
        else:
            self._send(connection)
        return True

    def attempt_peer(self, site: SiteView, via: str) -> None:
        """Send it to another edge, for a machine there; `via`: by way of that node, for the site's."""
        app, edge = self.app, self.edge
        assert app is not None
        self._release_load()
        peer = edge.table.peers.get(NodeName(via)) if via else site.target.peer
        pool = peer_pool(edge, peer) if peer is not None else None
        self.machine = site.target if not via or peer is None else MachineView(app.name, site.target.record, peer)
        self.attempts += 1
        if pool is None:
            self.fail(ProxyError(Code.PEER_UNREACHED, detail=f"node {via or site.node}: no way there"))
            return
        edge.count(W_PEER_REQUESTS)
        hop, want, stream = self.hop, self.want, self.stream
        # a body that is more than is kept goes out only where it will not have to be sent again
        limits, length = app.record.limits, self.head.length
        self.awaits_go = hop.wants_go if hop is not None else length > limits.replay_memory_bytes or length == CHUNKED
        self.hop_out = hop_line(
            Hop(
                app=app.name,
                port=stream.public_port,
                request_id=self.request_id,
                client_ip=stream.client_ip,
                is_tls=stream.is_tls if hop is None else hop.is_tls,
                hops=1 if hop is None else hop.hops + 1,
                may_wake=self.may_wake,
                may_wait=self.may_wait,
                wants_go=self.awaits_go,
                force=want.force if want is not None else None,
                prefer=want.prefer if want is not None else None,
                exclude=tuple(want.exclude) if want is not None else (),
                via=site.node if via else "",
            )
        )
        connection = pool.take()
        if connection is None:
            self.connecting = pool.connect(self)
        else:
            self._send(connection)

    @property
    def may_be_sent_twice(self) -> bool:
        """Whether it may go over a connection of which nobody knows how the machine has it."""
        return self.head.length == 0 and self.head.method in SAFE_METHODS

    def _admit(self, machine: MachineView, hard_limit: int | None) -> bool:
        """Have it counted as one of the machine's. False: no place."""
        if self.counted_slot != machine.slot:
            self._release_load()
            if not self.edge.load.admit(machine.slot, hard_limit):
                return False
            self.counted_slot = machine.slot
            assert self.app is not None
            self.counted_app = self.app.record.slot if hard_limit is not None else -1
        self.machine = machine
        self.hop_out = b""
        self.attempts += 1
        return True

    def send_ahead(self, machine: MachineView, connection: UpstreamConnection) -> None:
        """Have it lie in the socket of a machine that is being resumed."""
        assert self.port is not None
        if self._admit(machine, self.port.service.record.hard_limit):
            self._send(connection)
        else:
            connection.release(clean=False)  # for nobody else: the machine may have dropped it

    def on_connected(self, connection: UpstreamConnection) -> None:
        self.connecting = None
        if self.ended:
            connection.release(clean=True)
            return
        self.go_on(lambda: self._send(connection))

    def on_connect_failed(self, error: ProxyError) -> None:
        self.connecting = None
        if not self.ended:
            machine = self.machine
            assert machine is not None
            if machine.peer is None:
                self.edge.link.send(
                    PassiveFailure(machine.app, machine.record.id, machine.record.version, error.code.value)
                )
            self.go_on(lambda: self._after_failure(error))

    def _send(self, connection: UpstreamConnection) -> None:
        """Write the head and what is held of the body; from here on the body streams."""
        stream, head, port, app, edge = self.stream, self.head, self.port, self.app, self.edge
        assert port is not None and app is not None
        handover, again = self.handover, self.is_again
        if handover is not None:
            again = again or handover.sends_again
            handover.opened()
        if again and not self.can_send_again:
            connection.release(clean=True)
            self.refuse(ProxyError(Code.REPLAY_BODY_GONE, detail="the body outgrew what is kept while it waited"))
            return
        self.upstream = connection
        connection.begin(self, self.head_only)
        self.sent_ns = monotonic_ns()
        hop_out, self.hop_out = self.hop_out, b""
        keeps = port.service.pooled or head.upgrade is not None or bool(hop_out)
        if self.hop is not None:
            data = sent_on_head(head, keeps, hop_out)
            if self.hop.wants_go and not hop_out:
                stream.send_go()
        else:
            identity = stream.identity(head.minor, keeps)
            extra = self.extra + hop_out if hop_out else self.extra
            data = request_head(
                head,
                identity + extra if extra else identity,
                self.request_id,
                int(self.started_unix * 1_000_000),
                edge.traces.next(),
            )
        limit = app.record.limits.first_byte_timeout_s
        if self.head.length == 0:
            connection.transport.write(data)
            if limit is not None:
                edge.wheel.arm(connection, limit)
            return
        connection.cork()
        connection.write(data)
        connection.disarm()
        if head.expects_continue and limit is not None:
            connection.arm(limit)  # the client waits for the machine's word, and sends no last byte before it
        if not self.awaits_go:
            self._send_body(connection, again)
        elif limit is not None:
            connection.arm(limit)
        if not self.corked:
            connection.uncork()

    def cork(self) -> None:
        """The client's bytes are about to be read: gather what of them goes to the machine until `uncork`."""
        self.corked = True
        if self.upstream is not None:
            self.upstream.cork()

    def uncork(self) -> None:
        self.corked = False
        if self.upstream is not None:
            self.upstream.uncork()

    def _send_body(self, connection: UpstreamConnection, again: bool) -> None:
        """What has come of the body. `again`: a machine has had it before, so that it is all in what was kept."""
        held = self._take_held()
        if again and self.bytes_in:
            assert self.kept is not None
            self.replayed = self.kept.replay(_Again(self, connection))
        else:
            for piece in held or ():
                self._write_body(connection, piece)
            if self.body_done:
                self._finish_request(connection)
        if self.client_held:
            self.client_held = False
            self.stream.resume_body()

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
        gate = self.gate
        if gate is not None and gate.body_over(self.bytes_in):
            self.on_request_broken(gate.body_error(self.bytes_in))
            return
        if self.head.expects_continue:
            self._on_continue()
        if not self.ended and (self.response is None or self.replayed is not None):
            self._keep(data)
        connection = self.upstream if not self.awaits_go else None
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
            self.cut_off()  # it must not answer beside who may get the request next
            self.go_on(lambda: self._on_failure(ProxyError(Code.REPLAY_BODY_GONE, Source.EDGE, detail=detail)))

    def _on_go(self) -> None:
        """The other edge has a machine for it: the body may go."""
        self.awaits_go = False
        connection = self.upstream
        if self.hop is not None:
            self.stream.send_go()  # we only send it on, and its edge waits as we did
        if connection is None or self.ended:
            return
        connection.cork()
        self._send_body(connection, self.is_again)
        connection.uncork()

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
        if self.upstream is not None and not self.ended and self.replayed is None and not self.awaits_go:
            self._finish_request(self.upstream)

    # --- the answer, from the machine

    def on_response_head(self, head: ResponseHead) -> None:
        if head.status < 200:
            self._on_interim(head)
            return
        stream, request, port = self.stream, self.head, self.port
        assert port is not None
        self.first_byte_ns = monotonic_ns()
        if self.wake_machine is not None:
            self._drop_waits()  # it was sent ahead, and the machine is quicker than the word that it runs
        if head.noted and self.machine is not None and self.machine.peer is not None and self._is_refused(head):
            return
        if self.hop is not None:
            pass  # what it tells of its machine is for the edge that sent it on
        elif head.noted or port.watches:
            self._watch(head)
            if head.noted and self._is_replay(head):
                return
        if self.kept is not None:
            self.kept.stop_keeping()
        self.response = head
        self.status = head.status
        framing, self.chunked_out, must_close = response_framing(head, self.head_only, request.minor)
        # A body that is not whole yet may never be: then the connection's next byte is not a request.
        self.close_after = must_close or not self.body_done or request.upgrade is not None
        stream.send_head(head, port, self.request_id, framing, self.close_after)

    def _is_refused(self, head: ResponseHead) -> bool:
        """Read what the other edge says with the answer. True if it is no answer but that edge's refusal."""
        for name, value in head.noted:
            if name == SERVED_BY and is_machine_id(value):
                self.peer_machine = MachineId(value.decode("ascii"))
            elif name == REFUSED:
                self.refusal = _refusal(value)
                self.edge.count(W_PEER_REFUSALS)
        return self.refusal is not None

    @property
    def served_by(self) -> MachineId:
        """The machine that has the request, as far as is known: of a peer's, the node until it has answered."""
        if self.peer_machine is not None:
            return self.peer_machine
        return self.machine.record.id if self.machine is not None else MachineId("")

    def _watch(self, head: ResponseHead) -> None:
        """What the answer tells of its machine."""
        app, machine, edge = self.app, self.machine, self.edge
        assert app is not None and machine is not None
        if machine.peer is None:
            now = edge.wheel.now
            seconds = (self.first_byte_ns - self.sent_ns) / 1e9
            if head.status < 500:
                edge.scores.observe(machine.slot, now, seconds)
            else:
                edge.scores.observe_error(machine.slot, now, seconds)  # a machine that fails fast must not look fast
            for name, value in head.noted:
                if name == LOAD_HEADER:
                    edge.scores.report(machine.slot, now, value)
        is_asked = self.handover is None or self.handover.is_asked(app)  # only its cookie is read again
        if app.record.sticky is not None and is_asked and self.cookie != self.served_by:
            stick(self, head, app.record.sticky, self.served_by)

    def _is_replay(self, head: ResponseHead) -> bool:
        """Whether the machine hands the request on: then the answer is not the client's."""
        try:
            answer = replay_answer(self, head)
        except ProxyError as error:
            self.refuse(error)
            return True
        if answer is None:
            return False
        self.handing = answer
        answer.begin()
        return True

    def hand_on(self, directive: Directive) -> None:
        """The machine's answer is out of the way: follow the replay."""
        self.handing = None
        self._take_held()
        if self.replayed is not None:
            self.replayed.cancel()
            self.replayed = None
        self._release_load()
        if self.handover is None:
            self.handover = Handover(self)
        self.handover.follow(directive)

    def cut_off(self) -> None:
        """No more is wanted of what the machine sends."""
        if self.upstream is not None:
            self._let_go().abort()

    def _let_go(self) -> UpstreamConnection:
        """Give up the connection to the machine; nobody stands still any longer for its sake, nor it for another's."""
        connection, self.upstream = self.upstream, None
        assert connection is not None
        if self.upstream_held:
            self.upstream_held = False
            connection.gate.resume()
        self.on_upstream_resume()
        return connection

    def _on_interim(self, head: ResponseHead) -> None:
        if head.status == 100 and self.awaits_go:
            self._on_go()
            return
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
            self.cut_off()  # first: what was sent ahead waits on for its machine, and must not wait for this
            self._on_failure(
                ProxyError(Code.UPGRADE_REFUSED, Source.UPSTREAM, detail="101 to a request without Upgrade")
            )
            return
        self.first_byte_ns = monotonic_ns()
        self.response = head
        self.status = 101
        connection.disarm()
        if head.noted or port.watches:
            self._watch(head)
        self.stream.send_switch(head, port, self.request_id)
        self.tunnel = Tunnel(self, connection, port.idle_s)
        self.stream.open_tunnel(self.tunnel)

    def on_upgrade_bytes(self, data: bytes) -> None:
        if self.tunnel is not None:
            self.bytes_out += len(data)
            self.tunnel.from_machine(data)

    def on_response_body(self, data: bytes) -> None:
        if self.handing is not None:
            self.handing.add(data)
            return
        self.bytes_out += len(data)
        if self.chunked_out:
            self.stream.send_chunk(data)
        else:
            self.stream.send_data(data)

    def on_response_end(self, trailers: Headers) -> None:
        machine = self.machine
        if machine is not None:
            if machine.peer is not None:
                machine.peer.succeeded(self.edge.wheel.now)
            elif machine.passive is not None:
                machine.passive.succeeded(self.edge.wheel.now)
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            self._let_go().release(clean=self.body_done and not self.awaits_go and self.replayed is None)
            self.go_on(lambda: self._after_failure(refusal))
            return
        handing = self.handing
        if handing is None and self.chunked_out:
            self.stream.send_last_chunk(trailers)
        response = self.response if handing is None else handing.head
        assert response is not None
        is_sent = self.body_done and self.replayed is None  # one that is sent again may not be whole at the machine
        is_clean = response.keep_alive and is_sent and self.head.upgrade is None
        self._let_go().release(clean=is_clean)
        if handing is not None:
            self.go_on(handing.end)
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
        self.on_upstream_resume()
        if not self.ended:
            self.go_on(lambda: self._on_failure(error))

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
            if self.upstream is not None and self.response is None and self.app is not None:
                is_sent = self.body_done and self.replayed is None
                limit = self.app.record.limits.first_byte_timeout_s if is_sent else None
                if limit is None:
                    self.upstream.disarm()
                else:
                    self.upstream.arm(limit)
            if self.replayed is not None:  # last: it may fill the machine's side again
                self.replayed.resume()

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
            self.handing.fail(str(error))
        elif self.wake_machine is not None:
            self._release_load()  # it was sent ahead, in vain; the machine's start goes on
        elif self.response is not None:
            self._fail_midway(error)
        else:
            self._after_failure(error)

    def _after_failure(self, error: ProxyError) -> None:
        """An attempt failed before any answer: what next is decide/retry's to say."""
        machine, port = self.machine, self.port
        assert machine is not None and port is not None
        if machine.peer is not None:
            self._after_peer_failure(machine.peer, error)
            return
        if self.app is not None and error.code in _BLAMED and error.retry is not Retry.REUSED_CONNECTION:
            self.app.failed(machine, self.edge.wheel.now)
            self.edge.scores.observe_failure(machine.slot, self.edge.wheel.now)
        has_body = self.head.length != 0
        tried = (self.tried or set()) | {machine.record.id}
        others = self._others_run(tried) or (self.wakes == 0 and not self._is_given_back)
        step = next_step(self.head.method, has_body, error.code, error.retry, self.attempts, others)
        if step is Step.FRESH_CONNECTION and machine not in port.service.running:
            step = Step.ANOTHER if others else Step.GIVE_UP  # it is stopping, or answers elsewhere now
        if step is Step.FRESH_CONNECTION:
            self.connecting = self._fresh(machine)
        elif step is Step.ANOTHER:
            self.tried = tried
            self._another(machine)
        else:
            if error.retry is not Retry.NOTHING_SENT:
                self.trip = None  # a machine may have had it: it goes to no other
            self.fail(error)

    def _after_peer_failure(self, peer: PeerView, error: ProxyError) -> None:
        """Another edge was not reached, went away, or refused. Elsewhere, if no machine can have had the request."""
        if error.code in _BLAMED and (error.retry is not Retry.REUSED_CONNECTION or self.attempts > 1):
            peer.failed(self.edge.wheel.now)
        is_safe = error.retry is Retry.REUSED_CONNECTION and self.may_be_sent_twice
        if error.retry is not Retry.NOTHING_SENT and not is_safe:
            self.trip = None  # this is its end
        elif self.sent_ns and self.bytes_in and not self.awaits_go:
            self.is_again = True  # some of the body may have gone
        self.awaits_go = False
        self.sent_ns = 0
        self.peer_machine = None
        self.fail(error)

    @property
    def _is_given_back(self) -> bool:
        """Whether who named this one machine takes the request back: sooner than that it is looked after."""
        is_named = self.want is not None and self.want.force is not None
        return is_named and self.handover is not None and self.handover.gives_back

    def _others_run(self, tried: set[MachineId]) -> bool:
        """Whether a machine runs that may be taken in the place of those tried."""
        assert self.port is not None
        want = self.want
        if want is not None:
            if want.force is not None:
                return False
            tried = tried | want.exclude
        return any(one.record.id not in tried for one in self.port.service.running)

    def _fresh(self, machine: MachineView) -> asyncio.Task[None]:
        assert self.port is not None and self.app is not None
        self.attempts += 1
        return pool_for(self.edge, machine, self.port.service, self.app).connect(self)

    def _another(self, failed: MachineView) -> None:
        """Another running machine; with none left, have control look after the one that failed."""
        assert self.port is not None
        self._release_load()
        if self._others_run(self.tried or set()):
            pick(self)
        elif failed.record.state.value == "started" and self.may_wake:
            wake(self, failed.record.id)
        else:
            self.tried = None
            pick(self)

    def fail(self, error: ProxyError) -> None:
        """No machine was reached: go to another node, if there is one that has machines of the app. Where a replay
        pointed there, that is for its sender to hear of."""
        if self.trip is not None and self.trip.goes_on(self, error):
            return
        if self.handover is not None and self.handover.is_open:
            self.leave_target()
            self.handover.failed(error)
        else:
            self.refuse(error)

    def leave_target(self) -> None:
        """Stop trying to reach where a replay pointed."""
        self._drop_waits()
        self._release_load()

    def refuse(self, error: ProxyError) -> None:
        """Answer with an error of ours. Only before any byte of an answer has been sent."""
        self.detail, self.failed = error.detail, True
        after = error.retry_after_s
        fields = ((b"retry-after", b"%d" % after),) if after is not None else ()
        self.answer(error.code, http_status(error.code), fields, error_page(error))

    def answer(self, code: Code, status: int, fields: tuple[tuple[bytes, bytes], ...], body: bytes) -> None:
        """An answer of ours. Only before any byte of another has been sent."""
        self.code, self.status = code, status
        self._drop_upstream()
        fields = ((b"wakefront-error", code.value.encode()), *fields)
        self.stream.send_answer(status, fields, b"" if self.head_only else body, self.request_id)
        self._end(close=not self.body_done or self.head.upgrade is not None)

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
        if self.tunnel is not None:
            self.code, self.detail, self.failed = error.code, error.detail, True
            self.cut_off()
            self.tunnel.machine_lost()
        elif self.response is None:
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
            self.end_wake()
        if self.wait is not None:
            self.wait.cancel()
            self.wait = None
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None

    def _drop_upstream(self) -> None:
        self._drop_waits()
        if self.handover is not None:
            self.handover.stop()
        if self.handing is not None:
            self.handing.stop()
            self.handing = None
        self.cut_off()
        self._take_held()
        self._release_body()
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
                    self.stream.is_tls if self.hop is None else self.hop.is_tls, self.served_by, first_us / 1000,
                    self.wake_ns // 1000 / 1000, self.attempts, self.code.value if self.code is not None else "",
                    self.detail, self.tunnel is not None,
                )
            )  # fmt: skip


def _refusal(value: bytes) -> ProxyError:
    """Another edge's word that it does not serve the request. What can't be read counts as if a machine had it."""
    try:
        said = parse_refused(value)
        code = Code(said.code)
    except HopError as error:
        return ProxyError(Code.HOP_INVALID, Source.UPSTREAM, detail=f"a refusal that can't be read: {error}")
    except ValueError:  # a newer version's
        code = Code.HOP_INVALID
    retry = Retry.NOTHING_SENT if said.is_unsent else Retry.NEVER
    return ProxyError(code, Source.UPSTREAM, retry, said.detail, retry_after_s=said.retry_after_s)


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

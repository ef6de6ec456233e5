"""A request that its app handed on with `fly-replay`: where it goes next, and what becomes of it when it gets nowhere.

One `Handover` per request that was replayed at least once; the Exchange keeps it and asks it at three points: when an
answer says where to go (`follow`), when that can't be reached (`failed`), when a connection to it stands (`opened`).
What a directive says is decide/replay.py's to read and judge; how a request is sent is the Exchange's.
Source: spec routing §2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.clock import monotonic_ns, unix
from proxy.decide.balance import Preference
from proxy.decide.region import RegionWish
from proxy.decide.replay import Directive, FailReason, Fallback, apply_transform, judge, replay_failed, replay_src
from proxy.decide.replay_cache import Found
from proxy.edge.table import AppView, PortView
from proxy.edge.timers import Call
from proxy.errors import Code, ProxyError, Source
from proxy.model import MachineId, RegionCode

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange

_UNREACHED = frozenset(
    {
        Code.NO_CANDIDATE, Code.NO_CANDIDATE_AFTER_RETRIES, Code.NO_HEALTHY, Code.FORCED_UNREACHED, Code.QUEUE_FULL,
        Code.QUEUE_TIMEOUT, Code.CONNECT_REFUSED, Code.CONNECT_RESET, Code.CONNECT_TIMEOUT, Code.CONNECT_IO,
        Code.WAKE_HELD, Code.WAKE_IGNORED, Code.WAKE_TIMEOUT, Code.WAKE_INTERNAL, Code.WAKE_BUDGET,
        Code.START_FAILED, Code.NOT_STARTABLE, Code.START_CANCELLED, Code.TOO_MANY_WAITERS,
        Code.CONTROL_UNAVAILABLE, Code.MACHINE_GONE, Code.REPLAY_UNREACHED,
    }
)  # fmt: skip
_RETRIED = frozenset(
    {Code.NO_CANDIDATE_AFTER_RETRIES, Code.CONNECT_REFUSED, Code.CONNECT_RESET, Code.CONNECT_TIMEOUT, Code.CONNECT_IO}
)


class Handover:
    """Where a replayed request came from and how far it has got."""

    __slots__ = (
        "_app", "_came_back", "_directive", "_exchange", "_found", "_original", "_port", "_reached", "_replays",
        "_routed", "_source", "_started_ns", "_timer", "_want", "_wish",
    )  # fmt: skip

    _app: AppView  # of the machine that handed the request on
    _port: PortView
    _source: MachineId | None  # that machine; None: the cache remembered for it

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        head = exchange.head
        self._original = (head.target, head.passed, head.listed_hops)
        self._routed = exchange.app  # whose host the client named
        self._directive: Directive | None = None
        self._found: Found | None = None  # the entry of the cache that is being followed
        self._want: Preference | None = None
        self._wish: RegionWish | None = None
        self._reached = False
        self._started_ns = 0
        self._timer: Call | None = None
        self._came_back = False  # by a fallback: it is not handed on again
        self._replays = 0

    def follow(self, directive: Directive) -> None:
        """Send the request to where its app says."""
        exchange = self._exchange
        app, port, machine = exchange.app, exchange.port, exchange.machine
        assert app is not None and port is not None and machine is not None
        self._app, self._port, self._source = app, port, exchange.served_by
        self._directive = directive
        self._reached = False
        self._started_ns = monotonic_ns()
        table = exchange.edge.table
        target = app if directive.app is None else table.apps.get(directive.app)
        error = judge(
            directive, self._replays, self._came_back, app.record, target.record if target is not None else None
        )
        self._replays += 1
        if error is None:
            app.has_replayed = True  # the next one's body is kept further, if this one's was not kept far enough
        if error is None and not exchange.can_send_again:
            error = ProxyError(Code.REPLAY_BODY_GONE, detail="the request's body was more than is kept")
        if error is not None or target is None:
            exchange.refuse(error or ProxyError(Code.REPLAY_APP_UNKNOWN))
            return
        try:
            self._remember(directive, app)
        except ProxyError as fault:
            exchange.refuse(fault)
            return
        source = replay_src(self._source, machine.record.region, int(unix() * 1e6), directive.state)
        exchange.extra = b"fly-replay-src: %b\r\nfly-replay-cache-status: %b\r\n" % (source, exchange.cache_status)
        self._address(directive, target)

    def _remember(self, directive: Directive, app: AppView) -> None:
        """Tell the cache. Raises ProxyError(REPLAY_INVALID) for an order that it can't follow."""
        exchange, routed = self._exchange, self._routed
        if (directive.cache is None and exchange.session is None) or routed is None:
            return
        is_apps_own = self._replays == 1 and self._found is None and app.name == routed.name
        target = self._original[0]
        edge, host = exchange.edge, exchange.head.host
        edge.replays.note(routed.name, host, target, exchange.session, directive, is_apps_own, edge.wheel.now)

    def follow_remembered(self, found: Found) -> bool:
        """Go where the cache says. False, and nothing done, if that may not be any more."""
        exchange, directive = self._exchange, found.directive
        app, port = exchange.app, exchange.port
        assert app is not None and port is not None
        self._app, self._port, self._source = app, port, None
        table = exchange.edge.table
        target = app if directive.app is None else table.apps.get(directive.app)
        if target is None or judge(directive, 0, False, app.record, target.record) is not None:
            exchange.edge.replays.drop(found.key)
            return False
        self._found = found
        self._directive = directive
        self._reached = False
        self._started_ns = monotonic_ns()
        self._want, self._wish = exchange.want, exchange.wish
        exchange.extra = b"fly-replay-cache-status: hit\r\n"
        self._address(directive, target)
        return True

    def _address(self, directive: Directive, target: AppView) -> None:
        """Turn the exchange towards the target, and let it choose there."""
        exchange = self._exchange
        head, edge = exchange.head, exchange.edge
        error = self._keeps_out(target)
        if error is not None:
            exchange.refuse(error)
            return
        head.target, head.passed, head.listed_hops = self._original
        transform = directive.transform
        if transform is not None:
            head.target = transform.path or head.target
            head.passed = apply_transform(head.passed, transform, head.listed_hops)
            head.listed_hops = frozenset()  # they are out; what the app has set stays, whatever the client named
        if directive.timeout_s is not None:
            self._timer = edge.wheel.call_later(directive.timeout_s, self._on_timeout)
        port = target.port(exchange.stream.public_port)
        if port is None or not port.http:
            self.failed(ProxyError(Code.REPLAY_UNREACHED, detail=f"{target.name} serves no HTTP on this port"))
            return
        wish = RegionWish(directive.regions, is_forced=True) if directive.regions else None
        if wish is not None and not target.is_in(wish, RegionCode(edge.region)):
            self.failed(ProxyError(Code.REPLAY_UNREACHED, detail="the app has no machine in any of the regions"))
            return
        exclude = frozenset({self._source} if self._source is not None and directive.elsewhere else ())
        exchange.want = Preference(directive.instance, directive.prefer_instance, exclude)
        exchange.wish = wish
        exchange.aim(target, port)

    def _keeps_out(self, target: AppView) -> ProxyError | None:
        """Another app's access rules hold for what is replayed to it; they are the ones for the rest of the body."""
        exchange, gate = self._exchange, target.gate
        if gate is None or target.name == self._app.name:
            return None
        seen = max(exchange.head.length, exchange.bytes_in)
        exchange.gate = gate
        return gate.admit(exchange.stream.client_ip, seen, exchange.edge.wheel.now)

    def is_asked(self, app: AppView) -> bool:
        """Whether the client itself named this app."""
        return self._routed is not None and self._routed.name == app.name

    @property
    def sends_again(self) -> bool:
        """Whether a machine has had the request before: then its body is what was kept of it."""
        return self._replays > 0

    @property
    def is_open(self) -> bool:
        """Whether the target has not been reached yet: until then a failure is the replay's."""
        return self._directive is not None and not self._reached

    @property
    def gives_back(self) -> bool:
        """Whether a failure takes the request back to the app that handed it on."""
        return self.is_open and self._directive is not None and self._directive.fallback is not None

    def opened(self) -> None:
        """A connection to the target stands: what comes now is its answer, whatever it is (spec routing §2.2)."""
        self._reached = True
        self.stop()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        if self.is_open and not self._exchange.ended:
            self._exchange.go_on(self._give_up)

    def _give_up(self) -> None:
        self._exchange.leave_target()
        self._give_back(FailReason.TIMEOUT, ProxyError(Code.REPLAY_UNREACHED, detail="not reached within its timeout"))

    def failed(self, error: ProxyError) -> None:
        """The target could not be reached."""
        reason = FailReason.RETRIES_EXHAUSTED if error.code in _RETRIED else FailReason.NO_CANDIDATE
        self._give_back(reason, error)

    def _give_back(self, reason: FailReason, error: ProxyError) -> None:
        """Back to the app that handed it on where that asked for it, else the end."""
        self.stop()
        exchange, directive = self._exchange, self._directive
        assert directive is not None
        if self._source is None:
            self._leave_cache()
            return
        if directive.fallback is None or error.code not in _UNREACHED:
            self._reached = True  # nothing more is tried on behalf of the replay
            detail = f"replay by {self._source} of {self._app.name}: {reason.value}: {error}"
            code = Code.REPLAY_UNREACHED if error.code in _UNREACHED else error.code
            exchange.refuse(ProxyError(code, Source.MACHINE, detail=detail, retry_after_s=error.retry_after_s))
            return
        source = self._source
        self._directive = None
        self._came_back = True
        elapsed_ms = (monotonic_ns() - self._started_ns) // 1_000_000
        failed = replay_failed(directive, directive.app or self._app.name, source, reason, elapsed_ms)
        exchange.extra = b"fly-replay-failed: %b\r\n" % failed
        head = exchange.head
        head.target, head.passed, head.listed_hops = self._original
        force = source if directive.fallback is Fallback.FORCE_SELF else None
        exchange.want = Preference(force, None if force else source)
        exchange.wish = None
        self._go_back()

    def _leave_cache(self) -> None:
        """What the cache remembered can't be reached: forget it, and go the usual way."""
        exchange, found = self._exchange, self._found
        assert found is not None
        exchange.edge.replays.drop(found.key)
        self._found = self._directive = None
        exchange.extra = b""
        exchange.want, exchange.wish = self._want, self._wish
        self._go_back()

    def _go_back(self) -> None:
        """To the app that handed it on, under that one's rules again."""
        self._exchange.gate = self._app.gate
        self._exchange.aim(self._app, self._port)

"""Which node a request goes to, where its app has machines at several: one step at a time, each way once.

A `Trip` goes with the request. What is known of the app's machines elsewhere (table.SiteView) is up to half a second
old and may be wrong, so the node that gets the request decides last: it may refuse, and the request goes on.
Of this node's own machines choice.py chooses, as for any other app.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from proxy.decide.balance import Preference
from proxy.edge.choice import pick
from proxy.edge.table import PeerView, ServiceView, SiteView
from proxy.edge.upstream import Pool
from proxy.errors import Code, ProxyError, Source
from proxy.model import Endpoint, MachineState, RegionCode

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext
    from proxy.edge.exchange import Exchange

_STOPS_MAX: Final = 12  # of one request
_FULL_S: Final = 0.25  # a node that says that it is full is so until it says otherwise, or for this long
_CONNECT_TIMEOUT_S: Final = 3.0
# After these another node may do better. Everything else is the request's own fault, or has reached a machine.
_BOUNCES: Final = frozenset(
    {
        Code.CONNECT_REFUSED, Code.CONNECT_RESET, Code.CONNECT_TIMEOUT, Code.CONNECT_IO, Code.REQUEST_UNFINISHED,
        Code.PEER_UNREACHED, Code.RECENTLY_STOPPED, Code.AT_HARD_LIMIT, Code.HOP_INVALID, Code.OVERLOADED,
        Code.NO_HEALTHY, Code.NO_CANDIDATE, Code.NO_CANDIDATE_AFTER_RETRIES, Code.MACHINE_GONE, Code.QUEUE_FULL,
        Code.WAKE_INTERNAL, Code.WAKE_TIMEOUT, Code.START_FAILED, Code.NOT_STARTABLE, Code.START_CANCELLED,
        Code.WAKE_HELD, Code.TOO_MANY_WAITERS, Code.CONTROL_UNAVAILABLE, Code.FORCED_UNREACHED,
    }
)  # fmt: skip


class Trip:
    """Where a request has been. The node of a stop, and whether it may be woken for or wait in line there."""

    __slots__ = ("_been", "_last", "_node", "is_here")

    def __init__(self) -> None:
        self._been: set[tuple[str, bool, bool]] = set()
        self._node = ""
        self._last: ProxyError | None = None
        self.is_here = False  # a machine of this node is to serve it, and has not failed to yet

    def stop_at(self, node: str, is_here: bool, may_wake: bool, may_wait: bool) -> None:
        self._node = node
        self.is_here = is_here
        self._been.add((node, may_wake, may_wait))

    def has_been(self, node: str, may_wake: bool, may_wait: bool) -> bool:
        return (node, may_wake, may_wait) in self._been

    @property
    def is_long(self) -> bool:
        return len(self._been) >= _STOPS_MAX

    @property
    def last(self) -> ProxyError | None:
        """Why the last stop was in vain."""
        return self._last

    def goes_on(self, exchange: Exchange, error: ProxyError) -> bool:
        """A stop was in vain. Whether the request goes to another, or ends otherwise: not with this error."""
        if error.code not in _BOUNCES or not self._node or self.is_long:
            return False
        if exchange.kept is not None and exchange.is_again and not exchange.can_send_again:
            return False
        app, port = exchange.app, exchange.port
        assert app is not None and port is not None
        if error.code is Code.AT_HARD_LIMIT and (site := app.site(self._node)) is not None:
            site.refused(port.service.internal_port, exchange.edge.wheel.now + _FULL_S)
        self._last = error
        self._node = ""
        self.is_here = False
        exchange.leave_target()
        exchange.choose_again()
        return True


def peer_pool(edge: EdgeContext, peer: PeerView) -> Pool | None:
    """The connections to a node, made on first use; None while this node has no certificate to show."""
    if peer.pool is None and edge.peer_tls is not None:
        record = peer.record
        peer.pool = Pool(
            edge, Endpoint(0, record.host, record.port), 0, True, _CONNECT_TIMEOUT_S, -1, edge.peer_tls(record.name)
        )
    return peer.pool


def pick_site(exchange: Exchange) -> None:
    """Take the next step of a request whose app has machines at other nodes too."""
    trip = exchange.trip
    if trip is None:
        trip = exchange.trip = Trip()
    step = _next(exchange, trip)
    if step is None:
        exchange.trip = None
        exchange.fail(trip.last or _nowhere(exchange))
        return
    site, may_wake, may_wait = step
    exchange.may_wake, exchange.may_wait = may_wake, may_wait
    if site is None:
        trip.stop_at(exchange.edge.settings.node, True, may_wake, may_wait)
        exchange.tried = None
        pick(exchange)
    else:
        trip.stop_at(site.node, False, may_wake, may_wait)
        exchange.attempt_peer(site, "")


def _nowhere(exchange: Exchange) -> ProxyError:
    want = exchange.want
    if want is not None and want.force is not None:
        return ProxyError(Code.FORCED_UNREACHED, Source.MACHINE, detail=f"no node has a machine {want.force}")
    return ProxyError(Code.NO_CANDIDATE, detail="no machine of the app, on any node, may get it")


_Step = tuple[SiteView | None, bool, bool]  # the site (None: here), may wake, may wait


def _next(exchange: Exchange, trip: Trip) -> _Step | None:
    """The next stop."""
    app, port, edge = exchange.app, exchange.port, exchange.edge
    assert app is not None and port is not None
    service, here, now = port.service, edge.settings.node, edge.wheel.now
    want, wish_for = exchange.want, exchange.wish
    if want is not None and want.force is not None:
        return _to_the_machine(exchange, trip, want)
    if want is not None and want.prefer is not None and want.prefer not in app.machines:
        site = app.site_of(want.prefer)
        is_new = site is not None and not trip.has_been(site.node, False, False)
        if site is not None and is_new and _there(site, service, now, edge.rng).band >= 0:
            return site, False, False
    ranks = edge.region_ranks
    own = RegionCode(edge.region)
    stops: list[tuple[tuple[float, ...], _Step]] = []
    for site in (None, *app.sites.values()):
        region = own if site is None else site.target.record.region
        wish = wish_for.rank(region) if wish_for is not None else 0
        if wish is None:
            continue
        if site is None:
            node, away, seen = here, 0, _here(service, edge)
        else:
            node, away, seen = site.node, 1, _there(site, service, now, edge.rng)
        rank = -1 if region == own else ranks.get(region, len(ranks))
        is_last = site is None and edge.is_drained  # better than nowhere
        if seen.band >= 0 and not is_last and not trip.has_been(node, False, False):
            stops.append(((wish, 0, rank, seen.band, away, edge.rng.random()), (site, False, False)))
        if seen.sleeps and not is_last and service.record.autostart and not trip.has_been(node, True, False):
            stops.append(((wish, 1, rank, 0, away, edge.rng.random()), (site, True, False)))
        if (seen.runs or seen.sleeps) and not trip.has_been(node, True, True):
            stops.append(((wish, 3 if is_last else 2, rank, 0, away, edge.rng.random()), (site, True, True)))
    return min(stops, key=lambda one: one[0])[1] if stops else None


def _to_the_machine(exchange: Exchange, trip: Trip, want: Preference) -> _Step | None:
    app, here = exchange.app, exchange.edge.settings.node
    assert app is not None and want.force is not None
    site = None if want.force in app.machines else app.site_of(want.force)
    if (site is None and want.force not in app.machines) or trip.has_been(site.node if site else here, True, True):
        return None
    return site, True, True


class _Seen:
    """An app's machines at a node: the band of the least loaded that may be chosen (0 below its soft limit, 1 below its
    hard one, -1 none), whether any runs, and whether one sleeps."""

    __slots__ = ("band", "runs", "sleeps")

    def __init__(self, band: int, runs: bool, sleeps: bool) -> None:
        self.band = band
        self.runs = runs
        self.sleeps = sleeps


def _here(service: ServiceView, edge: EdgeContext) -> _Seen:
    record = service.record
    band = -1
    for one in service.running:
        load = edge.in_flight(one.slot)
        if load < record.soft_limit:
            band = 0
            break
        if record.hard_limit is None or load < record.hard_limit:
            band = 1
    sleeps = any(_can_be_woken(one.record.state) for one in service.machines)
    return _Seen(band, bool(service.running) or service.is_failing, sleeps)


def _there(site: SiteView, service: ServiceView, now: float, rng: random.Random) -> _Seen:
    peer, port = site.target.peer, service.internal_port
    assert peer is not None
    if not peer.record.is_up:
        return _Seen(-1, False, False)
    groups = service.record.processes
    machines = [one for one in site.machines if one.group in groups and not one.cordoned]
    started = [one for one in machines if one.state is MachineState.STARTED]
    sleeps = any(_can_be_woken(one.state) for one in machines)
    healthy = any(port not in one.failing_ports for one in started)
    is_avoided = peer.passive is not None and peer.passive.is_avoided(now)
    if not healthy or is_avoided or site.is_full(port, now) or rng.random() >= peer.record.share:
        return _Seen(-1, bool(started), sleeps)
    load = site.load(port)
    band = 0 if load is None or load.below_soft else 1 if load.below_hard else -1
    return _Seen(band, True, sleeps)


def _can_be_woken(state: MachineState) -> bool:
    return state.is_startable or state is MachineState.STARTING

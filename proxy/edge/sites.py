"""Which node a request goes to, where its app has machines at several: one step at a time, each way once.

A `Trip` goes with the request; decide/nearest.py chooses each of its steps, from what is known of the app's machines
elsewhere (table.SiteView). That is up to half a second old and may be wrong, so the node that gets the request decides
last: it may refuse, and the request goes on. Of this node's own machines choice.py chooses, as for any other app.

    KnownSites  a service's machines at other nodes as decide/nearest.py wants them, kept as long as nothing changes
    Trip        where a request has been, and what came of it
    pick_site   the next step
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from proxy.decide.nearest import (
    ANYWHERE,
    HERE,
    MAX_STEPS,
    Ask,
    Here,
    Nothing,
    Peer,
    Site,
    Sites,
    Step,
    Tried,
    Wait,
    Wake,
    next_step,
)
from proxy.decide.peer_health import PeerState
from proxy.edge.choice import pick
from proxy.edge.table import AppView, PeerView, ServiceView, SiteView
from proxy.edge.upstream import Pool
from proxy.errors import Code, ProxyError, Source
from proxy.model import Endpoint, MachineId, MachineState, NodeName, RegionCode, RemoteMachine

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext
    from proxy.edge.exchange import Exchange

_FULL_S: Final = 0.25  # a node that says that it is full is so until it says otherwise, or for this long
_RECOVERING_S: Final = 0.5  # between two looks at a node whose share grows
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


class KnownSites:
    """A service's machines at other nodes. What changed is seen by the versions of site and node, when it is asked."""

    __slots__ = ("_look_at", "_sites", "_versions")

    def __init__(self, app: AppView, region: RegionCode) -> None:
        self._sites = Sites(region, app.record.wake, app.record.primary_region)
        self._versions: dict[NodeName, int] = {}
        self._look_at = math.inf  # monotonic seconds at which time alone changes something

    def now(self, app: AppView, service: ServiceView, edge: EdgeContext) -> Sites:
        now, versions = edge.wheel.now, self._versions
        if now >= self._look_at:
            versions.clear()
            self._look_at = math.inf
        for node, view in app.sites.items():
            version = max(view.version, view.peer.version)
            if versions.get(node) != version:
                versions[node] = version
                self._sites.put(self._seen(view, service, now))
        if len(versions) != len(app.sites) or len(self._sites) != len(versions):
            for site in [site for site in self._sites if site.node not in app.sites]:
                self._sites.remove(site.node)
                versions.pop(site.node, None)
        self._sites.rank(edge.region_ranks)
        return self._sites

    def _seen(self, view: SiteView, service: ServiceView, now: float) -> Site:
        port, groups, record = service.internal_port, service.record.processes, view.peer.record
        well = failing = startable = starting = 0
        for one in view.machines:
            if one.group not in groups or one.cordoned:
                continue
            if one.state is MachineState.STARTED:
                if port in one.failing_ports:
                    failing += 1
                else:
                    well += 1
            elif one.state is MachineState.STARTING:
                starting += 1
            elif one.state.is_startable:
                startable += 1
        below_soft, below_hard, full = well, 0, 0
        load = view.load(port)
        if load is not None and well and load.below_soft + load.below_hard + load.full:
            below_soft, below_hard, full = load.below_soft, load.below_hard, load.full
        if (until := view.full_until(port)) > now:
            below_soft, below_hard, full = 0, 0, below_soft + below_hard + full
            self._look_at = min(self._look_at, until)
        state = _state(view.peer, now)
        suspicion = view.peer.suspicion
        share = record.share
        if suspicion is not None:
            if suspicion.is_suspect(now):
                self._look_at = min(self._look_at, suspicion.until)
            else:
                share = min(share, suspicion.share(now))
                if suspicion.share(now) < 1.0:
                    self._look_at = min(self._look_at, now + _RECOVERING_S)
        return Site(
            node=view.node, region=record.region, below_soft=below_soft, below_hard=below_hard, full=full,
            failing=failing, startable=startable, starting=starting, state=state, share=share,
            vias=record.vias,
        )  # fmt: skip


def _state(peer: PeerView, now: float) -> PeerState:
    if peer.record.is_silent:
        return PeerState.SILENT
    if not peer.record.is_up:
        return PeerState.DRAINING
    is_suspect = peer.suspicion is not None and peer.suspicion.is_suspect(now)
    return PeerState.SUSPECT if is_suspect else PeerState.HEALTHY


def known_sites(app: AppView, service: ServiceView, edge: EdgeContext) -> Sites:
    """A service's machines at other nodes, as they are known now."""
    known = service.known
    if known is None:
        known = service.known = KnownSites(app, RegionCode(edge.region))
    return known.now(app, service, edge)


def own_site(service: ServiceView, edge: EdgeContext) -> Site:
    """This node's machines of a service as they stand now."""
    record, port = service.record, service.internal_port
    below_soft = below_hard = failing = startable = starting = 0
    for one in service.running:
        load = edge.in_flight(one.slot)
        if load < record.soft_limit:
            below_soft += 1
        elif record.hard_limit is None or load < record.hard_limit:
            below_hard += 1
    for one in service.machines:
        state = one.record.state
        if state is MachineState.STARTED:
            failing += one.takes_requests and port in one.record.failing_ports
        elif state is MachineState.STARTING:
            starting += 1
        elif state.is_startable:
            startable += 1
    return Site(
        node=NodeName(edge.settings.node), region=RegionCode(edge.region), below_soft=below_soft, below_hard=below_hard,
        full=len(service.running) - below_soft - below_hard, failing=failing, startable=startable, starting=starting,
        state=PeerState.DRAINING if edge.is_drained else PeerState.HEALTHY,
    )  # fmt: skip


class Trip:
    """Where a request has been: the steps it took in vain, and the one it is at."""

    __slots__ = ("_count", "_step", "is_here", "last", "tried")

    def __init__(self) -> None:
        self._step: Step | None = None
        self._count = 0
        self.tried: Tried | None = None
        self.last: ProxyError | None = None  # why the last step was in vain
        self.is_here = False  # a machine of this node is to serve it, and has not failed to yet

    def take(self, step: Step, is_here: bool) -> None:
        self._step = step
        self._count += 1
        self.is_here = is_here

    def goes_on(self, exchange: Exchange, error: ProxyError) -> bool:
        """A step was in vain. Whether the request takes another, or ends otherwise: not with this error."""
        step = self._step
        if error.code not in _BOUNCES or step is None or self._count >= MAX_STEPS:
            return False
        if exchange.kept is not None and exchange.is_again and not exchange.can_send_again:
            return False
        app, port, edge = exchange.app, exchange.port, exchange.edge
        assert app is not None and port is not None
        if error.code is Code.AT_HARD_LIMIT and isinstance(step, (Peer, Wake, Wait)):
            site = app.site(step.node)
            if site is not None:
                site.refused(port.service.internal_port, edge.wheel.now + _FULL_S)
        if self.tried is None:
            self.tried = Tried(NodeName(edge.settings.node))
        self.tried.add(step, error.code)
        self.last = error
        self._step = None
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
    if isinstance(step, Nothing):
        exchange.trip = None
        exchange.fail(trip.last or _nowhere(exchange, step.code))
        return
    app, edge = exchange.app, exchange.edge
    assert app is not None
    is_forced = exchange.want is not None and exchange.want.force is not None
    # to a machine that is named it goes once: there it is woken, or waits, as need be
    exchange.may_wake = is_forced or isinstance(step, (Wake, Wait))
    exchange.may_wait = is_forced or isinstance(step, Wait)
    here = edge.settings.node
    node = here if isinstance(step, Here) else step.node
    via = step.via or "" if isinstance(step, (Peer, Wake)) else ""
    trip.take(Wait(NodeName(node)) if is_forced and not via else step, node == here)
    if isinstance(step, (Here, Peer)) and step.beside is not None:
        _start_beside(exchange, step.beside)
    if node == here:
        exchange.tried = None
        pick(exchange)
        return
    site = app.site(node)
    if site is None:  # it has gone meanwhile
        exchange.fail(ProxyError(Code.PEER_UNREACHED, detail=f"node {node}: it is not known any more"))
        return
    exchange.attempt_peer(site, via)


def _start_beside(exchange: Exchange, node: NodeName) -> None:
    """Have one more machine started, here or at another node; nobody waits for it."""
    app, port, edge = exchange.app, exchange.port, exchange.edge
    assert app is not None and port is not None
    if node == edge.settings.node:
        edge.waker.start_another(app, port.service)
        return
    site, groups = app.site(node), port.service.record.processes
    asleep = [one.id for one in site.machines if one.group in groups and _sleeps(one)] if site is not None else []
    if asleep and edge.waker.may_start_another(app):
        edge.waker.start_at(app, min(asleep))  # others, who ask for it at the same time, are to name the same


def _sleeps(machine: RemoteMachine) -> bool:
    return machine.state.is_startable and not machine.cordoned


def _nowhere(exchange: Exchange, code: Code) -> ProxyError:
    want = exchange.want
    if want is not None and want.force is not None:
        return ProxyError(Code.FORCED_UNREACHED, Source.MACHINE, detail=f"no node has a machine {want.force}")
    detail = "no machine of the app, on any node, may get it"
    if code is Code.PEER_UNREACHED:
        detail = "the nodes that have machines of the app for it are not heard of"
    return ProxyError(Code.NO_CANDIDATE, detail=detail)


def _next(exchange: Exchange, trip: Trip) -> Step:
    app, port, edge = exchange.app, exchange.port, exchange.edge
    assert app is not None and port is not None
    service, want = port.service, exchange.want
    if want is None and exchange.wish is None and trip.tried is None and not edge.is_drained:
        soft, in_flight = service.record.soft_limit, edge.in_flight
        for one in service.running:
            if in_flight(one.slot) < soft:
                return HERE
    ask = ask_of(exchange)
    if ask is None:
        return Nothing(Code.FORCED_UNREACHED)
    return next_step(ask, own_site(service, edge), known_sites(app, service, edge), edge.rng, trip.tried)


def ask_of(exchange: Exchange) -> Ask | None:
    """What a request wants of the choice; None: a machine that no node has."""
    app, port, want, wish = exchange.app, exchange.port, exchange.want, exchange.wish
    assert app is not None and port is not None
    service = port.service
    autostart = service.record.autostart
    if want is None:
        return ANYWHERE if wish is None and autostart else Ask(wish=wish, may_wake=autostart)
    here = NodeName(exchange.edge.settings.node)
    if want.force is not None:
        place = _place(app, want.force, here)
        return None if place is None else Ask(force=place[0], force_sleeps=not place[1], may_wake=autostart)
    prefer = None if want.prefer is None else _place(app, want.prefer, here)
    excluded: dict[NodeName, int] = {}
    for name in want.exclude:
        place = _place(app, name, here)
        if place is not None and place[1]:
            excluded[place[0]] = excluded.get(place[0], 0) + 1
    node = prefer[0] if prefer is not None and prefer[1] else None
    return Ask(wish=wish, prefer=node, excluded=excluded or None, may_wake=autostart)


def _place(app: AppView, machine: MachineId, here: NodeName) -> tuple[NodeName, bool] | None:
    """The node of a machine, and whether it runs there; None: no node has it."""
    own = app.machines.get(machine)
    if own is not None:
        return here, own.takes_requests
    site = app.site_of(machine)
    if site is None:
        return None
    runs = any(one.id == machine and one.state is MachineState.STARTED and not one.cordoned for one in site.machines)
    return site.node, runs

"""What a worker knows of apps and machines: records as control sent them, beside what belongs to this worker alone.

One `AppView` per app, replaced or updated in one assignment when a record comes; requests read it without locks. A
`MachineView` lives as long as its machine is known and owns its connection pools.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from proxy.decide.access import StartBudget, WakeFilter
from proxy.decide.balance import spared
from proxy.decide.ewma import PassiveHealth
from proxy.decide.headers import ResponseRules
from proxy.decide.peer_health import Suspicion
from proxy.decide.region import RegionWish
from proxy.decide.replay_key import SessionRules
from proxy.edge.access import AccessGate, access_gate
from proxy.model import (
    App,
    AppName,
    Balance,
    Machine,
    MachineId,
    MachineState,
    NodeName,
    Peer,
    Port,
    RegionCode,
    RemoteLoad,
    RemoteMachine,
    Service,
    WakeRules,
)

if TYPE_CHECKING:
    from proxy.edge.relay import Tunnel
    from proxy.edge.sites import KnownSites
    from proxy.edge.upstream import Pool

_VERSIONS: Final = itertools.count(
    1
)  # of what is known of nodes and sites: each change has a higher one than all before


class PeerView:
    """Another node and this worker's dealings with it."""

    __slots__ = ("pool", "record", "suspicion", "version")

    def __init__(self, record: Peer) -> None:
        self.record = record
        self.version = next(_VERSIONS)
        self.pool: Pool | None = None
        self.suspicion: Suspicion | None = None  # what requests have met there, once one has failed

    def set_record(self, record: Peer) -> None:
        self.record = record
        self.version = next(_VERSIONS)

    def failed(self, now: float) -> None:
        """A request could not be delivered to this node."""
        if self.suspicion is None:
            self.suspicion = Suspicion()
        self.suspicion.failed(now)
        self.version = next(_VERSIONS)

    def succeeded(self, now: float) -> None:
        """A request has got there."""
        if self.suspicion is not None and self.suspicion.succeeded(now):
            self.version = next(_VERSIONS)

    def close_pool(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None


class MachineView:
    """A machine and this worker's dealings with it; with a `peer`, an app's machines at another node, as one."""

    __slots__ = ("app", "passive", "peer", "pools", "record", "slot", "soft_cordoned", "tunnels")

    def __init__(self, app: AppName, record: Machine, peer: PeerView | None = None) -> None:
        self.app = app
        self.record = record
        self.peer = peer
        self.slot = record.slot
        self.soft_cordoned = False
        self.pools: dict[int, Pool] = {}
        self.tunnels: set[Tunnel] = set()  # open to it through this worker
        self.passive: PassiveHealth | None = None  # what requests have met there, once one has failed

    @property
    def takes_requests(self) -> bool:
        return self.record.state is MachineState.STARTED and not self.record.cordoned and not self.soft_cordoned

    def close_pools(self) -> None:
        for pool in self.pools.values():
            pool.close()
        self.pools.clear()


class SiteView:
    """What is known of an app's machines at another node."""

    __slots__ = ("_loads", "_refused_until", "machines", "node", "peer", "target", "version")

    def __init__(self, app: AppName, peer: PeerView) -> None:
        self.node = peer.record.name
        self.peer = peer
        self.version = next(_VERSIONS)
        self.machines: tuple[RemoteMachine, ...] = ()
        self._loads: dict[int, RemoteLoad] = {}
        self._refused_until: dict[int, float] = {}
        # what an Exchange sends to: the other edge chooses the machine
        stands_for = Machine(MachineId(peer.record.name), peer.record.region, "", MachineState.STARTED, 0, -1)
        self.target = MachineView(app, stands_for, peer)

    def set_machines(self, machines: tuple[RemoteMachine, ...]) -> None:
        self.machines = machines
        self.version = next(_VERSIONS)

    def set_load(self, load: RemoteLoad) -> None:
        self._loads[load.internal_port] = load
        self._refused_until.pop(load.internal_port, None)
        self.version = next(_VERSIONS)

    def load(self, internal_port: int) -> RemoteLoad | None:
        return self._loads.get(internal_port)

    def refused(self, internal_port: int, until: float) -> None:
        """All machines there are at their hard limit, says the node itself: till then, or till it says otherwise."""
        self._refused_until[internal_port] = until
        self.version = next(_VERSIONS)

    def full_until(self, internal_port: int) -> float:
        """Monotonic seconds, perhaps long ago."""
        return self._refused_until.get(internal_port, 0.0)


class ServiceView:
    """A service and the machines that can take its requests now."""

    __slots__ = ("internal_port", "is_failing", "known", "machines", "pooled", "record", "running", "sole")

    def __init__(self, record: Service, machines: Iterable[MachineView]) -> None:
        """`running`: what may be chosen. `sole`: the one to take without choosing."""
        self.record = record
        self.internal_port = record.internal_port
        self.pooled = record.concurrency_type.value == "requests"
        self.machines = [one for one in machines if one.record.group in record.processes]
        self.running: list[MachineView] = []
        self.sole: MachineView | None = None
        self.known: KnownSites | None = None  # its machines elsewhere
        self.is_failing = False  # machines run, and the checks of none pass
        self.refresh()

    def refresh(self) -> None:
        port = self.internal_port
        started = [one for one in self.machines if one.takes_requests and one.record.endpoint(port) is not None]
        self.running = running = [one for one in started if port not in one.record.failing_ports]
        self.is_failing = bool(started) and not running
        self.sole = running[0] if len(self.machines) == 1 and running else None


class PortView:
    """One public port of an app: where its requests go and what is done to them."""

    __slots__ = ("force_https", "http", "idle_s", "record", "rules", "service", "sessions", "steers", "tls", "watches")

    def __init__(self, record: Port, service: ServiceView, app: App) -> None:
        """`watches`: answers tell something. `steers`: a cookie or a cache may decide where a request goes."""
        self.record = record
        self.watches = app.balance is Balance.PEAK_EWMA or app.sticky is not None
        self.sessions = SessionRules(record.replay_cache) if record.replay_cache else None
        self.steers = self.sessions is not None or app.sticky is not None
        self.idle_s = record.idle_timeout_s or app.limits.idle_timeout_s
        self.service = service
        self.http = "http" in record.handlers
        self.tls = "tls" in record.handlers
        self.force_https = record.force_https
        self.rules = ResponseRules(record.pristine, record.response_headers)


class AppView:
    """An app, ready for requests."""

    __slots__ = (
        "avoided_until", "cells", "gate", "has_replayed", "machines", "name", "ports", "record", "services", "sites",
        "start_budget", "wake_filter",
    )  # fmt: skip

    def __init__(
        self, record: App, public_ports: Iterable[int], machines: dict[MachineId, MachineView], cells: int,
        workers: int = 1, old: AppView | None = None, sites: dict[NodeName, SiteView] | None = None,
    ) -> None:  # fmt: skip
        """`old`: the app as it was before this record; what was counted of its sources goes on. `sites`: its machines
        at other nodes, shared with who changes them."""
        self.record = record
        self.sites: dict[NodeName, SiteView] = {} if sites is None else sites
        self.gate: AccessGate | None = access_gate(record.access, workers, old.gate if old is not None else None)
        rules = record.wake_rules
        self.wake_filter = WakeFilter(rules)
        same = old is not None and old.record.wake_rules == rules
        self.start_budget: StartBudget | None = old.start_budget if old and same else start_budget(rules, workers)
        self.name = record.name
        self.cells = cells  # first of the app's counters in this worker's part of shared memory
        self.machines = machines
        self.services = [ServiceView(service, machines.values()) for service in record.services]
        # monotonic seconds until which some machine is avoided
        passive = [one.passive.avoided_until for one in machines.values() if one.passive is not None]
        self.avoided_until: float = max(passive, default=0.0)
        # its machines answer with fly-replay: bodies are worth keeping
        self.has_replayed: bool = old is not None and old.has_replayed
        self.ports: dict[int, PortView] = {}
        for service in self.services:
            for port in service.record.ports:
                for public in public_ports:
                    if port.start <= public <= port.end and public not in self.ports:
                        self.ports[public] = PortView(port, service, record)

    def refresh(self) -> None:
        for service in self.services:
            service.refresh()

    def port(self, public: int) -> PortView | None:
        """What a public port means for this app, whether or not this node listens there: another edge may."""
        view = self.ports.get(public)
        if view is None:
            for service in self.services:
                for port in service.record.ports:
                    if view is None and port.start <= public <= port.end:
                        view = self.ports[public] = PortView(port, service, self.record)
        return view

    def site(self, node: str) -> SiteView | None:
        """Its machines at another node, by that one's name."""
        return self.sites.get(NodeName(node))

    def is_in(self, wish: RegionWish, own: RegionCode) -> bool:
        """Whether it may have machines in a region that is asked for; this node's is always one."""
        return wish.rank(own) is not None or any(
            wish.rank(site.target.record.region) is not None for site in self.sites.values()
        )

    def has_machine(self, machine: MachineId) -> bool:
        """Whether this is one of its machines, wherever."""
        return machine in self.machines or self.site_of(machine) is not None

    def site_of(self, machine: MachineId) -> SiteView | None:
        """Where a machine is that is not this node's."""
        for site in self.sites.values():
            if any(one.id == machine for one in site.machines):
                return site
        return None

    def failed(self, machine: MachineView, now: float) -> None:
        """A request could not be delivered to this machine, or got no answer from it."""
        if machine.passive is None:
            machine.passive = PassiveHealth()
        machine.passive.failed(now)
        self.avoided_until = max(self.avoided_until, machine.passive.avoided_until)

    def without_failing(self, running: Sequence[MachineView], now: float) -> Sequence[MachineView]:
        """Those that requests have fared well with lately; all, if that is none."""
        return spared(running, lambda one: one.passive is not None and one.passive.is_avoided(now))

    @property
    def is_asleep(self) -> bool:
        """Whether a request would find no machine of some service running."""
        return any(not service.running for service in self.services)


def start_budget(rules: WakeRules, workers: int) -> StartBudget | None:
    """The starts that requests may cause, this worker's share of them; None if there is no limit."""
    if rules.starts_per_source_s is None and rules.starts_per_s is None:
        return None
    per_source_s, all_s = rules.starts_per_source_s, rules.starts_per_s
    return StartBudget(
        per_source_s / workers if per_source_s is not None else None, all_s / workers if all_s is not None else None
    )


class Table:
    """All apps by name and by host. `on_machine` is told of every machine record that took effect."""

    def __init__(self, public_ports: Iterable[int], app_cells: Callable[[int], int], workers: int = 1) -> None:
        """`app_cells(slot)`: the first of an app's counters in this worker's part of shared memory."""
        self._workers = workers
        self._public_ports = tuple(public_ports)
        self._app_cells = app_cells
        self.apps: dict[AppName, AppView] = {}
        self.hosts: dict[str, AppView] = {}
        self.peers: dict[NodeName, PeerView] = {}
        self._sites: dict[AppName, dict[NodeName, SiteView]] = {}
        self.on_moved: Callable[[int], None] = lambda slot: None  # what was measured of this slot's machine is over
        self.on_machine: Callable[[AppName, Machine], None] | None = None
        self.on_machine_gone: Callable[[MachineId], None] | None = None
        self._loading: set[AppName] | None = None
        self._leaving: dict[MachineId, MachineView] = {}  # known no more, with tunnels that are still open
        self._port_kinds: dict[int, str] = {}
        self._wildcards = False  # some app had a wildcard among its names, once

    def find(self, host: str) -> AppView | None:
        """The app of a host name: by the name itself, or by a wildcard one label up."""
        app = self.hosts.get(host)
        if app is None and self._wildcards and (dot := host.find(".")) > 0:
            app = self.hosts.get("*" + host[dot:])
        return app

    def start_load(self) -> None:
        """A whole table follows: what it does not name is gone at its end."""
        self._loading = set()

    def end_load(self) -> None:
        if self._loading is None:
            return
        for name in [name for name in self.apps if name not in self._loading]:
            self.remove_app(name)
        self._loading = None

    def set_app(self, record: App) -> None:
        """Put an app in, or replace it; its machines keep their pools."""
        old = self.apps.get(record.name)
        known = old.machines if old is not None else {}
        machines: dict[MachineId, MachineView] = {}
        changed: list[Machine] = []
        for machine in record.machines:
            view = known.get(machine.id)
            if view is None:
                view = MachineView(record.name, machine)
                changed.append(machine)
            elif machine.version >= view.record.version:
                if self._loading is not None:
                    view.soft_cordoned = False  # control asks again for what it still means
                if machine != view.record:
                    changed.append(machine)
                    self._update(view, machine)
            machines[machine.id] = view
        sites = self._sites.setdefault(record.name, {})
        app = AppView(record, self._public_ports, machines, self._app_cells(record.slot), self._workers, old, sites)
        self.apps[record.name] = app
        self._port_kinds.clear()
        for host in record.hostnames:
            self.hosts[host] = app
            if host.startswith("*."):
                self._wildcards = True
        if old is not None:
            self._drop_left_over(old, app)
        if self._loading is not None:
            self._loading.add(record.name)
        if self.on_machine is not None:
            for machine in changed:
                self.on_machine(record.name, machine)

    def _drop_left_over(self, old: AppView, new: AppView) -> None:
        for host in old.record.hostnames:
            if self.hosts.get(host) is old:
                del self.hosts[host]
        for machine_id, view in old.machines.items():
            if machine_id not in new.machines:
                self._forget(view)

    def remove_app(self, name: AppName) -> None:
        app = self.apps.pop(name, None)
        if app is None:
            return
        self._port_kinds.clear()
        for host in app.record.hostnames:
            if self.hosts.get(host) is app:
                del self.hosts[host]
        if not app.sites:
            self._sites.pop(name, None)
        for view in app.machines.values():
            self._forget(view)

    def _forget(self, view: MachineView) -> None:
        view.close_pools()
        self.on_moved(view.slot)
        self._leaving = {one: left for one, left in self._leaving.items() if left.tunnels}
        if view.tunnels:
            self._leaving[view.record.id] = view
        if self.on_machine_gone is not None:
            self.on_machine_gone(view.record.id)

    def set_machine(self, name: AppName, machine: Machine) -> None:
        """Take a machine's newer record; an older version never overwrites a newer one."""
        app = self.apps.get(name)
        if app is None:
            return
        view = app.machines.get(machine.id)
        if view is None:
            return  # a new machine comes with its app's record
        if machine.version < view.record.version:
            return
        self._update(view, machine)
        app.refresh()
        if self.on_machine is not None:
            self.on_machine(name, machine)

    def _update(self, view: MachineView, machine: Machine) -> None:
        moved = (
            machine.endpoints != view.record.endpoints
            or machine.netns_pid != view.record.netns_pid
            or machine.state is not MachineState.STARTED
        )
        if machine.version > view.record.version:
            view.soft_cordoned = False
        view.record = machine
        view.slot = machine.slot
        if moved:
            view.close_pools()
            view.passive = None
            self.on_moved(machine.slot)

    def set_peer(self, record: Peer) -> None:
        view = self.peers.get(record.name)
        if view is None:
            self.peers[record.name] = PeerView(record)
            return
        was_silent = view.record.is_silent
        if (view.record.host, view.record.port) != (record.host, record.port):
            view.close_pool()
        view.set_record(record)
        if record.is_silent and not was_silent and view.pool is not None:
            view.pool.give_up()

    def forget_pools(self) -> None:
        """Connections to peers that are made from now on show another certificate."""
        for peer in self.peers.values():
            peer.close_pool()

    def remove_peer(self, name: NodeName) -> None:
        view = self.peers.pop(name, None)
        if view is None:
            return
        view.close_pool()
        for sites in self._sites.values():
            sites.pop(name, None)

    def set_site(self, app: AppName, node: NodeName, machines: tuple[RemoteMachine, ...]) -> None:
        """The machines of an app at another node, all of them, kept also where the app is not known yet.

        Control tells of a node before it tells of its machines.
        """
        sites = self._sites.setdefault(app, {})
        if not machines:
            sites.pop(node, None)
            if not sites and app not in self.apps:
                del self._sites[app]
            return
        peer = self.peers.get(node)
        if peer is None:
            return
        site = sites.get(node)
        if site is None:
            site = sites[node] = SiteView(app, peer)
        site.set_machines(machines)

    def set_loads(self, node: NodeName, loads: tuple[RemoteLoad, ...]) -> None:
        for load in loads:
            site = self._sites.get(load.app, {}).get(node)
            if site is not None:
                site.set_load(load)

    def soft_cordon(self, name: AppName, machine_id: MachineId, on: bool) -> None:
        """Stop (or go on) choosing a machine, ahead of its next record."""
        app = self.apps.get(name)
        view = app.machines.get(machine_id) if app is not None else None
        if app is not None and view is not None:
            view.soft_cordoned = on
            app.refresh()
            if not on and self.on_machine is not None:
                self.on_machine(name, view.record)  # who waits may have it

    def end_tunnels(self, name: AppName, machine_id: MachineId) -> None:
        """A machine is about to be stopped: what it has open is told so, and ended."""
        app = self.apps.get(name)
        views = [app.machines.get(machine_id) if app is not None else None, self._leaving.pop(machine_id, None)]
        for tunnel in [one for view in views if view is not None for one in view.tunnels]:
            tunnel.going_away()

    def port_kind(self, public_port: int) -> str:
        """`tls`, `plain` or `mixed`: what arrives on a public port, as its apps' handlers have it."""
        kind = self._port_kinds.get(public_port)
        if kind is None:
            kinds = {app.ports[public_port].tls for app in self.apps.values() if public_port in app.ports}
            kind = "plain" if True not in kinds else "tls" if kinds == {True} else "mixed"
            self._port_kinds[public_port] = kind
        return kind

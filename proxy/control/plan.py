"""What control works from: the node and its apps as configuration has them, nothing left to look up.

`plan_of` makes it from a loaded config. Control keeps the last one that was good in run_dir, so that a control that
starts while config.toml is broken still knows how to wake every app. The file holds the environments of apps: 0600.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import msgspec

from proxy.config import (
    AppConfig,
    CertsSection,
    ClusterSection,
    GroupConfig,
    NodeConfig,
    OnDemandSection,
    PeerSection,
    RegionSection,
)
from proxy.decide.autostop import WarmHours
from proxy.ipc import PROTOCOL, Settings
from proxy.model import (
    AccessRules,
    AppLimits,
    AppName,
    Autostop,
    Balance,
    Endpoint,
    RegionCode,
    RestartPolicy,
    Service,
    StickyCookie,
    WakeMode,
    WakeOn,
    WakeRules,
)
from proxy.process import ListenAddress
from proxy.wire.fly_toml import NamedCheck


@dataclass(frozen=True, slots=True)
class MountPlan:
    """A volume of a group: its name and where the machine sees it."""

    name: str
    destination: str


@dataclass(frozen=True, slots=True)
class StaticMachine:
    """A machine that exists already and is never started by us."""

    id: str
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A process group: its command and how many machines of it run here."""

    name: str
    command: tuple[str, ...]
    count: int = 1
    mounts: tuple[MountPlan, ...] = ()
    restart: RestartPolicy = RestartPolicy.ON_FAILURE
    restart_retries: int = 10
    memory_mb: int = 256


@dataclass(frozen=True, slots=True)
class AppPlan:
    """An app as this node runs it."""

    name: AppName
    hostnames: tuple[str, ...]
    services: tuple[Service, ...]
    groups: tuple[GroupPlan, ...]
    driver: str = "process"  # process | static
    cwd: str = "/"
    env: tuple[tuple[str, str], ...] = ()
    user: str | None = None
    own_network: bool = False
    kill_signal: int = 2
    kill_timeout_s: float = 5.0
    primary_region: RegionCode | None = None
    wake_on: WakeOn = WakeOn.HELLO
    wake_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0  # 0: by Fly's formula only
    autostop_interval_s: float | None = None  # None: the node's
    autostop_at_once: int = 1  # machines of a group that a pass may stop
    busy: str | None = None  # a path; 409 or 423 says that the machine is not to be stopped now
    warm_hours: tuple[WarmHours, ...] = ()
    limits: AppLimits = field(default_factory=AppLimits)
    statics: tuple[StaticMachine, ...] = ()
    checks: tuple[NamedCheck, ...] = ()  # of the top level: told, never part of routing
    restart_on_checks: float = 0.0  # seconds of failing service checks after which a machine is restarted; 0 = never
    # what workers alone go by: see model.App
    balance: Balance = Balance.FLY
    sticky: StickyCookie | None = None
    access: AccessRules = field(default_factory=AccessRules)
    wake_rules: WakeRules = field(default_factory=WakeRules)
    organization: str = "personal"
    replay_sources: tuple[str, ...] = ()
    keeps_bodies: bool = False
    wake: WakeMode = WakeMode.FLY
    on_demand: OnDemandSection | None = None  # control alone goes by it

    def group(self, name: str) -> GroupPlan | None:
        return next((group for group in self.groups if group.name == name), None)

    def services_of(self, group: str) -> tuple[Service, ...]:
        return tuple(service for service in self.services if group in service.processes)

    def internal_ports(self, group: str) -> tuple[int, ...]:
        """Distinct internal ports of a group's services, the first service's first."""
        return tuple(dict.fromkeys(service.internal_port for service in self.services_of(group)))

    def is_always_on(self, group: str, index: int, region: str) -> bool:
        """Whether a machine runs from the start: nothing can wake it, or nothing may stop it."""
        services = self.services_of(group)
        if not services or any(service.autostop is Autostop.OFF for service in services):
            return True
        is_primary = self.primary_region is None or self.primary_region == region
        return is_primary and index < max(service.min_machines_running for service in services)


@dataclass(frozen=True, slots=True)
class NodePlan:
    """The node and all its apps."""

    name: str
    region: RegionCode
    domain: str
    data_dir: str
    admin_host: str
    admin_port: int
    settings: Settings
    apps: tuple[AppPlan, ...] = ()
    stop_machines_on_exit: bool = True
    autostop_interval_s: float = 300.0
    drain_timeout_s: float = 30.0
    certs: CertsSection = field(default_factory=CertsSection)
    public_ports: tuple[int, ...] = ()  # that are listened on
    backhaul: ListenAddress | None = None  # None: a node by itself
    regions: tuple[RegionSection, ...] = ()
    peers: tuple[PeerSection, ...] = ()
    cluster: ClusterSection | None = None
    identity: str = ""  # of this data_dir; machine ids are derived from it


def plan_of(config: NodeConfig) -> NodePlan:
    """What a loaded config.toml comes to for control."""
    limits = config.limits
    settings = Settings(
        protocol=PROTOCOL, node=config.node.name, region=config.node.region, domain=config.node.domain,
        access_log=config.log.access_log, access_log_format=config.log.access_log_format,
        max_head_bytes=limits.max_head_bytes, max_headers=limits.max_headers, max_target_bytes=limits.max_target_bytes,
        max_connections=limits.max_connections, handshake_timeout_s=limits.handshake_timeout_s,
        head_timeout_s=limits.head_timeout_s, idle_timeout_s=limits.idle_timeout_s,
        drain_timeout_s=limits.drain_timeout_s, wake_hints_per_source_s=limits.wake_hints_per_source_s,
        wake_hints_per_s=limits.wake_hints_per_s, source_connections=limits.source_connections,
        source_connects_s=limits.source_connects_s, source_handshakes_s=limits.source_handshakes_s,
        exempt_sources=limits.exempt_sources, max_memory_bytes=limits.max_memory_bytes,
        on_demand=any(app.on_demand is not None for app in config.apps),
    )  # fmt: skip
    return NodePlan(
        name=config.node.name,
        region=config.node.region,
        domain=config.node.domain,
        data_dir=config.node.data_dir,
        admin_host=config.listen.admin_host,
        admin_port=config.listen.admin_port,
        settings=settings,
        apps=tuple(_app_plan(app) for app in config.apps),
        stop_machines_on_exit=config.node.on_exit == "stop",
        autostop_interval_s=config.node.autostop_interval_s,
        drain_timeout_s=limits.drain_timeout_s,
        certs=config.certs,
        public_ports=config.public_ports,
        backhaul=config.listen.backhaul,
        regions=config.regions,
        peers=config.peers,
        cluster=config.cluster,
    )


def _app_plan(app: AppConfig) -> AppPlan:
    return AppPlan(
        name=app.name,
        hostnames=app.hostnames,
        services=app.services,
        groups=tuple(_group_plan(group) for group in app.groups),
        driver=app.driver,
        cwd=app.cwd,
        env=app.env,
        user=app.user,
        own_network=app.own_network,
        kill_signal=app.kill_signal,
        kill_timeout_s=app.kill_timeout_s,
        primary_region=app.primary_region,
        wake_on=app.wake_on,
        wake_timeout_s=app.wake_timeout_s,
        idle_timeout_s=app.idle_timeout_s,
        autostop_interval_s=app.autostop_interval_s,
        autostop_at_once=app.autostop_at_once,
        busy=app.busy,
        warm_hours=app.warm_hours,
        limits=app.limits,
        statics=tuple(StaticMachine(one.id, one.endpoints(app.services)) for one in app.machines),
        checks=app.fly.checks,
        restart_on_checks=app.restart_on_failing_checks_s,
        balance=app.balance,
        sticky=app.sticky,
        access=app.access,
        wake_rules=app.wake_rules,
        organization=app.organization,
        replay_sources=app.replay_sources,
        keeps_bodies=app.keep_bodies,
        wake=app.wake,
        on_demand=app.on_demand,
    )


def _group_plan(group: GroupConfig) -> GroupPlan:
    return GroupPlan(
        name=group.name,
        command=group.command,
        count=group.count,
        mounts=tuple(MountPlan(one.source, one.destination) for one in group.mounts),
        restart=group.restart,
        restart_retries=group.restart_retries,
        memory_mb=group.memory_mb,
    )


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(NodePlan).decode


def keep_plan(path: str, plan: NodePlan) -> None:
    """Write the last good plan, atomically, for the owner only."""
    descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_encode(plan))
    os.replace(path + ".new", path)


def kept_plan(path: str) -> NodePlan | None:
    """The plan that `keep_plan` wrote last, or None where there is none that this version can read."""
    try:
        with open(path, "rb") as file:
            return _decode(file.read())
    except (FileNotFoundError, msgspec.MsgspecError):
        return None

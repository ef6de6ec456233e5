"""The nouns: apps, services, ports, machines, as every part of Wakefront passes them around.

Everything here is frozen. A worker holds one `App` per app in a dict and replaces it in one assignment when control
sends a newer one; a request reads it without locks. Times end in `_s`, sizes in `_bytes`. The names are Fly's
(spec: fly.toml reference, Machines API); where a value may be absent it is `None`, never a magic number.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

AppName = NewType("AppName", str)
MachineId = NewType("MachineId", str)
RegionCode = NewType("RegionCode", str)
NodeName = NewType("NodeName", str)


class MachineState(enum.StrEnum):
    """States of Fly's Machines, those that a machine of ours can be in (spec machines §1)."""

    CREATED = "created"
    STARTING = "starting"
    STARTED = "started"
    STOPPING = "stopping"
    STOPPED = "stopped"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    FAILED = "failed"
    DESTROYED = "destroyed"

    @property
    def is_startable(self) -> bool:
        """Whether a start (or resume) is what brings it to `started`."""
        return self in _STARTABLE


_STARTABLE = frozenset({MachineState.CREATED, MachineState.STOPPED, MachineState.SUSPENDED, MachineState.FAILED})


class Autostop(enum.StrEnum):
    OFF = "off"
    STOP = "stop"
    SUSPEND = "suspend"


class ConcurrencyType(enum.StrEnum):
    CONNECTIONS = "connections"  # counts TCP connections; a new upstream connection for each HTTP request
    REQUESTS = "requests"  # counts HTTP requests; upstream connections are pooled


class Balance(enum.StrEnum):
    """How one of several running machines is chosen (spec routing §5.1; all but `fly` are ours)."""

    FLY = "fly"  # bands: below the soft limit before above it; a draw among equals
    LEAST_LOADED = "least-loaded"  # the less loaded of two drawn
    PEAK_EWMA = "peak-ewma"  # of two drawn, the lower product of load and recent response time
    APP_LOAD = "app-load"  # of two drawn, the lower load that the app itself reported


class WakeOn(enum.StrEnum):
    HELLO = "hello"  # the ClientHello that names the app starts it
    REQUEST = "request"  # only a whole request head starts it


class WakeMode(enum.StrEnum):
    """Where an app is woken, if some of its machines run and others are nearer (all but `fly` are ours)."""

    FLY = "fly"  # what runs, anywhere, serves; something is started where nothing does (spec machines §3)
    NEAREST = "nearest"  # the nearest region that has machines serves, even if one must be started there
    RACE = "race"  # what runs serves at once, and meanwhile a nearer one is started for those who come later


class RestartPolicy(enum.StrEnum):
    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class ReplayCacheRule:
    """A session cache of replay decisions (fly.toml `http_options.replay_cache`, spec routing §4.2)."""

    path_prefix: str  # may begin with a host name
    ttl_s: int
    kind: str  # cookie | header
    name: str
    allow_bypass: bool = False


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Who may use an app and how much. Sources are client addresses; networks are in CIDR notation."""

    allow: tuple[str, ...] = ()  # empty: everyone who is not denied
    deny: tuple[str, ...] = ()  # wins over `allow`
    requests_per_s: float | None = None  # of one source, in each worker's share of them; None = no limit
    requests_burst: int = 20
    connections: int | None = None  # open at once from one source, in each worker
    handshakes_per_s: float | None = None  # TLS handshakes begun by one source for the app's names
    max_body_bytes: int | None = None

    @property
    def is_open(self) -> bool:
        return self == AccessRules()


@dataclass(frozen=True, slots=True)
class WakeRules:
    """Requests that do not wake an app; they are answered 503 where nothing runs."""

    ignore_paths: tuple[str, ...] = ()  # globs over the path without its query: "/healthz", "/wp-*"
    ignore_methods: tuple[str, ...] = ()
    ignore_agents: tuple[str, ...] = ()  # parts of a User-Agent, whatever their case
    ignore_sources: tuple[str, ...] = ()  # networks
    starts_per_source_s: float | None = None  # starts a second that requests of one source may cause in a worker
    starts_per_s: float | None = None  # and of all sources
    waiting_page: bool = False  # browsers are shown a page that asks again, instead of being held


@dataclass(frozen=True, slots=True)
class StickyCookie:
    """A cookie of ours that keeps a client at its machine as long as that can take it."""

    name: str = "wakefront-sticky"
    ttl_s: float = 86_400.0


@dataclass(frozen=True, slots=True)
class Port:
    """One public port, or range of ports, of a service, with what is done to the bytes that arrive there."""

    start: int
    end: int  # inclusive; equal to `start` for a single port
    handlers: tuple[str, ...] = ()  # subset of http, tls, pg_tls, proxy_proto
    force_https: bool = False
    alpn: tuple[str, ...] = ()
    tls_versions: tuple[str, ...] = ()  # empty: TLSv1.2 and TLSv1.3
    default_self_signed: bool = False
    proxy_proto_version: str = "v1"
    idle_timeout_s: float | None = None
    headers_read_timeout_s: float | None = None
    h2_backend: bool = False
    compress: bool = False
    pristine: bool = False
    replay_cache: tuple[ReplayCacheRule, ...] = ()
    # (name as written, values): None removes the header from the response, a tuple sets it (one line per value)
    response_headers: tuple[tuple[str, tuple[str, ...] | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """A health check of a service, durations already clamped as Fly does (spec fly-toml §6)."""

    type: str  # tcp | http
    interval_s: float
    timeout_s: float
    grace_period_s: float
    method: str = "GET"
    path: str = "/"
    protocol: str = "http"
    tls_skip_verify: bool = False
    tls_server_name: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Service:
    """What an app offers on public ports, and the port its machines listen on."""

    protocol: str  # tcp | udp
    internal_port: int
    ports: tuple[Port, ...]
    processes: tuple[str, ...] = ("app",)  # process groups whose machines have this service
    autostop: Autostop = Autostop.OFF
    autostart: bool = True
    min_machines_running: int = 0
    concurrency_type: ConcurrencyType = ConcurrencyType.CONNECTIONS
    soft_limit: int = 20
    hard_limit: int | None = None
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a machine answers for one internal port."""

    internal_port: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a worker knows of a machine. `version` grows with each change; an older one never overwrites."""

    id: MachineId
    region: RegionCode
    group: str  # process group
    state: MachineState
    version: int
    slot: int  # row of the load counters in shared memory
    endpoints: tuple[Endpoint, ...] = ()
    netns_pid: int = 0  # connect inside this process's network namespace; 0 = the edge's own
    cordoned: bool = False
    # why it is not to be started now (breaker), shown to clients as the reason; None = may be started
    hold_reason: str | None = None
    hold_until: float = 0.0  # unix seconds at which a start may be tried again
    failing_ports: tuple[int, ...] = ()  # internal ports of services with a check that does not pass
    started_at: float = 0.0  # unix seconds of its last start or resume; 0 = not known

    def endpoint(self, internal_port: int) -> Endpoint | None:
        for endpoint in self.endpoints:
            if endpoint.internal_port == internal_port:
                return endpoint
        return None


@dataclass(frozen=True, slots=True)
class RemoteMachine:
    """A machine of another node, as far as a request that is to go there needs to know it."""

    id: MachineId
    group: str
    state: MachineState
    failing_ports: tuple[int, ...] = ()
    cordoned: bool = False


@dataclass(frozen=True, slots=True)
class RemoteLoad:
    """How a service's running, healthy machines at another node stand against their limits (spec routing §5.1)."""

    app: AppName
    internal_port: int
    below_soft: int
    below_hard: int
    full: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node of the fleet, as the workers know it."""

    name: NodeName
    region: RegionCode
    host: str  # where its backhaul is
    port: int
    is_up: bool = True  # its lease holds and it does not drain
    is_silent: bool = False  # its lease does not hold: what is under way there may never be answered
    share: float = 1.0  # of the requests that it would get: a node that has just come back gets few at first
    vias: tuple[NodeName, ...] = ()  # nodes that reach it, the shortest way first


@dataclass(frozen=True, slots=True)
class AppLimits:
    """Phase timeouts of one app, in seconds; None waits for ever (only where the client's own end bounds it)."""

    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float | None = 300.0  # from the request's last byte to the response head
    idle_timeout_s: float = 300.0  # no byte either way in the middle of an exchange or tunnel
    max_waiters: int = 10_000  # requests held while a machine starts
    queue_timeout_s: float = 10.0  # a request may wait this long for a machine below its hard limit
    max_queued: int = 1000  # requests that may wait so, in each worker
    replay_memory_bytes: int = 1_048_576  # of a request's body, kept so that it can be replayed
    replay_spool_bytes: int = 268_435_456  # and beyond that in a file, for apps that replay


@dataclass(frozen=True, slots=True)
class App:
    """All that a worker needs in order to serve an app. Sent whole when configuration changes."""

    name: AppName
    hostnames: tuple[str, ...]  # lower case, A-labels; `<app>.<domain>` first
    services: tuple[Service, ...]
    machines: tuple[Machine, ...] = ()
    slot: int = 0  # block of the app's counters in shared memory
    wake_on: WakeOn = WakeOn.HELLO
    wake_timeout_s: float = 60.0
    primary_region: RegionCode | None = None
    limits: AppLimits = AppLimits()
    balance: Balance = Balance.FLY
    sticky: StickyCookie | None = None
    access: AccessRules = AccessRules()
    wake_rules: WakeRules = WakeRules()
    organization: str = "personal"  # apps of one organization may replay to each other
    replay_sources: tuple[str, ...] = ()  # other organizations whose apps may replay to this one
    keeps_bodies: bool = False  # bodies are kept for a replay beyond memory from the first request on
    wake: WakeMode = WakeMode.FLY

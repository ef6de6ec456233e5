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


class WakeOn(enum.StrEnum):
    HELLO = "hello"  # the ClientHello that names the app starts it
    REQUEST = "request"  # only a whole request head starts it


class RestartPolicy(enum.StrEnum):
    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


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

    def endpoint(self, internal_port: int) -> Endpoint | None:
        for endpoint in self.endpoints:
            if endpoint.internal_port == internal_port:
                return endpoint
        return None


@dataclass(frozen=True, slots=True)
class AppLimits:
    """Phase timeouts of one app, in seconds; None waits for ever (only where the client's own end bounds it)."""

    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float | None = 300.0  # from the request's last byte to the response head
    idle_timeout_s: float = 300.0  # no byte either way in the middle of an exchange or tunnel
    max_waiters: int = 10_000  # requests held while a machine starts


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

"""config.toml and the fly.toml files it names: read once into frozen objects, every fault listed with file and line.

`load` never raises for what a file says. `LoadResult.config` is there only if nothing is an error; `draft` is what was
understood anyway, for `wakefront check`. Relative paths count from config.toml's folder. Defaults stand in the
dataclasses here and nowhere else; config.example.toml shows them. Whether this host permits namespaces and bind mounts
is left to machines, and asked by `wakefront check`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import shutil
import zoneinfo
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import idna
import tomli

from proxy.decide.access import Networks, network_fault, parse_networks
from proxy.decide.autostop import WarmHours, parse_warm_hours
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
from proxy.process import BACKHAUL, ListenAddress, ServePlan
from proxy.wire.fly_keys import KeyClass, KeyUse
from proxy.wire.fly_toml import DEFAULT_GROUP, FlyToml, FlyTomlResult, Volume, is_env_name, read_command, read_fly_toml
from proxy.wire.toml_table import (
    MISSING,
    Fault,
    Reader,
    Severity,
    Table,
    line_of,
    locate_keys,
    suggest,
)  # fmt: skip

_T = TypeVar("_T")

DEFAULT_REGION: Final = RegionCode("local")
# A worker at rest has some 45 MB. Overload is measured by max_memory, and begins below it.
_LEAST_MEMORY_BYTES: Final = 64 * 1024**2
DEFAULT_ADMIN: Final = "127.0.0.1:8081"
DEFAULT_DATA_DIR: Final = "./wakefront-data"
DEFAULT_LISTEN: Final = {80: ("127.0.0.1", 8080), 443: ("127.0.0.1", 8443)}


@dataclass(frozen=True, slots=True)
class NodeSection:
    name: str
    region: RegionCode = DEFAULT_REGION
    domain: str = "apps.localhost"  # an app answers at <app>.<domain>
    data_dir: str = DEFAULT_DATA_DIR  # absolute once loaded
    workers: int = 0  # 0 = one a core
    on_exit: str = "stop"  # stop | keep: what becomes of machines when the service ends
    autostop_interval_s: float = 300.0  # between two looks for idle machines
    retire_timeout_s: float = 900.0  # for connections of workers that others have taken over from


@dataclass(frozen=True, slots=True)
class ListenSection:
    public: tuple[ListenAddress, ...]
    admin_host: str
    admin_port: int
    backhaul: ListenAddress | None = None  # where other nodes reach this one; None = there are none


@dataclass(frozen=True, slots=True)
class RegionSection:
    """Where a region is, for what is not measured yet."""

    code: RegionCode
    latitude: float  # degrees, north positive
    longitude: float  # degrees, east positive


@dataclass(frozen=True, slots=True)
class PeerSection:
    """Another node of the fleet."""

    name: str
    region: RegionCode
    host: str  # an IP address, or a name
    port: int


@dataclass(frozen=True, slots=True)
class ClusterSection:
    """The engine that nodes share what must be right in: NATS with JetStream, the operator's or one of our own."""

    urls: tuple[str, ...] = field(default=(), repr=False)  # of the operator's servers; may hold passwords
    embedded: bool = False  # start one here
    listen: str = ""  # of the embedded: "IP:PORT" for those of other nodes; "" = none reach it
    routes: tuple[str, ...] = ()  # "HOST:PORT" of the embedded servers of other nodes
    ca_file: str | None = None  # absolute; None = the system's roots
    domain: str = ""  # of JetStream, where this node's server is a leaf


@dataclass(frozen=True, slots=True)
class DnsHookSection:
    """How the TXT record of a DNS-01 challenge is set."""

    hook: str  # exec | rfc2136
    command: tuple[str, ...] = ()  # of exec: argv, to which present|cleanup, name and value are added
    server: str = ""  # of rfc2136: "IP:PORT"
    zone: str = ""  # "": found by its SOA
    key_name: str = ""  # TSIG
    key_secret: str = field(default="", repr=False)  # base64
    key_algorithm: str = "hmac-sha256"
    ttl: int = 60
    timeout_s: float = 60.0  # of one call or update
    propagation_timeout_s: float = 120.0  # until every name server shows the record


@dataclass(frozen=True, slots=True)
class CertsSection:
    issuer: str = "internal"  # internal | acme
    acme_directory: str = "https://acme-v02.api.letsencrypt.org/directory"
    acme_email: str = ""
    acme_ca_file: str | None = None  # absolute; None = the system's roots
    acme_eab_kid: str = ""
    acme_eab_hmac_key: str = field(default="", repr=False)
    acme_profile: str = ""
    key_types: tuple[str, ...] = ("ecdsa",)  # and rsa
    challenges: tuple[str, ...] = ("tls-alpn-01", "http-01")  # the ones to try first in front
    addresses: tuple[str, ...] = ()  # where clients reach this node; () = not known
    cname_target: str = ""  # what CNAMEs of custom domains point to; "" = <app>.<domain>
    dns_servers: tuple[str, ...] = ()  # "IP:PORT"; () = the authoritative ones, found from the root's
    dns_delegation: str = ""  # zone that _acme-challenge CNAMEs of customers point into
    check_dns: bool = True  # look at DNS before the CA is asked
    dns: DnsHookSection | None = None


@dataclass(frozen=True, slots=True)
class OnDemandSection:
    """Certificates for names that nobody has added, when a client asks for one (off without this)."""

    ask: str = ""  # URL; GET with ?domain=NAME, 2xx permits
    ask_timeout_s: float = 0.6
    allow: tuple[str, ...] = ()  # names, or *.suffix for any depth below it
    names_burst: int = 200  # new names at once
    names_hour: float = 2000.0  # and an hour
    domain_burst: int = 10  # new names of one registered domain at once
    domain_hour: float = 10.0  # and an hour
    negative_ttl_s: float = 60.0  # a name that was refused is not asked for again so soon


@dataclass(frozen=True, slots=True)
class LogSection:
    """Field names are those of ipc.Settings."""

    access_log: str = "-"  # "-" standard output, "" none, else an absolute path
    access_log_format: str = "json"  # json | text


@dataclass(frozen=True, slots=True)
class LimitsSection:
    """Field names and defaults are those of ipc.Settings."""

    max_head_bytes: int = 65_536
    max_headers: int = 100
    max_target_bytes: int = 16_384
    max_connections: int = 0  # per worker; 0 = from RLIMIT_NOFILE
    handshake_timeout_s: float = 10.0
    head_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    drain_timeout_s: float = 30.0
    wake_hints_per_source_s: float = 5.0
    wake_hints_per_s: float = 100.0
    source_connections: int = 0
    source_connects_s: float = 1000.0
    source_handshakes_s: float = 200.0
    exempt_sources: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    max_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StaticMachine:
    """A machine that exists already: an address for every internal port of the app."""

    id: str
    host: str
    port: int

    def endpoints(self, services: Sequence[Service]) -> tuple[Endpoint, ...]:
        ports = dict.fromkeys(service.internal_port for service in services)
        return tuple(Endpoint(port, self.host, self.port) for port in ports)


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """A process group: what its machines run, and how many there are here."""

    name: str
    command: tuple[str, ...]  # argv; may hold {port} and {port:N}
    count: int = 1
    internal_ports: tuple[int, ...] = ()  # of the group's services, the first service's first
    mounts: tuple[Volume, ...] = ()
    restart: RestartPolicy = RestartPolicy.ON_FAILURE
    restart_retries: int = 10
    memory_mb: int = 256


@dataclass(frozen=True, slots=True)
class AppConfig:
    """An app as this node runs it: its fly.toml and what config.toml adds."""

    name: AppName
    hostnames: tuple[str, ...]  # A-labels, lower case; <app>.<domain> first
    fly: FlyToml
    groups: tuple[GroupConfig, ...]
    driver: str = "process"  # process | static
    fly_toml_path: str | None = None
    cwd: str = "/"
    user: str | None = None
    network: str = "port"  # port | namespace
    env: tuple[tuple[str, str], ...] = ()  # all but what the driver sets (FLY_..., PORT)
    wake_on: WakeOn = WakeOn.HELLO
    wake_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0  # 0 = by Fly's autostop formula only
    autostop_interval_s: float | None = None  # None = the node's
    autostop_at_once: int = 1
    busy: str | None = None  # a path
    warm_hours: tuple[WarmHours, ...] = ()
    restart_on_failing_checks_s: float = 0.0  # 0 = never
    limits: AppLimits = field(default_factory=AppLimits)
    balance: Balance = Balance.FLY
    sticky: StickyCookie | None = None
    access: AccessRules = field(default_factory=AccessRules)
    wake_rules: WakeRules = field(default_factory=WakeRules)
    organization: str = "personal"
    replay_sources: tuple[str, ...] = ()
    keep_bodies: bool = False
    wake: WakeMode = WakeMode.FLY
    on_demand: OnDemandSection | None = None
    machines: tuple[StaticMachine, ...] = ()
    keys: tuple[KeyUse, ...] = ()  # of its fly.toml

    @property
    def services(self) -> tuple[Service, ...]:
        return self.fly.services

    @property
    def primary_region(self) -> RegionCode | None:
        return RegionCode(self.fly.primary_region) if self.fly.primary_region else None

    @property
    def machine_count(self) -> int:
        """How many machines serve: those of groups with a service."""
        return len(self.machines) or sum(group.count for group in self.groups if group.internal_ports)

    @property
    def can_autostop(self) -> bool:
        """Whether a machine may stop by itself: every service of its group must permit it."""
        if self.driver == "static":
            return False
        services = [[one for one in self.services if group.name in one.processes] for group in self.groups]
        return any(ones and all(one.autostop is not Autostop.OFF for one in ones) for ones in services)

    @property
    def can_wake(self) -> bool:
        return self.driver != "static" and any(service.autostart for service in self.services)

    @property
    def own_network(self) -> bool:
        return self.network == "namespace"

    @property
    def kill_signal(self) -> int:
        return self.fly.kill_signal.number

    @property
    def kill_timeout_s(self) -> float:
        return self.fly.kill_timeout_s


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """All of config.toml, with its apps."""

    path: str
    node: NodeSection
    listen: ListenSection
    certs: CertsSection = CertsSection()
    log: LogSection = LogSection()
    limits: LimitsSection = LimitsSection()
    apps: tuple[AppConfig, ...] = ()
    keys: tuple[KeyUse, ...] = ()  # keys of config.toml that have no effect yet
    regions: tuple[RegionSection, ...] = ()
    peers: tuple[PeerSection, ...] = ()
    cluster: ClusterSection | None = None

    @property
    def is_fleet(self) -> bool:
        """Whether there may be other nodes."""
        return self.listen.backhaul is not None

    @property
    def public_ports(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(one.public_port for one in self.listen.public))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What loading came to."""

    config: NodeConfig | None  # None if anything is an error
    faults: tuple[Fault, ...]
    draft: NodeConfig | None  # what was understood, faults or not; None if config.toml is not TOML

    @property
    def errors(self) -> tuple[Fault, ...]:
        return tuple(one for one in self.faults if one.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Fault, ...]:
        return tuple(one for one in self.faults if one.severity is Severity.WARNING)


@dataclass(frozen=True, slots=True)
class Host:
    """What of this host a configuration is judged by."""

    name: str
    euid: int
    cores: int

    @classmethod
    def this(cls) -> Host:
        return cls(os.uname().nodename, os.geteuid(), len(os.sched_getaffinity(0)))


def load(path: str | os.PathLike[str], host: Host | None = None) -> LoadResult:
    """Read config.toml and every fly.toml it names."""
    source = Source.read(os.path.abspath(path))
    if source.document is None:
        return LoadResult(None, source.placed(), None)
    reader = _ConfigReader(source, source.document, host or Host.this())
    draft = reader.read()
    faults = (*source.placed(), *reader.app_faults)
    is_good = all(fault.severity is not Severity.ERROR for fault in faults)
    return LoadResult(draft if is_good else None, faults, draft)


def load_fly_toml(path: str | os.PathLike[str]) -> tuple[FlyTomlResult | None, tuple[Fault, ...]]:
    """Read one fly.toml by itself; None if it is not TOML at all."""
    source = Source.read(os.fspath(path))
    if source.document is None:
        return None, source.placed()
    result = read_fly_toml(source.document)
    source.reader.faults += result.faults
    return result, source.placed()


def plan(config: NodeConfig, config_path: str | os.PathLike[str], host: Host | None = None) -> ServePlan:
    """What the supervisor needs to know of a configuration."""
    return ServePlan(
        config_path=os.path.abspath(config_path),
        data_dir=config.node.data_dir,
        workers=config.node.workers or (host or Host.this()).cores,
        listen=config.listen.public + ((config.listen.backhaul,) if config.listen.backhaul is not None else ()),
        drain_timeout_s=config.limits.drain_timeout_s,
        retire_timeout_s=config.node.retire_timeout_s,
        admin=ListenAddress(0, config.listen.admin_host, config.listen.admin_port),
    )


@dataclass(slots=True)
class Source:
    """A TOML file: its text for the lines of faults, its parsed document, and the faults found in it."""

    path: str
    text: str = ""
    document: dict[str, object] | None = None
    reader: Reader = field(default_factory=Reader)
    unparsed: Fault | None = None

    @classmethod
    def read(cls, path: str) -> Source:
        source = cls(path)
        try:
            with open(path, "rb") as file:
                source.text = file.read().decode("utf-8")
            source.document = tomli.loads(source.text)
        except OSError as error:
            source.unparsed = Fault((), "", f"cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            source.unparsed = Fault((), "", "is not UTF-8 text", line=line)
        except tomli.TOMLDecodeError as error:
            expectation = f"is not valid TOML: {error.msg} (column {error.colno})"
            source.unparsed = Fault((), "", expectation, line=min(error.lineno, source.text.count("\n") + 1))
        except (RecursionError, ValueError) as error:
            source.unparsed = Fault((), "", f"is not valid TOML: {error}")
        return source

    def placed(self) -> tuple[Fault, ...]:
        """The faults with file and line, in the order of the file."""
        faults = [self.unparsed] if self.unparsed else self.reader.faults
        if not faults:
            return ()
        lines = locate_keys(self.text) if self.document is not None else {}
        rows = self.text.split("\n")
        placed = []
        for fault in faults:
            line = fault.line or line_of(lines, fault.path)
            shown = _printable(rows[line - 1]) if line and line <= len(rows) else None
            if (
                "env" in fault.path
                or fault.path[-1:]
                in (
                    ("acme_eab_hmac_key",),
                    ("key_secret",),
                )
                or fault.path[:2] == ("cluster", "urls")
            ):  # what stands there may be a secret: it is not repeated
                fault, shown = dataclasses.replace(fault, value=""), None
            expectation = _printable(fault.expectation)
            placed.append(
                dataclasses.replace(fault, file=self.path, line=line, source_line=shown, expectation=expectation)
            )
        return tuple(sorted(placed, key=lambda one: one.line or 0))


class _ConfigReader:
    """Reads config.toml section by section; faults of fly.toml files gather in `app_faults`."""

    def __init__(self, source: Source, document: Mapping[str, object], host: Host) -> None:
        self.path = source.path
        self.folder = os.path.dirname(source.path)
        self.host = host
        self.reader = source.reader
        self.top = Table(source.reader, document)
        self.app_faults: list[Fault] = []
        self.read_paths: set[str] = set()
        self.keys: list[KeyUse] = []

    def read(self) -> NodeConfig:
        only_known(self.top, _SECTIONS)
        node, listen, limits = self._node(), self._listen(), self._limits()
        regions, peers, cluster = self._regions(), self._peers(node, listen), self._cluster()
        self._check_fleet(node)
        tables = self.top.tables("apps")
        apps = [app for table in tables if (app := _AppReader(self, table, node).read()) is not None]
        self._check_duplicates(apps)
        self._warn_of_unmapped_ports(listen, apps)
        self._warn_of_owner(apps)
        return NodeConfig(
            self.path, node, listen, self._certs(), self._log(node), limits, tuple(app for app, _ in apps),
            tuple(self.keys), regions, peers, cluster,
        )  # fmt: skip

    def resolve(self, text: str) -> str:
        """A path of config.toml, absolute."""
        return os.path.normpath(os.path.join(self.folder, os.path.expanduser(text)))

    def _section(self, name: str, *known: str) -> Table:
        table = self.top.table(name) or Table(self.reader, {}, (name,))
        if known:
            only_known(table, known)
        return table

    # --- sections

    def _node(self) -> NodeSection:
        table = self._section("node", *_fields(NodeSection))
        name = _matching(table, "name", r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "letters, digits, dots and dashes")
        domain = table.text("domain")
        data_dir = table.text("data_dir")
        node = _build(
            NodeSection,
            name=name or self.host.name,
            region=_matching(table, "region", _REGION, "lower case letters, digits and dashes"),
            domain=None if domain is None else to_hostname(table, "domain", domain),
            workers=table.integer("workers", 0, 256),
            on_exit=table.text("on_exit", choices=("stop", "keep")),
            autostop_interval_s=_positive_s(table, "autostop_interval"),
            retire_timeout_s=table.duration_s("retire_timeout", bare_unit_s=1.0),
        )
        return dataclasses.replace(node, data_dir=self.resolve(data_dir or node.data_dir))

    def _listen(self) -> ListenSection:
        table = self._section("listen")
        public: list[ListenAddress] = []
        for key in table.values:
            if key == "dns":
                self.keys.append(KeyUse(("listen", key), KeyClass.KEPT, "not in this version yet"))
            elif key not in ("admin", "backhaul"):
                public += self._public_port(table, key)
        if not public and not any(key.isdecimal() for key in table.values):
            public = [ListenAddress(port, *bind) for port, bind in DEFAULT_LISTEN.items()]
        admin, backhaul = self._admin(table), self._backhaul(table)
        taken: dict[tuple[str, int], int | str] = {(admin[0], admin[1]): "admin"} if admin[1] else {}
        for one in public:
            if one.port and (one.host, one.port) in taken:
                table.error(
                    str(one.public_port), f"{one.host}:{one.port} is bound for {taken[one.host, one.port]} already"
                )
            taken.setdefault((one.host, one.port), one.public_port)
        if backhaul is not None and backhaul.port and (holder := taken.get((backhaul.host, backhaul.port))):
            table.error("backhaul", f"{backhaul.host}:{backhaul.port} is bound for {holder} already")
        return ListenSection(tuple(public), *admin, backhaul)

    def _public_port(self, table: Table, key: str) -> list[ListenAddress]:
        if not re.fullmatch(r"[0-9]{1,5}", key) or not 1 <= int(key) <= 65535:
            expected = 'expected a public port in 1-65535 such as "443", or admin or backhaul'
            table.error(key, expected, suggest(key, ("admin", "backhaul", "dns")))
            return []
        addresses = []
        for text in table.texts(key):
            address = parse_address(text, low_port=0)
            if address is None:
                self.reader.error(table.at(key), text, 'expected bind addresses "IP:PORT" such as "127.0.0.1:8443"')
            else:
                addresses.append(ListenAddress(int(key), *address))
        return addresses

    def _admin(self, table: Table) -> tuple[str, int]:
        address = parse_address(text, low_port=0) if (text := table.text("admin")) is not None else None
        if address is None and text is not None:
            table.error("admin", 'expected an address "IP:PORT" such as "127.0.0.1:8081"')
        host, port = address or _address(DEFAULT_ADMIN)
        if not ipaddress.ip_address(host).is_loopback:
            table.warn(
                "admin", "the admin API speaks plain HTTP: on an address that others reach its token can be read"
            )
        return host, port

    def _backhaul(self, table: Table) -> ListenAddress | None:
        if (text := table.text("backhaul")) is None:
            return None
        address = parse_address(text, low_port=0)
        if address is None:
            table.error("backhaul", 'expected an address "IP:PORT" such as "10.0.0.5:7443"')
            return None
        return ListenAddress(BACKHAUL, *address)

    # --- the fleet

    def _says(self, section: str, key: str) -> bool:
        table = self.top.raw(section)
        return isinstance(table, Mapping) and key in table

    def _regions(self) -> tuple[RegionSection, ...]:
        regions = []
        for code, table in self.top.entries("regions"):
            only_known(table, ("latitude", "longitude"))
            if not re.fullmatch(_REGION, code) or code == "any":
                self.reader.error(table.path, code, "expected a region's code: lower case letters, digits and dashes")
            latitude, longitude = table.number("latitude", -90, 90), table.number("longitude", -180, 180)
            for key, value in (("latitude", latitude), ("longitude", longitude)):
                if value is None and key not in table:
                    table.error(key, "expected degrees: latitude and longitude go together")
            if latitude is not None and longitude is not None:
                regions.append(RegionSection(RegionCode(code), latitude, longitude))
        return tuple(regions)

    def _peers(self, node: NodeSection, listen: ListenSection) -> tuple[PeerSection, ...]:
        peers: list[PeerSection] = []
        for table in self.top.tables("peers"):
            only_known(table, _PEER_KEYS)
            name = _matching(table, "name", _NODE_LABEL, _NODE_LABEL_EXPECTED)
            region = _matching(table, "region", _REGION, "lower case letters, digits and dashes")
            text = table.text("backhaul")
            address = parse_remote(text) if text is not None else None
            for key in _PEER_KEYS:
                if key not in table:
                    table.error(key, f"expected the peer's {_PEER_KEYS[key]}")
            if address is None and text is not None:
                table.error("backhaul", 'expected "HOST:PORT", at which this node reaches it, such as "10.0.0.6:7443"')
            if name == node.name:
                table.error("name", "is this node's own name: a peer is another node")
            if name is not None and any(one.name == name for one in peers):
                table.error("name", "is the name of another peer too")
            if address is not None and any((one.host, one.port) == address for one in peers):
                table.error("backhaul", "is the address of another peer too")
            if (
                address is not None
                and listen.backhaul is not None
                and address == (listen.backhaul.host, listen.backhaul.port)
            ):
                table.error("backhaul", "is this node's own address")
            if name is not None and region is not None and address is not None:
                peers.append(PeerSection(name, RegionCode(region), *address))
        return tuple(peers)

    def _cluster(self) -> ClusterSection | None:
        if (table := self.top.table("cluster")) is None:
            return None
        only_known(table, _fields(ClusterSection))
        urls, embedded = table.texts("urls"), table.flag("embedded")
        for one in urls:
            if not is_url(one, ("nats", "tls", "ws", "wss")):
                table.reader.error(table.at("urls"), one, 'expected URLs such as "nats://10.0.0.9:4222"')
        if embedded and urls:
            table.error("embedded", "urls name servers of yours: expected either those or embedded = true")
        elif not embedded and not urls:
            table.error("urls", "expected the URLs of NATS servers, or embedded = true to start one here")
        for key in ("listen", "routes"):
            if key in table and not embedded:
                table.error(key, "only with embedded = true: it is of the server that is started here")
        listen = table.text("listen")
        if listen is not None and parse_address(listen, low_port=1) is None:
            table.error("listen", 'expected an address "IP:PORT" for the servers of other nodes')
        for one in (routes := table.texts("routes")):
            if parse_remote(one) is None:
                table.reader.error(table.at("routes"), one, 'expected "HOST:PORT" of the servers of other nodes')
        ca_file = table.text("ca_file")
        if ca_file is not None and not os.path.isfile(ca_file := self.resolve(ca_file)):
            table.error("ca_file", f"expected a file of roots in PEM: there is no {ca_file}")
        return _build(
            ClusterSection,
            urls=urls,
            embedded=embedded,
            listen=listen,
            routes=routes,
            ca_file=ca_file,
            domain=_matching(table, "domain", r"[A-Za-z0-9_-]{1,64}", "letters, digits, dashes and underscores"),
        )

    def _check_fleet(self, node: NodeSection) -> None:
        """What a node needs to be one of several: an address, and a name that can stand in its certificate."""
        if not self._says("listen", "backhaul"):
            for section in ("peers", "cluster"):
                if section in self.top:
                    what = "peers reach this node" if section == "peers" else "the nodes of a cluster reach each other"
                    expected = f'needs an address at which {what}: add backhaul = "IP:PORT" to [listen]'
                    self.reader.error((section,), MISSING, expected)
            return
        if not re.fullmatch(_NODE_LABEL, node.name):
            given = self._says("node", "name")
            where = "" if given else f" (the host's is {node.name!r})"
            near = re.sub(r"[^a-z0-9-]+", "-", node.name.partition(".")[0].lower()).strip("-")
            expected = (
                f"with listen.backhaul the name stands in the node's certificate: expected {_NODE_LABEL_EXPECTED}"
            )
            self.reader.error(
                ("node", "name"), node.name if given else MISSING, expected + where,
                near if re.fullmatch(_NODE_LABEL, near) else None,
            )  # fmt: skip

    def _certs(self) -> CertsSection:
        table = self._section("certs", *_fields(CertsSection))
        directory = table.text("acme_directory")
        if directory is not None and not is_url(directory, ("https",)):
            table.error("acme_directory", "expected an https:// URL")
        email = _matching(table, "acme_email", r"[^@\s,<>]+@[^@\s,<>]+\.[^@\s,<>.]+", "a mail address, or no such key")
        ca_file = table.text("acme_ca_file")
        if ca_file is not None and not os.path.isfile(ca_file := self.resolve(ca_file)):
            table.error("acme_ca_file", f"expected a file of roots in PEM: there is no {ca_file}")
        kid, hmac_key = table.text("acme_eab_kid"), table.text("acme_eab_hmac_key")
        if bool(kid) is not bool(hmac_key):
            table.error(
                "acme_eab_kid" if kid else "acme_eab_hmac_key", "acme_eab_kid and acme_eab_hmac_key go together"
            )
        key_types = _choices(table, "key_types", ("ecdsa", "rsa"))
        if key_types is not None and "ecdsa" not in key_types:
            table.error("key_types", 'expected "ecdsa", and "rsa" beside it if at all')
        for one in (addresses := table.texts("addresses")):
            try:
                ipaddress.ip_address(one)
            except ValueError:
                table.reader.error(table.at("addresses"), one, "expected IP addresses")
        for one in (dns_servers := table.texts("dns_servers")):
            if parse_address(one, low_port=1) is None:
                table.reader.error(table.at("dns_servers"), one, 'expected name servers "IP:PORT"')
        certs = _build(
            CertsSection,
            issuer=table.text("issuer", choices=("internal", "acme")),
            acme_directory=directory,
            acme_email=email,
            acme_ca_file=ca_file,
            acme_eab_kid=kid,
            acme_eab_hmac_key=hmac_key,
            acme_profile=_matching(table, "acme_profile", r"[A-Za-z0-9._-]{1,64}", "the name of a profile of the CA"),
            key_types=key_types,
            challenges=_choices(table, "challenges", ("tls-alpn-01", "http-01", "dns-01")),
            addresses=addresses if "addresses" in table else None,
            cname_target=_hostname_of(table, "cname_target"),
            dns_servers=dns_servers if "dns_servers" in table else None,
            dns_delegation=_hostname_of(table, "dns_delegation"),
            check_dns=table.flag("check_dns", True),
            dns=self._dns_hook(table.table("dns")),
        )
        self._warn_of_certs(table, certs)
        return certs

    def _dns_hook(self, table: Table | None) -> DnsHookSection | None:
        if table is None:
            return None
        only_known(table, _fields(DnsHookSection))
        hook = table.text("hook", choices=("exec", "rfc2136"))
        command = read_command(table, "command")
        server = table.text("server")
        if "hook" not in table:
            table.error("hook", 'expected "exec" or "rfc2136"')
        if hook == "exec" and not command:
            table.error("command", "expected the command that sets and removes TXT records")
        if hook == "rfc2136" and (server is None or parse_address(server, low_port=1) is None):
            table.error("server", 'expected the name server that takes updates, "IP:PORT"')
        secret = table.text("key_secret")
        if bool(table.text("key_name")) is not bool(secret):
            table.error("key_secret", "key_name and key_secret go together")
        algorithms = ("hmac-sha256", "hmac-sha384", "hmac-sha512", "hmac-sha224", "hmac-sha1", "hmac-md5")
        if hook is None:
            return None
        return _build(
            DnsHookSection,
            hook=hook,
            command=command,
            server=server,
            zone=_hostname_of(table, "zone"),
            key_name=table.text("key_name"),
            key_secret=secret,
            key_algorithm=table.text("key_algorithm", choices=algorithms),
            ttl=table.integer("ttl", 1, 86_400),
            timeout_s=_positive_s(table, "timeout"),
            propagation_timeout_s=table.duration_s("propagation_timeout", bare_unit_s=1.0),
        )

    def _warn_of_certs(self, table: Table, certs: CertsSection) -> None:
        """Warn of keys that do nothing together with the rest of what is configured."""
        if certs.issuer != "acme":
            for key in ("acme_email", "acme_eab_kid", "acme_profile", "key_types", "challenges", "dns"):
                if key in table and getattr(certs, key) != getattr(CertsSection(), key):
                    table.warn(key, 'has no effect without issuer = "acme"')
        elif not certs.acme_email:
            expected = "without it the CA cannot tell anybody when something is wrong with a certificate"
            self.reader.warn(("certs", "acme_email"), MISSING, expected)
        if "dns-01" in certs.challenges and certs.dns is None:
            table.error("challenges", "dns-01 needs [certs.dns]: how TXT records are set")
        if certs.dns_delegation and certs.dns is None:
            table.error("dns_delegation", "needs [certs.dns]: how TXT records in that zone are set")

    def _log(self, node: NodeSection) -> LogSection:
        table = self._section("log", "access", "format")
        access = table.text("access")
        if access and access != "-":
            access = self.resolve(access)
            folder = os.path.dirname(access)
            is_ours = os.path.commonpath((folder, node.data_dir)) == node.data_dir  # and made at the start
            if not is_ours and not os.path.isdir(folder):
                table.error("access", f"expected a file in a folder that exists: there is no {folder}")
        return _build(LogSection, access_log=access, access_log_format=table.text("format", choices=("json", "text")))

    def _limits(self) -> LimitsSection:
        table = self._section("limits", *_fields(LimitsSection))
        limits = _build(
            LimitsSection,
            max_head_bytes=table.integer("max_head_bytes", 1024, 16 * 1024**2),
            max_headers=table.integer("max_headers", 1, 10_000),
            max_target_bytes=table.integer("max_target_bytes", 128, 16 * 1024**2),
            max_connections=table.integer("max_connections", 0, 10_000_000),
            handshake_timeout_s=_positive_s(table, "handshake_timeout"),
            head_timeout_s=_positive_s(table, "head_timeout"),
            idle_timeout_s=_positive_s(table, "idle_timeout"),
            drain_timeout_s=table.duration_s("drain_timeout", bare_unit_s=1.0),
            wake_hints_per_source_s=table.number("wake_hints_per_source", 0, 1e6),
            wake_hints_per_s=table.number("wake_hints", 0, 1e6),
            source_connections=table.integer("source_connections", 0, 10_000_000),
            source_connects_s=table.number("source_connects", 0, 1e6),
            source_handshakes_s=table.number("source_handshakes", 0, 1e6),
            exempt_sources=tuple(_networks(table, "exempt_sources")) if "exempt_sources" in table else None,
            max_memory_bytes=table.size_bytes("max_memory", bare_unit_bytes=1),
        )
        if 0 < limits.max_memory_bytes < _LEAST_MEMORY_BYTES:
            table.warn("max_memory", "a worker takes most of that at rest: it would refuse clients as overloaded")
        if limits.max_target_bytes > limits.max_head_bytes:
            table.error("max_target_bytes", f"is above max_head_bytes, {limits.max_head_bytes}")
        return limits

    # --- what only all apps together show

    def _check_duplicates(self, apps: Sequence[_ReadApp]) -> None:
        names: dict[str, str] = {}
        hostnames: dict[str, str] = {}
        machines: dict[str, str] = {}
        for app, table in apps:
            if app.name in names:
                table.error("name", f"{app.name!r} is the name of another app too ({names[app.name]})")
            names.setdefault(app.name, f"[[apps]] number {len(names) + 1}")
            for hostname in app.hostnames:
                owner = hostnames.setdefault(hostname, app.name)
                if owner != app.name:
                    table.error("hostnames", f"{hostname} belongs to the app {owner!r} already")
            for machine in app.machines:
                if machines.setdefault(machine.id, app.name) != app.name:
                    table.error("machines", f"{machine.id!r} is a machine of the app {machines[machine.id]!r} already")

    def _warn_of_unmapped_ports(self, listen: ListenSection, apps: Sequence[_ReadApp]) -> None:
        mapped = {one.public_port for one in listen.public}
        asking: dict[int, list[str]] = {}
        for app, _ in apps:
            for port in (port for service in app.services for port in service.ports if "http" in port.handlers):
                if not any(port.start <= one <= port.end for one in mapped):
                    asking.setdefault(port.start, []).append(app.name)
        for number, names in asking.items():
            owners = ", ".join(dict.fromkeys(names))
            bind = number if number > 1023 else number + 8000
            expected = f'public port {number} of {owners} is not served here: add "{number}" = ["127.0.0.1:{bind}"]'
            self.reader.warn(("listen", str(number)), MISSING, expected)

    def _warn_of_owner(self, apps: Sequence[_ReadApp]) -> None:
        processes = [(app, table) for app, table in apps if app.driver == "process" and app.groups]
        if self.host.euid == 0:
            for app, table in processes:
                if app.user is None or app.user.partition(":")[0] in ("root", "0"):
                    table.warn("user", f"machines of {app.name} run as root: name a user that owns nothing else")
        elif processes:
            expected = "machines run as the user who owns this folder and can read the private keys in it"
            self.reader.warn(("node", "data_dir"), MISSING, expected)


class _AppReader:
    """Reads one [[apps]] and its fly.toml."""

    def __init__(self, config: _ConfigReader, table: Table, node: NodeSection) -> None:
        self.config = config
        self.table = table
        self.node = node

    def read(self) -> _ReadApp | None:
        """The app, or None where nothing of it could be understood; the faults say why."""
        table = self.table
        only_known(table, _APP_KEYS)
        driver = self._driver()
        machines = self._machines(driver)
        own = self._own()
        path, result = self._fly_toml(driver, machines)
        if result is None:
            self._judge_alone()
            return None
        fly, name = result.app, self._name(result.app, path)
        cwd = self._cwd(path, driver)
        groups = self._groups(fly, driver, cwd, len(machines))
        env = self._env(fly)
        if name is None:
            return None
        app = _build(
            AppConfig,
            name=name,
            hostnames=self._hostnames(name),
            fly=fly,
            groups=groups,
            driver=driver,
            fly_toml_path=path,
            cwd=cwd,
            env=env,
            machines=machines,
            keys=result.keys if path is not None else (),
            **own,
        )
        self._check_ports(app)
        self._warn_of_idle_keys(app)
        return app, table

    def _own(self) -> dict[str, Any]:  # Any: one AppConfig field each
        """What config.toml alone says, so that its faults are told whatever the fly.toml is like."""
        table = self.table
        wake_on, balance = table.text("wake_on", choices=("hello", "request")), table.text("balance", choices=_BALANCES)
        wake = table.text("wake", choices=_WAKE_MODES)
        return dict(
            user=self._user(),
            network=table.text("network", choices=("port", "namespace")),
            wake_on=WakeOn(wake_on) if wake_on else None,
            wake_timeout_s=_positive_s(table, "wake_timeout"),
            idle_timeout_s=table.duration_s("idle_timeout", bare_unit_s=1.0),
            autostop_interval_s=_positive_s(table, "autostop_interval"),
            autostop_at_once=table.integer("autostop_at_once", 1, 10_000),
            busy=_matching(table, "busy", r"/[!-~]{0,1023}", 'a path such as "/busy"'),
            warm_hours=self._warm_hours(),
            restart_on_failing_checks_s=table.duration_s("restart_on_failing_checks", bare_unit_s=1.0),
            limits=self._limits(),
            balance=Balance(balance) if balance else None,
            sticky=self._sticky(),
            access=self._access(),
            wake_rules=self._wake_rules(),
            organization=_matching(table, "organization", _ORGANIZATION, _ORGANIZATION_EXPECTED),
            replay_sources=self._replay_sources(),
            keep_bodies=table.flag("keep_bodies"),
            wake=WakeMode(wake) if wake else None,
            on_demand=self._on_demand(),
        )

    def _on_demand(self) -> OnDemandSection | None:
        table = self.table.table("on_demand")
        if table is None:
            return None
        only_known(
            table,
            ("ask", "ask_timeout", "allow", "names_burst", "names_hour", "domain_burst", "domain_hour", "negative_ttl"),
        )
        ask = table.text("ask")
        if ask is not None and not is_url(ask, ("http", "https")):
            table.error("ask", "expected an http:// or https:// URL")
        if ask is None and not table.texts("allow"):
            table.error(
                "ask", "expected `ask`, a URL, or `allow`, names: without either anybody could have certificates made"
            )
        allow = []
        for one in table.texts("allow"):
            star = "*." if one.startswith("*.") else ""
            if (name := to_hostname(table, "allow", one.removeprefix("*."))) is not None:
                if star and "." not in name:
                    table.reader.error(table.at("allow"), one, "would permit every name below a top-level domain")
                allow.append(star + name)
        return _build(
            OnDemandSection,
            ask=ask,
            ask_timeout_s=_positive_s(table, "ask_timeout"),
            allow=tuple(allow),
            names_burst=table.integer("names_burst", 1, 1_000_000),
            names_hour=table.number("names_hour", 0, 1e9),
            domain_burst=table.integer("domain_burst", 1, 100_000),
            domain_hour=table.number("domain_hour", 0, 1e6),
            negative_ttl_s=_positive_s(table, "negative_ttl"),
        )

    def _judge_alone(self) -> None:
        """Without a fly.toml that can be read: what should stand beside one, as far as it can be judged by itself."""
        nothing = read_fly_toml({}).app
        if not isinstance(self.table.raw("command"), Mapping):  # one goes by process groups
            self._commands(nothing)
        if not isinstance(self.table.raw("count"), Mapping):
            self._counts(nothing)
        self._env(nothing)

    # --- which app it is

    def _driver(self) -> str:
        name = self.table.text("driver") or "process"
        if name in ("exec", "docker", "fly"):
            self.table.error(
                "driver", f'the driver {name!r} is not in this version yet: expected "process" or "static"'
            )
        elif name not in ("process", "static"):
            self.table.error("driver", 'expected "process" or "static"', suggest(name, ("process", "static")))
        return "static" if name == "static" else "process"

    def _fly_toml(self, driver: str, machines: Sequence[StaticMachine]) -> tuple[str | None, FlyTomlResult | None]:
        name = self.table.text("fly_toml")
        if name is None:
            if driver == "static" and machines:
                port = machines[0].port
                return None, read_fly_toml({"http_service": {"internal_port": port}})
            if "fly_toml" not in self.table:
                self.table.error("fly_toml", "expected the path of the app's fly.toml")
            return None, None
        path = self.config.resolve(name)
        result, faults = load_fly_toml(path)
        if result is None and not os.path.isfile(path):
            self.table.error("fly_toml", f"expected a file: there is no {path}")
            return path, None
        if path not in self.config.read_paths:  # two apps may share a file: its faults are told once
            self.config.read_paths.add(path)
            self.config.app_faults += faults
        return path, result

    def _name(self, fly: FlyToml, path: str | None) -> AppName | None:
        name = self.table.text("name") or fly.app
        where = "name" if path is None or "name" in self.table else "fly_toml"
        if name is None:
            self.table.error("name", "expected the app's name, since its fly.toml has no `app`")
        elif re.search(r"[{}<>\[\]$%]", name):
            expected = f"the app's name is the placeholder {name!r}: fill it in there, or give `name` here"
            self.table.error(where, expected)
        elif not _APP_NAME.fullmatch(name):
            expected = f"the app's name is {name!r}: expected lower case letters, digits and dashes, 63 at most"
            self.table.error(where, expected)
        else:
            return AppName(name)
        return None

    def _hostnames(self, name: AppName) -> tuple[str, ...]:
        own = f"{name}.{self.node.domain}"
        given = (to_hostname(self.table, "hostnames", one, wildcards=True) for one in self.table.texts("hostnames"))
        return tuple(dict.fromkeys((own, *(one for one in given if one is not None))))

    # --- what its machines are

    def _machines(self, driver: str) -> tuple[StaticMachine, ...]:
        tables = self.table.tables("machines")
        if driver != "static":
            if tables:
                self.table.error("machines", 'only with driver = "static": other drivers make their machines')
            return ()
        if not tables:
            self.table.error("machines", "expected [[apps.machines]] with id and address")
        machines: list[StaticMachine] = []
        for table in tables:
            only_known(table, ("id", "address", "start", "stop", "status"))
            id = _matching(table, "id", r"[a-z0-9][a-z0-9-]{0,62}", "lower case letters, digits and dashes")
            text = table.text("address")
            address = parse_address(text, low_port=1) if text is not None else None
            if "id" not in table:
                table.error("id", "expected the machine's id")
            if address is None and (text is not None or "address" not in table):
                table.error("address", 'expected "IP:PORT" such as "10.0.0.5:8080"')
            if any(one.id == id for one in machines):
                table.error("id", "is the id of another machine of this app too")
            if id is not None and address is not None:
                machines.append(StaticMachine(id, *address))
        for key in ("command", "cwd", "user", "count", "network", "env"):
            if key in self.table:
                self.table.warn(key, "has no effect on machines that exist already")
        return tuple(machines)

    def _cwd(self, path: str | None, driver: str) -> str:
        text = self.table.text("cwd")
        cwd = self.config.resolve(text) if text else os.path.dirname(path) if path else self.config.folder
        if driver == "process" and not os.path.isdir(cwd):
            self.table.error("cwd", f"expected a folder: there is no {cwd}")
        return cwd

    def _groups(self, fly: FlyToml, driver: str, cwd: str, machines: int) -> tuple[GroupConfig, ...]:
        commands, counts = self._commands(fly), self._counts(fly)
        groups = []
        for name in fly.groups:
            count = counts.get(name, 1) if driver == "process" else machines if name == fly.default_group else 0
            command = commands.get(name) or fly.argv(name)
            if driver == "process":
                self._check_command(name, command, count, cwd)
            restart = fly.restart(name)
            ports = dict.fromkeys(one.internal_port for one in fly.services if name in one.processes)
            groups.append(
                GroupConfig(
                    name=name,
                    command=command,
                    count=count,
                    internal_ports=tuple(ports),
                    mounts=tuple(one for one in fly.mounts if name in one.processes),
                    restart=restart.policy,
                    restart_retries=restart.retries,
                    memory_mb=fly.memory_mb(name),
                )
            )
        return tuple(groups)

    def _commands(self, fly: FlyToml) -> dict[str, tuple[str, ...]]:
        """Commands of config.toml by group; one command alone is that of the default group."""
        value = self.table.raw("command")
        if isinstance(value, Mapping):
            below = Table(self.table.reader, value, self.table.at("command"))
            for group in below.values:
                if group not in fly.groups:
                    expected = f"no process group is called {group!r} (there is {', '.join(fly.groups)})"
                    below.error(group, expected, suggest(group, fly.groups))
            return {group: read_command(below, group) for group in below.values}
        return {fly.default_group: read_command(self.table, "command")}

    def _check_command(self, group: str, command: tuple[str, ...], count: int, cwd: str) -> None:
        if not command and count and "command" not in self.table:
            of = "" if group == DEFAULT_GROUP else f" of process group {group!r}"
            expected = (
                f"expected the command that starts a machine{of}: its fly.toml has none ([processes] or an image's)"
            )
            self.table.error("command", expected)
        elif not command and count and self.table.raw("command") in ("", []):
            self.table.error("command", "expected a command, not nothing")
        elif command and count and "{" not in command[0]:
            program = os.path.join(cwd, command[0]) if "/" in command[0] else shutil.which(command[0])
            if program is None or not os.access(program, os.X_OK) or os.path.isdir(program):
                self.table.warn("command", f"there is no program {command[0]!r} here now")

    def _counts(self, fly: FlyToml) -> dict[str, int]:
        value = self.table.raw("count")
        if not isinstance(value, Mapping):
            count = self.table.integer("count", 0, 10_000)
            return {} if count is None else dict.fromkeys(fly.groups, count)
        counts = {}
        below = Table(self.table.reader, value, self.table.at("count"))
        for group in below.values:
            count = below.integer(group, 0, 10_000)
            if group not in fly.groups:
                expected = f"no process group is called {group!r} (there is {', '.join(fly.groups)})"
                below.error(group, expected, suggest(group, fly.groups))
            elif count is not None:
                counts[group] = count
        return counts

    def _check_ports(self, app: AppConfig) -> None:
        """Warn where machines would not listen on the ports of their own that they are given."""
        if app.driver != "process":
            return
        for group in (one for one in app.groups if one.count):
            named = {int(found) for word in group.command for found in re.findall(r"\{port:([0-9]{1,5})\}", word)}
            for port in named - set(group.internal_ports):
                self.table.warn(
                    "command", f"{{port:{port}}}: {group.name!r} has no service with the internal port {port}"
                )
            if not app.own_network and group.internal_ports:
                self._check_fixed_port(group)

    def _check_fixed_port(self, group: GroupConfig) -> None:
        if any("{port" in word or "$PORT" in word or "${PORT" in word for word in group.command):
            return
        cure = 'PORT in its environment or {port} in the command; else use network = "namespace"'
        for port in group.internal_ports:
            if any(re.search(rf"(?<![0-9]){port}(?![0-9])", word) for word in group.command):
                expected = (
                    f"the command of {group.name!r} names port {port}, but each machine has a port of its own: {cure}"
                )
                self.table.warn("command", expected)
                return
        if group.count > 1:
            expected = (
                f"{group.count} machines of {group.name!r} share this host's ports: each must listen on its own: {cure}"
            )
            self.table.warn("count", expected)

    def _user(self) -> str | None:
        user = _matching(
            self.table, "user", r"[A-Za-z0-9_][A-Za-z0-9_.-]*(:[0-9]+)?", "a user's name, or UID or UID:GID"
        )
        if user and self.config.host.euid != 0:
            self.table.warn("user", "only root can start machines as another user")
        return user

    def _env(self, fly: FlyToml) -> tuple[tuple[str, str], ...]:
        """[env], over it what config.toml adds (secrets win over env), and PRIMARY_REGION (which beats both)."""
        env = dict(fly.env)
        if (table := self.table.table("env")) is not None:
            env |= {name: value for name, value in table.scalars() if is_env_name(table, name)}
        if fly.primary_region:
            env["PRIMARY_REGION"] = fly.primary_region
        return tuple(env.items())

    def _limits(self) -> AppLimits:
        table = self.table
        limits = _build(
            AppLimits,
            connect_timeout_s=_positive_s(table, "connect_timeout"),
            idle_timeout_s=_positive_s(table, "stream_idle_timeout"),
            max_waiters=table.integer("max_waiters", 1, 10_000_000),
            queue_timeout_s=table.duration_s("queue_timeout", bare_unit_s=1.0),
            max_queued=table.integer("max_queued", 0, 10_000_000),
            replay_memory_bytes=table.integer("replay_memory", 0, 2**30),
            replay_spool_bytes=table.integer("replay_spool", 0, 2**40),
        )
        first_byte_s = table.duration_s("first_byte_timeout", bare_unit_s=1.0)
        return (
            limits if first_byte_s is None else dataclasses.replace(limits, first_byte_timeout_s=first_byte_s or None)
        )

    # --- which machine, who may ask, and what wakes

    def _sticky(self) -> StickyCookie | None:
        if not isinstance(self.table.raw("sticky"), Mapping):
            value = self.table.raw("sticky")
            if value is not MISSING and not isinstance(value, bool):
                self.table.error("sticky", 'expected true, false, or { name = "...", ttl = "24h" }')
            return StickyCookie() if value is True else None
        table = self._below("sticky", ("name", "ttl"))
        name = _matching(table, "name", r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", "a cookie's name")
        return _build(StickyCookie, name=name, ttl_s=_positive_s(table, "ttl"))

    def _replay_sources(self) -> tuple[str, ...]:
        sources = []
        for one in self.table.texts("replay_sources"):
            if re.fullmatch(_ORGANIZATION, one):
                sources.append(one)
            else:
                expected = f"expected names of organizations: {_ORGANIZATION_EXPECTED}"
                self.table.reader.error(self.table.at("replay_sources"), one, expected)
        return tuple(dict.fromkeys(sources))

    def _access(self) -> AccessRules:
        table = self._below("access", _ACCESS_KEYS)
        allow, deny = _networks(table, "allow"), _networks(table, "deny")
        allow += self._allowed_by_file(table)
        if deny and allow:
            denied = Networks(deny)
            for one in allow:  # the quick look first: a list may hold thousands
                if denied.contains(one.partition("/")[0]) and _is_within_any(one, deny):
                    table.reader.warn(table.at("deny"), list(deny), f"holds all of {one}, which is allowed: deny wins")
        for key in ("requests_per_second", "handshakes_per_second"):
            if table.raw(key) == 0 and not isinstance(table.raw(key), bool):
                table.warn(key, "0 refuses everyone; leave the key out for no limit")
        burst = table.raw("requests_burst")
        if burst not in (MISSING, AccessRules().requests_burst) and "requests_per_second" not in table:
            table.warn("requests_burst", "has no effect without requests_per_second")
        return _build(
            AccessRules,
            allow=tuple(dict.fromkeys(allow)),
            deny=tuple(dict.fromkeys(deny)),
            requests_per_s=table.number("requests_per_second", 0, 1e6),
            requests_burst=table.integer("requests_burst", 1, 1_000_000),
            connections=table.integer("connections", 1, 10_000_000),
            handshakes_per_s=table.number("handshakes_per_second", 0, 1e6),
            max_body_bytes=table.integer("max_body", 0, 2**50),
        )

    def _allowed_by_file(self, table: Table) -> list[str]:
        """The networks of `allow_from_file`. A list that cannot be read, or is empty, must not open the app to all."""
        name = table.text("allow_from_file")
        if name is None:
            return []
        path = self.config.resolve(name)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_LIST_MAX + 1)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            table.error("allow_from_file", f"expected a list of networks: {path} cannot be read: {why}")
            return []
        if len(text) > _LIST_MAX:
            table.error("allow_from_file", f"expected a list of networks of {_LIST_MAX >> 20} MB at most")
            return []
        networks, faults = parse_networks(text)
        rows = text.removeprefix("\ufeff").splitlines()
        for line, expectation in faults:
            fault = Fault((), "", _printable(expectation), file=path, line=line, source_line=_printable(rows[line - 1]))
            self.config.app_faults.append(fault)
        if not networks and not faults:
            table.error("allow_from_file", f"there is no network in {path}: everyone would be let in")
        return networks

    def _wake_rules(self) -> WakeRules:
        table = self._below("wake_rules", _WAKE_KEYS)
        for key, pattern, expected in (
            ("ignore_paths", r"[/*?\[].*", 'globs of paths such as "/wp-*"'),
            ("ignore_methods", r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", 'methods such as "HEAD"'),
            ("ignore_agents", r".*\S.*", 'parts of a User-Agent such as "bot"'),
        ):
            for one in table.texts(key):
                if not re.fullmatch(pattern, one):
                    table.reader.error(table.at(key), one, f"expected {expected}")
        for key in ("starts_per_source", "starts"):
            if table.raw(key) == 0 and not isinstance(table.raw(key), bool):
                table.warn(key, "0 lets no request start a machine; leave the key out for no limit")
        return _build(
            WakeRules,
            ignore_paths=table.texts("ignore_paths"),
            ignore_methods=tuple(one.upper() for one in table.texts("ignore_methods")),
            ignore_agents=table.texts("ignore_agents"),
            ignore_sources=tuple(_networks(table, "ignore_sources")),
            starts_per_source_s=table.number("starts_per_source", 0, 1e6),
            starts_per_s=table.number("starts", 0, 1e6),
            waiting_page=table.flag("waiting_page"),
        )

    def _warm_hours(self) -> tuple[WarmHours, ...]:
        found = []
        for text in self.table.texts("warm_hours"):
            try:
                hours = parse_warm_hours(text)
            except ValueError as error:
                self.table.reader.error(self.table.at("warm_hours"), text, str(error))
                continue
            if _is_zone(hours.zone):
                found.append(hours)
                continue
            names = {one.lower(): one for one in zoneinfo.available_timezones()}
            near = suggest(hours.zone, names)
            expected = f"{hours.zone!r} is no time zone that this host knows"
            self.table.reader.error(self.table.at("warm_hours"), text, expected, names[near] if near else None)
        return tuple(found)

    def _below(self, key: str, known: Sequence[str]) -> Table:
        """A table in the app's section; an empty one where there is none."""
        table = self.table.table(key) or Table(self.table.reader, {}, self.table.at(key))
        only_known(table, known)
        return table

    def _warn_of_idle_keys(self, app: AppConfig) -> None:
        """Warn of keys that do nothing together with the rest of what is configured."""
        table = self.table
        for key in ("busy", "warm_hours", "autostop_interval", "autostop_at_once"):
            if key in table and not app.can_autostop:
                table.warn(key, "has no effect: no machine stops by itself (auto_stop_machines in fly.toml)")
        if app.sticky is not None and app.machine_count < 2:
            table.warn("sticky", "has no effect with a single machine")
        if app.balance is not Balance.FLY and app.machine_count < 2:
            table.warn("balance", "has no effect with a single machine")
        if app.keep_bodies and app.limits.replay_spool_bytes == 0:
            table.warn("keep_bodies", "has no effect with replay_spool = 0")
        if app.restart_on_failing_checks_s and (app.driver == "static" or not any(one.checks for one in app.services)):
            table.warn("restart_on_failing_checks", "has no effect: no service of machines made here has a check")
        if app.wake is not WakeMode.FLY and not app.can_wake:
            table.warn("wake", "has no effect: nothing starts machines of this app on demand")
        if app.wake_rules != WakeRules() and not app.can_wake:
            table.warn("wake_rules", "have no effect: nothing starts machines of this app on demand")
        elif app.wake_on is WakeOn.HELLO:
            for key in ("ignore_paths", "ignore_methods", "ignore_agents"):
                if found := getattr(app.wake_rules, key):
                    expected = 'over TLS the ClientHello wakes before this is known: set wake_on = "request"'
                    table.reader.warn((*table.at("wake_rules"), key), list(found), expected)


_ReadApp = tuple[AppConfig, Table]

_SECTIONS: Final = ("node", "listen", "certs", "regions", "peers", "cluster", "log", "limits", "apps")
_PEER_KEYS: Final = {"name": "name", "region": "region", "backhaul": 'address, "HOST:PORT"'}
_REGION: Final = r"[a-z0-9][a-z0-9-]{0,31}"
_NODE_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123 §2.1, and one spelling only
_NODE_LABEL_EXPECTED: Final = "lower case letters, digits and inner dashes, 63 at most"
_APP_KEYS: Final = (
    "name", "fly_toml", "driver", "command", "cwd", "user", "count", "network", "wake_on", "wake_timeout",
    "idle_timeout", "hostnames", "env", "connect_timeout", "first_byte_timeout", "stream_idle_timeout", "max_waiters",
    "machines", "balance", "queue_timeout", "max_queued", "organization", "replay_sources", "keep_bodies",
    "replay_memory", "replay_spool", "sticky", "access", "wake_rules", "restart_on_failing_checks", "autostop_interval",
    "autostop_at_once", "busy", "warm_hours", "on_demand", "wake",
)  # fmt: skip
_ACCESS_KEYS: Final = (
    "allow", "deny", "allow_from_file", "requests_per_second", "requests_burst", "connections",
    "handshakes_per_second", "max_body",
)  # fmt: skip
_WAKE_KEYS: Final = (
    "ignore_paths", "ignore_methods", "ignore_agents", "ignore_sources", "starts_per_source", "starts", "waiting_page",
)  # fmt: skip
_BALANCES: Final = tuple(one.value for one in Balance)
_WAKE_MODES: Final = tuple(one.value for one in WakeMode)
_ORGANIZATION: Final = r"[a-z0-9][a-z0-9-]{0,62}"
_ORGANIZATION_EXPECTED: Final = "lower case letters, digits and dashes"
_LIST_MAX: Final = 1 << 20  # of a file of networks, which goes to workers in the app's record
_APP_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def only_known(table: Table, known: Iterable[str]) -> None:
    """Refuse keys of config.toml that there are not: a key misspelt is a setting not made."""
    names = tuple(known)
    for key in table.values:
        if key not in names:
            table.error(key, "not a key of config.toml", suggest(key, names))


def parse_address(text: str, *, low_port: int) -> tuple[str, int] | None:
    """`127.0.0.1:80`, `[::1]:80` or `localhost:80` as host and port, or None."""
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not low_port <= int(port) <= 65535:
        return None
    host = "127.0.0.1" if host == "localhost" else host
    is_bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if is_bracketed else host)
    except ValueError:
        return None
    return (str(address), int(port)) if is_bracketed == (address.version == 6) else None


def is_region_code(text: str) -> bool:
    return re.fullmatch(_REGION, text) is not None


def parse_remote(text: str) -> tuple[str, int] | None:
    """`10.0.0.6:7443`, `[2001:db8::6]:7443` or `node-b.example:7443` as host and port of another node, or None."""
    if (address := parse_address(text, low_port=1)) is not None:
        return None if ipaddress.ip_address(address[0]).is_unspecified else address
    host, _, port = text.lower().rpartition(":")
    is_name = len(host) <= 253 and re.fullmatch(rf"{_NODE_LABEL}(\.{_NODE_LABEL})*", host)
    if not is_name or re.fullmatch(r"[0-9.]+", host) or not re.fullmatch(r"[0-9]{1,5}", port):
        return None
    return (host, int(port)) if 1 <= int(port) <= 65535 else None


def to_hostname(table: Table, key: str, text: str, *, wildcards: bool = False) -> str | None:
    """A host name in lower case A-labels (IDNA 2008, UTS 46); a fault and None if it is not one."""
    name = text.strip().rstrip(".").lower()
    star = "*." if name.startswith("*.") and wildcards else ""
    try:
        if re.fullmatch(r"[0-9.]+|.*:.*", name):
            raise ValueError("an address is not a name")
        if star and "." not in name.removeprefix(star):
            raise ValueError("that would be every name below a top-level domain")
        return star + idna.encode(name.removeprefix(star), uts46=True).decode("ascii").lower()
    except (idna.IDNAError, ValueError) as error:
        table.reader.error(table.at(key), text, f"expected a host name ({str(error)[:80].rstrip('.')})")
        return None


def _printable(row: str) -> str:
    """A line of a file, or of our own about it, fit for a terminal."""
    return "".join(one if one.isprintable() else " " for one in row).strip()[:400]


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _fields(kind: type[object]) -> tuple[str, ...]:
    """The keys of a section: the fields' names, times and rates without their unit."""
    return tuple(_KEY_OF.get(name, name.removesuffix("_s")) for name in kind.__dataclass_fields__)  # type: ignore[attr-defined]  # given dataclasses only


_KEY_OF: Final = {
    "wake_hints_per_source_s": "wake_hints_per_source",
    "wake_hints_per_s": "wake_hints",
    "max_memory_bytes": "max_memory",
}


def _build(kind: type[_T], **values: object) -> _T:
    """An object whose absent values (None) are the dataclass's defaults."""
    return kind(**{name: value for name, value in values.items() if value is not None})


def _matching(table: Table, key: str, pattern: str, expected: str) -> str | None:
    text = table.text(key)
    if text is not None and not re.fullmatch(pattern, text):
        table.error(key, f"expected {expected}")
        return None
    return text


def _hostname_of(table: Table, key: str) -> str | None:
    text = table.text(key)
    return to_hostname(table, key, text) if text is not None else None


def _choices(table: Table, key: str, known: Sequence[str]) -> tuple[str, ...] | None:
    """An array whose members are among `known`; None where there is none."""
    if key not in table:
        return None
    for one in (found := table.texts(key)):
        if one not in known:
            table.reader.error(table.at(key), one, f"expected {', '.join(known)}", suggest(one, known))
    if not found:
        table.error(key, f"expected one at least of {', '.join(known)}")
    return tuple(dict.fromkeys(found))


def is_url(text: str, schemes: Sequence[str]) -> bool:
    """Whether it is an absolute URL that can be asked."""
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in schemes
            and bool(parts.hostname)
            and parts.port != 0
            and text.isprintable()
            and " " not in text
        )
    except ValueError:
        return False


def _networks(table: Table, key: str) -> list[str]:
    """The networks of an array; each that is none is a fault."""
    networks = []
    for one in table.texts(key):
        if (fault := network_fault(one)) is not None:
            table.reader.error(table.at(key), one, fault)
        else:
            networks.append(one)
    return networks


def _is_within_any(network: str, others: Iterable[str]) -> bool:
    one = ipaddress.ip_network(network)
    wholes = (ipaddress.ip_network(other) for other in others)
    return any(one.version == whole.version and one.subnet_of(whole) for whole in wholes)  # type: ignore[arg-type]  # versions are the same


def _is_zone(name: str) -> bool:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def _positive_s(table: Table, key: str) -> float | None:
    seconds = table.duration_s(key, bare_unit_s=1.0)
    if seconds == 0:
        table.error(key, "expected a duration above 0")
        return None
    return seconds

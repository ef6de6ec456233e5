"""fly.toml: a parsed document in, frozen objects out, with every fault and the fate of every key.

All sections and old forms are read (spec: fly.toml reference; public configuration page, flyctl's parser and
validator). Where Fly lets a wrong value pass, it is a warning here and the default is taken; where Fly refuses, or
where taking the default would be less safe than what the file seems to ask for, it is an error. Which keys have an
effect is said by fly_keys; files, folders and everything a node adds to an app are left to config.
"""

from __future__ import annotations

import base64
import binascii
import re
import shlex
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypedDict

from proxy.model import Autostop, Check, ConcurrencyType, Port, ReplayCacheRule, RestartPolicy, Service
from proxy.wire.fly_keys import KeyClass, KeyUse, classify_keys
from proxy.wire.toml_table import Fault, KeyPath, Reader, Severity, Table, render_path, scalar_text, suggest

DEFAULT_GROUP: Final = "app"
MAX_KILL_TIMEOUT_S: Final = 300.0
MB: Final = 1024**2
GB: Final = 1024**3


class KillSignal(NamedTuple):
    name: str
    number: int


DEFAULT_KILL_SIGNAL: Final = KillSignal("SIGINT", int(signal.SIGINT))


@dataclass(frozen=True, slots=True)
class Volume:
    """A `[[mounts]]` section."""

    source: str
    destination: str
    processes: tuple[str, ...]
    initial_size_bytes: int | None = None
    snapshot_retention_days: int | None = None
    scheduled_snapshots: bool | None = None


@dataclass(frozen=True, slots=True)
class Restart:
    """What happens after a machine of these groups ends by itself."""

    policy: RestartPolicy
    retries: int
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Vm:
    """Size of machines; empty `processes` = every group without a section of its own."""

    size: str | None
    memory_bytes: int | None
    cpus: int | None
    cpu_kind: str | None
    gpus: int | None
    gpu_kind: str | None
    kernel_args: tuple[str, ...]
    host_dedication_id: str | None
    persist_rootfs: str | None
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamedCheck:
    """A top-level check: told to operators, never part of routing."""

    name: str
    check: Check
    port: int | None
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MachineCheck:
    """A throw-away machine that tests another during a deploy."""

    command: tuple[str, ...]
    entrypoint: tuple[str, ...] = ()
    image: str | None = None
    kill_signal: KillSignal | None = None
    kill_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Metrics:
    port: int
    path: str
    https: bool
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StaticFiles:
    guest_path: str
    url_prefix: str
    tigris_bucket: str | None = None
    index_document: str | None = None


@dataclass(frozen=True, slots=True)
class GuestFile:
    guest_path: str
    raw_value: str | None
    local_path: str | None
    secret_name: str | None
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Build:
    image: str | None = None
    dockerfile: str | None = None
    ignorefile: str | None = None
    target: str | None = None
    builder: str | None = None
    buildpacks: tuple[str, ...] = ()
    builtin: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    compression: str | None = None
    compression_level: int | None = None
    compose: bool = False
    compose_file: str | None = None


@dataclass(frozen=True, slots=True)
class Deploy:
    strategy: str = "rolling"
    max_unavailable: float = 0.33
    wait_timeout_s: float = 300.0
    release_command: str | None = None
    release_command_timeout_s: float = 300.0
    release_command_vm: Vm | None = None
    seed_command: str | None = None


@dataclass(frozen=True, slots=True)
class Experimental:
    cmd: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    exec: tuple[str, ...] = ()
    auto_rollback: bool | None = None
    enable_consul: bool = False
    enable_etcd: bool = False
    lazy_load_images: bool = False
    machine_config: str | None = None


@dataclass(frozen=True, slots=True)
class FlyToml:
    """One app as its fly.toml describes it, defaults filled in."""

    app: str | None = None  # None: the file names none; it is given elsewhere
    primary_region: str | None = None
    kill_signal: KillSignal = DEFAULT_KILL_SIGNAL
    kill_timeout_s: float = 5.0
    swap_size_mb: int | None = None
    console_command: str | None = None
    host_dedication_id: str | None = None
    machine_config: str | None = None
    container: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    processes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # group -> argv; empty argv: the image's CMD
    services: tuple[Service, ...] = ()  # that of [http_service] first
    mounts: tuple[Volume, ...] = ()
    restarts: tuple[Restart, ...] = ()
    vm: tuple[Vm, ...] = ()
    checks: tuple[NamedCheck, ...] = ()
    machine_checks: tuple[MachineCheck, ...] = ()  # of the top level and of all services
    metrics: tuple[Metrics, ...] = ()
    statics: tuple[StaticFiles, ...] = ()
    files: tuple[GuestFile, ...] = ()
    build: Build = Build()
    deploy: Deploy = Deploy()
    experimental: Experimental = Experimental()

    @property
    def groups(self) -> tuple[str, ...]:
        """The process groups: those of [processes], or the one that is there without it."""
        return tuple(self.processes) or (DEFAULT_GROUP,)

    @property
    def default_group(self) -> str:
        """The group of every item that names none: `app`, else the first by name."""
        return DEFAULT_GROUP if DEFAULT_GROUP in self.groups else min(self.groups)

    def argv(self, group: str) -> tuple[str, ...]:
        """What a machine of the group runs, or nothing where only an image's own command would say it.

        `exec` replaces all; else `entrypoint` is followed by the group's command, else by `cmd`.
        """
        if self.experimental.exec:
            return self.experimental.exec
        return self.experimental.entrypoint + (self.processes.get(group) or self.experimental.cmd)

    def memory_mb(self, group: str) -> int:
        """Memory of the group's machines: its own [[vm]], else that of all groups, else Fly's smallest size."""
        own = [one for one in self.vm if group in one.processes]
        for one in own or [one for one in self.vm if not one.processes]:
            if one.memory_bytes:
                return max(one.memory_bytes // MB, 1)
            return _preset_mb(one.size or "")
        return 256

    def restart(self, group: str) -> Restart:
        for one in self.restarts:
            if group in one.processes:
                return one
        return Restart(RestartPolicy.ON_FAILURE, 10, (group,))


@dataclass(frozen=True, slots=True)
class FlyTomlResult:
    """What reading came to. `app` is always there, with defaults in place of faulty values."""

    app: FlyToml
    faults: tuple[Fault, ...]
    keys: tuple[KeyUse, ...]

    @property
    def is_valid(self) -> bool:
        return all(fault.severity is not Severity.ERROR for fault in self.faults)


def read_fly_toml(document: Mapping[str, object]) -> FlyTomlResult:
    """Read a parsed fly.toml. Never raises: everything wrong is among the faults, all at once.

    Unknown keys are warnings, as Fly ignores them.
    """
    reader = Reader()
    keys = classify_keys(document)
    for key in keys:
        if key.use is KeyClass.UNKNOWN:
            value = _value_at(document, key.path)
            reader.warn(key.path, value, "not a key of fly.toml; it is ignored", key.did_you_mean)
    app = _FlyTomlReader(Table(reader, document)).read()
    return FlyTomlResult(app, tuple(reader.faults), keys)


class _FlyTomlReader:
    """Reads section after section; holds what later sections need of earlier ones, the process groups."""

    def __init__(self, top: Table) -> None:
        self.top = top
        self.reader = top.reader
        self.machine_checks: list[MachineCheck] = []
        self.processes = self._processes()
        self.groups = tuple(self.processes) or (DEFAULT_GROUP,)
        self.default = DEFAULT_GROUP if DEFAULT_GROUP in self.groups else min(self.groups)

    def read(self) -> FlyToml:
        top = self.top
        experimental = self._experimental()
        return FlyToml(
            app=top.text("app") or None,
            primary_region=top.text("primary_region") or None,
            kill_signal=_kill_signal(top) or DEFAULT_KILL_SIGNAL,
            kill_timeout_s=self._kill_timeout_s(),
            swap_size_mb=top.integer("swap_size_mb", 0, 1 << 20),
            console_command=top.text("console_command"),
            host_dedication_id=top.text("host_dedication_id"),
            machine_config=top.text("machine_config"),
            container=top.text("container"),
            env=self._env(),
            processes=self.processes,
            services=self._services(),
            mounts=self._mounts(),
            restarts=self._restarts(),
            vm=tuple(
                self._vm(table) for name in ("vm", "compute", "computes") for table in top.tables(name)
            ),
            checks=self._named_checks(),
            machine_checks=(*self._machine_checks(top), *self.machine_checks),
            metrics=self._metrics(),
            statics=self._statics(),
            files=self._files(),
            build=self._build(),
            deploy=self._deploy(),
            experimental=experimental,
        )  # fmt: skip

    # --- process groups

    def _processes(self) -> dict[str, tuple[str, ...]]:
        value = self.top.raw("processes")
        if isinstance(value, list):
            return self._old_processes()
        table = self.top.table("processes")
        if table is None:
            return {}
        return {name: read_command(table, name) for name in table.values if self._is_group_name(table, name)}

    def _old_processes(self) -> dict[str, tuple[str, ...]]:
        groups = {}
        for table in self.top.tables("processes"):
            if not table.values:  # what Fly's API answers for an app without groups
                continue
            name = table.text("name")
            if name is None:
                table.error("name", "expected the name of the process group")
            elif self._is_group_name(table, name):
                groups[name] = read_command(table, "command")
        return groups

    def _is_group_name(self, table: Table, name: str) -> bool:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
            return True
        self.reader.error(table.path, name, "a process group's name has letters, digits, - and _ only")
        return False

    def _groups_of(self, table: Table) -> tuple[str, ...]:
        """The groups an item belongs to: those it names, else the default one."""
        names = table.texts("processes")
        for name in names:
            if name not in self.groups:
                known = ", ".join(self.groups)
                table.warn(
                    "processes", f"no process group is called {name!r} (there is {known})", suggest(name, self.groups)
                )
        return names or (self.default,)

    # --- top level

    def _kill_timeout_s(self) -> float:
        seconds = self.top.duration_s("kill_timeout", bare_unit_s=1.0)
        key = self.top
        if seconds is None and (old := self.top.raw("experimental")) and isinstance(old, Mapping):
            key = Table(self.reader, old, ("experimental",))
            seconds = key.duration_s("kill_timeout", bare_unit_s=1.0)
        if seconds is None:
            return 5.0
        if seconds > MAX_KILL_TIMEOUT_S:
            key.warn(
                "kill_timeout", f"over the {MAX_KILL_TIMEOUT_S:g} s that Fly allows; {MAX_KILL_TIMEOUT_S:g} s is taken"
            )
        return min(seconds, MAX_KILL_TIMEOUT_S)

    def _env(self) -> dict[str, str]:
        env: dict[str, str] = {}
        for table in self.top.tables("env"):
            for name, value in table.scalars():
                if is_env_name(table, name):
                    env[name] = value
        return env

    def _experimental(self) -> Experimental:
        table = self.top.table("experimental")
        if table is None:
            return Experimental()
        return Experimental(
            cmd=read_command(table, "cmd"),
            entrypoint=read_command(table, "entrypoint"),
            exec=read_command(table, "exec"),
            auto_rollback=table.flag("auto_rollback") if "auto_rollback" in table else None,
            enable_consul=table.flag("enable_consul"),
            enable_etcd=table.flag("enable_etcd"),
            lazy_load_images=table.flag("lazy_load_images"),
            machine_config=table.text("machine_config"),
        )

    # --- services

    def _services(self) -> tuple[Service, ...]:
        services = []
        seen: list[tuple[str, Port, KeyPath]] = []
        http = self.top.table("http_service")
        if http is not None:
            services.append(self._http_service(http))
            self._note_ports(services[-1], [http.path, http.path], seen)
        for table in self.top.tables("services"):
            service, paths = self._service(table)
            services.append(service)
            self._note_ports(service, paths, seen)
        return tuple(services)

    def _http_service(self, table: Table) -> Service:
        """Expand to the service that it stands for: http on 80, http and tls on 443."""
        if self.processes and not table.texts("processes"):
            table.warn("processes", f"no process group is named; {self.default!r} is taken. Fly refuses to deploy this")
        options = self._port_options(table)
        plain = Port(80, 80, ("http",), force_https=table.flag("force_https"), **_without_tls(options))
        tls = Port(443, 443, ("http", "tls"), **options)
        return self._service_of(table, "tcp", (plain, tls), self._checks(table, "checks", "http"))

    def _service(self, table: Table) -> tuple[Service, list[KeyPath]]:
        if self.processes and not table.texts("processes"):
            table.error("processes", "expected the process groups of this service, since there are [processes]")
        protocol = table.text("protocol", choices=("tcp", "udp")) or "tcp"
        ports: list[Port] = []
        paths: list[KeyPath] = []
        for one in table.tables("ports"):
            for port in self._ports(one, protocol):
                ports.append(port)
                paths.append(one.path)
        if not ports and not table.values.get("ports"):
            table.warn("ports", "no public port: nothing reaches this service from outside")
        tcp, http = self._checks(table, "tcp_checks", "tcp"), self._checks(table, "http_checks", "http")
        service = self._service_of(table, protocol, tuple(ports), tcp + http)
        if protocol == "udp":
            self._check_udp(table, service)
        return service, paths

    def _service_of(self, table: Table, protocol: str, ports: tuple[Port, ...], checks: tuple[Check, ...]) -> Service:
        kind, soft, hard = self._concurrency(table)
        autostop, autostart = self._autostop(table), table.flag("auto_start_machines", True)
        if autostop is not Autostop.OFF and not autostart:
            table.warn("auto_start_machines", "machines that stopped for want of load are never started again")
        self.machine_checks += self._machine_checks(table)
        return Service(
            protocol=protocol,
            internal_port=table.integer("internal_port", 1, 65535, numeric_string=True) or 8080,
            ports=ports,
            processes=self._groups_of(table),
            autostop=autostop,
            autostart=autostart,
            min_machines_running=table.integer("min_machines_running", 0, 1_000_000) or 0,
            concurrency_type=kind,
            soft_limit=soft,
            hard_limit=hard,
            checks=checks,
        )

    def _autostop(self, table: Table) -> Autostop:
        value = table.raw("auto_stop_machines")
        if isinstance(value, bool):
            return Autostop.STOP if value else Autostop.OFF
        text = table.text("auto_stop_machines", choices=[one.value for one in Autostop])
        return Autostop(text) if text else Autostop.OFF

    def _concurrency(self, table: Table) -> tuple[ConcurrencyType, int, int | None]:
        value = table.raw("concurrency")
        if isinstance(value, str):  # the old form
            found = re.fullmatch(r"\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*", value)
            if found is None:
                table.error("concurrency", 'expected a table, or "SOFT,HARD" as in old files')
                return ConcurrencyType.CONNECTIONS, 20, None
            soft, hard = int(found[1]), int(found[2])
            if 0 < hard < soft:
                table.warn("concurrency", f"the soft limit is above the hard limit {hard} and never reached")
            return ConcurrencyType.REQUESTS, soft or 20, hard or None
        below = table.table("concurrency")
        if below is None:
            return ConcurrencyType.CONNECTIONS, 20, None
        hard_limit = below.integer("hard_limit", 0, 1_000_000_000) or None
        soft_limit = below.integer("soft_limit", 0, 1_000_000_000) or min(20, hard_limit or 20)
        if hard_limit is not None and soft_limit > hard_limit:
            below.warn("soft_limit", f"is above the hard limit {hard_limit} and never reached")
        return self._concurrency_type(below), soft_limit, hard_limit

    def _concurrency_type(self, table: Table) -> ConcurrencyType:
        text = table.text("type")
        known = [one.value for one in ConcurrencyType]
        if text is None or text in known:
            return ConcurrencyType(text or ConcurrencyType.CONNECTIONS)
        table.warn("type", 'expected "connections" or "requests"; "connections" is taken', suggest(text, known))
        return ConcurrencyType.CONNECTIONS

    # --- ports

    def _ports(self, table: Table, protocol: str) -> list[Port]:
        """The ports of one section: a single one, a range, or both."""
        handlers = self._handlers(table)
        force_https = table.flag("force_https")
        if force_https and "http" not in handlers:
            table.warn("force_https", "only for ports with the http handler; it is ignored. Fly refuses to deploy this")
            force_https = False
        if protocol == "udp" and handlers:
            table.error("handlers", "a udp service has no handlers")
        version = "v1"
        if (proxy := table.table("proxy_proto_options")) is not None:
            version = proxy.text("version", choices=("v1", "v2")) or "v1"
        options = self._port_options(table)
        spans = self._spans(table)
        return [
            Port(low, high, handlers, force_https=force_https, proxy_proto_version=version, **options)
            for low, high in spans
        ]

    def _handlers(self, table: Table) -> tuple[str, ...]:
        known = ("http", "tls", "pg_tls", "proxy_proto")
        handlers = []
        for name in table.texts("handlers"):
            if name == "edge_http":  # an old name
                name = "http"
            if name not in known:
                expected = f"{name!r} is not a handler ({', '.join(known)}); it is ignored"
                table.warn("handlers", expected, suggest(name, known))
            elif name not in handlers:
                handlers.append(name)
        return tuple(handlers)

    def _spans(self, table: Table) -> list[tuple[int, int]]:
        spans = []
        port = table.integer("port", 1, 65535, numeric_string=True)
        if port is not None:
            spans.append((port, port))
        if "start_port" in table or "end_port" in table:
            low = table.integer("start_port", 0, 65535, numeric_string=True) or 1
            high = table.integer("end_port", 1, 65535, numeric_string=True) or 65535
            if low > high:
                table.error("start_port", f"is above end_port {high}")
            else:
                spans.append((low, high))
        if not spans and "port" not in table and "start_port" not in table and "end_port" not in table:
            table.error("port", "expected a port in 1-65535, or start_port and end_port")
        return spans

    def _port_options(self, table: Table) -> _PortOptions:
        options = _PortOptions()
        if (tls := table.table("tls_options")) is not None:
            options["alpn"] = tls.texts("alpn")
            options["tls_versions"] = self._tls_versions(tls)
            options["default_self_signed"] = tls.flag("default_self_signed")
        if (http := table.table("http_options")) is not None:
            options["idle_timeout_s"] = float(http.integer("idle_timeout", 0, 2**32 - 1) or 0) or None
            options["headers_read_timeout_s"] = float(http.integer("headers_read_timeout", 0, 2**32 - 1) or 0) or None
            options["h2_backend"] = http.flag("h2_backend")
            options["compress"] = http.flag("compress")
            if (response := http.table("response")) is not None:
                options["pristine"] = response.flag("pristine")
                options["response_headers"] = self._response_headers(response)
            rules = [self._replay_cache(one) for one in http.tables("replay_cache")]
            options["replay_cache"] = tuple(rule for rule in rules if rule is not None)
        return options

    def _tls_versions(self, table: Table) -> tuple[str, ...]:
        known = ("TLSv1.2", "TLSv1.3")
        versions = []
        for name in table.texts("versions"):
            if name in known:
                versions.append(name)
            else:
                table.error("versions", f'{name!r} is not "TLSv1.2" or "TLSv1.3"', suggest(name, known))
        return tuple(versions)

    def _response_headers(self, response: Table) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
        table = response.table("headers")
        if table is None:
            return ()
        headers: list[tuple[str, tuple[str, ...] | None]] = []
        for name, value in table.values.items():
            if not _HEADER_NAME.fullmatch(name):
                self.reader.error(table.at(name), value, "not a header name")
                continue
            if value is False:
                headers.append((name, None))
                continue
            texts = [scalar_text(one) for one in value] if isinstance(value, list) else [scalar_text(value)]
            lines = tuple(one.strip(" \t") for one in texts if one is not None and _HEADER_VALUE.fullmatch(one))
            if len(lines) < len(texts) or value is True:
                self.reader.error(
                    table.at(name), value, "expected false, a string or an array of strings, each one line"
                )
            else:
                headers.append((name, lines))
        return tuple(headers)

    def _replay_cache(self, table: Table) -> ReplayCacheRule | None:
        """A rule, or None with a warning: a cache left out costs time only, one read wrong leads requests astray."""
        prefix, kind, name = (
            table.text("path_prefix"),
            table.text("type", choices=("cookie", "header")),
            table.text("name"),
        )
        if prefix is None or not _CACHE_PREFIX.fullmatch(prefix):
            table.warn("path_prefix", 'expected the path prefix whose replays are cached, such as "/" or "host/path"')
            prefix = None
        if kind is None and "type" not in table:
            table.warn("type", 'expected "cookie" or "header"')
        if name is None or not _HEADER_NAME.fullmatch(name):
            table.warn("name", "expected the name of the cookie or header that tells sessions apart")
            name = None
        seconds = table.integer("ttl_seconds", 0, 2**32 - 1)
        if seconds is None or seconds < 10:
            table.warn("ttl_seconds", "expected at least 10; 10 is taken")
        may_bypass = table.flag("allow_bypass")
        if prefix is None or kind is None or name is None:
            return None
        return ReplayCacheRule(prefix, max(10, seconds or 0), kind, name, may_bypass)

    def _note_ports(self, service: Service, paths: list[KeyPath], seen: list[tuple[str, Port, KeyPath]]) -> None:
        """Warn of a public port that an earlier port of the same protocol already has: the first is served."""
        for port, path in zip(service.ports, paths, strict=True):
            for protocol, earlier, owner in seen:
                if protocol == service.protocol and earlier.start <= port.end and port.start <= earlier.end:
                    number = max(earlier.start, port.start)
                    expected = f"public port {number} is given twice; the first, in {render_path(owner)}, is served"
                    self.reader.warn((*path, "port"), number, expected)
                    break
            seen.append((service.protocol, port, path))

    def _check_udp(self, table: Table, service: Service) -> None:
        for port in service.ports:
            if port.start == port.end != service.internal_port:
                table.warn(
                    "internal_port", f"of a udp service is the public port {port.start} too: ports are not translated"
                )

    # --- checks

    def _checks(self, table: Table, key: str, kind: str) -> tuple[Check, ...]:
        return tuple(self._check(one, kind, low_s=1.0, high_s=60.0) for one in table.tables(key))

    def _check(self, table: Table, kind: str, *, low_s: float, high_s: float, interval_high_s: float = 60.0) -> Check:
        """One check, its times within Fly's limits; bare numbers are milliseconds."""
        interval = table.duration_s("interval", bare_unit_s=1e-3)
        timeout = table.duration_s("timeout", bare_unit_s=1e-3)
        grace = table.duration_s("grace_period", bare_unit_s=1e-3)
        table.integer("restart_limit", 0, 1_000_000)
        interval_s = 15.0 if interval is None else min(max(interval, low_s), interval_high_s)
        timeout_s = 2.0 if timeout is None else min(max(timeout, min(low_s, 1.0)), high_s)
        grace_s = 1.0 if grace is None else grace
        if kind == "tcp":
            return Check("tcp", interval_s, timeout_s, grace_s)
        return Check(
            type="http",
            interval_s=interval_s,
            timeout_s=timeout_s,
            grace_period_s=grace_s,
            method=(table.text("method") or "GET").upper(),
            path=table.text("path") or "/",
            protocol=table.text("protocol", choices=("http", "https")) or "http",
            tls_skip_verify=table.flag("tls_skip_verify"),
            tls_server_name=table.text("tls_server_name"),
            headers=self._check_headers(table),
        )

    def _check_headers(self, table: Table) -> tuple[tuple[str, str], ...]:
        """A map, or the old array of {name, value}."""
        value = table.raw("headers")
        if not isinstance(value, list):
            below = table.table("headers")
            return () if below is None else tuple(below.scalars())
        headers = []
        for one in table.tables("headers"):
            if "name" not in one:
                headers += list(one.scalars())
            elif name := one.text("name"):
                headers.append((name, scalar_text(one.values.get("value")) or ""))
        return tuple(headers)

    def _named_checks(self) -> tuple[NamedCheck, ...]:
        checks = []
        for name, table in self.top.entries("checks"):
            kind = table.text("type", choices=("tcp", "http"))
            if "type" not in table:
                table.error("type", 'expected "tcp" or "http"')
            port = table.integer("port", 1, 65535, numeric_string=True)
            if port is None and "port" not in table and "http_service" not in self.top:
                table.error("port", "expected the port to check, since there is no [http_service] to take it from")
            check = self._check(table, kind or "tcp", low_s=2.0, high_s=60.0, interval_high_s=86400.0)
            checks.append(NamedCheck(name, check, port, self._groups_of(table)))
        return tuple(checks)

    def _machine_checks(self, table: Table) -> tuple[MachineCheck, ...]:
        checks = []
        for one in table.tables("machine_checks"):
            command = read_command(one, "command")
            if not command and "command" not in one:
                one.warn("command", "expected the command that tests a machine")
            checks.append(
                MachineCheck(
                    command=command,
                    entrypoint=read_command(one, "entrypoint"),
                    image=one.text("image"),
                    kill_signal=_kill_signal(one),
                    kill_timeout_s=one.duration_s("kill_timeout", bare_unit_s=1.0),
                )
            )
        return tuple(checks)

    # --- what machines have

    def _mounts(self) -> tuple[Volume, ...]:
        mounts = []
        taken: dict[str, str] = {}
        for table in (one for name in ("mounts", "mount") for one in self.top.tables(name)):
            volume = self._mount(table)
            if volume is None:
                continue
            mounts.append(volume)
            for group in volume.processes:
                if group in taken:
                    table.error("processes", f"group {group!r} has the mount {taken[group]!r} already; a group has one")
                taken.setdefault(group, volume.source)
        return tuple(mounts)

    def _mount(self, table: Table) -> Volume | None:
        source, destination = table.text("source"), table.text("destination")
        size = table.size_bytes("initial_size", bare_unit_bytes=GB)
        if size is not None and size < GB:
            table.error("initial_size", 'expected "1gb" or more')
        groups = self._groups_of(table)
        retention = table.integer("snapshot_retention", 1, 60)
        scheduled = table.flag("scheduled_snapshots") if "scheduled_snapshots" in table else None
        table.integer("auto_extend_size_threshold", 0, 99)
        table.size_bytes("auto_extend_size_increment", bare_unit_bytes=GB)
        table.size_bytes("auto_extend_size_limit", bare_unit_bytes=GB)
        if not self._check_mount(table, source, destination) or source is None or destination is None:
            return None
        inside = "/" + "/".join(one for one in destination.split("/") if one not in ("", "."))
        return Volume(source, inside, groups, size, retention, scheduled)

    def _check_mount(self, table: Table, source: str | None, destination: str | None) -> bool:
        # the source names a folder of ours: nothing in it may lead elsewhere
        is_valid = bool(source and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,62}", source))
        if not is_valid and ("source" not in table or source is not None):
            table.error("source", "expected the volume's name: letters, digits and _")
        elif source and not re.fullmatch(r"[a-z0-9_]{1,30}", source):
            table.warn("source", "Fly's volume names have lower case letters, digits and _ only, 30 at most")
        parts = (destination or "").split("/")
        if not destination or "\0" in destination or ".." in parts or not any(one not in ("", ".") for one in parts):
            if "destination" not in table or destination is not None:
                table.error("destination", "expected an absolute path other than /")
            return False
        if not destination.startswith("/"):
            table.warn("destination", f"is not an absolute path; /{destination} is taken")
        return is_valid

    def _restarts(self) -> tuple[Restart, ...]:
        names = {
            "always": RestartPolicy.ALWAYS, "never": RestartPolicy.NO, "no": RestartPolicy.NO,
            "on-failure": RestartPolicy.ON_FAILURE, "on-fail": RestartPolicy.ON_FAILURE,
        }  # fmt: skip
        restarts = []
        for table in self.top.tables("restart"):
            text = table.text("policy", choices=tuple(names))
            retries = table.integer("retries", 0, 1_000_000)
            policy = names[text] if text else RestartPolicy.ON_FAILURE
            restarts.append(Restart(policy, 10 if retries is None else retries, self._groups_of(table)))
        return tuple(restarts)

    def _vm(self, table: Table) -> Vm:
        memory = table.size_bytes("memory", bare_unit_bytes=MB)
        megabytes = table.size_bytes("memory_mb", bare_unit_bytes=MB)
        groups = table.texts("processes")
        if groups:
            self._groups_of(table)
        table.text("persist_rootfs", choices=("never", "restart", "always"))
        return Vm(
            size=table.text("size"),
            memory_bytes=megabytes if memory is None else memory,
            cpus=table.integer("cpus", 1, 1024),
            cpu_kind=table.text("cpu_kind"),
            gpus=table.integer("gpus", 0, 1024),
            gpu_kind=table.text("gpu_kind"),
            kernel_args=table.texts("kernel_args"),
            host_dedication_id=table.text("host_dedication_id"),
            persist_rootfs=table.text("persist_rootfs"),
            processes=groups,
        )

    def _metrics(self) -> tuple[Metrics, ...]:
        found = []
        for table in (one for name in ("metrics", "metric") for one in self.top.tables(name)):
            port = table.integer("port", 1, 65535, numeric_string=True)
            if port is None and "port" not in table:
                table.warn("port", "expected the port of the metrics")
            if port is not None:
                path = table.text("path") or "/metrics"
                found.append(Metrics(port, path, table.flag("https"), self._groups_of(table)))
        old = self.top.raw("experimental")
        if not found and isinstance(old, Mapping):
            table = Table(self.reader, old, ("experimental",))
            port = table.integer("metrics_port", 1, 65535, numeric_string=True)
            if port is not None:
                found.append(Metrics(port, table.text("metrics_path") or "/metrics", False, (self.default,)))
        return tuple(found)

    def _statics(self) -> tuple[StaticFiles, ...]:
        found: list[StaticFiles] = []
        for table in self.top.tables("statics"):
            guest_path, prefix = table.text("guest_path"), table.text("url_prefix")
            if guest_path is None or prefix is None:
                table.warn("guest_path" if guest_path is None else "url_prefix", "expected guest_path and url_prefix")
                continue
            if prefix in (one.url_prefix for one in found):
                table.warn("url_prefix", "is given twice; the first is served")
            bucket, index = table.text("tigris_bucket"), table.text("index_document")
            found.append(StaticFiles(guest_path, prefix, bucket, index))
        if len(found) > 10:
            self.reader.warn(("statics", 10), len(found), "at most 10 [[statics]]")
        return tuple(found)

    def _files(self) -> tuple[GuestFile, ...]:
        found = []
        for table in self.top.tables("files"):
            guest_path = table.text("guest_path")
            raw, local, secret = table.text("raw_value"), table.text("local_path"), table.text("secret_name")
            if guest_path is None:
                table.warn("guest_path", "expected the path of the file inside the machine")
                continue
            if sum(one is not None for one in (raw, local, secret)) != 1:
                table.warn("guest_path", "expected exactly one of raw_value, local_path, secret_name")
            if raw is not None and not _is_base64(raw):
                table.warn("raw_value", "expected base64")
            found.append(GuestFile(guest_path, raw, local, secret, self._groups_of(table)))
        return tuple(found)

    # --- build and deploy

    def _build(self) -> Build:
        table = self.top.table("build")
        if table is None:
            return Build()
        compose = table.table("compose")
        build = Build(
            image=table.text("image"),
            dockerfile=table.text("dockerfile"),
            ignorefile=table.text("ignorefile"),
            target=table.text("build-target") or table.text("build_target"),
            builder=table.text("builder"),
            buildpacks=table.texts("buildpacks"),
            builtin=table.text("builtin"),
            settings=dict(settings.scalars()) if (settings := table.table("settings")) else {},
            args=dict(args.scalars()) if (args := table.table("args")) else {},
            compression=table.text("compression", choices=("gzip", "zstd")),
            compression_level=table.integer("compression_level", 0, 100),
            compose=compose is not None,
            compose_file=compose.text("file") if compose else None,
        )
        methods = [key for key in ("image", "dockerfile", "builder", "builtin") if key in table]
        if len(methods) > 1:
            table.warn(methods[1], f"more than one way to build ({', '.join(methods)}); Fly takes one")
        return build

    def _deploy(self) -> Deploy:
        table = self.top.table("deploy")
        if table is None:
            return Deploy()
        strategy = table.text("strategy")
        known = ("rolling", "immediate", "canary", "bluegreen")
        if strategy is not None and strategy not in known:
            table.warn("strategy", f"expected one of {', '.join(known)}", suggest(strategy, known))
            strategy = None
        unavailable = table.number("max_unavailable", 0, 1_000_000)
        wait = table.duration_s("wait_timeout", bare_unit_s=1.0)
        release = table.duration_s("release_command_timeout", bare_unit_s=1.0)
        vm = table.table("release_command_vm")
        return Deploy(
            strategy=strategy or "rolling",
            max_unavailable=0.33 if unavailable is None else unavailable,
            wait_timeout_s=300.0 if wait is None else wait,
            release_command=table.text("release_command"),
            release_command_timeout_s=300.0 if release is None else release,
            release_command_vm=self._vm(vm) if vm else None,
            seed_command=table.text("seed_command"),
        )


class _PortOptions(TypedDict, total=False):
    """Arguments of Port that http_service and [[services.ports]] have in common."""

    alpn: tuple[str, ...]
    tls_versions: tuple[str, ...]
    default_self_signed: bool
    idle_timeout_s: float | None
    headers_read_timeout_s: float | None
    h2_backend: bool
    compress: bool
    pristine: bool
    replay_cache: tuple[ReplayCacheRule, ...]
    response_headers: tuple[tuple[str, tuple[str, ...] | None], ...]


_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_CACHE_PREFIX = re.compile(
    r"[A-Za-z0-9.-]*/(?:[!\"$-)+-.0->@-~]+/)*(?:[!\"$-)+-.0->@-~]+|\*)?"
)  # [host]/path or [host]/path/*
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")


def read_command(table: Table, key: str) -> tuple[str, ...]:
    """A command: an array of words, or a string that is split as a shell would; no shell runs it."""
    value = table.raw(key)
    if isinstance(value, str):
        try:
            words = tuple(shlex.split(value))
        except ValueError as error:
            table.error(key, f"expected a command that can be split into words ({str(error).lower()})")
            return ()
    else:
        words = table.texts(key)
    if any("\0" in word for word in words):
        table.error(key, "a command has no NUL character")
        return ()
    return words


def is_env_name(table: Table, name: str) -> bool:
    """Whether a name may stand in an environment; writes a fault if not."""
    if not name or "=" in name or "\0" in name:
        table.reader.error(table.at(name), "", "not a name for an environment variable")
        return False
    if name.startswith("FLY_"):
        table.reader.error(table.at(name), "", "names that begin with FLY_ are set by the platform only")
        return False
    if "\0" in str(table.values.get(name)):
        table.reader.error(table.at(name), "", "a value in the environment has no NUL character")
        return False
    return True


def _preset_mb(size: str) -> int:
    """Memory of a named size: 256 MB a shared CPU, 2 GB a performance CPU (spec: machine sizes)."""
    found = re.fullmatch(r"(shared-cpu|performance)-([0-9]{1,2})x", size)
    return int(found[2]) * (256 if found[1] == "shared-cpu" else 2048) if found else 256


def _kill_signal(table: Table) -> KillSignal | None:
    known = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGSTOP")
    name = table.text("kill_signal", choices=known) if table.raw("kill_signal") != "" else None
    return KillSignal(name, int(signal.Signals[name])) if name else None


def _without_tls(options: _PortOptions) -> _PortOptions:
    plain = options.copy()
    plain.pop("alpn", None)
    plain.pop("tls_versions", None)
    plain.pop("default_self_signed", None)
    return plain


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _value_at(document: object, path: KeyPath) -> object:
    for part in path:
        if isinstance(document, Mapping) or (isinstance(document, list) and isinstance(part, int)):
            document = document[part]  # type: ignore[index]  # the path was found by walking this very document
    return document

"""`wakefront check`: what config.toml and its fly.toml files come to, and everything that is wrong with them.

`report` and `report_fly_toml` give the normalised form that `--json` prints; `render` draws the same for people. Beside
what the files say, this host is asked whether it permits what they ask for.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from proxy.cli.failure import USAGE
from proxy.cli.output import print_json
from proxy.config import AppConfig, ClusterSection, LoadResult, NodeConfig, load, load_fly_toml
from proxy.decide.autostop import WarmHours
from proxy.machines import volumes
from proxy.machines.driver import DriverError, Mount
from proxy.model import AccessRules, AppLimits, WakeRules
from proxy.wire.fly_keys import KeyClass, KeyUse
from proxy.wire.fly_toml import FlyToml, KillSignal
from proxy.wire.toml_table import Fault, Severity

if TYPE_CHECKING:
    from rich.console import Console

Report = dict[str, Any]  # JSON, so anything


def run_check(config: str | os.PathLike[str] | None, fly_tomls: Sequence[str | os.PathLike[str]], as_json: bool) -> int:
    """Check a config.toml, or fly.toml files by themselves, or both; print it. 0, or USAGE if there is an error."""
    node = report(load(config)) if config is not None else None
    files = [report_fly_toml(path) for path in fly_tomls]
    if as_json:
        print_json({**(node or {}), **({"fly_tomls": files, "summary": _count(files)} if files else {})})
    else:
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
        if node is not None:
            render(node, console)
        if files:
            render_fly_tomls(files, console)
    return 0 if all(one["ok"] for one in (node, *files) if one is not None) else USAGE


def report(result: LoadResult) -> Report:
    """The normalised form of a node's configuration and all its faults. Values of [apps.env] are not repeated."""
    config = result.draft
    faults = (*result.faults, *(_host_faults(config) if config is not None else ()))
    path = config.path if config is not None else result.faults[0].file
    node: Report = {"config": path, "ok": not any(one.severity is Severity.ERROR for one in faults)}
    if config is not None:
        node |= {
            "node": plain(config.node),
            "listen": {
                "public": plain(config.listen.public),
                "admin": _address(config.listen.admin_host, config.listen.admin_port),
            }
            | ({"backhaul": _address(backhaul.host, backhaul.port)} if (backhaul := config.listen.backhaul) else {}),
            "regions": plain(config.regions),
            "peers": plain(config.peers),
            "cluster": _cluster(config.cluster),
            "certs": plain(config.certs),
            "log": plain(config.log),
            "limits": plain(config.limits),
            "apps": [_app(app) for app in config.apps],
            "keys": _keys(config.keys),
        }
    return node | {"faults": [_fault(one) for one in faults]}


def _cluster(cluster: ClusterSection | None) -> Report | None:
    """The engine that nodes share; what is in front of a URL's host may be a password, and is left out."""
    if cluster is None:
        return None
    hidden = tuple(re.sub(r"//[^/@]*@", "//", one) for one in cluster.urls)
    report: Report = plain(dataclasses.replace(cluster, urls=hidden))
    return report


def report_fly_toml(path: str | os.PathLike[str]) -> Report:
    """The normalised form of one fly.toml by itself and all its faults."""
    result, faults = load_fly_toml(path)
    found: Report = {"file": os.fspath(path), "ok": not any(one.severity is Severity.ERROR for one in faults)}
    if result is not None:
        found |= {**normalised(result.app), "keys": _keys(result.keys)}
    return found | {"faults": [_fault(one) for one in faults]}


def normalised(fly: FlyToml) -> Report:
    """A fly.toml with old forms, aliases and defaults resolved; what is absent or empty is left out."""
    whole: Report = plain(fly)
    whole["kill_timeout_s"] = fly.kill_timeout_s
    whole["groups"] = list(fly.groups)
    whole["default_group"] = fly.default_group
    for section, default in (("build", FlyToml().build), ("deploy", FlyToml().deploy)):
        if getattr(fly, section) == default:
            whole.pop(section, None)
    if not any(plain(fly.experimental).values()):
        whole.pop("experimental", None)
    return whole


def plain(value: object) -> Any:
    """Objects as JSON has them; fields that are None or empty are left out."""
    if isinstance(value, KillSignal):
        return value.name
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: plain(one) for name, one in fields.items() if one is not None and one not in ((), {}, [])}
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return value


def whole(value: AccessRules | WakeRules) -> Report:
    """Rules with every field, set or not."""
    return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _warm(hours: WarmHours) -> str:
    """Warm hours as they are written in config.toml, the days in full."""
    days = ",".join(_DAYS[day] for day in hours.days)
    begin, end = (f"{minute // 60:02}:{minute % 60:02}" for minute in (hours.begin, hours.end))
    return f"{days} {begin}-{end} {hours.zone}"


_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _app(app: AppConfig) -> Report:
    fly = normalised(app.fly)
    for name in ("app", "processes", "groups", "mounts", "restarts", "env"):
        fly.pop(name, None)
    return {
        "name": app.name,
        "hostnames": list(app.hostnames),
        "driver": app.driver,
        "fly_toml": app.fly_toml_path,
        "cwd": app.cwd,
        "user": app.user,
        "network": app.network,
        "env": sorted(name for name, _ in app.env),
        "wake_on": app.wake_on.value,
        "wake_timeout_s": app.wake_timeout_s,
        "idle_timeout_s": app.idle_timeout_s,
        "limits": plain(app.limits),
        "balance": app.balance.value,
        "sticky": plain(app.sticky) if app.sticky is not None else None,
        "access": whole(app.access),
        "wake_rules": whole(app.wake_rules),
        "organization": app.organization,
        "replay_sources": list(app.replay_sources),
        "keep_bodies": app.keep_bodies,
        "autostop": {
            "interval_s": app.autostop_interval_s,
            "at_once": app.autostop_at_once,
            "busy": app.busy,
            "warm_hours": [_warm(one) for one in app.warm_hours],
        },
        "restart_on_failing_checks_s": app.restart_on_failing_checks_s,
        "groups": [plain(group) for group in app.groups],
        "machines": plain(app.machines),
        **fly,
        "keys": _keys(app.keys),
    }


def _keys(keys: Iterable[KeyUse]) -> Report:
    found: dict[KeyClass, list[Any]] = {use: [] for use in KeyClass}
    for one in keys:
        if one.use is KeyClass.USED:
            found[one.use].append(one.key)
        elif one.use is KeyClass.KEPT:
            found[one.use].append({"key": one.key, "reason": one.reason})
        else:
            found[one.use].append({"key": one.key, "did_you_mean": one.did_you_mean})
    return {use.value: entries for use, entries in found.items()}


def _fault(fault: Fault) -> Report:
    return {
        "severity": fault.severity.value,
        "file": fault.file,
        "line": fault.line,
        "source": fault.source_line,
        "key": fault.key,
        "value": fault.value,
        "expectation": fault.expectation,
        "did_you_mean": fault.did_you_mean,
    }


def _host_faults(config: NodeConfig) -> list[Fault]:
    """What the configuration asks of this host that it does not give."""
    faults = []

    def warn(index: int, key: str, value: str, expectation: str) -> None:
        faults.append(Fault(("apps", index, key), value, expectation, Severity.WARNING, file=config.path))

    for index, app in enumerate(config.apps):
        if app.driver != "process":
            continue
        mounts = [
            Mount(app.cwd, "/" + one.destination.lstrip("/"), one.source)
            for group in app.groups
            for one in group.mounts
            if group.count
        ]
        for why in volumes.mount_support(mounts):
            names = ", ".join(dict.fromkeys(one.name for one in mounts))
            warn(index, "fly_toml", names, f"{app.name}: {why}; machines find each folder in FLY_VOLUME_<NAME>")
        if app.own_network and (why_not := volumes.network_support()) is not None:
            warn(index, "network", app.network, f"{app.name}: {why_not}")
        if app.user is not None:
            try:
                volumes.account(app.user)
            except DriverError as error:
                warn(index, "user", app.user, str(error))
    return faults


# --- for people


def _fleet(node: Report) -> str:
    peers, cluster = node["peers"], node["cluster"]
    engine = "none" if cluster is None else "embedded NATS" if cluster["embedded"] else ", ".join(cluster["urls"])
    return f"backhaul {node['listen']['backhaul']}, {_plural(len(peers), 'peer')}, cluster engine {engine}"


def render(node: Report, console: Console) -> None:
    """Draw a report of `report`: the node, each app, every fault, and the sum."""
    if "node" in node:
        about = node["node"]
        _put(console, f"{_path(node['config'])}", style="bold")
        _put(console, f"  node {about['name']}, region {about['region']}, admin http://{node['listen']['admin']}")
        public = node["listen"]["public"]
        bound = ", ".join(f"{one['public_port']} at {_address(one['host'], one['port'])}" for one in public)
        _put(console, f"  public ports {bound or 'none'}")
        if "backhaul" in node["listen"]:
            _put(console, f"  {_fleet(node)}")
        _render_keys(node["keys"], console, "  ")
    for app in node.get("apps", ()):
        _render_app(app, console)
    _render_faults(node["faults"], console)
    _render_sum(node["faults"], _plural(len(node.get("apps", ())), "app"), console)


def render_fly_tomls(files: Sequence[Report], console: Console) -> None:
    """Draw reports of bare fly.toml files: one in full, many in a line each with their faults."""
    for one in files:
        services = one.get("services", [])
        keys = one.get("keys", {})
        counted = ", ".join(f"{len(keys[use])} {use}" for use in keys)
        _put(
            console,
            f"{'good' if one['ok'] else 'BAD '}  {_path(one['file'])}: "
            f"{one.get('app') or 'no app name'}, {_plural(len(services), 'service')}, keys {counted or 'none'}",
            style="" if one["ok"] else "bold red",
        )
        if len(files) == 1:
            _render_services(services, console)
            _render_keys(keys, console, "    ")
        _render_faults(one["faults"], console)
    summary = _count(files)
    faults = [fault for one in files for fault in one["faults"]]
    said = f"{_plural(summary['files'], 'file')}, {summary['valid']} valid, {summary['invalid']} invalid"
    _render_sum(faults, said, console)


def _render_app(app: Report, console: Console) -> None:
    _put(console)
    _put(console, f"{app['name']}  {' '.join(app['hostnames'])}", style="bold")
    _put(console, f"    {'fly.toml':9} {_path(app['fly_toml']) if app['fly_toml'] else 'none'}, driver {app['driver']}")
    _render_services(app.get("services", []), console)
    for check in app.get("checks", ()):
        target = f"port {check['port']}" if "port" in check else "the service's port"
        _put(console, f"    {'check':9} {check['name']}: {_check(check['check'])} on {target}")
    for name, said in _settings(app):
        _put(console, f"    {name:9} {said}")
    for group in app["groups"]:
        if app["driver"] == "process":
            command = " ".join(group.get("command", ())) or "no command"
            _put(console, f"    {'machines':9} {group['count']} × {group['name']}: {command}")
        for mount in group.get("mounts", ()):
            _put(console, f"    {'volume':9} {mount['source']} at {mount['destination']} ({group['name']})")
    for machine in app["machines"]:
        _put(console, f"    {'machine':9} {machine['id']} at {_address(machine['host'], machine['port'])}")
    _render_keys(app["keys"], console, "    ")


def _settings(app: Report) -> Iterator[tuple[str, str]]:
    """A line for each of the app's settings that is not as it would be without config.toml."""
    limits, default = app["limits"], plain(AppLimits())
    if app["balance"] != "fly":
        yield "balance", app["balance"]
    has_hard_limit = any("hard_limit" in service for service in app.get("services", ()))
    if has_hard_limit or any(limits[key] != default[key] for key in ("queue_timeout_s", "max_queued")):
        queued = f"{_plural(limits['max_queued'], 'request')} a worker, each {limits['queue_timeout_s']:g} s at most"
        yield "queue", queued
    if app["sticky"] is not None:
        yield "sticky", f"cookie {app['sticky']['name']} for {app['sticky']['ttl_s']:g} s"
    if access := _access(app["access"]):
        yield "access", access
    if rules := _wake_rules(app["wake_rules"]):
        yield "wake", rules
    replay = [f"organization {app['organization']}"] if app["organization"] != "personal" else []
    replay += [f"from {', '.join(app['replay_sources'])} too"] if app["replay_sources"] else []
    for key, of in (("replay_memory_bytes", "in memory"), ("replay_spool_bytes", "in a file")):
        replay += [f"{limits[key]} bytes {of}"] if limits[key] != default[key] else []
    replay += ["bodies kept from the first request on"] if app["keep_bodies"] else []
    if replay:
        yield "replay", "; ".join(replay)
    if stops := _stops(app["autostop"]):
        yield "autostop", stops
    if app["restart_on_failing_checks_s"]:
        yield "restart", f"after {app['restart_on_failing_checks_s']:g} s of failing checks"


def _access(rules: Report) -> str:
    said = [f"{name} {_some(rules[name])}" for name in ("allow", "deny") if rules[name]]
    if (rate := rules["requests_per_s"]) is not None:
        said.append(f"{rate:g} requests a second, {rules['requests_burst']} at once")
    if (number := rules["connections"]) is not None:
        said.append(_plural(number, "connection"))
    if (rate := rules["handshakes_per_s"]) is not None:
        said.append(f"{rate:g} handshakes a second")
    if (size := rules["max_body_bytes"]) is not None:
        said.append(f"bodies of {size} bytes at most")
    return "; ".join(said)


def _wake_rules(rules: Report) -> str:
    kinds = ("paths", "methods", "agents", "sources")
    said = [f"not by {kind} {_some(rules[f'ignore_{kind}'])}" for kind in kinds if rules[f"ignore_{kind}"]]
    for key, of in (("starts_per_source_s", "one source"), ("starts_per_s", "all sources")):
        if (rate := rules[key]) is not None:
            said.append(f"{rate:g} starts a second by {of}")
    if rules["waiting_page"]:
        said.append("waiting page")
    return "; ".join(said)


def _stops(autostop: Report) -> str:
    said = [f"every {autostop['interval_s']:g} s"] if autostop["interval_s"] is not None else []
    said += [f"{autostop['at_once']} at once"] if autostop["at_once"] != 1 else []
    said += [f"unless {autostop['busy']} says busy"] if autostop["busy"] is not None else []
    said += [f"one is kept in {hours}" for hours in autostop["warm_hours"]]
    return "; ".join(said)


def _some(values: Sequence[str]) -> str:
    """A few values, and how many more there are."""
    more = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return ", ".join(values[:4]) + more


def _render_services(services: Iterable[Report], console: Console) -> None:
    for service in services:
        ports = ", ".join(_port(port) for port in service.get("ports", ())) or "no public port"
        limits = f"{service['concurrency_type']}, soft limit {service['soft_limit']}"
        if "hard_limit" in service:
            limits += f", hard limit {service['hard_limit']}"
        _put(
            console,
            f"    {'service':9} {service['protocol']} {ports} → {service['internal_port']} "
            f"({', '.join(service['processes'])})",
        )
        starts = "on" if service["autostart"] else "off"
        _put(
            console,
            f"    {'':9} {limits}; autostop {service['autostop']}, autostart {starts}, "
            f"at least {service['min_machines_running']} running",
        )
        for check in service.get("checks", ()):
            _put(console, f"    {'check':9} {_check(check)}")


def _port(port: Report) -> str:
    number = f"{port['start']}" if port["start"] == port["end"] else f"{port['start']}–{port['end']}"
    handlers = "+".join(port.get("handlers", ())) or "raw"
    return f"{number} {handlers}{' (to https)' if port['force_https'] else ''}"


def _check(check: Report) -> str:
    times = f"every {check['interval_s']:g} s, {check['timeout_s']:g} s to answer, after {check['grace_period_s']:g} s"
    if check["type"] == "tcp":
        return f"tcp {times}"
    return f"{check['protocol']} {check['method']} {check['path']} {times}"


def _render_keys(keys: Report, console: Console, indent: str) -> None:
    """How many keys are used; those without effect, gathered by reason; those nobody knows."""
    if not any(keys.get(use.value) for use in KeyClass):
        return
    counted = ", ".join(f"{len(keys[use.value])} {use.value}" for use in KeyClass)
    _put(console, f"{indent}{'keys':9} {counted}")
    reasons: dict[str, list[str]] = {}
    for one in keys["kept"]:
        reasons.setdefault(one["reason"], []).append(one["key"])
    for reason, names in reasons.items():
        _put(console, f"{indent}{'kept':9} {', '.join(_gathered(names))}: {reason}", style="dim")
    for one in keys["unknown"]:
        hint = f": did you mean {one['did_you_mean']}?" if one["did_you_mean"] else ""
        _put(console, f"{indent}{'unknown':9} {one['key']}{hint}", style="yellow")


def _gathered(keys: Iterable[str]) -> list[str]:
    """Keys of one section, when there are several, as `section.{one, other}`."""
    sections: dict[str, list[str]] = {}
    for key in keys:
        section, dot, name = key.rpartition(".")
        sections.setdefault(section + dot, []).append(name)
    return [
        f"{section}{{{', '.join(names)}}}"
        if section and len(names) > 1
        else ", ".join(section + name for name in names)
        for section, names in sections.items()
    ]


def _render_faults(faults: Iterable[Report], console: Console) -> None:
    for fault in faults:
        where = ":".join(str(part) for part in (_path(fault["file"]) if fault["file"] else "", fault["line"]) if part)
        key = f"{fault['key']}{' = ' if fault['key'] and fault['value'] else ''}{fault['value']}"
        hint = f" (did you mean {fault['did_you_mean']}?)" if fault["did_you_mean"] else ""
        colour = "bold red" if fault["severity"] == "error" else "yellow"
        _put(console, f"{fault['severity']}: {where}: {key or 'file'}", style=colour)
        if fault["source"]:
            _put(console, f"    | {fault['source']}", style="dim")
        _put(console, f"    {fault['expectation']}{hint}")


def _render_sum(faults: Sequence[Report], what: str, console: Console) -> None:
    errors = sum(one["severity"] == "error" for one in faults)
    said = f"{what}: {_plural(errors, 'error')}, {_plural(len(faults) - errors, 'warning')}"
    _put(console, said, style="bold red" if errors else "bold green")


def _put(console: Console, text: str = "", style: str = "") -> None:
    """One line; what comes from files may not control the terminal."""
    console.print("".join(one if one.isprintable() or one == "\n" else "\ufffd" for one in text), style=style)


def _count(files: Sequence[Report]) -> dict[str, int]:
    valid = sum(one["ok"] for one in files)
    return {"files": len(files), "valid": valid, "invalid": len(files) - valid}


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _path(path: str) -> str:
    """A path as seen from here, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path

"""`wakefront serve`: check the configuration, say where things will be, become the supervisor.

The process that the user started is the supervisor (exec, not a child): signals and the exit status are its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxy import compiled
from proxy.cli.failure import USAGE, CliError
from proxy.cli.node import config_path, is_file
from proxy.cli.output import print_json, say
from proxy.config import AppConfig, NodeConfig, load, plan
from proxy.model import Port
from proxy.process import ServePlan


def serve(config: Path | None, as_json: bool) -> None:
    """Never returns: ends in exec, or in CliError where the configuration is not good."""
    path = config_path(config)
    if not is_file(path):
        raise CliError(
            f"No config file at {path}: name one with --config FILE; README.md has a first one to copy.", USAGE
        )
    result = load(path)
    if result.config is None:
        from proxy.cli.check import run_check

        run_check(path, [], as_json)
        raise CliError(f"Not started: {path} has {_count(len(result.errors), 'fault')}, listed above.", USAGE)
    serve_plan = plan(result.config, path)
    if as_json:
        print_json(_facts(result.config, serve_plan))
    else:
        say(_announcement(result.config, serve_plan, path, len(result.warnings)))
    from proxy.supervisor import exec_supervisor

    exec_supervisor(serve_plan)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def urls(app: AppConfig, serve_plan: ServePlan) -> list[str]:
    """Where a browser on this host finds an app: each public port with an HTTP handler, as it is bound here."""
    found = []
    for service in app.services:
        for port in service.ports:
            if "http" in port.handlers:
                found += [_url(app.hostnames[0], port, one.public_port, one.port) for one in _bound(serve_plan, port)]
    return list(dict.fromkeys(found))


def _bound(serve_plan: ServePlan, port: Port) -> list[Any]:
    return [one for one in serve_plan.listen if port.start <= one.public_port <= port.end]


def _url(host: str, port: Port, public_port: int, bound_port: int) -> str:
    scheme, usual = ("https", 443) if "tls" in port.handlers else ("http", 80)
    return f"{scheme}://{host}{'' if bound_port == usual else f':{bound_port}'}/"


def _facts(config: NodeConfig, serve_plan: ServePlan) -> dict[str, Any]:
    return {
        "name": config.node.name,
        "region": config.node.region,
        "admin": _admin(config),
        "data_dir": config.node.data_dir,
        "workers": serve_plan.workers,
        "compiled": compiled.is_in_use,
        "apps": [{"name": app.name, "urls": urls(app, serve_plan)} for app in config.apps],
    }


def _admin(config: NodeConfig) -> str:
    host = config.listen.admin_host
    return f"[{host}]:{config.listen.admin_port}" if ":" in host else f"{host}:{config.listen.admin_port}"


def _announcement(config: NodeConfig, serve_plan: ServePlan, path: Path, warnings: int) -> str:
    lines = [
        f"wakefront: node {config.node.name}, region {config.node.region}, {_count(serve_plan.workers, 'worker')}",
        f"  admin   http://{_admin(config)}  (token in {config.node.data_dir}/admin.token)",
        f"  root    wakefront certs ca --config {path} > ca.pem",
    ]
    if not compiled.is_in_use:
        lines.append(f"  code    {compiled.describe()}")
    width = max((len(app.name) for app in config.apps), default=0)
    lines += [f"  app     {app.name:{width}}  {'  '.join(urls(app, serve_plan))}" for app in config.apps]
    if not config.apps:
        lines.append("  no apps yet: add an [[apps]] and `wakefront reload`")
    if warnings:
        lines.append(f"  {_count(warnings, 'warning')}: see `wakefront check --config {path}`")
    return "\n".join(lines)

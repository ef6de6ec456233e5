"""`wakefront bench coldstart`: how long an app of yours takes from its first byte asked to its first byte answered.

Each run stops (or suspends) the app's machines through the admin API, waits until that is so, and makes one real
request through the public listener. The client's phases are timed here, the node's come from its record of the wake;
they are put on one scale by Unix time, so the bench runs on the node's host.
"""

from __future__ import annotations

import http.client
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from proxy.cli.client import ca_pem, wait_for_state
from proxy.cli.failure import USAGE, CliError
from proxy.cli.node import Api, ApiError, FoundMachine, app_path, bound_ports, list_machines, machine_path, unknown_app
from proxy.cli.output import print_json, say, table
from proxy.cli.visit import Answer, Times, percentile, trusting, visit

_PHASES = {
    "connected": "TCP connected",
    "hello_sent": "ClientHello sent",
    "asked": "start asked for",
    "forked": "program started",
    "listening": "program listens",
    "answered": "machine announced",
    "handshake_done": "TLS handshake done",
    "request_sent": "request sent",
    "first_byte": "first byte",
}
_CLOCKS_DIFFER_MS = 1.0  # two readings of the Unix clock against the monotonic one, while it is being adjusted


@dataclass(frozen=True, slots=True)
class Target:
    """How to reach an app through its node's public listener."""

    address: tuple[str, int]
    host: str
    tls: ssl.SSLContext | None
    path: str


def coldstart(
    api: Api, app: str, runs: int, *, suspend: bool = False, path: str = "/", plain: bool = False, as_json: bool = False
) -> None:
    target = _target(api, app, path, plain)
    done: list[dict[str, Any]] = []
    with _progress(runs, f"waking {app}", as_json) as advance:
        for number in range(1, runs + 1):
            done.append({"id": number, **_run(api, app, target, suspend)})
            advance()
    summary = _summary([one["phases_ms"] for one in done])
    if as_json:
        print_json({"name": app, "from": "suspended" if suspend else "stopped", "runs": done, "phases": summary})
    else:
        _print(app, runs, suspend, summary, done)


def _print(app: str, runs: int, suspend: bool, summary: list[dict[str, Any]], done: list[dict[str, Any]]) -> None:
    state = "suspended" if suspend else "stopped"
    rows = [(one["label"], one["p50"], one["p90"], one["p99"], one["max"]) for one in summary]
    table(
        ("ms since the connect began", "p50", "p90", "p99", "max"),
        rows,
        title=f"{app}, {runs} first requests to a {state} machine",
    )
    if odd := sorted({one["status"] for one in done if not 200 <= one["status"] < 400}):
        say(f"Not every answer was a good one: status {', '.join(map(str, odd))}.")


def _target(api: Api, app: str, path: str, plain: bool) -> Target:
    try:
        facts = api.get(app_path(app))
    except ApiError as error:
        raise unknown_app(api, app) if error.status == 404 else error from None
    hostnames = facts.get("hostnames") or []
    if not hostnames:
        raise CliError(f"{app} has no hostname that a request could name.", USAGE)
    if not path.startswith("/"):
        raise CliError(f"--path {path} must begin with a slash.", USAGE)
    if not all("!" <= char <= "~" for char in path):
        raise CliError(f"--path {path!r} must be as it goes over the wire: ASCII, the rest percent-encoded.", USAGE)
    tls = None if plain else trusting(ca_pem(api))
    return Target(listen_address(api, 80 if plain else 443), str(hostnames[0]), tls, path)


def listen_address(api: Api, public_port: int) -> tuple[str, int]:
    """Where the node has bound a public port, by what its supervisor has written down; a wildcard means loopback."""
    data_dir = api.node.data_dir
    if data_dir is None:
        raise CliError("The bench runs where the node runs: name its config.toml with --config.", USAGE)
    for one in bound_ports(data_dir):
        if one["public_port"] == public_port:
            host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(one["host"], one["host"])
            return host, int(one["port"])
    raise CliError(f"The node listens on no address for port {public_port}: see [listen] in its config.toml.", USAGE)


def _run(api: Api, app: str, target: Target, suspend: bool) -> dict[str, Any]:
    machines = _put_to_sleep(api, app, "suspended" if suspend else "stopped")
    try:
        answer = visit(target.address, target.host, target.tls, path=target.path, timeout_s=90.0)
    except (OSError, http.client.HTTPException) as error:
        raise CliError(f"The request to {target.host} failed ({error}): see `wakefront logs {app}`.") from error
    if 500 <= answer.status < 600 and (code := answer.headers.get("wakefront-error")):
        raise CliError(f"{app} did not come up: {answer.status} with {code}; see `wakefront logs {app}`.")
    return {"status": answer.status, "phases_ms": _phases(api, app, machines, answer)}


def _put_to_sleep(api: Api, app: str, state: str) -> list[FoundMachine]:
    verb = {"stopped": "stop", "suspended": "suspend"}[state]
    found = [FoundMachine(app, str(one["id"]), str(one["state"]), one) for one in list_machines(api, app)]
    if not found:
        raise CliError(f"{app} has no machine here that could be started.")
    asleep = ("stopped", "created", "failed") if state == "stopped" else ("suspended",)
    for machine in found:
        if machine.state in asleep:
            continue
        if state == "suspended" and machine.state != "started":
            # only a running machine can be frozen
            api.post(f"{machine_path(app, machine.id)}/start")
            wait_for_state(api, machine, "started", 60.0)
        api.post(f"{machine_path(app, machine.id)}/{verb}")
        wait_for_state(api, machine, state, 60.0)
    return found


def _phases(api: Api, app: str, machines: list[FoundMachine], answer: Answer) -> dict[str, float]:
    phases = answer.times.ms()
    for machine in machines:
        phases |= wake_phases(api, app, machine.id, answer.times)
    return phases


def wake_phases(api: Api, app: str, machine: str, times: Times) -> dict[str, float]:
    """The node's phases of the machine's last wake in ms since `times.began`; empty if that wake was an earlier one."""
    try:
        wake = api.get(f"{machine_path(app, machine)}/wakes")
    except ApiError as error:
        if error.status == 404:
            return {}  # never woken
        raise
    if not wake:
        return {}
    asked_ms = (wake["asked_at"] - times.began_unix) * 1e3
    if asked_ms < -_CLOCKS_DIFFER_MS:
        return {}
    reached = {name: wake.get(name) for name in ("asked", "forked", "listening", "answered")}
    return {name: round(asked_ms + ms, 3) for name, ms in reached.items() if ms is not None}


def _summary(runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Each phase's percentiles over the runs that have it, in the order in which they happen."""
    summary = []
    for name, label in _PHASES.items():
        if values := [run[name] for run in runs if name in run]:
            shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
            figures = {key: percentile(values, share) for key, share in shares.items()}
            summary.append({"name": name, "label": label, "runs": len(values), **figures, "max": max(values)})
    return sorted(summary, key=lambda one: one["p50"])


@contextmanager
def _progress(total: int, text: str, quiet: bool) -> Iterator[Any]:
    """A bar on stderr where somebody watches; yields what to call after each run."""
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)

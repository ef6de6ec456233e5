"""Commands that ask a running node through its admin API, and how their answers look in a terminal.

Each takes the Api of the node it is about. JSON output is the node's own answer, lists as arrays of objects.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from proxy.cli.failure import CliError
from proxy.cli.node import (
    Api,
    ApiError,
    FoundMachine,
    app_path,
    find_machine,
    find_node,
    list_apps,
    list_machines,
    machine_path,
    unknown_app,
)
from proxy.cli.output import age, print_json, say, table, waiting

# The state in which each verb leaves a machine.
_TARGET = {"start": "started", "stop": "stopped", "suspend": "suspended", "restart": "started"}
_DONE = {"start": "started", "stop": "stopped", "suspend": "suspended", "restart": "restarted"}


def connect(config: Path | None, admin: str | None) -> Api:
    return Api(find_node(config, admin))


def status(api: Api, as_json: bool) -> None:
    answer = api.get("/v1/status")
    if as_json:
        print_json(answer)
        return
    facts = [f"{key} {answer[key]}" for key in ("name", "region", "version") if answer.get(key)]
    if isinstance(answer.get("uptime_s"), int | float):
        facts.append(f"up {age(answer['uptime_s'])}")
    say(" · ".join(facts) if facts else f"node at {api.node.address}")
    if workers := answer.get("workers"):
        say(f"workers: {_workers(workers)}")
    _app_table(list_apps(api), api)


def _workers(workers: Any) -> str:
    if not isinstance(workers, list):
        return str(workers)
    return ", ".join(f"{one.get('slot', '?')} (pid {one.get('pid', '?')})" for one in workers)


def apps(api: Api, as_json: bool) -> None:
    known = list_apps(api)
    if as_json:
        print_json(known)
        return
    if not known:
        say("This node has no apps: add an [[apps]] to its config.toml, then `wakefront reload`.")
        return
    _app_table(known, api)


def _app_table(known: list[dict[str, Any]], api: Api) -> None:
    rows = []
    for one in known:
        machines = list_machines(api, str(one["name"]))
        held = next((reason for machine in machines if (reason := _hold(machine))), "")
        rows.append((one["name"], _states(machines), ", ".join(one.get("hostnames", [])), held))
    columns = ("app", "machines", "names", "held back")
    width = 4 if any(row[3] for row in rows) else 3
    table(columns[:width], [row[:width] for row in rows])


def _states(machines: list[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for machine in machines:
        counts[str(machine.get("state"))] = counts.get(str(machine.get("state")), 0) + 1
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"


def _hold(machine: dict[str, Any]) -> str:
    """Why a machine is not started now, and for how long: set while its starts keep failing."""
    reason = machine.get("hold_reason")
    if not reason:
        return ""
    left = float(machine.get("hold_until") or 0) - time.time()
    return f"{reason} (next try in {max(1, round(left))} s)" if left > 0 else str(reason)


def machine_list(api: Api, app: str | None, as_json: bool) -> None:
    names = [app] if app is not None else [str(one["name"]) for one in list_apps(api)]
    found = [{"app": name, **machine} for name in names for machine in list_machines(api, name)]
    if as_json:
        print_json(found)
        return
    rows = [
        (one["id"], one["app"], one.get("state"), one.get("region"), _group(one), one.get("updated_at"), _hold(one))
        for one in found
    ]
    columns = ("id", "app", "state", "region", "group", "changed", "held back")
    width = 7 if any(row[6] for row in rows) else 6
    table(columns[:width], [row[:width] for row in rows])


def _group(machine: dict[str, Any]) -> str:
    metadata = (machine.get("config") or {}).get("metadata") or {}
    return str(machine.get("group") or metadata.get("fly_process_group") or "app")


def machine_status(api: Api, wanted: str, app: str | None, as_json: bool) -> None:
    found = find_machine(api, wanted, app)
    path = machine_path(found.app, found.id)
    machine, events, wakes = api.get(path), api.get(f"{path}/events"), _wakes(api, path)
    if as_json:
        print_json({"app": found.app, **machine, "events": events, "wakes": wakes})
        return
    say(f"{found.id} of {found.app}: {machine.get('state')} in {machine.get('region')}, group {_group(machine)}")
    if held := _hold(machine):
        say(f"held back: {held}")
    for name, value in (wakes or {}).items():
        if isinstance(value, int | float | str) and value != "":
            say(f"  last wake, {name.replace('_', ' ')}: {value}")
    table(("when", "event", "status", "by", "detail"), [_event_row(event) for event in events])


def _wakes(api: Api, path: str) -> dict[str, Any] | None:
    """The last wake's phases; None where the machine was never woken."""
    try:
        answer = api.get(f"{path}/wakes")
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    return answer if isinstance(answer, dict) else None


def _event_row(event: dict[str, Any]) -> tuple[object, ...]:
    stamp = event.get("timestamp")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp / 1000)) if isinstance(stamp, int | float) else ""
    ended = (event.get("request") or {}).get("exit_event") or {}
    detail = ""
    if ended:
        code, signal = ended.get("exit_code"), ended.get("signal")
        detail = f"signal {signal}" if signal else "exit code unknown" if code is None else f"exit code {code}"
    return (when, event.get("type"), event.get("status"), event.get("source"), detail)


def machine_act(api: Api, verb: str, wanted: str, app: str | None, wait_s: float, as_json: bool) -> None:
    found = find_machine(api, wanted, app)
    path = machine_path(found.app, found.id)
    began = time.monotonic()
    with waiting(f"{verb} {found.app}/{found.id}", quiet=as_json):
        try:
            api.post(f"{path}/{verb}", timeout_s=max(wait_s, 1.0) + 30.0)
            if wait_s > 0:
                wait_for_state(api, found, _TARGET[verb], wait_s)
        except ApiError as error:
            raise _act_failed(error, verb, found, wait_s) from None
    now = api.get(path)
    if as_json:
        print_json({"app": found.app, "id": found.id, "previous_state": found.state, "state": now.get("state")})
        return
    took = (time.monotonic() - began) * 1e3
    done = f"{_DONE[verb]} (was {found.state}, {took:.0f} ms)" if wait_s > 0 else f"asked to {verb}"
    say(f"{found.app}/{found.id}: {done}")


def wait_for_state(api: Api, machine: FoundMachine, state: str, wait_s: float) -> None:
    """Until the machine is in that state; the API answers 408 where it does not come to it in time.

    One request may wait 60 s at most, so a longer wait asks again.
    """
    deadline = time.monotonic() + wait_s
    while True:
        left = max(1, round(deadline - time.monotonic()))
        query = {"state": state, "timeout": min(60, left)}
        try:
            api.get(f"{machine_path(machine.app, machine.id)}/wait", query, timeout_s=min(60, left) + 10.0)
            return
        except ApiError as error:
            if error.status != 408 or time.monotonic() >= deadline - 1:
                raise


def _act_failed(error: ApiError, verb: str, machine: FoundMachine, wait_s: float) -> CliError:
    if error.status == 408:
        return CliError(
            f"{machine.app}/{machine.id} was not {_TARGET[verb]} after {wait_s:g} s: see `wakefront machine status "
            f"{machine.id}` and `wakefront logs {machine.app}`."
        )
    said = error.body.get("error") if isinstance(error.body, dict) else error.body
    if error.status in (401, 403) or not said:
        return error
    return CliError(f"Cannot {verb} {machine.app}/{machine.id}: {said}.")


def reload(api: Api, as_json: bool) -> None:
    try:
        answer = api.post("/v1/reload")
    except ApiError as error:
        if error.status in (401, 403) or not isinstance(error.body, dict):
            raise
        raise CliError(_faults(error.body, str(error))) from None
    if as_json:
        print_json(answer)
        return
    changes = [
        f"{word} {', '.join(map(str, answer[word]))}"
        for word in ("added", "changed", "removed")
        if isinstance(answer, dict) and answer.get(word)
    ]
    say("reloaded" + (": " + "; ".join(changes) if changes else ""))
    for warning in (answer or {}).get("warnings", []) if isinstance(answer, dict) else []:
        say(f"warning: {warning if isinstance(warning, str) else json.dumps(warning)}")


def _faults(body: dict[str, Any], fallback: str) -> str:
    faults = body.get("faults") or []
    if not faults:
        return fallback
    shown = "\n".join(f"  {one if isinstance(one, str) else _fault(one)}" for one in faults)
    return f"Nothing was changed, the new configuration has faults:\n{shown}"


def _fault(fault: dict[str, Any]) -> str:
    text = fault.get("text") or fault.get("message") or json.dumps(fault)
    place = ":".join(str(fault[key]) for key in ("file", "line") if fault.get(key))
    return f"{place}: {text}" if place and not str(text).startswith(place) else str(text)


def logs(api: Api, app: str, follow: bool, lines: int, as_json: bool) -> None:
    query = {"follow": int(follow), "lines": lines}
    try:
        for line in api.stream(f"{app_path(app)}/logs", query, timeout_s=None if follow else 30.0):
            say(json.dumps({"name": app, "line": line}, ensure_ascii=False) if as_json else line)
    except ApiError as error:
        raise unknown_app(api, app) if error.status == 404 else error from None
    if follow:
        raise CliError("The node ended the stream, it stops or restarts: ask again to go on.")


def certs_ca(api: Api, as_json: bool) -> None:
    pem = ca_pem(api)
    if as_json:
        print_json({"name": "internal", "pem": pem})
    else:
        say(pem.rstrip("\n"))


def ca_pem(api: Api) -> str:
    """The root of the internal CA. The node sends PEM as it is, or in a JSON object."""
    raw = api.text("/v1/certs/ca")
    if raw.lstrip().startswith("{"):
        raw = str(json.loads(raw).get("pem", ""))
    if "BEGIN CERTIFICATE" not in raw:
        raise CliError("The node sent no root certificate: are its certificates from the internal CA?")
    return raw

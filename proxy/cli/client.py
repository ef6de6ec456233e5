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
    lease_header,
    list_apps,
    list_machines,
    machine_path,
    refused,
    unknown_app,
)
from proxy.cli.output import age, print_json, say, table, waiting

# The states that each verb may leave a machine in: one that never ran, or could not start, is not stopped any further.
_TARGETS = {"start": "started", "stop": "stopped,created,failed", "suspend": "suspended", "restart": "started"}
_DONE = {"start": "started", "stop": "stopped", "suspend": "suspended", "restart": "restarted"}
_CA_WAIT_S = 3.0


def connect(config: Path | None, admin: str | None) -> Api:
    return Api(find_node(config, admin))


def status(api: Api, as_json: bool) -> None:
    answer = api.get("/v1/status")
    if as_json:
        print_json(answer)
        return
    control = answer["control"]
    say(
        f"node {answer['name']}, region {answer['region']}, wakefront {answer['version']}, "
        f"up {age(answer['uptime_s'])}, {'ready' if answer['ready'] else 'not ready'}"
    )
    say(f"control pid {control['pid']}; {_workers(answer['workers'])}")
    if (fleet := answer.get("fleet")) is not None:
        made = "made here" if fleet["origin"] == "made" else "joined"
        known = f"{fleet['nodes']} {'node' if fleet['nodes'] == 1 else 'nodes'} known"
        where = fleet["address"] or "an address not configured"
        say(f"fleet {fleet['root'][:16]} ({made}), {known}, reached at {where}")
    for warning in answer["warnings"]:
        say(f"warning: {warning}")
    rows = []
    for one in answer["apps"]:
        remarks = [remark for machine in one["machines"] if (remark := _remark(machine))]
        in_flight = sum(machine["in_flight"] for machine in one["machines"])
        rows.append((one["name"], _states(one["machines"]), in_flight, remarks[0] if remarks else ""))
    columns = ("app", "machines", "in flight", "remark")
    width = 4 if any(row[3] for row in rows) else 3
    table(columns[:width], [row[:width] for row in rows])


def _workers(workers: list[dict[str, Any]]) -> str:
    linked = [
        f"{one['slot']} (pid {one['pid']}, {one['connections']} connections{', retiring' if one['retiring'] else ''})"
        for one in workers
        if one["linked"]
    ]
    missing = [str(one["slot"]) for one in workers if not one["linked"]]
    text = f"workers {', '.join(linked)}" if linked else "no worker is linked"
    return text + (f"; not linked: {', '.join(missing)}" if linked and missing else "")


def apps(api: Api, as_json: bool) -> None:
    known = list_apps(api)
    if as_json:
        print_json(known)
        return
    if not known:
        say("This node has no apps: add an [[apps]] to its config.toml, then `wakefront reload`.")
        return
    rows = [(one["name"], _count(one["states"]), one["driver"], ", ".join(one["hostnames"])) for one in known]
    table(("app", "machines", "driver", "names"), rows)


def _states(machines: list[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for machine in machines:
        counts[machine["state"]] = counts.get(machine["state"], 0) + 1
    return _count(counts)


def _count(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"


def _remark(machine: dict[str, Any]) -> str:
    """What an operator should know of a machine: a cordon, that it is held back after failed starts, or a note."""
    if machine.get("cordoned"):
        return "cordoned" + (f"; {machine['note']}" if machine.get("note") else "")
    if not machine.get("hold_reason"):
        return str(machine.get("note") or "")
    left = float(machine.get("hold_until") or 0) - time.time()
    return f"held back: {machine['hold_reason']}" + (f" (next try in {round(left)} s)" if left >= 0.5 else "")


def machine_list(api: Api, app: str | None, as_json: bool) -> None:
    names = [app] if app is not None else [str(one["name"]) for one in list_apps(api)]
    found = [{"app": name, **machine} for name in names for machine in list_machines(api, name)]
    if as_json:
        print_json(found)
        return
    rows = [
        (one["id"], one["app"], one["state"], one["region"], one["group"], one["updated_at"], _remark(one))
        for one in found
    ]
    columns = ("id", "app", "state", "region", "group", "changed", "remark")
    width = 7 if any(row[6] for row in rows) else 6
    table(columns[:width], [row[:width] for row in rows])


def machine_status(api: Api, wanted: str, app: str | None, as_json: bool) -> None:
    found = find_machine(api, wanted, app)
    path = machine_path(found.app, found.id)
    machine = api.get(path, {"include_leases": "true"})
    events, wakes = api.get(f"{path}/events"), _wakes(api, path)
    if as_json:
        print_json({"app": found.app, **machine, "events": events, "wakes": wakes})
        return
    pid = f", pid {machine['pid']}" if machine.get("pid") else ""
    say(f"{found.id} of {found.app}: {machine['state']} in {machine['region']}, group {machine['group']}{pid}")
    for endpoint in machine.get("endpoints", []):
        say(f"  port {endpoint['internal_port']} at {endpoint['host']}:{endpoint['port']}")
    if remark := _remark(machine):
        say(f"  {remark}")
    if lease := machine.get("lease"):
        why = f" ({lease['description']})" if lease.get("description") else ""
        say(f"  leased by {lease['owner']} for {age(max(0.0, lease['expires_at'] - time.time()))}{why}")
    if wakes:
        say(f"  {_last_wake(wakes)}")
    if checks := machine.get("checks"):
        table(("check", "status", "since", "output"), [_check_row(check) for check in checks])
    table(("when", "event", "status", "by", "detail"), [_event_row(event) for event in events])


def _check_row(check: dict[str, Any]) -> tuple[object, ...]:
    """The last result of a health check; of its output the first line."""
    output = str(check.get("output") or "").strip().partition("\n")[0]
    return (check.get("name"), check.get("status"), check.get("updated_at"), output[:120])


def _last_wake(wake: dict[str, Any]) -> str:
    steps = [
        f"{name} {wake[name]:.1f} ms" for name in ("forked", "listening", "answered") if wake.get(name) is not None
    ]
    end = f", failed with {wake['code']}" if wake.get("code") else ""
    return f"last wake: by {wake['source']} when {wake['from_state']}{''.join(f', {step}' for step in steps)}{end}"


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


def machine_act(
    api: Api, verb: str, wanted: str, app: str | None, wait_s: float, as_json: bool, nonce: str | None = None
) -> None:
    found = find_machine(api, wanted, app)
    path = machine_path(found.app, found.id)
    began = time.monotonic()
    with waiting(f"{verb} {found.app}/{found.id}", quiet=as_json):
        try:
            api.post(f"{path}/{verb}", timeout_s=max(wait_s, 1.0) + 30.0, headers=lease_header(nonce))
            if wait_s > 0:
                wait_for_state(api, found, _TARGETS[verb], wait_s)
        except ApiError as error:
            raise _act_failed(error, verb, found, wait_s) from None
    now = api.get(path)
    if as_json:
        print_json({"app": found.app, "id": found.id, "previous_state": found.state, "state": now.get("state")})
        return
    took = (time.monotonic() - began) * 1e3
    done = f"{_DONE[verb]} (was {found.state}, {took:.0f} ms)" if wait_s > 0 else f"asked to {verb}"
    say(f"{found.app}/{found.id}: {done}")


def wait_for_state(api: Api, machine: FoundMachine, states: str, wait_s: float) -> None:
    """Until the machine is in one of the states; the API answers 408 where it does not come to it in time.

    One request may wait 60 s at most, so a longer wait asks again.
    """
    deadline = time.monotonic() + wait_s
    while True:
        left = max(1, round(deadline - time.monotonic()))
        query = {"state": states, "timeout": min(60, left)}
        try:
            api.get(f"{machine_path(machine.app, machine.id)}/wait", query, timeout_s=min(60, left) + 10.0)
            return
        except ApiError as error:
            if error.status != 408 or time.monotonic() >= deadline - 1:
                raise


def _act_failed(error: ApiError, verb: str, machine: FoundMachine, wait_s: float) -> CliError:
    if error.status == 408:
        return CliError(
            f"{machine.app}/{machine.id} was not {_DONE[verb]} after {wait_s:g} s: see `wakefront machine status "
            f"{machine.id}` and `wakefront logs {machine.app}`."
        )
    return refused(error, verb, machine)


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
    changes = [f"{word} {', '.join(answer[word])}" for word in ("added", "changed", "removed") if answer[word]]
    say("reloaded" + (": " + "; ".join(changes) if changes else ", no app is new or changed"))
    for warning in answer["warnings"]:
        say(f"warning: {warning}")


def _faults(body: dict[str, Any], fallback: str) -> str:
    if not body.get("faults"):
        return fallback
    shown = "\n".join(f"  {one['text']}" for one in body["faults"])
    if any(one.get("file", "?") for one in body["faults"]):
        return f"Nothing was changed, the new configuration has faults:\n{shown}"
    return f"{body['error'][:1].upper()}{body['error'][1:]}:\n{shown}"


def logs(api: Api, app: str, follow: bool, lines: int, as_json: bool) -> None:
    query = {"follow": int(follow), "lines": lines}
    try:
        for line in api.stream(f"{app_path(app)}/logs", query, timeout_s=None if follow else 30.0):
            machine, _, text = line.partition(" ")
            fact = {"name": app, "machine": machine, "line": text}
            say(json.dumps(fact, ensure_ascii=False) if as_json else line)
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
    """The root of the internal CA. At its very first start a node may be ready a moment before it is made."""
    deadline = time.monotonic() + _CA_WAIT_S
    while True:
        try:
            return api.text("/v1/certs/ca")
        except ApiError as error:
            if error.status != 404 or not isinstance(error.body, dict):
                raise
            if time.monotonic() > deadline:
                raise CliError(f"There is no root certificate: {error.body.get('error')}.") from None
        time.sleep(0.05)

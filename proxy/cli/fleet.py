"""`wakefront node`: how nodes become one fleet.

`invite`, `invites` and `revoke` ask a node that runs; `join` works on the files of one that need not run yet.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from proxy.cli.failure import USAGE, CliError
from proxy.cli.node import Api, ApiError
from proxy.cli.output import age, print_error, print_json, say, table

if TYPE_CHECKING:
    from proxy.config import NodeConfig
    from proxy.control.joining import Joined

_MAX_TOKEN_CHARS = 4096  # of standard input
_INVITES = "/v1/node/invites"


def invite(api: Api, valid: str, address: str | None, replace: str | None, as_json: bool) -> None:
    """The token alone goes to standard output: it is to be carried, by hand or by a pipe."""
    body = {"valid": valid, "address": address or "", "replace": replace or ""}
    made = _ask(api, lambda: api.post(_INVITES, body))
    if as_json:
        print_json(made)
        return
    say(made["token"])
    until = datetime.fromtimestamp(made["expires_at"], UTC)
    for line in (
        f"Lets one node join, until {until:%H:%M} UTC ({age(made['expires_at'] - made['created_at'])}), by way of "
        f"{made['address']}. Whoever has this line can be that node: pass it on as you would a password.",
        "On the new node: wakefront node join TOKEN --config FILE",
    ):
        print(line, file=sys.stderr, flush=True)


def invites(api: Api, as_json: bool) -> None:
    found: list[dict[str, Any]] = _ask(api, lambda: api.get(_INVITES))["invites"]
    if as_json:
        print_json(found)
        return
    if not found:
        say("There are no invites: make one with `wakefront node invite`.")
        return
    rows = [
        (one["id"], one["state"], f"{datetime.fromtimestamp(one['expires_at'], UTC):%F %H:%M} UTC", one["used_by"])
        for one in found
    ]
    table(("invite", "state", "expires", "used by"), rows)


def revoke(api: Api, id: str, as_json: bool) -> None:
    _ask(api, lambda: api.delete(f"{_INVITES}/{quote(id, safe='')}"))
    if as_json:
        print_json({"id": id, "state": "revoked"})
    else:
        say(f"Invite {id} was taken back.")


def nodes(api: Api, as_json: bool) -> None:
    found: list[dict[str, Any]] = _ask(api, lambda: api.get("/v1/nodes"))["nodes"]
    if as_json:
        print_json(found)
        return
    rows = [
        (one["name"] + (" (this one)" if one["is_self"] else ""), one["region"], one["state"],
         "" if one["is_self"] else f"{one['rtt_ms']:.1f} ms" if one["rtt_ms"] else "?", str(one["apps"]),
         str(one["machines"]), one["fault"])
        for one in found
    ]  # fmt: skip
    table(("node", "region", "state", "away", "apps", "machines", "fault"), rows)


def regions(api: Api, as_json: bool) -> None:
    found: list[dict[str, Any]] = _ask(api, lambda: api.get("/v1/regions"))["regions"]
    if as_json:
        print_json(found)
        return
    rows = [
        (str(one["rank"]), one["name"],
         f"{one['rtt_ms']:.1f} ms" if one["is_measured"] else "not measured", f"{one['nodes_up']} of {one['nodes']}")
        for one in found
    ]  # fmt: skip
    table(("", "region", "away", "nodes up"), rows)


def drain(api: Api, on: bool, as_json: bool) -> None:
    answer = _ask(api, lambda: api.post("/v1/node/drain" if on else "/v1/node/undrain", {}))
    if as_json:
        print_json(answer)
    elif on:
        say(
            "No new request comes to this node's machines while others can take it. `wakefront node undrain` ends that."
        )
    else:
        say("This node takes its share again.")


def _ask(api: Api, question: Any) -> Any:  # Any: JSON, and what asks for it
    try:
        return question()
    except ApiError as error:
        if error.status in (400, 404, 409, 503) and isinstance(error.body, dict) and error.body.get("error"):
            text = str(error.body["error"])
            raise CliError(
                f"{text[:1].upper()}{text[1:]}.", USAGE if error.status == 400 else error.exit_code
            ) from error
        raise


def join(config_path: Path, token: str, address: str | None, as_json: bool) -> None:
    from proxy.clock import SystemClock
    from proxy.control.joining import JoinFailed, Newcomer
    from proxy.control.joining import join as join_fleet

    config = _load(config_path)
    newcomer = Newcomer(
        config.node.name, config.node.region, _own_address(config, address, config_path), Path(config.node.data_dir)
    )
    try:
        joined = asyncio.run(join_fleet(_read(token), newcomer, SystemClock()))
    except JoinFailed as error:
        raise CliError(str(error)) from error
    if as_json:
        print_json(_joined_json(joined, newcomer.name))
    else:
        _say_joined(joined, newcomer.name, config_path)


def _read(token: str) -> str:
    return sys.stdin.read(_MAX_TOKEN_CHARS) if token == "-" else token


def _load(path: Path) -> NodeConfig:
    from proxy.config import load

    result = load(path)
    if result.config is None:
        for fault in result.errors:
            print_error(str(fault))
        raise CliError(f"{path} has faults: see `wakefront check --config {shlex.quote(str(path))}`.", USAGE)
    return result.config


def _own_address(config: NodeConfig, address: str | None, path: Path) -> str:
    from proxy.config import parse_remote
    from proxy.control.membership import advertised

    if config.listen.backhaul is None:
        raise CliError(
            f'{path} does not say where other nodes reach this one: add backhaul = "IP:PORT" to [listen].', USAGE
        )
    if address is not None and parse_remote(address) is None:
        raise CliError(f"--address: {address!r} is not HOST:PORT, for example 10.0.0.6:7443.", USAGE)
    if not (told := address or advertised(config.listen.backhaul)):
        raise CliError(
            "[listen] backhaul says where this node listens, not where others reach it: name that with --address.",
            USAGE,
        )
    return told


def _joined_json(joined: Joined, name: str) -> dict[str, Any]:
    nodes = [
        {"id": one.name, "name": one.name, "region": one.region, "backhaul": one.backhaul or None}
        for one in joined.nodes
    ]
    return {
        "node": name, "inviter": joined.inviter, "root": joined.fingerprint, "nodes": nodes,
        "left_own_ca": joined.left_own_ca, "running": joined.is_running,
    }  # fmt: skip


def _say_joined(joined: Joined, name: str, path: Path) -> None:
    others = ", ".join(f"{one.name} ({one.region})" for one in joined.nodes if one.name != name)
    say(f"{name} has joined the fleet of {others}.")
    if joined.left_own_ca:
        say("The CA that this node had made for itself is kept aside, sealed, in its data_dir.")
    verb = "reload" if joined.is_running else "serve"
    say(f"Next: wakefront {verb} --config {shlex.quote(str(path))}")

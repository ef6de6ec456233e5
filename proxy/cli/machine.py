"""Commands that keep a machine out of the way or to oneself: cordons, leases, metadata, and waiting for a state.

Each takes the Api of the node and the machine as the user named it. Starting and stopping are in client.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from proxy.cli.failure import USAGE, CliError
from proxy.cli.node import Api, ApiError, FoundMachine, find_machine, lease_header, machine_path, refused
from proxy.cli.output import age, print_json, say, table, waiting

_LONGEST_ASK_S = 60.0  # of one wait, by the API


def cordon(api: Api, wanted: str, app: str | None, nonce: str | None, as_json: bool) -> None:
    found, answer = _change(api, "cordon", wanted, app, nonce)
    if as_json:
        print_json({**_name(found), "cordoned": True, "acknowledged": answer["acknowledged"]})
        return
    say(f"{found.app}/{found.id}: cordoned, it gets no new requests")
    if not answer["acknowledged"]:
        say("A worker has not confirmed it yet: see `wakefront status`.")


def uncordon(api: Api, wanted: str, app: str | None, nonce: str | None, as_json: bool) -> None:
    found, _ = _change(api, "uncordon", wanted, app, nonce)
    if as_json:
        print_json({**_name(found), "cordoned": False})
    else:
        say(f"{found.app}/{found.id}: uncordoned, it gets requests again")


def _change(api: Api, verb: str, wanted: str, app: str | None, nonce: str | None) -> tuple[FoundMachine, Any]:
    found = find_machine(api, wanted, app)
    try:
        return found, api.post(f"{_path(found)}/{verb}", headers=lease_header(nonce))
    except ApiError as error:
        raise refused(error, verb, found) from None


# --- waiting


def wait(
    api: Api, wanted: str, app: str | None, states: Sequence[str], timeout_s: float, version: str | None,
    from_event: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Until the machine is in one of the states. The API waits a minute at most, so a longer wait asks again."""
    if not all(word.strip() for state in states for word in state.split(",")):
        raise CliError("--state is empty: name one as `machine list` shows it, or `settled`.", USAGE)
    found = find_machine(api, wanted, app)
    query: dict[str, Any] = {"state": ",".join(states)}
    query |= {key: value for key, value in (("version", version), ("from_event_id", from_event)) if value}
    deadline = time.monotonic() + timeout_s
    with waiting(f"waiting for {found.app}/{found.id}", quiet=as_json):
        while True:
            left = min(_LONGEST_ASK_S, max(0.0, deadline - time.monotonic()))
            try:
                answer = api.get(f"{_path(found)}/wait", {**query, "timeout": round(left, 3)}, timeout_s=left + 10.0)
                break
            except ApiError as error:
                if error.status != 408 or time.monotonic() >= deadline:
                    raise refused(error, "wait for", found) from None
    if as_json:
        print_json({**_name(found), **answer})
    else:
        say(f"{found.app}/{found.id}: {answer['state']}")


# --- leases


def lease_show(api: Api, wanted: str, app: str | None, as_json: bool) -> None:
    found = find_machine(api, wanted, app)
    try:
        lease = api.get(f"{_path(found)}/lease")["data"]
    except ApiError as error:
        if error.status != 404:
            raise
        lease = None
    if as_json:
        print_json({**_name(found), "lease": lease})
    elif lease is None:
        say(f"{found.app}/{found.id}: nobody holds a lease")
    else:
        _show_lease(found, lease)


def lease_take(
    api: Api, wanted: str, app: str | None, ttl_s: float, description: str, nonce: str | None, as_json: bool
) -> None:
    """Take a lease or, with the nonce of the one that is held, extend it."""
    found = find_machine(api, wanted, app)
    body = {"ttl": ttl_s, "description": description}
    try:
        lease = api.post(f"{_path(found)}/lease", body, headers=lease_header(nonce))["data"]
    except ApiError as error:
        raise refused(error, "extend the lease of" if nonce else "lease", found) from None
    if as_json:
        print_json({**_name(found), "lease": lease})
    else:
        _show_lease(found, lease)


def lease_release(api: Api, wanted: str, app: str | None, nonce: str, as_json: bool) -> None:
    found = find_machine(api, wanted, app)
    try:
        api.delete(f"{_path(found)}/lease", headers=lease_header(nonce))
    except ApiError as error:
        raise refused(error, "release the lease of", found) from None
    if as_json:
        print_json({**_name(found), "lease": None})
    else:
        say(f"{found.app}/{found.id}: the lease is given back")


def _show_lease(found: FoundMachine, lease: dict[str, Any]) -> None:
    left = age(max(0.0, lease["expires_at"] - time.time()))
    why = f" ({lease['description']})" if lease.get("description") else ""
    say(f"{found.app}/{found.id}: leased by {lease['owner']} for {left}{why}")
    say(f"nonce {lease['nonce']}")


# --- metadata


def metadata_show(api: Api, wanted: str, app: str | None, as_json: bool) -> None:
    found = find_machine(api, wanted, app)
    metadata = api.get(f"{_path(found)}/metadata")
    if as_json:
        print_json({**_name(found), "metadata": metadata})
    else:
        table(("key", "value"), sorted(metadata.items()))


def metadata_set(
    api: Api, wanted: str, app: str | None, pairs: Sequence[str], nonce: str | None, as_json: bool
) -> None:
    changes: dict[str, str | None] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CliError(f"{pair!r} is not KEY=VALUE.", USAGE)
        changes[key] = value
    _merge(api, wanted, app, changes, nonce, as_json)


def metadata_remove(
    api: Api, wanted: str, app: str | None, keys: Sequence[str], nonce: str | None, as_json: bool
) -> None:
    _merge(api, wanted, app, dict.fromkeys(keys), nonce, as_json)


def _merge(
    api: Api, wanted: str, app: str | None, changes: dict[str, str | None], nonce: str | None, as_json: bool
) -> None:
    found = find_machine(api, wanted, app)
    try:
        api.post(f"{_path(found)}/metadata", {"metadata": changes}, headers=lease_header(nonce))
    except ApiError as error:
        raise refused(error, "change the metadata of", found) from None
    if as_json:
        print_json({**_name(found), "metadata": api.get(f"{_path(found)}/metadata")})
    else:
        words = [f"{key} removed" if value is None else f"{key} set" for key, value in changes.items()]
        say(f"{found.app}/{found.id}: {', '.join(words)}")


# --- shared


def _name(found: FoundMachine) -> dict[str, Any]:
    return {"app": found.app, "id": found.id}


def _path(found: FoundMachine) -> str:
    return machine_path(found.app, found.id)

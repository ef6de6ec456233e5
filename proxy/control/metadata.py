"""Metadata of a machine: names and values that users keep with it (spec machines §5).

A change makes no new version and restarts nothing. `fly_process_group` is always there and is the configuration's. What
`wakefront_busy` means is decide/autostop.py's.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxy.control.machines import Owned
from proxy.decide.autostop import BUSY_KEY, is_busy_value

GROUP_KEY = "fly_process_group"
MAX_KEYS = 64
MAX_KEY_CHARACTERS = 128
MAX_VALUE_CHARACTERS = 1024


def metadata_of(machine: Owned) -> dict[str, str]:
    """All of it, as it is shown."""
    return {GROUP_KEY: machine.row.group, **machine.row.metadata}


def changed_metadata(machine: Owned, changes: Mapping[str, object], replace: bool = False) -> dict[str, str]:
    """What is to be kept after `changes`, in which None takes a key away. Raises ValueError for what can't be kept."""
    kept = {} if replace else dict(machine.row.metadata)
    for key, value in changes.items():
        if key == GROUP_KEY:
            if value != machine.row.group:
                raise ValueError(f"{GROUP_KEY} comes from the configuration and is {machine.row.group!r}")
        elif value is None:
            kept.pop(key, None)
        else:
            kept[key] = _checked(key, value)
    if len(kept) > MAX_KEYS:
        raise ValueError(f"a machine has room for {MAX_KEYS} keys")
    return kept


def _checked(key: str, value: object) -> str:
    if not 0 < len(key) <= MAX_KEY_CHARACTERS or not key.isprintable() or " " in key or "/" in key:
        raise ValueError(
            f"{key[:40]!r}: a key has 1 to {MAX_KEY_CHARACTERS} printable characters, no spaces or slashes"
        )
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a text, or null to take the key away")
    if len(value) > MAX_VALUE_CHARACTERS:
        raise ValueError(f"{key}: a value has up to {MAX_VALUE_CHARACTERS} characters")
    try:
        (key + value).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key!r}: half of a surrogate pair is no text") from None
    if key == BUSY_KEY and not is_busy_value(value):
        raise ValueError(f"{key}: expected true, false, or the unix time until which the machine is busy")
    return value

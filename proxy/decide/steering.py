"""What a client's own fields ask of routing (spec routing §3), and the syntax that they share with fly-replay.

Values come from anyone, so nothing here raises: what is no region and no machine id is left out. Only where something
is *forced* may it not be forgotten, lest the request go where the client said it must not: `Steering.is_impossible`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec

from proxy.model import MachineId

MAX_REGIONS: Final = 64  # in one list; there are fewer codes and aliases than that

is_machine_id = re.compile(rb"[0-9A-Za-z][0-9A-Za-z_-]{0,62}").fullmatch
is_region = re.compile(rb"[a-z0-9][a-z0-9-]{0,31}").fullmatch

_PREFER_REGION = b"fly-prefer-region"
_FORCE_REGION = b"fly-force-region"
_PREFER_INSTANCE = b"fly-prefer-instance-id"
_FORCE_INSTANCE = b"fly-force-instance-id"
_CACHE_CONTROL = b"fly-replay-cache-control"
STEERING_FIELDS: Final = frozenset({_PREFER_REGION, _FORCE_REGION, _PREFER_INSTANCE, _FORCE_INSTANCE, _CACHE_CONTROL})


class Steering(msgspec.Struct, frozen=True):
    """What a client asks for. A forced machine goes before forced regions, and both before what is preferred."""

    prefer_regions: tuple[str, ...] = ()  # codes and aliases in order; then the nearest
    force_regions: tuple[str, ...] | None = None  # only these; None = none are forced
    prefer_instance: MachineId | None = None
    force_instance: MachineId | None = None
    skips_cache: bool = False  # of replays, where their rule allows that
    is_impossible: bool = False  # forced is what no machine and no region can be called


NOT_STEERED: Final = Steering()


def parse_steering(fields: Iterable[tuple[bytes, bytes]]) -> Steering:
    """Read the fields that steer from (lower-case name, value) pairs; others are passed over.

    Of a field that comes twice the first counts, as for a list whose end is cut off (choice; unknown at Fly).
    """
    first: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in STEERING_FIELDS:
            first.setdefault(name, value.strip(b" \t"))
    if not first:
        return NOT_STEERED
    prefer_instance = first.get(_PREFER_INSTANCE, b"")
    force_instance = first.get(_FORCE_INSTANCE)
    force_regions = None if _FORCE_REGION not in first else _regions(first[_FORCE_REGION])
    return Steering(
        prefer_regions=_regions(first.get(_PREFER_REGION, b"")),
        force_regions=force_regions,
        prefer_instance=_machine(prefer_instance),
        force_instance=None if force_instance is None else _machine(force_instance),
        skips_cache=first.get(_CACHE_CONTROL, b"").lower() == b"skip",
        is_impossible=force_regions == () or (force_instance is not None and not is_machine_id(force_instance)),
    )


def _machine(value: bytes) -> MachineId | None:
    return MachineId(value.decode("ascii")) if is_machine_id(value) else None


def _regions(value: bytes) -> tuple[str, ...]:
    names = (name.strip(b" \t").lower() for name in value.split(b",", MAX_REGIONS)[:MAX_REGIONS])
    return tuple(name.decode("ascii") for name in names if is_region(name))

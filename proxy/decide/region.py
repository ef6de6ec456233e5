"""Regions by name: what a list such as `iad,ord,us,any` means among the regions there are (spec routing §2.1, §3).

Which of several is nearest, and which have room, is not known here: an area is a set, and the order inside it is the
caller's. Codes that are not Fly's are an operator's own; they belong to no area but `any`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from proxy.model import RegionCode

ANY: Final = "any"

_US = frozenset({"atl", "bos", "den", "dfw", "ewr", "iad", "lax", "mia", "ord", "phx", "sea", "sjc"})

# Fly publishes the aliases and the codes, not which code is in which alias: this is geography. Mexico is in North
# America, India in Asia-Pacific; Johannesburg is in no area that has a name.
AREAS: Final = {
    "apac": frozenset({"bom", "hkg", "nrt", "sin", "syd"}),
    "eu": frozenset({"ams", "arn", "cdg", "fra", "lhr", "mad", "otp", "waw"}),
    "na": _US | {"gdl", "phx", "qro", "yul", "yyz"},
    "sa": frozenset({"bog", "eze", "gig", "gru", "scl"}),
    "us": _US,
    "usa": _US,
}


def names_region(name: str, region: str) -> bool:
    """Whether a code or alias means this region. An operator's region may itself be called `eu`: then it is meant."""
    return name in (region, ANY) or region in AREAS.get(name, ())


@dataclass(frozen=True, slots=True)
class RegionWish:
    """The regions that a request asks for, in order: codes and aliases. Forced ones are not left for others."""

    names: tuple[str, ...]
    is_forced: bool = False

    def rank(self, region: str) -> int | None:
        """Which of the names is the first that means this region; the last rank where none does, None if forced."""
        for at, name in enumerate(self.names):
            if names_region(name, region):
                return at
        return None if self.is_forced else len(self.names)


def expand_regions(
    names: Iterable[str], local: RegionCode, known: Iterable[RegionCode]
) -> tuple[tuple[RegionCode, ...], ...]:
    """The regions that a list means, area by area in its order; inside an area the local one first, then as in `known`.

    A region stands only in the first area that has it; areas without one are left out. With one node, all that counts
    is whether anything is left.
    """
    left = list(dict.fromkeys((local, *known)))
    areas: list[tuple[RegionCode, ...]] = []
    for name in names:
        area = tuple(region for region in left if names_region(name, region))
        if area:
            areas.append(area)
            left = [region for region in left if region not in area]
    return tuple(areas)

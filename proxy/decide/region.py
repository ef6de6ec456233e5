"""Regions by name: what a list such as `iad,ord,us,any` means among the regions there are (spec routing §2.1, §3).

Which of several is nearest, and which have room, is not known here: an area is a set, and the order inside it is the
caller's. Codes that are not Fly's are an operator's own; they belong to no area but `any`. Where they lie: places.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from proxy.decide.places import FLY

ANY: Final = "any"


def _in(*areas: str) -> frozenset[str]:
    return frozenset(code for code, place in FLY.items() if place.area in areas)


# Fly publishes the aliases and the codes, not which code is in which alias: that is geography (places.FLY).
AREAS: Final = {
    "apac": _in("apac"),
    "eu": _in("eu"),
    "na": _in("us", "na"),
    "sa": _in("sa"),
    "us": _in("us"),
    "usa": _in("us"),
}
_AREAS_OF: Final[dict[str, tuple[str, ...]]] = {
    code: tuple(name for name, area in AREAS.items() if code in area) for code in FLY
}


@dataclass(frozen=True, slots=True)
class RegionWish:
    """The regions that a request asks for, in order: codes and aliases. Forced ones are not left for others.

    An operator's region may itself be called `eu`: then it is meant too.
    """

    names: tuple[str, ...]
    is_forced: bool = False

    def rank(self, region: str) -> int | None:
        """Which of the names is the first that means this region; the last rank where none does, None if forced."""
        return self.ranks((region,))[0]

    def ranks(self, regions: Iterable[str]) -> list[int | None]:
        """The rank of each. A client may name 64 areas: they are gone through once, not for every region."""
        first: dict[str, int] = {}
        for at, name in enumerate(self.names):
            first.setdefault(name, at)
        last = None if self.is_forced else len(self.names)
        ranks: list[int | None] = []
        for region in regions:
            found = [first[name] for name in (region, ANY, *_AREAS_OF.get(region, ())) if name in first]
            ranks.append(min(found) if found else last)
        return ranks

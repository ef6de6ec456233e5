"""How far other regions are, by measured round trips: robust against a stray sample, slow to change its mind.

A `Pair` keeps the last few samples of one pair of nodes. Its value is their median, which one late answer does not move
and a lasting change does after three samples. A `RegionOrder` sorts regions by such values, and takes a new one only
once it has differed for a while by more than jitter does: else traffic would go to and fro between two regions that
are about as far.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Final

from proxy.decide.places import Place, distance_km, place_of
from proxy.model import RegionCode

SAMPLES: Final = 5
LONGEST_S: Final = 30.0  # of a round trip that is believed
_STEP_S: Final = 0.002  # differences up to this, or to a tenth, are jitter
_STEP_SHARE: Final = 0.1
_PATIENCE_S: Final = 2.0  # so long a difference must last
_EWMA: Final = 0.25
# Light in fibre goes there and back in 1e-5 s a km; paths are some 1.6 times the great circle (a guess, till measured)
_S_PER_KM: Final = 1.6e-5
_UNPLACED_S: Final = 0.3  # of a region that was never measured and is nowhere on the map: behind most others


class Pair:
    """The round trips between two nodes."""

    __slots__ = ("_samples", "jitter_s", "mean_s")

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self.mean_s = 0.0  # moving average
        self.jitter_s = 0.0  # moving average of the distance from it

    def add(self, rtt_s: float) -> None:
        """Take a sample. Raises ValueError for what no round trip takes."""
        if not (0.0 < rtt_s < LONGEST_S):  # a NaN is neither
            raise ValueError(f"{rtt_s} s is no round trip")
        if not self._samples:
            self.mean_s = rtt_s
        self.jitter_s += (abs(rtt_s - self.mean_s) - self.jitter_s) * _EWMA
        self.mean_s += (rtt_s - self.mean_s) * _EWMA
        self._samples.append(rtt_s)

    @property
    def value_s(self) -> float:
        """The median of the last samples; 0 before the first."""
        return median(self._samples) if self._samples else 0.0


def guess_s(
    own: RegionCode, region: RegionCode, measured: Mapping[RegionCode, float], placed: Mapping[RegionCode, Place]
) -> float:
    """A round trip that was never measured, from the map and from what those that were tell of its scale."""
    here, there = place_of(own, placed), place_of(region, placed)
    if here is None or there is None:
        return _UNPLACED_S
    scales = []
    for known, rtt_s in measured.items():
        place = place_of(known, placed)
        if place is not None and (away := distance_km(here, place)) > 100.0:
            scales.append(rtt_s / away)
    return distance_km(here, there) * (median(scales) if scales else _S_PER_KM)


class RegionOrder:
    """All regions, nearest first; the own one is always that."""

    def __init__(self, own: RegionCode, placed: Mapping[RegionCode, Place] | None = None) -> None:
        self._own = own
        self._placed = dict(placed or {})
        self._taken: dict[RegionCode, float] = {}  # the value that counts
        self._differs_since: dict[RegionCode, float] = {}
        self.order: tuple[RegionCode, ...] = (own,)

    def update(self, now: float, measured: Mapping[RegionCode, float], known: Iterable[RegionCode]) -> bool:
        """Take the latest round trips, in seconds, of those of the `known` regions that have one. Whether the order
        is another now."""
        regions = {region for region in known if region != self._own}
        for gone in [region for region in self._taken if region not in regions]:
            del self._taken[gone]
            self._differs_since.pop(gone, None)
        for region in regions:
            self._take(region, now, measured.get(region))
        for region in regions - self._taken.keys():
            self._taken[region] = math.nan
        values = {
            region: guess_s(self._own, region, measured, self._placed) if math.isnan(taken) else taken
            for region, taken in self._taken.items()
        }
        order = (self._own, *sorted(values, key=lambda region: (values[region], region)))
        changed = order != self.order
        self.order = order
        return changed

    def _take(self, region: RegionCode, now: float, value: float | None) -> None:
        taken = self._taken.get(region, math.nan)
        if value is None:
            return
        if math.isnan(taken):
            self._taken[region] = value
        elif abs(value - taken) <= max(_STEP_S, taken * _STEP_SHARE):
            self._differs_since.pop(region, None)
        elif now - self._differs_since.setdefault(region, now) >= _PATIENCE_S:
            self._taken[region] = value
            del self._differs_since[region]

    def rtt_s(self, region: RegionCode) -> float | None:
        """The value that counts for a region; None before it was measured."""
        taken = self._taken.get(region, math.nan)
        return None if math.isnan(taken) else taken

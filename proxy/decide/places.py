"""Where regions are: Fly's codes with their cities, what an operator says of others, and how far it is between two.

For what is not measured yet (latency.py), and the one source of which code lies in which area (region.py). A code is
that of an airport; the place meant is the city, as Fly's list of regions has it. Coordinates are to a hundredth of a
degree, a kilometre: paths of cables are not known that well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from proxy.model import RegionCode

EARTH_RADIUS_KM: Final = 6_371.0  # the mean; the Earth's flattening is 0.3 %


@dataclass(frozen=True, slots=True)
class Place:
    """A point on Earth, in degrees: north and east are positive."""

    latitude: float
    longitude: float
    city: str = ""
    area: str = ""  # the smallest that has a name: us, na, sa, eu, apac; Africa has none


def _fly(code: str, city: str, latitude: float, longitude: float, area: str = "") -> tuple[RegionCode, Place]:
    return RegionCode(code), Place(latitude, longitude, city, area)


# All that Fly has or had; the last three were given up long ago. Mexico is in North America, India in Asia-Pacific.
FLY: Final[dict[RegionCode, Place]] = dict(
    (
        _fly("ams", "Amsterdam", 52.37, 4.90, "eu"),
        _fly("arn", "Stockholm", 59.33, 18.07, "eu"),
        _fly("atl", "Atlanta", 33.75, -84.39, "us"),
        _fly("bog", "Bogotá", 4.71, -74.07, "sa"),
        _fly("bom", "Mumbai", 19.08, 72.88, "apac"),
        _fly("bos", "Boston", 42.36, -71.06, "us"),
        _fly("cdg", "Paris", 48.86, 2.35, "eu"),
        _fly("den", "Denver", 39.74, -104.99, "us"),
        _fly("dfw", "Dallas", 32.78, -96.80, "us"),
        _fly("ewr", "Secaucus", 40.79, -74.06, "us"),
        _fly("eze", "Buenos Aires", -34.60, -58.38, "sa"),
        _fly("fra", "Frankfurt", 50.11, 8.68, "eu"),
        _fly("gdl", "Guadalajara", 20.66, -103.35, "na"),
        _fly("gig", "Rio de Janeiro", -22.91, -43.17, "sa"),
        _fly("gru", "São Paulo", -23.55, -46.63, "sa"),
        _fly("hkg", "Hong Kong", 22.32, 114.17, "apac"),
        _fly("iad", "Ashburn", 39.04, -77.49, "us"),
        _fly("jnb", "Johannesburg", -26.20, 28.05),
        _fly("lax", "Los Angeles", 34.05, -118.24, "us"),
        _fly("lhr", "London", 51.51, -0.13, "eu"),
        _fly("mad", "Madrid", 40.42, -3.70, "eu"),
        _fly("mia", "Miami", 25.76, -80.19, "us"),
        _fly("nrt", "Tokyo", 35.68, 139.69, "apac"),
        _fly("ord", "Chicago", 41.88, -87.63, "us"),
        _fly("otp", "Bucharest", 44.43, 26.10, "eu"),
        _fly("phx", "Phoenix", 33.45, -112.07, "us"),
        _fly("qro", "Querétaro", 20.59, -100.39, "na"),
        _fly("scl", "Santiago", -33.45, -70.67, "sa"),
        _fly("sea", "Seattle", 47.61, -122.33, "us"),
        _fly("sin", "Singapore", 1.35, 103.82, "apac"),
        _fly("sjc", "San Jose", 37.34, -121.89, "us"),
        _fly("syd", "Sydney", -33.87, 151.21, "apac"),
        _fly("waw", "Warsaw", 52.23, 21.01, "eu"),
        _fly("yul", "Montreal", 45.50, -73.57, "na"),
        _fly("yyz", "Toronto", 43.65, -79.38, "na"),
        _fly("maa", "Chennai", 13.08, 80.27, "apac"),
        _fly("mrs", "Marseille", 43.30, 5.37, "eu"),
        _fly("vin", "Vint Hill", 38.75, -77.67, "us"),
    )
)


def distance_km(a: Place, b: Place) -> float:
    """Along the great circle (haversine): at most 20,015 km."""
    south, north = math.radians(a.latitude), math.radians(b.latitude)
    up = math.sin((north - south) / 2)
    along = math.sin(math.radians(b.longitude - a.longitude) / 2)
    h = up * up + math.cos(south) * math.cos(north) * along * along
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(h)))


class Places:
    """Fly's regions and an operator's, whose word wins: a code of Fly's may be a place of his own there."""

    __slots__ = ("_km", "_places")

    def __init__(self, own: Mapping[RegionCode, tuple[float, float]] | None = None) -> None:
        """`own`: latitude and longitude of the regions that config.toml has sections for."""
        self._places = FLY | {code: Place(*point) for code, point in (own or {}).items()}
        self._km: dict[tuple[RegionCode, RegionCode], float] = {}  # of places known: their number bounds it

    def distance_km(self, a: RegionCode, b: RegionCode) -> float | None:
        """None if nobody said where one of them is; a region is at no distance from itself."""
        if a == b:
            return 0.0
        known = self._km.get((a, b))
        if known is None:
            here, there = self._places.get(a), self._places.get(b)
            if here is None or there is None:
                return None
            known = self._km[a, b] = self._km[b, a] = distance_km(here, there)
        return known

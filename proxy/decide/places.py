"""Where regions are: a first guess at distance, for pairs of regions that nobody has measured yet.

The codes are Fly's, past and present; each stands at its city, by that city's public coordinates (rounded to a tenth of
a degree, 11 km: what is made of them is a guess). Operators add their own (`[regions.X]` in config.toml) or move ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from proxy.model import RegionCode

Place = tuple[float, float]  # latitude, longitude, in degrees

PLACES: Final[Mapping[str, Place]] = {
    "ams": (52.4, 4.9), "arn": (59.3, 18.1), "atl": (33.7, -84.4), "bog": (4.7, -74.1), "bom": (19.1, 72.9),
    "bos": (42.4, -71.1), "cdg": (48.9, 2.4), "den": (39.7, -105.0), "dfw": (32.8, -96.8), "ewr": (40.7, -74.2),
    "eze": (-34.6, -58.4), "fra": (50.1, 8.7), "gdl": (20.7, -103.3), "gig": (-22.9, -43.2), "gru": (-23.5, -46.6),
    "hkg": (22.3, 114.2), "iad": (39.0, -77.5), "jnb": (-26.2, 28.0), "lax": (34.1, -118.2), "lhr": (51.5, -0.1),
    "mad": (40.4, -3.7), "mia": (25.8, -80.2), "nrt": (35.7, 139.7), "ord": (41.9, -87.6), "otp": (44.4, 26.1),
    "phx": (33.4, -112.1), "qro": (20.6, -100.4), "scl": (-33.4, -70.7), "sea": (47.6, -122.3), "sin": (1.4, 103.8),
    "sjc": (37.3, -121.9), "syd": (-33.9, 151.2), "waw": (52.2, 21.0), "yul": (45.5, -73.6), "yyz": (43.7, -79.4),
}  # fmt: skip

_EARTH_KM: Final = 6371.0


def distance_km(a: Place, b: Place) -> float:
    """Along the great circle (haversine)."""
    lat_a, lon_a, lat_b, lon_b = map(math.radians, (*a, *b))
    half = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return 2 * _EARTH_KM * math.asin(min(1.0, math.sqrt(half)))


def place_of(region: RegionCode, own: Mapping[RegionCode, Place]) -> Place | None:
    """Where a region is, by the operator's word or else by ours; None for one that nobody has placed."""
    return own.get(region) or PLACES.get(region)

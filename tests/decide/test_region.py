"""decide/region.py: what codes and aliases mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.region import AREAS, RegionWish

FLY = [
    "ams", "arn", "atl", "bog", "bom", "bos", "cdg", "den", "dfw", "ewr", "eze", "fra", "gdl", "gig", "gru", "hkg",
    "iad", "jnb", "lax", "lhr", "mad", "mia", "nrt", "ord", "otp", "phx", "qro", "scl", "sea", "sin", "sjc", "syd",
    "waw", "yul", "yyz", "maa", "mrs", "vin",
]  # fmt: skip
codes = st.sampled_from([*FLY, "home", "eu", "lab-2"])


def means(name: str, region: str) -> bool:
    return name in (region, "any") or region in AREAS.get(name, ())


def test_areas_hold_fly_codes_only_and_every_code_but_johannesburg_is_in_one() -> None:
    named = set().union(*AREAS.values())
    assert named <= set(FLY)
    assert set(FLY) - named == {"jnb"}


def test_no_region_is_in_two_continents_and_the_us_lies_in_north_america() -> None:
    continents = [AREAS[name] for name in ("apac", "eu", "na", "sa")]
    assert sum(map(len, continents)) == len(set().union(*continents))
    assert AREAS["us"] == AREAS["usa"] < AREAS["na"]


@pytest.mark.parametrize(
    ("name", "region", "expected"),
    [
        ("ams", "ams", True), ("ams", "fra", False), ("eu", "ams", True), ("eu", "iad", False), ("us", "iad", True),
        ("usa", "sjc", True), ("us", "yyz", False), ("na", "yyz", True), ("na", "qro", True), ("sa", "gru", True),
        ("apac", "syd", True), ("any", "ams", True), ("any", "home", True), ("home", "home", True),
        ("eu", "home", False), ("eu", "eu", True), ("nowhere", "ams", False),
    ],
)  # fmt: skip
def test_a_name_means_its_own_region_its_area_or_any(name: str, region: str, expected: bool) -> None:
    assert (RegionWish((name,), is_forced=True).rank(region) is not None) is expected


@given(st.lists(st.sampled_from([*FLY, *AREAS, "any", "home", "zz"]), max_size=8), st.lists(codes, max_size=8))
def test_a_regions_rank_is_that_of_the_first_name_that_means_it(names: list[str], known: list[str]) -> None:
    for is_forced in (False, True):
        expected = [
            next((at for at, name in enumerate(names) if means(name, one)), None if is_forced else len(names))
            for one in known
        ]
        assert RegionWish(tuple(names), is_forced).ranks(known) == expected

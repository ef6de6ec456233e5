"""decide/region.py: what codes and aliases mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.region import AREAS, RegionWish, expand_regions, names_region
from proxy.model import RegionCode

FLY = [
    "ams", "arn", "atl", "bog", "bom", "bos", "cdg", "den", "dfw", "ewr", "eze", "fra", "gdl", "gig", "gru", "hkg",
    "iad", "jnb", "lax", "lhr", "mad", "mia", "nrt", "ord", "otp", "phx", "qro", "scl", "sea", "sin", "sjc", "syd",
    "waw", "yul", "yyz", "maa", "mrs", "vin",
]  # fmt: skip
codes = st.sampled_from([*FLY, "home", "eu", "lab-2"])


def regions(*names: str) -> tuple[RegionCode, ...]:
    return tuple(map(RegionCode, names))


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
    assert names_region(name, region) is expected


def test_areas_come_in_the_order_of_the_list_with_the_local_region_first_in_its_own() -> None:
    known = regions("ams", "fra", "iad", "ord", "syd")
    expanded = expand_regions(("ord", "eu", "us", "any"), RegionCode("fra"), known)
    assert expanded == (regions("ord"), regions("fra", "ams"), regions("iad"), regions("syd"))


def test_what_is_not_known_is_left_out() -> None:
    assert expand_regions(("sjc", "sa"), RegionCode("home"), ()) == ()
    assert expand_regions(("sjc", "any"), RegionCode("home"), ()) == (regions("home"),)


@given(st.lists(st.sampled_from([*FLY, *AREAS, "any", "home", "zz"]), max_size=8), codes, st.lists(codes, max_size=8))
def test_each_region_comes_once_and_exactly_those_that_some_name_means(
    names: list[str], local: str, known: list[str]
) -> None:
    expanded = expand_regions(names, RegionCode(local), regions(*known))
    flat = [region for area in expanded for region in area]
    assert len(flat) == len(set(flat))
    assert set(flat) == {one for one in (local, *known) if any(names_region(name, one) for name in names)}
    assert all(expanded)


@given(st.lists(st.sampled_from([*FLY, *AREAS, "any", "home", "zz"]), max_size=8), st.lists(codes, max_size=8))
def test_a_regions_rank_is_that_of_the_first_name_that_means_it(names: list[str], known: list[str]) -> None:
    for is_forced in (False, True):
        expected = [
            next((at for at, name in enumerate(names) if names_region(name, one)), None if is_forced else len(names))
            for one in known
        ]
        assert RegionWish(tuple(names), is_forced).ranks(known) == expected

"""decide/places.py: where regions are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.places import FLY, Place, Places, distance_km
from proxy.decide.region import AREAS
from proxy.model import RegionCode

places = st.builds(Place, st.floats(-90, 90), st.floats(-180, 180))


def code(name: str) -> RegionCode:
    return RegionCode(name)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # Great-circle distances between the cities, to a percent.
        ("ams", "fra", 365), ("lhr", "cdg", 344), ("ams", "iad", 6_200), ("sjc", "iad", 3_850), ("syd", "sin", 6_300),
        ("lhr", "nrt", 9_560), ("gru", "jnb", 7_440), ("nrt", "sjc", 8_310), ("eze", "scl", 1_135), ("ewr", "bos", 305),
    ],
)  # fmt: skip
def test_distances_between_cities_are_those_of_the_globe(a: str, b: str, expected: float) -> None:
    assert distance_km(FLY[code(a)], FLY[code(b)]) == pytest.approx(expected, rel=0.015)


def test_the_far_side_of_the_earth_is_half_its_circumference_away() -> None:
    assert distance_km(Place(0, 0), Place(0, 180)) == pytest.approx(20_015, abs=1)
    assert distance_km(Place(90, 13), Place(-90, -50)) == pytest.approx(20_015, abs=1)
    assert distance_km(Place(52, 180), Place(52, -180)) == pytest.approx(0, abs=1e-6)


@given(places, places, places)
def test_distance_is_symmetric_bounded_and_no_detour_is_shorter(a: Place, b: Place, c: Place) -> None:
    assert 0 <= distance_km(a, b) <= 20_016
    assert distance_km(a, b) == pytest.approx(distance_km(b, a), abs=1e-6)
    assert distance_km(a, c) <= distance_km(a, b) + distance_km(b, c) + 1e-3
    assert distance_km(a, a) == pytest.approx(0, abs=1e-3)


def test_every_region_of_an_area_has_a_place_on_that_side_of_the_earth() -> None:
    assert set().union(*AREAS.values()) <= set(FLY)
    for one in AREAS["eu"]:
        assert 35 < FLY[code(one)].latitude < 65 and -10 < FLY[code(one)].longitude < 30
    for one in AREAS["na"]:
        assert 15 < FLY[code(one)].latitude < 60 and -125 < FLY[code(one)].longitude < -65
    for one in AREAS["sa"]:
        assert -40 < FLY[code(one)].latitude < 13 and -80 < FLY[code(one)].longitude < -34
    for one in AREAS["apac"]:
        assert 70 < FLY[code(one)].longitude < 155


def test_no_two_of_flys_regions_are_at_the_same_place() -> None:
    assert len({(one.latitude, one.longitude) for one in FLY.values()}) == len({one.city for one in FLY.values()})
    assert len({one.city for one in FLY.values()}) == len(FLY)


def test_an_operators_section_adds_a_region_and_its_word_on_one_of_flys_wins() -> None:
    known = Places({code("home"): (53.22, 6.57), code("ams"): (52.0, 4.0)})
    assert known.distance_km(code("home"), code("fra")) == pytest.approx(360, rel=0.15)
    assert known.distance_km(code("ams"), code("fra")) == distance_km(Place(52.0, 4.0), FLY[code("fra")])
    assert Places().distance_km(code("ams"), code("fra")) == distance_km(FLY[code("ams")], FLY[code("fra")])
    assert Places().distance_km(code("home"), code("fra")) is None


def test_what_is_nowhere_is_at_no_known_distance_but_from_itself() -> None:
    known = Places()
    assert known.distance_km(code("lab"), code("ams")) is None
    assert known.distance_km(code("lab"), code("lab")) == 0
    assert known.distance_km(code("ams"), code("fra")) == known.distance_km(code("fra"), code("ams"))

"""latency.py and places.py: medians, guesses from the map, and an order that jitter does not change."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.latency import Pair, RegionOrder, guess_s
from proxy.decide.places import PLACES, distance_km
from proxy.decide.region import AREAS
from proxy.model import RegionCode

AMS, IAD, SYD, FRA = (RegionCode(code) for code in ("ams", "iad", "syd", "fra"))


def test_every_region_of_an_area_has_a_place() -> None:
    assert {code for area in AREAS.values() for code in area} <= PLACES.keys()
    assert all(-90 <= lat <= 90 and -180 <= lon <= 180 for lat, lon in PLACES.values())


@pytest.mark.parametrize(("a", "b", "km"), [("ams", "lhr", 360), ("ams", "iad", 6200), ("syd", "gru", 13_400)])
def test_distances_are_those_of_an_atlas(a: str, b: str, km: float) -> None:
    assert distance_km(PLACES[a], PLACES[b]) == pytest.approx(km, rel=0.03)
    assert distance_km(PLACES[a], PLACES[b]) == pytest.approx(distance_km(PLACES[b], PLACES[a]))


def test_one_late_answer_moves_nothing_and_three_do() -> None:
    pair = Pair()
    for _ in range(5):
        pair.add(0.080)
    pair.add(2.0)
    assert pair.value_s == 0.080
    for _ in range(3):
        pair.add(0.160)
    assert pair.value_s == pytest.approx(0.160)
    assert pair.jitter_s > 0


@pytest.mark.parametrize("rtt", [0.0, -1.0, math.nan, math.inf, 31.0])
def test_what_is_no_round_trip_is_refused(rtt: float) -> None:
    pair = Pair()
    with pytest.raises(ValueError, match="round trip"):
        pair.add(rtt)
    assert pair.value_s == 0.0


def test_regions_that_were_never_measured_stand_by_the_map() -> None:
    order = RegionOrder(AMS)
    assert order.update(0.0, {}, [SYD, IAD, FRA, RegionCode("nowhere")])
    assert order.order == (AMS, FRA, IAD, SYD, RegionCode("nowhere"))
    # the one that was measured sets the scale for the others
    assert guess_s(AMS, SYD, {IAD: 0.31}, {}) == pytest.approx(0.31 * 16_650 / 6_200, rel=0.05)


def test_an_operators_region_stands_where_the_operator_says() -> None:
    order = RegionOrder(AMS, {RegionCode("barn"): (52.3, 4.8)})
    order.update(0.0, {}, [FRA, RegionCode("barn")])
    assert order.order == (AMS, "barn", FRA)


def test_a_lasting_change_moves_traffic_and_a_short_one_does_not() -> None:
    order = RegionOrder(AMS)
    order.update(0.0, {IAD: 0.080, SYD: 0.250}, [IAD, SYD])
    assert order.order == (AMS, IAD, SYD)
    order.update(1.0, {IAD: 0.400, SYD: 0.250}, [IAD, SYD])
    order.update(2.0, {IAD: 0.080, SYD: 0.250}, [IAD, SYD])
    order.update(4.0, {IAD: 0.400, SYD: 0.250}, [IAD, SYD])
    assert order.order == (AMS, IAD, SYD)
    order.update(6.0, {IAD: 0.400, SYD: 0.250}, [IAD, SYD])
    assert order.order == (AMS, SYD, IAD)
    assert order.rtt_s(IAD) == 0.400


@given(st.integers(0, 2**32))
def test_jitter_never_changes_the_order(seed: int) -> None:
    rng = random.Random(seed)
    order = RegionOrder(AMS)
    base = {IAD: 0.080, FRA: 0.0805}
    order.update(0.0, base, base)
    first = order.order
    for second in range(1, 60):
        noisy = {region: rtt + rng.uniform(-1, 1) * 0.9 * max(0.002, rtt * 0.1) for region, rtt in base.items()}
        assert not order.update(float(second), noisy, noisy)
    assert order.order == first


@given(st.integers(0, 2**32))
def test_a_change_shows_within_ten_seconds_of_samples(seed: int) -> None:
    rng = random.Random(seed)
    pairs = {IAD: Pair(), SYD: Pair()}
    order = RegionOrder(AMS)
    for second in range(40):
        for region, rtt in ((IAD, 0.08 if second < 20 else 0.4), (SYD, 0.25)):
            pairs[region].add(rtt * rng.uniform(1.0, 1.05))
        order.update(float(second), {region: pair.value_s for region, pair in pairs.items()}, pairs)
        if second == 19:
            assert order.order == (AMS, IAD, SYD)
        if second == 29:
            assert order.order == (AMS, SYD, IAD)


def test_a_region_that_is_gone_is_forgotten() -> None:
    order = RegionOrder(AMS)
    order.update(0.0, {IAD: 0.08}, [IAD])
    assert order.update(1.0, {}, [])
    assert order.order == (AMS,) and order.rtt_s(IAD) is None

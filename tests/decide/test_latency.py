"""decide/latency.py: estimates that spikes do not move, rows that may lie, an order that does not flap."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.latency import (
    FACTOR_S_KM,
    FARTHEST_S,
    MAX_NODES,
    MAX_REGIONS,
    Basis,
    LatencyError,
    LatencyTable,
    Pair,
    Ranking,
    margin_s,
)
from proxy.decide.places import FLY, Places
from proxy.model import NodeName, RegionCode

T0 = 1_000_000.0
AMS, FRA, IAD, SYD, HOME = (RegionCode(one) for one in ("ams", "fra", "iad", "syd", "home"))
LIES = [math.nan, math.inf, -math.inf, 0.0, -0.001, 10.5, 1e300, True, "0.01", None]


def n(name: str) -> NodeName:
    return NodeName(name)


def pair_of(*samples: float, start: float = T0) -> Pair:
    pair = Pair()
    for at, one in enumerate(samples):
        pair.add(one, start + at)
    return pair


# --- one pair


def test_a_pair_knows_nothing_until_it_was_measured() -> None:
    pair = Pair()
    assert pair.rtt_s(T0) is None and not pair.is_fresh(T0) and pair.count == 0


def test_one_or_two_spikes_move_nothing() -> None:
    pair = pair_of(*[0.010] * 6)
    for at, spike in enumerate((0.9, 0.010, 0.010, 0.010, 0.010, 0.7, 0.8, 0.010, 0.010)):
        pair.add(spike, T0 + 6 + at)
        assert pair.rtt_s(T0 + 6 + at) == pytest.approx(0.010)


def test_a_first_spike_is_forgotten_with_the_second_sample() -> None:
    assert pair_of(0.5, 0.010).rtt_s(T0 + 1) == 0.010


@pytest.mark.parametrize(("before", "after"), [(0.010, 0.080), (0.080, 0.010), (0.010, 0.014), (0.2, 0.15)])
def test_a_lasting_change_shows_within_five_samples(before: float, after: float) -> None:
    pair = pair_of(*[before] * 20, *[after] * 5)
    value = pair.rtt_s(T0 + 24)
    assert value is not None and abs(value - after) < 0.1 * abs(before - after)


@given(st.floats(0.0005, 0.3), st.lists(st.floats(-1, 1), min_size=6, max_size=40), st.integers(5, 39))
def test_the_estimate_stays_among_the_good_samples_whatever_one_spike_says(
    base: float, noise: list[float], at: int
) -> None:
    samples = [base * (1 + 0.2 * one) for one in noise]
    low, high = min(samples), max(samples)
    if at < len(samples):
        samples[at] = 9.9
    pair = Pair()
    for second, sample in enumerate(samples):
        pair.add(sample, T0 + second)
    value = pair.rtt_s(T0 + len(samples) - 1)
    assert value is not None and low * (1 - 1e-9) <= value <= high * (1 + 1e-9)


def test_an_estimate_ends_ten_seconds_after_its_last_sample_and_begins_anew() -> None:
    pair = pair_of(*[0.010] * 10)
    assert pair.rtt_s(T0 + 19) == pytest.approx(0.010)
    assert pair.rtt_s(T0 + 19.1) is None
    pair.add(0.060, T0 + 30)
    assert pair.rtt_s(T0 + 30) == 0.060 and pair.count == 1


def test_jitter_is_how_far_samples_lie_from_the_estimate() -> None:
    steady = pair_of(*[0.020] * 30)
    rng = random.Random(1)
    unsteady = pair_of(*(0.020 + rng.uniform(-0.004, 0.004) for _ in range(60)))
    assert steady.jitter_s == 0.0
    assert 0.001 < unsteady.jitter_s < 0.004  # 2 ms in the mean


@pytest.mark.parametrize("lie", LIES)
def test_a_sample_that_is_no_round_trip_is_refused_and_changes_nothing(lie: float) -> None:
    pair = pair_of(0.010)
    with pytest.raises(LatencyError, match="round trip"):
        pair.add(lie, T0 + 1)
    assert pair.rtt_s(T0 + 1) == 0.010 and pair.count == 1


# --- the order

regions = st.sampled_from(sorted(FLY))


@given(st.dictionaries(regions, st.floats(0.001, 0.4), min_size=2, max_size=12), st.integers(0, 2**32))
def test_noise_below_the_threshold_never_changes_the_order(bases: dict[RegionCode, float], seed: int) -> None:
    rng, ranking = random.Random(seed), Ranking()
    orders = set()
    for step in range(60):
        noisy = {region: base + rng.uniform(-0.0005, 0.0005) for region, base in bases.items()}
        orders.add(ranking.update(noisy, T0 + step / 2))
    assert len(orders) == 1


def test_a_lasting_change_takes_the_hold_and_no_more() -> None:
    ranking = Ranking()
    assert ranking.update({AMS: 0.010, FRA: 0.020}, T0) == (AMS, FRA)
    for step in range(6):
        assert ranking.update({AMS: 0.050, FRA: 0.020}, T0 + 1 + step / 2) == (AMS, FRA)
    assert ranking.update({AMS: 0.050, FRA: 0.020}, T0 + 4) == (FRA, AMS)


def test_a_change_that_comes_and_goes_starts_counting_anew() -> None:
    ranking = Ranking()
    ranking.update({AMS: 0.010, FRA: 0.020}, T0)
    for step in range(40):
        ams = 0.010 if step % 5 == 4 else 0.050
        assert ranking.update({AMS: ams, FRA: 0.020}, T0 + step / 2) == (AMS, FRA)


@pytest.mark.parametrize(
    ("ams", "swaps"),
    [(0.0219, False), (0.0223, True), (0.0201, False)],  # of 20 ms: 10 % of the longer one is more than 2 ms
)
def test_regions_swap_by_more_than_ten_percent_and_two_milliseconds(ams: float, swaps: bool) -> None:
    ranking = Ranking()
    ranking.update({AMS: 0.010, FRA: 0.020}, T0)
    for step in range(20):
        order = ranking.update({AMS: ams, FRA: 0.020}, T0 + step)
    assert order == ((FRA, AMS) if swaps else (AMS, FRA))


def test_near_regions_need_two_milliseconds_whatever_the_share() -> None:
    ranking = Ranking()
    ranking.update({AMS: 0.001, FRA: 0.0012}, T0)
    for step in range(20):
        assert ranking.update({AMS: 0.003, FRA: 0.0012}, T0 + step) == (AMS, FRA)


times = st.dictionaries(regions, st.floats(0.0005, 0.4), min_size=1, max_size=12)


@given(times, st.lists(st.tuples(times, st.floats(0.1, 2.0)), max_size=8))
def test_nothing_overtakes_what_is_nearer_and_what_lasts_comes_out_within_the_margin(
    first: dict[RegionCode, float], changes: list[tuple[dict[RegionCode, float], float]]
) -> None:
    ranking, now = Ranking(), T0
    order = ranking.update(first, now)
    current: Mapping[RegionCode, float] = first
    for change, pause in changes:
        now += pause
        current = {region: change.get(region, value) for region, value in first.items()}
        after = ranking.update(current, now)
        assert sorted(after) == sorted(first)
        for at, one in enumerate(after):
            for other in after[at + 1 :]:
                if order.index(other) < order.index(one):
                    assert current[one] <= current[other]  # it has overtaken `other`, and is nearer
        order = after
    for _ in range(2 + 8):
        now += 1.0
        order = ranking.update(current, now)
    for at, one in enumerate(order):
        for other in order[at + 1 :]:
            assert current[one] - current[other] <= margin_s(current[one]) + 1e-12


def test_newcomers_stand_where_their_time_belongs_and_the_gone_are_gone() -> None:
    ranking = Ranking()
    ranking.update({AMS: 0.010, IAD: 0.090}, T0)
    assert ranking.update({AMS: 0.010, IAD: 0.090, FRA: 0.017}, T0 + 1) == (AMS, FRA, IAD)
    assert ranking.update({IAD: 0.090, FRA: 0.017}, T0 + 2) == (FRA, IAD)


# --- the table


def a_table() -> LatencyTable:
    """This node `a1` in ams; others in ams, fra, iad, syd."""
    table = LatencyTable(n("a1"), AMS, Places())
    for node, region in (("a2", AMS), ("f1", FRA), ("f2", FRA), ("f3", FRA), ("i1", IAD), ("s1", SYD)):
        table.set_node(n(node), region)
    return table


def test_own_probes_count_from_the_own_region_before_what_neighbours_say() -> None:
    table = a_table()
    table.take_row(n("a2"), n("a2"), {n("f1"): 0.100}, T0)
    assert table.rtt(AMS, FRA, T0).rtt_s == 0.100
    table.sample(n("f1"), 0.007, T0)
    time = table.rtt(AMS, FRA, T0)
    assert (time.rtt_s, time.basis) == (0.007, Basis.MEASURED)


def test_a_region_is_as_far_as_the_middle_one_of_its_nodes() -> None:
    table = a_table()
    for node, rtt in (("f1", 0.0001), ("f2", 0.007), ("f3", 0.900)):  # one lies, one is sick
        table.sample(n(node), rtt, T0)
    assert table.rtt(AMS, FRA, T0).rtt_s == 0.007
    assert table.own_row(T0) == {n("f1"): 0.0001, n("f2"): 0.007, n("f3"): 0.900}
    assert table.own_row(T0 + 11) == {}


def test_a_region_that_was_measured_only_from_there_is_known() -> None:
    table = a_table()
    table.take_row(n("i1"), n("i1"), {n("a1"): 0.080, n("a2"): 0.082}, T0)
    assert table.rtt(AMS, IAD, T0).rtt_s == 0.080


def test_what_was_measured_is_remembered_for_ten_minutes_and_then_guessed() -> None:
    table = a_table()
    table.sample(n("i1"), 0.050, T0)
    assert table.rtt(AMS, IAD, T0).basis is Basis.MEASURED
    later = table.rtt(AMS, IAD, T0 + 60)
    assert (later.rtt_s, later.basis) == (0.050, Basis.REMEMBERED)
    guess = table.rtt(AMS, IAD, T0 + 700)
    assert guess.basis is Basis.DISTANCE and guess.rtt_s == pytest.approx(6_200 * FACTOR_S_KM, rel=0.02)


def test_unknown_pairs_come_by_distance_and_an_unplaced_region_comes_last() -> None:
    table = a_table()
    table.set_node(n("h1"), HOME)
    assert table.order(AMS, T0) == (AMS, FRA, IAD, SYD, HOME)
    assert table.rtt(AMS, HOME, T0).rtt_s == FARTHEST_S and table.rtt(AMS, HOME, T0).basis is Basis.NOTHING
    assert table.rtt(HOME, HOME, T0).rtt_s == 0


def a_globe(count: int, factor_s_km: float, liars: int = 0) -> LatencyTable:
    """One node in each of many regions, whose rows know distances by a factor; some lie by a thousand."""
    places, codes = Places(), sorted(FLY)[:count]
    table = LatencyTable(n(codes[0]), RegionCode(codes[0]), places)
    for code in codes:
        table.set_node(n(code), RegionCode(code))
    for at, code in enumerate(codes[1:]):
        row = {
            n(other): factor_s_km * km * (1000 if at < liars else 1)
            for other in codes[1:]
            if other != code and (km := places.distance_km(RegionCode(code), RegionCode(other))) is not None
        }
        table.take_row(n(code), n(code), {one: min(9.0, max(1e-6, rtt)) for one, rtt in row.items()}, T0)
    return table


@pytest.mark.parametrize("factor", [0.000_004, 0.000_012, 0.000_030])
def test_the_factor_is_fitted_to_what_is_measured(factor: float) -> None:
    assert a_globe(20, factor).factor_s_km(T0) == pytest.approx(factor, rel=0.01)


def test_a_third_of_lying_rows_does_not_move_the_factor() -> None:
    assert a_globe(20, 0.000_012, liars=6).factor_s_km(T0) == pytest.approx(0.000_012, rel=0.02)


def test_one_measured_pair_alone_does_not_set_the_scale() -> None:
    table = a_table()
    table.sample(n("i1"), 5.0, T0)
    assert table.factor_s_km(T0) == FACTOR_S_KM


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_row_is_refused_whole_and_the_last_one_stands(lie: float) -> None:
    table = a_table()
    table.take_row(n("f1"), n("f1"), {n("i1"): 0.085}, T0)
    with pytest.raises(LatencyError, match="f1 to s1"):
        table.take_row(n("f1"), n("f1"), {n("i1"): 0.001, n("s1"): lie}, T0 + 1)
    assert table.rtt(FRA, IAD, T0 + 1).rtt_s == 0.085


def test_a_node_speaks_of_its_own_row_only() -> None:
    table = a_table()
    with pytest.raises(LatencyError, match="a node's row is its own"):
        table.take_row(n("f1"), n("i1"), {n("a1"): 0.0001}, T0)
    with pytest.raises(LatencyError, match="it has its own row"):
        table.take_row(n("a1"), n("a1"), {n("i1"): 0.0001}, T0)
    with pytest.raises(LatencyError, match="not a node of the fleet"):
        table.take_row(n("x"), n("x"), {n("i1"): 0.0001}, T0)
    with pytest.raises(LatencyError, match="more than"):
        table.take_row(n("f1"), n("f1"), {n(f"n{at}"): 0.01 for at in range(MAX_NODES + 1)}, T0)
    assert table.rtt(AMS, IAD, T0).basis is Basis.DISTANCE


def test_entries_about_nodes_that_are_not_known_take_no_room() -> None:
    table = a_table()
    table.take_row(n("f1"), n("f1"), {n("nobody"): 0.01, n("f1"): 0.01, n("i1"): 0.085}, T0)
    assert table.rtt(FRA, IAD, T0).rtt_s == 0.085
    assert table.detours(n("nobody"), T0) == ()


def test_nodes_and_regions_are_bounded() -> None:
    table = LatencyTable(n("me"), AMS, Places())
    for at in range(MAX_NODES - 1):
        table.set_node(n(f"n{at}"), RegionCode(f"r{at % (MAX_REGIONS - 1)}"))
    with pytest.raises(LatencyError, match="nodes"):
        table.set_node(n("more"), AMS)
    table.remove_node(n("n0"))
    with pytest.raises(LatencyError, match="regions"):
        table.set_node(n("more"), FRA)
    with pytest.raises(LatencyError, match="not another node"):
        table.sample(n("nobody"), 0.01, T0)


def test_a_node_that_is_gone_takes_all_that_was_known_of_it_along() -> None:
    table = a_table()
    table.sample(n("i1"), 0.080, T0)
    table.take_row(n("i1"), n("i1"), {n("s1"): 0.2}, T0)
    table.order(AMS, T0)
    table.remove_node(n("i1"))
    table.remove_node(n("a1"))  # this node: it stays
    assert table.order(AMS, T0) == (AMS, FRA, SYD)
    assert table.node_rtt_s(n("i1"), T0) is None and table.detours(n("s1"), T0) == ()
    table.set_node(n("i1"), IAD)
    assert table.rtt(AMS, IAD, T0).basis is Basis.DISTANCE


def test_a_node_that_moves_is_of_its_new_region() -> None:
    table = a_table()
    table.sample(n("i1"), 0.080, T0)
    table.set_node(n("i1"), HOME)
    assert set(table.order(AMS, T0)) == {AMS, FRA, SYD, HOME}
    assert table.rtt(AMS, HOME, T0).rtt_s == 0.080


def test_detours_are_the_nodes_that_reach_another_by_the_whole_way() -> None:
    table = a_table()
    for node, rtt in (("f1", 0.007), ("f2", 0.009), ("i1", 0.080)):
        table.sample(n(node), rtt, T0)
    for node, rtt in (("f1", 0.400), ("f2", 0.270), ("i1", 0.200), ("f3", 0.001)):  # f3 is not reached from here
        table.take_row(n(node), n(node), {n("s1"): rtt}, T0)
    assert table.detours(n("s1"), T0) == (n("f2"), n("i1"), n("f1"))
    assert table.detours(n("s1"), T0 + 60) == ()


def test_traffic_moves_within_ten_seconds_of_a_link_that_turns_slow_and_not_for_its_jitter() -> None:
    """Probes each second, the order asked for twice a second; Frankfurt is far from the 60th second to the 120th."""
    rng, table = random.Random(6), a_table()
    changes: list[tuple[float, RegionCode]] = []
    for step in range(360):
        now = T0 + step / 2
        if step % 2 == 0:
            fra = 0.120 if 60 <= now - T0 < 120 else 0.010
            for node, rtt in (("f1", fra), ("f2", fra), ("f3", fra), ("i1", 0.080), ("s1", 0.250)):
                spike = 0.3 if rng.random() < 0.05 else 0.0
                table.sample(n(node), rtt * rng.uniform(0.9, 1.1) + spike, now)
        order = table.order(AMS, now)
        if not changes or changes[-1][1] != order[1]:
            changes.append((now - T0, order[1]))
    assert [region for _, region in changes] == [FRA, IAD, FRA]
    assert 60 < changes[1][0] <= 70 and 120 < changes[2][0] <= 130

"""decide/balance.py: which running machine gets a request, by load, by score and by name; when one more is wanted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.balance import (
    NOTHING,
    Asked,
    Preference,
    choose_machine,
    pick_named,
    recently_started,
    spared,
    wants_another,
)
from proxy.model import Balance, Machine, MachineId, MachineState, RegionCode

POLICIES = list(Balance)
OTHERS = [policy for policy in Balance if policy is not Balance.FLY]


@dataclass(frozen=True)
class Slot:
    slot: int


class Table:
    """Scores as a test states them."""

    def __init__(self, seconds: Sequence[float] = (), reported: Sequence[float | None] = ()) -> None:
        self.seconds, self.reported = seconds, reported

    def response_time(self, slot: int, now: float) -> float:
        return self.seconds[slot] if self.seconds else 0.01

    def reported_load(self, slot: int, now: float) -> float | None:
        return self.reported[slot] if self.reported else None


def slots(count: int) -> list[Slot]:
    return [Slot(at) for at in range(count)]


def chosen(
    loads: Sequence[int],
    soft: int,
    seed: int = 1,
    hard: int | None = None,
    policy: Balance = Balance.FLY,
    scores: Table | None = None,
) -> int | None:
    rng = random.Random(seed)
    one = choose_machine(slots(len(loads)), loads.__getitem__, soft, hard, rng, policy, scores or Table())
    return one.slot if one is not None else None


def counted(
    loads: Sequence[int],
    soft: int,
    draws: int,
    hard: int | None = None,
    policy: Balance = Balance.FLY,
    scores: Table | None = None,
) -> Counter[int | None]:
    rng, machines = random.Random(7), slots(len(loads))
    counts: Counter[int | None] = Counter()
    for _ in range(draws):
        one = choose_machine(machines, loads.__getitem__, soft, hard, rng, policy, scores or Table())
        counts[one.slot if one is not None else None] += 1
    return counts


def is_even(counts: Counter[int | None], among: Sequence[int]) -> bool:
    """Whether the draws fell on these alone, each within five standard deviations of its share."""
    total = sum(counts.values())
    share = total / len(among)
    allowed = 5 * (share * (1 - 1 / len(among))) ** 0.5
    return set(counts) == set(among) and all(abs(counts[one] - share) <= allowed for one in among)


class Asking:
    """Counts how many loads were read."""

    def __init__(self, load: Callable[[int], int]) -> None:
        self.load, self.asked = load, 0

    def __call__(self, slot: int) -> int:
        self.asked += 1
        return self.load(slot)


few_loads = st.lists(st.integers(0, 40), min_size=1, max_size=16)
many_loads = st.lists(st.integers(0, 40), min_size=17, max_size=60)
limits = st.none() | st.integers(0, 45)
seeds = st.integers(0, 99)

# --- all policies


@pytest.mark.parametrize("policy", POLICIES)
def test_of_none_there_is_none_to_choose(policy: Balance) -> None:
    assert chosen([], 20, policy=policy) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_single_machine_is_chosen_whatever_its_load(policy: Balance) -> None:
    assert chosen([1_000], 1, policy=policy) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_single_machine_at_its_hard_limit_is_not_chosen(policy: Balance) -> None:
    assert chosen([5], 1, hard=5, policy=policy) is None
    assert chosen([4], 1, hard=5, policy=policy) == 0


@given(few_loads | many_loads, st.integers(0, 40), limits, seeds, st.sampled_from(POLICIES))
def test_none_at_its_hard_limit_is_chosen_and_none_only_if_all_are(
    loads: list[int], soft: int, hard: int | None, seed: int, policy: Balance
) -> None:
    one = chosen(loads, soft, seed, hard, policy)
    if one is None:
        assert hard is not None and min(loads) >= hard
    else:
        assert hard is None or loads[one] < hard


@given(few_loads | many_loads, st.integers(0, 40), limits, seeds, st.sampled_from(POLICIES))
def test_the_choice_depends_on_its_arguments_alone(
    loads: list[int], soft: int, hard: int | None, seed: int, policy: Balance
) -> None:
    assert chosen(loads, soft, seed, hard, policy) == chosen(loads, soft, seed, hard, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_of_a_thousand_machines_only_a_few_are_looked_at(policy: Balance) -> None:
    machines, rng, load = slots(1_000), random.Random(3), Asking(lambda slot: slot % 40)
    for _ in range(1_000):
        assert choose_machine(machines, load, 20, 30, rng, policy, Table()) is not None
    assert load.asked <= 4_000


@pytest.mark.parametrize("policy", POLICIES)
def test_overload_of_a_thousand_machines_does_not_make_each_choice_a_scan(policy: Balance) -> None:
    machines, rng, load = slots(1_000), random.Random(3), Asking(lambda slot: 25)
    for _ in range(1_000):
        assert choose_machine(machines, load, 20, 30, rng, policy, Table()) is not None
    assert load.asked <= 50_000  # a scan each would be a million


# --- fly: bands


@given(few_loads, st.integers(0, 40), seeds)
def test_one_below_its_soft_limit_goes_before_any_at_or_above_it(loads: list[int], soft: int, seed: int) -> None:
    one = chosen(loads, soft, seed)
    assert one is not None
    if min(loads) < soft:
        assert loads[one] < soft


def test_within_a_band_the_draw_is_even_and_load_does_not_matter() -> None:
    assert is_even(counted([0, 19, 20, 5], 20, 3_000), [0, 1, 3])


def test_all_at_their_soft_limit_share_alike() -> None:
    assert is_even(counted([20, 90, 35], 20, 3_000), [0, 1, 2])


def test_between_the_limits_the_draw_is_even_and_leaves_out_who_is_full() -> None:
    assert is_even(counted([50, 20, 49, 60, 30], 20, 3_000, hard=50), [1, 2, 4])


def test_a_hard_limit_below_the_soft_one_is_the_one_that_holds() -> None:
    assert is_even(counted([3, 5, 4, 9], 20, 2_000, hard=5), [0, 2])


@pytest.mark.parametrize("busy", [0, 10, 30, 39])
def test_of_many_machines_too_the_draw_within_the_band_is_even(busy: int) -> None:
    loads = [25] * busy + [3] * (40 - busy)
    counts = counted(loads, 20, 8_000)
    below: Counter[int | None] = Counter(
        {one: count for one, count in counts.items() if one is not None and loads[one] < 20}
    )
    assert is_even(below, range(busy, 40))


def test_of_many_machines_all_above_their_soft_limit_the_draw_is_even() -> None:
    assert is_even(counted([25] * 40, 20, 8_000), range(40))


def test_of_many_machines_one_with_room_is_nearly_always_preferred() -> None:
    half = counted([25] * 50 + [3] * 50, 20, 2_000)
    assert sum(count for one, count in half.items() if one is not None and one < 50) == 0
    tenth = counted([25] * 90 + [3] * 10, 20, 2_000)
    assert sum(count for one, count in tenth.items() if one is not None and one < 90) < 400  # 0.9 ** 16 * 0.84 = 16 %


def test_the_only_one_with_room_of_a_thousand_is_found_before_long() -> None:
    assert counted([25] * 999 + [3], 20, 500)[999] > 2


def test_the_only_one_below_its_hard_limit_of_a_thousand_is_found_at_once() -> None:
    assert counted([30] * 999 + [29], 20, 20, hard=30) == {999: 20}


# --- the others: the better of two


def test_of_two_the_less_loaded_gets_the_request_even_if_both_are_below_their_soft_limit() -> None:
    assert counted([3, 2], 20, 200, policy=Balance.LEAST_LOADED) == {1: 200}


def test_least_loaded_settles_a_tie_by_draw() -> None:
    assert is_even(counted([4, 4, 4, 4], 20, 4_000, policy=Balance.LEAST_LOADED), range(4))


def test_least_loaded_never_takes_the_most_loaded_and_ranks_the_rest_by_load() -> None:
    counts = counted([9, 1, 5, 3], 2, 6_000, policy=Balance.LEAST_LOADED)
    shares = [counts[one] / 6_000 for one in (1, 3, 2)]
    assert counts[0] == 0  # whoever is drawn beside it has less
    assert shares == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.03)  # pairs of four where it is the lesser: 3, 2, 1


def test_the_two_are_drawn_evenly_from_those_below_their_hard_limit() -> None:
    counts = counted([9, 1, 9, 3, 5], 2, 6_000, hard=9, policy=Balance.LEAST_LOADED)
    assert set(counts) == {1, 3}
    assert counts[1] / 6_000 == pytest.approx(2 / 3, abs=0.03)


@given(few_loads, limits, seeds)
def test_of_two_machines_least_loaded_takes_the_lesser(loads: list[int], hard: int | None, seed: int) -> None:
    two = [*loads, *loads][:2] if len(loads) == 1 else loads[:2]
    one = chosen(two, 0, seed, hard, Balance.LEAST_LOADED)
    assert one is None or two[one] == min(two)


def test_a_machine_that_answers_slowly_waits_until_the_fast_one_has_as_much_to_do() -> None:
    scores = Table(seconds=[0.2, 0.005])
    assert counted([0, 38], 20, 50, policy=Balance.PEAK_EWMA, scores=scores) == {1: 50}  # 39 x 5 ms < 200 ms
    assert counted([0, 40], 20, 50, policy=Balance.PEAK_EWMA, scores=scores) == {0: 50}


@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0.00001, 60)), min_size=2, max_size=2), seeds, st.integers(0, 40)
)
def test_peak_ewma_takes_the_lower_product_of_load_and_response_time(
    machines: list[tuple[int, float]], seed: int, soft: int
) -> None:
    loads, seconds = zip(*machines, strict=True)
    one = chosen(loads, soft, seed, policy=Balance.PEAK_EWMA, scores=Table(seconds=seconds))
    costs = [(load + 1) * second for load, second in machines]
    assert one is not None and costs[one] == min(costs)


def test_what_the_app_reports_counts_for_more_than_what_is_in_flight() -> None:
    scores = Table(reported=[0.9, 0.2])
    assert counted([0, 30], 20, 50, policy=Balance.APP_LOAD, scores=scores) == {1: 50}


def test_where_one_of_two_reports_nothing_the_load_decides() -> None:
    assert counted([0, 30], 20, 50, policy=Balance.APP_LOAD, scores=Table(reported=[0.9, None])) == {0: 50}
    assert counted([7, 3], 20, 50, policy=Balance.APP_LOAD, scores=Table(reported=[None, None])) == {1: 50}


def test_where_both_report_the_same_the_load_decides() -> None:
    assert counted([7, 3], 20, 50, policy=Balance.APP_LOAD, scores=Table(reported=[0.5, 0.5])) == {1: 50}


def test_bands_hold_for_fly_alone() -> None:
    for policy in (Balance.PEAK_EWMA, Balance.APP_LOAD):
        scores = Table(seconds=[0.2, 0.001], reported=[0.9, 0.1])
        assert chosen([19, 20], 20, policy=policy, scores=scores) == 1


@pytest.mark.parametrize("policy", [Balance.PEAK_EWMA, Balance.APP_LOAD])
def test_a_policy_that_needs_scores_says_so(policy: Balance) -> None:
    with pytest.raises(ValueError, match="needs scores"):
        choose_machine(slots(2), lambda slot: 0, 20, None, random.Random(1), policy)


# --- by name

A, B = MachineId("a"), MachineId("b")


def named(
    want: Preference, loads: tuple[int, int] = (0, 0), hard: int | None = None, sick: Sequence[int] = ()
) -> tuple[Asked, int | None, str | None]:
    started = {A: Slot(0), B: Slot(1)}
    result = pick_named(want, started, lambda one: one.slot not in sick, loads.__getitem__, hard)
    return result.outcome, result.machine.slot if result.machine is not None else None, result.unavailable


def test_who_names_no_machine_leaves_it_to_the_load() -> None:
    assert named(NOTHING) == (Asked.NOT, None, None)
    assert named(Preference(exclude=frozenset({A}))) == (Asked.NOT, None, None)


@pytest.mark.parametrize("want", [Preference(force=B), Preference(prefer=B)])
def test_a_machine_asked_for_by_name_is_taken_above_its_soft_limit_too(want: Preference) -> None:
    assert named(want, (0, 4), 5) == (Asked.CHOSEN, 1, None)
    assert named(want, (0, 900)) == (Asked.CHOSEN, 1, None)


def test_a_preferred_machine_that_is_full_gone_sick_or_tried_is_said_to_be_unavailable() -> None:
    unavailable = (Asked.UNAVAILABLE, None, B)
    assert named(Preference(prefer=B), (0, 5), 5) == unavailable
    assert named(Preference(prefer=B), sick=[1]) == unavailable
    assert named(Preference(prefer=B, exclude=frozenset({B}))) == unavailable
    assert named(Preference(prefer=MachineId("c"))) == (Asked.UNAVAILABLE, None, "c")


def test_a_forced_machine_is_taken_though_its_checks_fail() -> None:
    assert named(Preference(force=B), sick=[1]) == (Asked.CHOSEN, 1, None)


def test_a_forced_machine_at_its_hard_limit_is_waited_for() -> None:
    assert named(Preference(force=B), (0, 5), 5) == (Asked.FULL, 1, None)


def test_a_forced_machine_that_does_not_run_or_was_tried_is_missing() -> None:
    assert named(Preference(force=MachineId("c"))) == (Asked.MISSING, None, None)
    assert named(Preference(force=B, exclude=frozenset({B}))) == (Asked.MISSING, None, None)


def test_who_forces_one_and_prefers_another_gets_the_forced_one_or_none() -> None:
    assert named(Preference(force=B, prefer=A)) == (Asked.CHOSEN, 1, None)
    assert named(Preference(force=MachineId("c"), prefer=A)) == (Asked.MISSING, None, None)


ids = st.none() | st.sampled_from([A, B, MachineId("c")])


@given(ids, ids, st.frozensets(st.sampled_from([A, B])), st.tuples(st.integers(0, 6), st.integers(0, 6)), limits)
def test_no_machine_but_the_named_one_is_picked_and_none_that_is_excluded(
    force: MachineId | None,
    prefer: MachineId | None,
    exclude: frozenset[MachineId],
    loads: tuple[int, int],
    hard: int | None,
) -> None:
    outcome, slot, unavailable = named(Preference(force, prefer, exclude), loads, hard)
    asked_for = force or prefer
    if slot is not None:
        name = (A, B)[slot]
        assert name == asked_for and name not in exclude
        assert (outcome is Asked.FULL) == (hard is not None and loads[slot] >= hard)
    assert (outcome is Asked.NOT) == (asked_for is None)
    assert (unavailable is not None) == (outcome is Asked.UNAVAILABLE)
    assert outcome is not Asked.UNAVAILABLE or force is None


# --- one more machine


@given(st.lists(st.integers(0, 40)), st.integers(0, 40))
def test_one_more_is_wanted_only_if_machines_run_and_none_has_room(loads: list[int], soft: int) -> None:
    assert wants_another(loads, soft) == (bool(loads) and min(loads) >= soft)


def test_the_first_machine_with_room_ends_the_look_for_one_more() -> None:
    seen: list[int] = []
    assert not wants_another((seen.append(load) or load for load in (20, 3, 20)), 20)  # type: ignore[func-returns-value]
    assert seen == [20, 3]


NOW = 1_800_000_000.0


def machine(state: MachineState, started_at: float = NOW - 300, failing: tuple[int, ...] = ()) -> Machine:
    return Machine(A, RegionCode("ams"), "app", state, 1, 0, failing_ports=failing, started_at=started_at)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (machine(MachineState.STARTED, NOW - 19.9, (80,)), True),
        (machine(MachineState.STARTED, NOW, (80,)), True),
        (machine(MachineState.STARTED, NOW - 20.0, (80,)), False),  # it has had its time
        (machine(MachineState.STARTED, NOW - 5), False),  # its checks pass: it takes requests already
        (machine(MachineState.STARTED, NOW - 5, (81,)), False),  # another service's check
        (machine(MachineState.STARTED, 0.0, (80,)), False),  # not known when
        (machine(MachineState.STARTED, NOW + 3_600, (80,)), False),  # the clock was set back
        (machine(MachineState.STARTING), True),
        (machine(MachineState.STOPPED, NOW - 5, (80,)), False),
        (machine(MachineState.SUSPENDED, NOW - 5, (80,)), False),
        (machine(MachineState.FAILED, NOW - 5, (80,)), False),
    ],
)
def test_a_start_that_has_yet_to_bear_fruit_holds_back_further_ones(one: Machine, expected: bool) -> None:
    assert recently_started([one], NOW, 80) is expected
    assert recently_started([machine(MachineState.STARTED), one], NOW, 80) is expected


def test_where_nothing_was_started_nothing_is_held_back() -> None:
    assert not recently_started([], NOW, 80)


@given(few_loads, st.integers(0, 40))
def test_those_that_failed_lately_are_spared_unless_all_did(loads: list[int], most: int) -> None:
    machines = slots(len(loads))
    kept = list(spared(machines, lambda one: loads[one.slot] > most))
    good = [one for one in machines if loads[one.slot] <= most]
    assert kept == (good or machines)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.autostop import (
    Policy,
    Resting,
    Use,
    WarmHours,
    choose_excess,
    choose_idle,
    choose_to_warm,
    is_busy_until,
    is_busy_value,
    parse_warm_hours,
    policy_of,
)
from proxy.model import Autostop, MachineId, MachineState, Service

STOP = Policy(Autostop.STOP, soft_limit=10, min_running=0)


def uses(*loads: int) -> list[Use]:
    return [Use(MachineId(f"m{place}"), load, 0.0) for place, load in enumerate(loads)]


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ((), None),
        ((0,), "m0"),  # a lone machine without load
        ((1,), None),
        ((0, 0), "m0"),  # 2 - (0 + 1) = 1
        ((3, 2), "m1"),  # the least loaded
        ((11, 0), None),  # 2 - (1 + 1) = 0
        ((10, 0), "m1"),  # at the soft limit is not above it
        ((11, 0, 0), "m1"),
        ((11, 11, 5), None),
        ((11, 11, 5, 6), "m2"),
    ],
)
def test_excess_follows_flys_formula(loads: tuple[int, ...], chosen: str | None) -> None:
    assert choose_excess(uses(*loads), STOP) == ([] if chosen is None else [chosen])


def test_the_primary_region_keeps_its_minimum_running() -> None:
    policy = Policy(Autostop.STOP, 10, min_running=2)
    assert choose_excess(uses(0, 0), policy) == []
    assert choose_excess(uses(0, 0, 0), policy) == ["m0"]
    assert choose_idle(uses(0, 0, 0), policy, now=100.0, idle_timeout_s=5.0) == ["m0"]


def test_autostop_off_stops_nothing() -> None:
    off = Policy(Autostop.OFF, 10, 0)
    assert choose_excess(uses(0, 0, 0), off) == []
    assert choose_idle(uses(0), off, 100.0, 1.0) == []


def test_idle_machines_are_those_unused_for_the_whole_timeout_longest_first() -> None:
    running = [Use(MachineId("a"), 0, 90.0), Use(MachineId("b"), 0, 80.0), Use(MachineId("c"), 1, 0.0)]
    running.append(Use(MachineId("d"), 0, 99.0))
    assert choose_idle(running, STOP, now=100.0, idle_timeout_s=10.0) == ["b", "a"]


def service(autostop: Autostop, soft: int = 10, least: int = 0) -> Service:
    return Service("tcp", 8080, (), autostop=autostop, soft_limit=soft, min_machines_running=least)


@pytest.mark.parametrize(
    ("modes", "mode"),
    [
        ((), Autostop.OFF),
        ((Autostop.STOP,), Autostop.STOP),
        ((Autostop.SUSPEND, Autostop.SUSPEND), Autostop.SUSPEND),
        ((Autostop.SUSPEND, Autostop.STOP), Autostop.STOP),
        ((Autostop.STOP, Autostop.OFF), Autostop.OFF),
    ],
)
def test_a_machine_may_be_stopped_only_if_all_its_services_say_so(modes: tuple[Autostop, ...], mode: Autostop) -> None:
    assert policy_of((service(one) for one in modes), True).mode is mode


def test_services_of_one_machine_join_to_the_careful_side() -> None:
    both = (service(Autostop.STOP, soft=5, least=1), service(Autostop.STOP, soft=20, least=3))
    assert policy_of(both, is_primary=True) == Policy(Autostop.STOP, 5, 3)
    assert policy_of(both, is_primary=False) == Policy(Autostop.STOP, 5, 0)


@pytest.mark.parametrize(
    ("loads", "at_once", "chosen"),
    [
        ((0, 0, 0, 0), 3, ["m0", "m1", "m2"]),
        ((0, 0, 0, 0), 9, ["m0", "m1", "m2"]),  # 4 - (0 + 1) = 3
        ((0, 0, 0, 4), 9, ["m0", "m1", "m2"]),
        ((8, 8, 8, 8), 3, ["m0"]),  # Fly's one; without a second, two would have 32 for 20
        ((5, 5, 5, 5), 3, ["m0", "m1"]),  # two have 20 for 20
        ((0,), 5, ["m0"]),
        ((0, 0), 0, []),
    ],
)
def test_a_pass_stops_more_than_one_only_where_those_left_can_carry_the_load(
    loads: tuple[int, ...], at_once: int, chosen: list[str]
) -> None:
    assert choose_excess(uses(*loads), STOP, at_once) == chosen


def test_a_busy_machine_is_passed_by_however_idle_it_looks() -> None:
    busy, idle = Use(MachineId("a"), 0, 0.0, is_busy=True), Use(MachineId("b"), 3, 0.0)
    assert choose_excess([busy, idle], STOP) == ["b"]
    assert choose_excess([busy], STOP) == []
    assert choose_idle([busy], STOP, 100.0, 1.0) == []


@given(
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=12), st.integers(0, 5), st.integers(0, 12),
    st.floats(0, 200), st.floats(0.1, 100),
)  # fmt: skip
def test_no_pass_goes_below_the_minimum_and_none_takes_a_busy_machine_for_idle(
    loads: list[tuple[int, bool]], least: int, at_once: int, now: float, timeout: float
) -> None:
    running = [Use(MachineId(f"m{place}"), load, 0.0, busy) for place, (load, busy) in enumerate(loads)]
    by_id, policy = {one.id: one for one in running}, Policy(Autostop.STOP, 10, least)
    idle = choose_idle(running, policy, now, timeout)
    assert len(running) - len(idle) >= min(least, len(running))
    assert all(by_id[one].load == 0 and not by_id[one].is_busy for one in idle)
    excess = choose_excess(running, policy, at_once)
    left = len(running) - len(excess)
    assert len(excess) <= at_once and left >= min(least, len(running))
    assert not any(by_id[one].is_busy for one in excess) and len(set(excess)) == len(excess)
    if len(excess) > 1:
        assert sum(one.load for one in running) <= 10 * left
    if len(running) > 1 and excess:
        assert left > sum(1 for one in running if one.load > 10)


# --- busy


@pytest.mark.parametrize(
    ("value", "busy"),
    [(None, False), ("true", True), ("false", False), ("1000.5", True), ("1000", False), ("999", False), ("", False),
     ("soon", False), ("nan", False)],
)  # fmt: skip
def test_metadata_says_busy_with_true_or_with_a_time_to_come(value: str | None, busy: bool) -> None:
    assert is_busy_until(value, unix_s=1000.0) is busy


@given(st.text(max_size=20))
def test_values_that_may_be_set_are_those_that_are_understood(value: str) -> None:
    if is_busy_value(value):
        assert value in ("true", "false") or float(value) >= 0
    is_busy_until(value, 0.0)  # and none raises


# --- warm hours


def test_in_warm_hours_one_machine_stays_at_least() -> None:
    assert policy_of((service(Autostop.STOP),), True, is_warm=True).min_running == 1
    assert policy_of((service(Autostop.STOP, least=3),), True, is_warm=True).min_running == 3
    assert policy_of((service(Autostop.STOP, least=3),), False, is_warm=True).min_running == 1
    assert policy_of((service(Autostop.OFF),), True, is_warm=True).mode is Autostop.OFF


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("mon-fri 08:00-18:00 Europe/Amsterdam", WarmHours((0, 1, 2, 3, 4), 480, 1080, "Europe/Amsterdam")),
        ("daily 0:00-24:00", WarmHours((0, 1, 2, 3, 4, 5, 6), 0, 1440, "UTC")),
        ("  Sat,SUN  22:30 - 02:15   UTC ", WarmHours((5, 6), 1350, 135, "UTC")),
        ("sat-mon,wed 9:05-9:06", WarmHours((0, 2, 5, 6), 545, 546, "UTC")),
        ("tue-tue 9:00-10:00", WarmHours((1,), 540, 600, "UTC")),
    ],
)
def test_warm_hours_are_read(text: str, hours: WarmHours) -> None:
    assert parse_warm_hours(text) == hours


@pytest.mark.parametrize(
    "text",
    ["", "mon", "mon 8-18", "mon 08:00-08:00", "mon 24:00-08:00", "mon 08:60-09:00", "mon 08:00-24:01",
     "day 08:00-09:00", "mon- 08:00-09:00", "mon,,tue 08:00-09:00",
     "mon 08:00-09:00 Europe/Amsterdam too", "mon ٠8:00-09:00"],
)  # fmt: skip
def test_what_is_no_warm_hours_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_warm_hours(text)


@given(st.sets(st.integers(0, 6), min_size=1), st.integers(0, 1439), st.integers(0, 1440), st.integers(0, 10_079))
def test_warm_hours_contain_the_minutes_that_counting_them_gives(days: set[int], begin: int, end: int, at: int) -> None:
    if begin == end:
        return
    length = end - begin if end > begin else end + 1440 - begin
    expected = any((at - (day * 1440 + begin)) % 10_080 < length for day in days)
    assert WarmHours(tuple(days), begin, end).contains(at // 1440, at % 1440) is expected


@given(
    st.lists(st.tuples(st.sampled_from(list(MachineState)), st.booleans()), max_size=8), st.integers(0, 4),
    st.integers(0, 4),
)  # fmt: skip
def test_warming_starts_only_what_may_be_started_and_only_while_too_few_run(
    states: list[tuple[MachineState, bool]], running: int, least: int
) -> None:
    resting = [Resting(MachineId(f"m{place}"), state, held) for place, (state, held) in enumerate(states)]
    chosen = choose_to_warm(resting, running, Policy(Autostop.STOP, 10, least))
    able = {one.id: one for one in resting if one.state.is_startable and not one.is_held}
    assert (chosen is not None) == (running < least and bool(able))
    if chosen is not None and any(one.state is MachineState.SUSPENDED for one in able.values()):
        assert able[chosen].state is MachineState.SUSPENDED
    assert choose_to_warm(resting, 0, Policy(Autostop.OFF, 0, 0)) is None

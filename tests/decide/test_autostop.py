from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.autostop import Policy, Use, choose_excess, choose_idle, policy_of
from proxy.model import Autostop, MachineId, Service

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
    assert choose_excess(uses(*loads), STOP) == chosen


def test_the_primary_region_keeps_its_minimum_running() -> None:
    policy = Policy(Autostop.STOP, 10, min_running=2)
    assert choose_excess(uses(0, 0), policy) is None
    assert choose_excess(uses(0, 0, 0), policy) == "m0"
    assert choose_idle(uses(0, 0, 0), policy, now=100.0, idle_timeout_s=5.0) == ["m0"]


def test_autostop_off_stops_nothing() -> None:
    off = Policy(Autostop.OFF, 10, 0)
    assert choose_excess(uses(0, 0, 0), off) is None
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


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 5), st.floats(0, 200), st.floats(0.1, 100))
def test_no_pass_goes_below_the_minimum_and_none_takes_a_busy_machine_for_idle(
    loads: list[int], least: int, now: float, timeout: float
) -> None:
    running, policy = uses(*loads), Policy(Autostop.STOP, 10, least)
    idle = choose_idle(running, policy, now, timeout)
    assert len(running) - len(idle) >= min(least, len(running))
    assert all(one.load == 0 for one in running if one.id in idle)
    excess = choose_excess(running, policy)
    assert excess is None or len(running) - 1 >= least

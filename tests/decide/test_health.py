"""One check's status over time: starts, grace periods, flips, and when the next check is due."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.health import (
    LONGEST_QUICK_PAUSE_S,
    QUICK_INTERVALS,
    SHORTEST_PAUSE_S,
    CheckState,
    Status,
    restart_is_due,
)
from proxy.model import Check

T0 = 1000.0


def a_check(interval_s: float = 15.0, grace_s: float = 1.0) -> Check:
    return Check("http", interval_s, 2.0, grace_s)


def started(check: Check | None = None) -> CheckState:
    state = CheckState(check or a_check(), T0 - 500.0, Status.PASSING)
    state.started(T0)
    return state


# --- status


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([], Status.WARNING),
        ([(0.0, True)], Status.PASSING),
        ([(0.5, False)], Status.WARNING),
        ([(0.999, False)], Status.WARNING),
        ([(1.0, False)], Status.CRITICAL),
        ([(0.5, False), (0.6, True)], Status.PASSING),
        ([(0.5, True), (0.6, False)], Status.CRITICAL),  # the first pass ends the grace period
        ([(5.0, False), (6.0, True)], Status.PASSING),
        ([(5.0, True), (20.0, False)], Status.CRITICAL),
        ([(5.0, True), (20.0, False), (21.0, True)], Status.PASSING),
    ],
)
def test_one_result_flips_a_started_check_and_early_failures_are_warnings(
    results: list[tuple[float, bool]], status: Status
) -> None:
    state = started()
    for after, passes in results:
        state.heard(passes, T0 + after)
    assert state.status is status
    assert state.is_passing is (status is Status.PASSING)
    assert state.is_known is bool(results)


def test_without_a_grace_period_the_first_failure_is_critical() -> None:
    state = started(a_check(grace_s=0.0))
    state.heard(False, T0)
    assert state.status is Status.CRITICAL


def test_what_was_known_before_a_start_is_void() -> None:
    state = CheckState(a_check(), T0 - 100.0, Status.CRITICAL)
    state.heard(False, T0 - 50.0)
    state.started(T0)
    assert (state.status, state.is_known, state.critical_since) == (Status.WARNING, False, None)


@pytest.mark.parametrize("held", [Status.PASSING, Status.CRITICAL])
def test_a_resumed_machine_is_what_it_was_until_the_next_result(held: Status) -> None:
    state = CheckState(a_check(), T0 - 100.0, held)
    state.heard(held is Status.PASSING, T0 - 50.0)
    state.resumed(T0)
    assert state.status is held and state.is_known


def test_a_critical_check_stays_critical_over_a_resume_and_its_grace_period() -> None:
    state = CheckState(a_check(), T0 - 100.0, Status.CRITICAL)
    state.resumed(T0)
    state.heard(False, T0 + 0.1)
    assert state.status is Status.CRITICAL and state.critical_since == T0


# --- moments


def test_checks_after_a_start_are_close_together_until_the_first_pass() -> None:
    state, rng, now, moments = started(), random.Random(1), T0, []
    while now < T0 + 20.0:
        state.heard(False, now)
        now = state.next_check(now, rng)
        moments.append(now - T0)
    assert moments[0] == pytest.approx(SHORTEST_PAUSE_S)
    assert sum(moment < 1.0 for moment in moments) >= 9
    assert max(b - a for a, b in itertools.pairwise(moments)) <= LONGEST_QUICK_PAUSE_S + 1e-9
    state.heard(True, now)
    assert state.next_check(now, rng) - now >= 7.5


def test_two_intervals_after_a_start_a_check_that_never_passed_is_regular() -> None:
    state, rng = started(a_check(interval_s=4.0)), random.Random(1)
    state.heard(False, T0 + 7.9)
    assert state.next_check(T0 + 7.9, rng) <= T0 + 7.9 + LONGEST_QUICK_PAUSE_S
    state.heard(False, T0 + 8.1)
    assert state.next_check(T0 + 8.1, rng) >= T0 + 8.1 + 2.0


def test_quick_checks_are_never_slower_than_the_interval() -> None:
    state = started(a_check(interval_s=0.5))
    state.heard(False, T0 + 0.9)
    assert state.next_check(T0 + 0.9, random.Random(1)) <= T0 + 1.4


def test_a_first_pass_may_be_waited_for_during_the_grace_period_and_two_intervals() -> None:
    assert started(a_check(interval_s=10.0, grace_s=5.0)).first_pass_by == T0 + 25.0


def test_machines_started_together_drift_apart() -> None:
    rng, seconds = random.Random(1), []
    for _ in range(200):
        state = started()
        state.heard(True, T0)
        seconds.append(round(state.next_check(T0, rng) - T0))
    assert len(set(seconds)) >= 7
    assert max(seconds.count(one) for one in set(seconds)) < 60


@given(
    interval_s=st.floats(1.0, 60.0),
    grace_s=st.floats(0.0, 60.0),
    steps=st.lists(st.tuples(st.sampled_from(["pass", "fail", "start", "resume"]), st.floats(0.0, 90.0)), max_size=60),
    seed=st.integers(0, 2**32),
)
def test_whatever_happens_the_next_check_is_soon_enough_and_the_status_follows_the_last_result(
    interval_s: float, grace_s: float, steps: list[tuple[str, float]], seed: int
) -> None:
    state, now, rng = CheckState(a_check(interval_s, grace_s), T0, Status.PASSING), T0, random.Random(seed)
    state.started(now)
    for what, later in steps:
        now += later
        if what == "start":
            state.started(now)
            assert not state.is_passing
        elif what == "resume":
            before = state.status
            state.resumed(now)
            assert state.status is before
        else:
            state.heard(what == "pass", now)
            assert state.is_passing is (what == "pass")
        assert now < state.next_check(now, rng) <= now + interval_s
        assert (state.critical_since is not None) is (state.status is Status.CRITICAL)
        assert state.first_pass_by <= now + grace_s + QUICK_INTERVALS * interval_s


# --- restarts


def test_a_restart_is_due_after_the_time_of_uninterrupted_failure() -> None:
    state = started()
    state.heard(False, T0 + 0.5)  # within the grace period: it does not count
    assert not restart_is_due([state], 1.0, T0 + 100.0)
    state.heard(False, T0 + 2.0)
    state.heard(False, T0 + 40.0)
    assert not restart_is_due([state], 60.0, T0 + 61.9)
    assert restart_is_due([state], 60.0, T0 + 62.0)
    state.heard(True, T0 + 62.0)
    state.heard(False, T0 + 63.0)
    assert not restart_is_due([state], 60.0, T0 + 100.0)


def test_no_restart_is_due_unless_it_was_asked_for() -> None:
    state = started(a_check(grace_s=0.0))
    state.heard(False, T0)
    assert not restart_is_due([state], 0.0, T0 + 1e9)


def test_one_of_several_checks_that_fails_long_enough_is_enough() -> None:
    good, bad = started(), started()
    good.heard(True, T0 + 5.0)
    bad.heard(False, T0 + 5.0)
    assert restart_is_due([good, bad], 10.0, T0 + 15.0)
    assert not restart_is_due([good], 10.0, T0 + 15.0)

from __future__ import annotations

import pytest

from proxy.decide.restart import hold_left_s, hold_s, restart_pause_s
from proxy.model import RestartPolicy

NO, ON_FAILURE, ALWAYS = RestartPolicy.NO, RestartPolicy.ON_FAILURE, RestartPolicy.ALWAYS


@pytest.mark.parametrize(
    ("policy", "code", "signal", "tries", "pause"),
    [
        (NO, 1, None, 0, None),
        (NO, None, 9, 0, None),
        (ON_FAILURE, 0, None, 0, None),
        (ON_FAILURE, 1, None, 0, 0.0),
        (ON_FAILURE, None, 9, 0, 0.0),
        (ON_FAILURE, None, None, 0, 0.0),  # an unknown end counts as a failure
        (ON_FAILURE, 1, None, 1, 1.0),
        (ON_FAILURE, 1, None, 9, 30.0),
        (ON_FAILURE, 1, None, 10, None),
        (ALWAYS, 0, None, 0, 0.0),
        (ALWAYS, 1, None, 50, 30.0),
    ],
)
def test_restart_policy(
    policy: RestartPolicy, code: int | None, signal: int | None, tries: int, pause: float | None
) -> None:
    assert restart_pause_s(policy, code, signal, [1000.0] * tries, 1001.0, 10) == pause


def test_tries_of_more_than_five_minutes_ago_do_not_count() -> None:
    assert restart_pause_s(ON_FAILURE, 1, None, [0.0] * 10, 301.0, 10) == 0.0


def test_holds_double_up_to_a_minute() -> None:
    assert [hold_s(failures) for failures in (0, 1, 2, 3, 4, 5, 6, 7, 8, 1000)] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(("until", "left"), [(0.0, 0.0), (990.0, 0.0), (1000.0, 0.0), (1001.5, 1.5), (1060.0, 60.0)])
def test_a_hold_lasts_to_its_time(until: float, left: float) -> None:
    assert hold_left_s(until, 1000.0) == left


def test_a_hold_is_over_when_the_clock_was_set_back() -> None:
    assert hold_left_s(1_000_060.0, 1_000_060.0 - 86_400.0) == 0.0

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.errors import Failure
from certs.renewal import RenewalWindow, due_at, retry_at

DAY = 86_400.0


def test_a_certificate_is_due_around_two_thirds_of_its_life_and_names_are_spread() -> None:
    times = [due_at(0, 90 * DAY, None, f"name{number}") for number in range(200)]
    assert all(58 * DAY <= one <= 60 * DAY for one in times)
    assert max(times) - min(times) > DAY
    assert times[0] == due_at(0, 90 * DAY, None, "name0")


def test_a_short_life_is_renewed_at_its_half() -> None:
    assert 2.8 * DAY <= due_at(0, 6 * DAY, None, "a") <= 3 * DAY


def test_the_cas_window_counts_more_than_our_own_rule() -> None:
    window = RenewalWindow(10 * DAY, 12 * DAY)
    times = [due_at(0, 90 * DAY, window, f"name{number}") for number in range(200)]
    assert all(10 * DAY <= one <= 12 * DAY for one in times)
    assert max(times) - min(times) > DAY


@given(st.floats(60, 4e7), st.floats(0, 1e8), st.floats(0, 1e8), st.text())
def test_it_is_never_due_after_its_end_whatever_the_ca_says(life: float, begins: float, ends: float, name: str) -> None:
    assert due_at(0, life, RenewalWindow(begins, ends), name) < life


@pytest.mark.parametrize("failure", list(Failure))
def test_every_failure_waits_longer_as_it_repeats_and_never_for_ever(failure: Failure) -> None:
    waits = [retry_at(failure, number, 0.0, 1000.0, random.Random(1)) - 1000.0 for number in range(1, 600)]
    assert waits[0] >= 2 and max(waits) <= 1.2 * DAY
    assert waits[-1] > waits[0]


def test_what_the_ca_asks_for_is_kept_and_bounded() -> None:
    rng = random.Random(1)
    assert retry_at(Failure.RATE_LIMITED, 1, 120.0, 0.0, rng) < 150
    assert retry_at(Failure.SERVER, 1, 5000.0, 0.0, rng) >= 5000
    assert retry_at(Failure.RATE_LIMITED, 1, 1e12, 0.0, rng) <= 1.2 * 7 * DAY


def test_a_name_is_validated_less_often_than_a_ca_permits() -> None:
    """Five failures an hour and name is the limit of Let's Encrypt."""
    now, tries = 0.0, 0
    while now < 3600:
        tries += 1
        now = retry_at(Failure.VALIDATION, tries, 0.0, now, random.Random(0))
    assert tries <= 3

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from certs.budget import LETS_ENCRYPT, OTHERS, Budget, Event, Limit, limits_of
from certs.errors import AcmeError, Failure
from certs.store import SealedStore

SECRET = bytes(range(32))


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SealedStore]:
    made = SealedStore(tmp_path / "store.db", SECRET, time.time)
    yield made
    made.close()


def test_a_window_fills_and_empties_and_survives_a_restart(store: SealedStore, clock: Clock) -> None:
    budget = Budget(store, clock, {Event.ORDER: Limit(3, 600)})
    for _ in range(3):
        budget.check(["a.example.com"], is_renewal=False, is_on_demand=False)
        budget.spend(Event.ORDER, "")
        clock.now += 60
    again = Budget(store, clock, {Event.ORDER: Limit(3, 600)})
    again.load()
    for one in (budget, again):
        with pytest.raises(AcmeError) as caught:
            one.check(["b.example.com"], is_renewal=False, is_on_demand=False)
        assert caught.value.failure is Failure.RATE_LIMITED
        assert caught.value.retry_after_s == pytest.approx(420)
        assert "orders" in str(caught.value)
        one.check(["a.example.com"], is_renewal=True, is_on_demand=False)  # renewals are exempt
    clock.now += 421
    again.check(["b.example.com"], is_renewal=False, is_on_demand=False)


def test_names_on_demand_leave_a_half_to_the_others(store: SealedStore, clock: Clock) -> None:
    budget = Budget(store, clock, {Event.ORDER: Limit(4, 600)})
    for _ in range(2):
        budget.spend(Event.ORDER, "")
    with pytest.raises(AcmeError):
        budget.check(["a.example.com"], is_renewal=False, is_on_demand=True)
    budget.check(["a.example.com"], is_renewal=False, is_on_demand=False)


def test_a_registered_domain_is_counted_over_all_names_below_it(store: SealedStore, clock: Clock) -> None:
    budget = Budget(store, clock, {Event.CERTIFICATE: Limit(1, 600)})
    budget.spend(Event.CERTIFICATE, "example.co.uk")
    with pytest.raises(AcmeError, match="below example"):
        budget.check(["b.example.co.uk"], is_renewal=False, is_on_demand=False)
    budget.check(["other.co.uk"], is_renewal=False, is_on_demand=False)


def test_failed_validations_hold_back_renewals_too(store: SealedStore, clock: Clock) -> None:
    budget = Budget(store, clock, {Event.FAILED_VALIDATION: Limit(1, 600)})
    budget.spend(Event.FAILED_VALIDATION, "a.example.com")
    with pytest.raises(AcmeError, match=r"failed validations of a\.example\.com"):
        budget.check(["a.example.com"], is_renewal=True, is_on_demand=False)


def test_what_no_window_reaches_is_forgotten(store: SealedStore, clock: Clock) -> None:
    budget = Budget(store, clock, {Event.ORDER: Limit(3, 600)})
    budget.spend(Event.ORDER, "")
    clock.now += 8 * 86_400
    again = Budget(store, clock, {Event.ORDER: Limit(3, 600)})
    again.load()
    assert not list(store.items("spent", lambda key, error: None))


def test_what_no_window_reaches_is_forgotten_while_it_runs_too(store: SealedStore, clock: Clock) -> None:
    Budget(store, clock, {Event.ORDER: Limit(3, 600)}).spend(Event.ORDER, "")  # another CA's limit
    limits = {Event.CERTIFICATE: Limit(2, 7 * 86_400), Event.FAILED_VALIDATION: Limit(3, 600)}
    budget = Budget(store, clock, limits)
    budget.load()
    for week in range(4):
        for number in range(300):
            budget.spend(Event.FAILED_VALIDATION, f"{week}-{number}.example.com")
        for _ in range(2):
            budget.spend(Event.CERTIFICATE, "example.com")
        clock.now += 8 * 86_400
    for _ in range(2):
        budget.spend(Event.CERTIFICATE, "example.com")
    assert len(list(store.items("spent", lambda key, error: None))) < 600
    assert len(budget._spent) < 600
    with pytest.raises(AcmeError):
        budget.check(["a.example.com"], is_renewal=False, is_on_demand=False)


def test_a_name_that_is_asked_for_often_is_counted_right_from_many_threads(store: SealedStore, clock: Clock) -> None:
    budget = Budget(store, clock, {Event.FAILED_VALIDATION: Limit(600, 600)})
    with ThreadPoolExecutor(8) as threads:
        for _ in range(600):
            threads.submit(budget.spend, Event.FAILED_VALIDATION, "a.example.com")
            budget.free_at(Event.FAILED_VALIDATION, "a.example.com")
    assert budget.free_at(Event.FAILED_VALIDATION, "a.example.com") == clock.now + 600
    clock.now += 600
    assert budget.free_at(Event.FAILED_VALIDATION, "a.example.com") == 0.0


def test_our_limits_are_below_those_of_the_ca_and_only_for_it() -> None:
    assert limits_of("https://acme-v02.api.letsencrypt.org/directory") is LETS_ENCRYPT
    assert limits_of("https://letsencrypt.org.evil.example/directory") is OTHERS
    published = {Event.ORDER: 300, Event.CERTIFICATE: 50, Event.DUPLICATE: 5, Event.FAILED_VALIDATION: 5}
    assert all(LETS_ENCRYPT[event].events <= 0.8 * count for event, count in published.items())

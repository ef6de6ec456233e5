"""What one source may have of a worker, and that its memory is bounded and comes back."""

from __future__ import annotations

import logging

import pytest

from proxy.edge import sources as module
from proxy.edge.sources import Sources
from proxy.ipc import PROTOCOL, Settings

A, B = "198.51.100.1", "198.51.100.2"


def some(connections: int = 1000, workers: int = 1, **settings: object) -> Sources:
    made = Sources(workers)
    apply(made, connections, **settings)
    return made


def apply(one: Sources, connections: int = 1000, **settings: object) -> None:
    one.apply(Settings(PROTOCOL, "n", "ams", "d", **settings), connections)  # type: ignore[arg-type]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    return clock


def test_a_source_has_its_share_of_connections_and_no_more_until_one_ends() -> None:
    one = some(source_connections=2, source_connects_s=0.0)
    assert one.enter(A) and one.enter(A) and not one.enter(A)
    one.leave(A)
    assert not one.enter(A), "the refused one counted until it left"
    one.leave(A)
    one.leave(A)
    assert one.enter(A)
    assert one.enter(B), "others have theirs"


def test_by_default_it_is_a_quarter_and_never_less_than_a_few_browsers_need() -> None:
    for connections, most in ((1000, 250), (100, 64)):
        one = some(connections, source_connects_s=0.0)
        assert [one.enter(A) for _ in range(most + 1)] == [True] * most + [False]


def test_all_addresses_of_an_ipv6_64_are_one_source() -> None:
    one = some(source_connections=1, source_connects_s=0.0)
    assert one.enter("2001:db8:0:1::1") and not one.enter("2001:db8:0:1:ffff::2") and one.enter("2001:db8:0:2::1")


def test_connects_and_handshakes_have_a_rate_that_workers_share(now: list[float]) -> None:
    one = some(workers=2, source_connects_s=10.0, source_handshakes_s=4.0)
    assert [one.enter(A) for _ in range(11)] == [True] * 10 + [False], "a second's worth may come at once"
    now[0] += 1.0
    assert [one.enter(A) for _ in range(6)] == [True] * 5 + [False], "half of the rate is this worker's"
    assert [one.may_shake_hands(A) for _ in range(5)] == [True] * 4 + [False]
    assert one.may_shake_hands(B)


def test_exempt_networks_have_no_limits_and_loopback_is_exempt_by_default(now: list[float]) -> None:
    one = some(source_connections=1, source_connects_s=1.0, source_handshakes_s=1.0)
    assert all(one.enter("127.0.0.5") and one.may_shake_hands("::1") for _ in range(50))
    apply(one, source_connections=1, source_connects_s=1.0, exempt_sources=(f"{A}/32",))
    assert all(one.enter(A) for _ in range(50))
    one.enter("127.0.0.6")
    assert not one.enter("127.0.0.6")


def test_zero_sets_no_limit_to_a_rate() -> None:
    one = some(source_connects_s=0.0, source_handshakes_s=0.0, source_connections=10_000)
    assert all(one.enter(A) and one.may_shake_hands(A) for _ in range(5000))


def test_new_settings_begin_rates_afresh_only_where_they_differ(now: list[float]) -> None:
    one = some(source_connects_s=1.0)
    assert one.enter(A) and not one.enter(A)
    apply(one, source_connects_s=1.0)
    assert not one.enter(A)
    apply(one, source_connects_s=2.0)
    assert one.enter(A)


def test_nothing_is_kept_of_sources_that_have_left() -> None:
    one = some(source_connects_s=0.0)
    for number in range(1000):
        one.enter(f"198.51.100.{number}")
    for number in range(1000):
        one.leave(f"198.51.100.{number}")
    assert len(one) == 0


def test_a_flood_of_refusals_is_one_line_in_ten_seconds(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    one = some(source_connections=1, source_connects_s=0.0)
    with caplog.at_level(logging.WARNING, "sources"):
        for _ in range(500):
            one.enter(A)
        assert len(caplog.records) == 1 and A in caplog.text
        assert "[limits] source_connections" in caplog.text, "what to change"
        now[0] += 10.0
        one.enter(A)
    assert "499 connections refused" in caplog.records[1].message


def test_a_connection_that_is_handed_on_counts_once(now: list[float]) -> None:
    """As on a port where the first byte tells what is spoken."""
    one = some(source_connections=2, source_connects_s=1.0)
    assert one.enter(A)
    one.hand_on(A)
    assert one.enter(A), "neither another connection nor another connect"
    one.leave(A)
    assert len(one) == 0
    assert not one.enter(A), "the next one is"

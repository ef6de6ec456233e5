"""edge/access.py: who gets through an app's gate, and what a newer record of the app leaves of the old one's counts."""

from __future__ import annotations

import pytest

from proxy.edge.access import HANDSHAKES_BURST, RETRY_AFTER_MAX_S, AccessGate, access_gate
from proxy.errors import Code, ProxyError, Source, http_status
from proxy.model import AccessRules
from proxy.wire.http1 import CHUNKED

HERE, THERE = "192.0.2.1", "198.51.100.1"


def gate(rules: AccessRules, workers: int = 1) -> AccessGate:
    made = access_gate(rules, workers)
    assert made is not None
    return made


def code(error: ProxyError | None) -> Code | None:
    return error.code if error is not None else None


def test_open_rules_have_no_gate() -> None:
    assert access_gate(AccessRules(), 4) is None
    assert access_gate(AccessRules(), 4, gate(AccessRules(connections=1))) is None


@pytest.mark.parametrize(
    ("rules", "source", "let_in"),
    [
        (AccessRules(deny=("192.0.2.0/24",)), HERE, False),
        (AccessRules(deny=("192.0.2.0/24",)), THERE, True),
        (AccessRules(deny=("192.0.2.0/24",)), "::ffff:192.0.2.1", False),
        (AccessRules(allow=("192.0.2.0/24",)), HERE, True),
        (AccessRules(allow=("192.0.2.0/24",)), THERE, False),
        (AccessRules(allow=("192.0.2.0/24",)), "2001:db8::1", False),
        (AccessRules(allow=("192.0.2.0/24",), deny=("192.0.2.1",)), HERE, False),
        (AccessRules(allow=("192.0.2.0/24",), deny=("192.0.2.1",)), "192.0.2.2", True),
        (AccessRules(deny=("192.0.2.0/24",)), "", False),
        (AccessRules(allow=("0.0.0.0/0", "::/0")), "unknown", False),
        (AccessRules(max_body_bytes=1), "", True),
    ],
)
def test_networks_let_in_or_exclude(rules: AccessRules, source: str, let_in: bool) -> None:
    app = gate(rules)
    expected = None if let_in else Code.ACCESS_DENIED
    assert code(app.admit(source, 0, 0.0)) is expected
    assert code(app.enter(source)) is expected
    assert app.denies(source) is not let_in


def test_a_denied_request_is_403_of_the_client_and_names_its_source_in_the_log_only() -> None:
    error = gate(AccessRules(deny=("192.0.2.0/24",))).admit(HERE, 0, 0.0)
    assert error is not None and http_status(error.code) == 403
    assert error.source is Source.DOWNSTREAM and HERE in error.detail


def test_a_network_that_is_none_is_refused_when_the_gate_is_made() -> None:
    with pytest.raises(ValueError):
        access_gate(AccessRules(deny=("192.0.2.0/33",)), 1)
    with pytest.raises(ValueError, match="at least one worker"):
        access_gate(AccessRules(connections=1), 0)


def test_a_source_over_its_rate_is_told_when_to_come_again() -> None:
    app = gate(AccessRules(requests_per_s=0.5, requests_burst=2))
    assert app.admit(HERE, 0, 100.0) is None and app.admit(HERE, 0, 100.0) is None
    error = app.admit(HERE, 0, 100.0)
    assert error is not None and error.code is Code.SOURCE_REQUESTS and http_status(error.code) == 429
    assert error.retry_after_s == 2
    assert app.admit(THERE, 0, 100.0) is None
    assert app.admit(HERE, 0, 102.0) is None


@pytest.mark.parametrize(("rate", "retry_after_s"), [(1000.0, 1), (0.0, RETRY_AFTER_MAX_S), (1e-9, RETRY_AFTER_MAX_S)])
def test_retry_after_is_a_whole_number_within_bounds(rate: float, retry_after_s: int) -> None:
    app = gate(AccessRules(requests_per_s=rate, requests_burst=1))
    app.admit(HERE, 0, 100.0)
    error = app.admit(HERE, 0, 100.0)
    assert error is not None and error.retry_after_s == retry_after_s


def test_a_denied_request_costs_its_source_nothing_of_its_rate() -> None:
    app = gate(AccessRules(requests_per_s=1.0, requests_burst=1, max_body_bytes=5, deny=("198.51.100.0/24",)))
    assert code(app.admit(THERE, 0, 0.0)) is Code.ACCESS_DENIED
    assert code(app.admit(HERE, 6, 0.0)) is Code.BODY_TOO_LARGE  # was let in, and counted
    assert code(app.admit(HERE, 0, 0.0)) is Code.SOURCE_REQUESTS


def test_the_workers_together_keep_the_rate_and_each_has_the_whole_burst() -> None:
    rules = AccessRules(requests_per_s=8.0, requests_burst=3)
    apps = [gate(rules, workers=4) for _ in range(4)]
    burst = sum(app.admit(HERE, 0, 0.0) is None for app in apps for _ in range(10))
    assert burst == 4 * 3
    later = sum(app.admit(HERE, 0, second / 2) is None for second in range(1, 21) for app in apps for _ in range(10))
    assert later == 8 * 10


@pytest.mark.parametrize(
    ("announced", "expected"), [(0, None), (100, None), (101, Code.BODY_TOO_LARGE), (CHUNKED, None)]
)
def test_an_announced_body_over_the_limit_is_413_before_it_is_read(announced: int, expected: Code | None) -> None:
    assert code(gate(AccessRules(max_body_bytes=100)).admit(HERE, announced, 0.0)) is expected


def test_a_body_without_a_length_is_judged_as_it_comes() -> None:
    app = gate(AccessRules(max_body_bytes=100))
    assert [app.body_over(seen) for seen in (0, 100, 101)] == [False, False, True]
    assert not gate(AccessRules(connections=1)).body_over(1 << 60)
    assert gate(AccessRules(max_body_bytes=0)).body_over(1)
    assert http_status(app.body_error(101).code) == 413


def test_a_source_has_so_many_connections_at_once() -> None:
    app = gate(AccessRules(connections=2))
    assert app.enter(HERE) is None and app.enter(HERE) is None
    error = app.enter(HERE)
    assert error is not None and error.code is Code.SOURCE_CONNECTIONS and http_status(error.code) == 429
    assert app.enter(THERE) is None
    app.leave(HERE)
    assert app.enter(HERE) is None and app.enter(HERE) is not None


def test_one_ipv6_network_counts_as_one_source() -> None:
    app = gate(AccessRules(connections=1))
    assert app.enter("2001:db8::1") is None
    assert app.enter("2001:db8::2") is not None
    assert app.enter("2001:db8:0:1::1") is None
    app.leave("2001:db8::1")
    assert app.enter("2001:db8::2") is None


def test_connections_that_have_gone_leave_nothing_behind() -> None:
    app = gate(AccessRules(connections=1))
    for number in range(100_000):
        source = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        assert app.enter(source) is None
        app.leave(source)
    app.leave(HERE)  # never came: nobody's count suffers
    assert app._open == {}
    assert app.enter(HERE) is None


def test_handshakes_have_their_own_rate_and_a_browsers_first_few_pass() -> None:
    app = gate(AccessRules(handshakes_per_s=1.0), workers=2)
    assert [app.handshake(HERE, 10.0) for _ in range(12)] == [True] * int(HANDSHAKES_BURST) + [False] * 2
    assert app.handshake(THERE, 10.0)
    assert not app.handshake(HERE, 11.0) and app.handshake(HERE, 12.0)
    assert all(gate(AccessRules(connections=1)).handshake(HERE, 10.0) for _ in range(100))


def test_unchanged_rules_keep_their_gate() -> None:
    rules = AccessRules(requests_per_s=1.0, requests_burst=1, connections=1)
    app = gate(rules)
    assert app.admit(HERE, 0, 0.0) is None
    again = access_gate(AccessRules(requests_per_s=1.0, requests_burst=1, connections=1), 1, app)
    assert again is app
    assert access_gate(rules, 2, app) is not app


def test_changed_rules_go_on_counting_the_connections_that_are_open() -> None:
    old = gate(AccessRules(connections=2))
    assert old.enter(HERE) is None and old.enter(HERE) is None
    new = access_gate(AccessRules(connections=2, max_body_bytes=9), 1, old)
    assert new is not None and new is not old
    assert new.enter(HERE) is not None
    old.leave(HERE)
    assert new.enter(HERE) is None
    old.leave(HERE)
    new.leave(HERE)
    assert new._open == {}

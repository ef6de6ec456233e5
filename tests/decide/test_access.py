"""decide/access.py: networks against ipaddress as oracle, token buckets against their definition, wake rules."""

from __future__ import annotations

import ipaddress
import math
from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.decide.access import (
    SOURCES_MAX,
    Bucket,
    Networks,
    SourceBuckets,
    StartBudget,
    WakeFilter,
    network_fault,
    parse_networks,
    plain_path,
    source_key,
)
from proxy.model import WakeRules

V4 = st.ip_addresses(v=4).map(str)
# few bits that differ, so that addresses meet networks
V6 = st.integers(0, 0xFFFF).map(lambda n: str(ipaddress.IPv6Address((0x20010DB8 << 96) | (n & 0xFF) << 56 | n >> 8)))
MAPPED = st.integers(0, 0xFFFFFFFF).map(lambda n: f"::ffff:{ipaddress.IPv4Address(n)}")
ADDRESSES = st.one_of(V4, V6, MAPPED, st.ip_addresses(v=6).map(str))


@st.composite
def networks(draw: st.DrawFn) -> str:
    if draw(st.booleans()):
        return str(ipaddress.ip_network((int(draw(st.ip_addresses(v=4))), draw(st.integers(0, 32))), strict=False))
    base = int(ipaddress.IPv6Address(draw(st.one_of(V6, st.ip_addresses(v=6).map(str)))))
    return str(ipaddress.IPv6Network((base, draw(st.integers(0, 128))), strict=False))


def as_v4(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return getattr(address, "ipv4_mapped", None) or address


# --- networks


@given(st.lists(networks(), max_size=12), ADDRESSES)
def test_networks_hold_what_ipaddress_says_they_hold(texts: list[str], text: str) -> None:
    compiled = Networks(texts)
    address = as_v4(ipaddress.ip_address(text))
    plain = [network for each in texts if not is_mapped(network := ipaddress.ip_network(each))]
    mapped = [network for each in texts if is_mapped(network := ipaddress.ip_network(each))]
    expected = any(address in network for network in plain) or any(
        address.version == 4 and int(address) | 0xFFFF << 32 in range(int(one[0]), int(one[-1]) + 1) for one in mapped
    )
    assert compiled.contains(text) is expected
    assert compiled.contains(text) is expected  # and again, from memory


def is_mapped(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    return network.version == 6 and network.prefixlen >= 96 and as_v4(network[0]).version == 4


@given(st.lists(networks(), min_size=1, max_size=20), st.data())
def test_every_network_holds_its_first_and_last_address(texts: list[str], data: st.DataObject) -> None:
    network = ipaddress.ip_network(data.draw(st.sampled_from(texts)))
    compiled = Networks(texts)
    for address in (network[0], network[-1]):
        if as_v4(address).version == network.version or is_mapped(network):
            assert compiled.contains(str(address))


@pytest.mark.parametrize(
    ("network", "source", "inside"),
    [
        ("192.0.2.0/24", "192.0.2.255", True),
        ("192.0.2.0/24", "192.0.3.0", False),
        ("192.0.2.0/24", "::ffff:192.0.2.9", True),
        ("::ffff:192.0.2.0/120", "192.0.2.9", True),
        ("::ffff:0.0.0.0/96", "203.0.113.1", True),
        ("::ffff:0.0.0.0/96", "2001:db8::1", False),
        ("192.0.2.7", "192.0.2.7", True),
        ("0.0.0.0/0", "203.0.113.1", True),
        ("0.0.0.0/0", "::1", False),
        ("::/0", "2001:db8::1", True),
        ("::/0", "203.0.113.1", False),
        ("::/0", "::ffff:203.0.113.1", False),
        ("2001:db8::/32", "2001:db8:ffff::1", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("10.0.0.0/8", "", False),
        ("10.0.0.0/8", "10.0.0.01", False),
        ("10.0.0.0/8", "ten", False),
    ],
)
def test_a_network_holds(network: str, source: str, inside: bool) -> None:
    assert Networks([network]).contains(source) is inside


def test_what_is_no_address_is_told_apart_from_what_is_outside() -> None:
    compiled = Networks(["10.0.0.0/8"])
    assert [compiled.find(source) for source in ("10.1.2.3", "11.1.2.3", "nobody")] == [True, False, None]
    assert bool(compiled) and not Networks([])


@given(st.text(max_size=50))
def test_any_text_is_a_network_or_has_a_fault_that_quotes_it(text: str) -> None:
    if network_fault(text) is None:
        assert Networks([text])
    else:
        assert text in network_fault(text) or repr(text) in str(network_fault(text))
    assert Networks(["10.0.0.0/8"]).contains(text) in (True, False)


def test_a_list_of_networks_is_read_with_comments_and_every_fault_by_its_line() -> None:
    text = (
        "\ufeff# our CDN\r\n173.245.48.0/20   # first\r\n\r\n2400:cb00::/32\r\n  192.0.2.1\nnot-a-network\n"
        "10.0.0.1/8\nfe80::1%eth0\n10.0.0.0/33\n"
    )
    found, faults = parse_networks(text)
    assert found == ["173.245.48.0/20", "2400:cb00::/32", "192.0.2.1"]
    assert [line for line, _ in faults] == [6, 7, 8, 9]
    assert '"10.0.0.0/8" is the network' in faults[1][1]
    assert parse_networks("") == ([], [])


@given(st.text())
def test_reading_networks_takes_any_text(text: str) -> None:
    found, faults = parse_networks(text)
    Networks(found)
    assert all(1 <= line <= len(text.splitlines()) for line, _ in faults)


# --- sources and rates


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8::1", "2001:db8:0:0:1:2:3:4", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::1", "::2", True),
        ("", "192.0.2.1", False),
        ("not:an:address", "not:an:address", True),
    ],
)
def test_two_addresses_count_as_one_source(one: str, other: str, same: bool) -> None:
    assert (source_key(one) == source_key(other)) is same


def test_a_source_has_its_burst_and_then_its_rate_and_others_theirs() -> None:
    buckets = SourceBuckets(2.0, burst=3)
    assert [buckets.take("192.0.2.1", 100.0) for _ in range(3)] == [None] * 3
    assert buckets.take("192.0.2.1", 100.0) == pytest.approx(0.5, abs=1e-5)
    assert buckets.take("192.0.2.2", 100.0) is None
    assert buckets.take("192.0.2.1", 100.5) is None and buckets.take("192.0.2.1", 100.5) is not None
    assert [buckets.take("192.0.2.1", 200.0) is None for _ in range(4)] == [True, True, True, False]


@given(
    st.floats(0.01, 1000.0),
    st.integers(1, 50),
    st.lists(st.floats(0.0, 20.0), max_size=60),
    st.floats(0.0, 1e7),
)
def test_no_span_of_time_has_more_than_burst_and_rate_allow(
    rate: float, burst: int, gaps: list[float], start: float
) -> None:
    buckets = SourceBuckets(rate, burst)
    now, taken = start, []
    for gap in gaps:
        now += gap
        if buckets.take("192.0.2.1", now) is None:
            taken.append(now)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + rate * (taken[last] - taken[first] + 2e-6) + 1e-6


@given(st.floats(0.001, 1e5), st.integers(1, 100), st.floats(0.0, 1e7))
def test_who_waits_as_long_as_told_is_let_in(rate: float, burst: int, now: float) -> None:
    buckets = SourceBuckets(rate, burst)
    for _ in range(burst + 2):
        seconds = buckets.take("2001:db8::1", now)
        if seconds is not None:
            assert 0 < seconds < math.inf
            now += seconds
            assert buckets.take("2001:db8::1", now) is None


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_of_nothing_allows_nothing(rate: float) -> None:
    assert SourceBuckets(rate, 20).take("192.0.2.1", 5.0) == math.inf
    assert Bucket(rate).wait(5.0) == math.inf


def test_a_rate_below_one_lets_one_through_at_once() -> None:
    buckets = SourceBuckets(0.1)
    assert buckets.take("192.0.2.1", 0.0) is None
    assert buckets.take("192.0.2.1", 0.0) == pytest.approx(10.0, abs=1e-3)


@pytest.mark.slow
def test_a_hundred_thousand_sources_take_bounded_memory_and_the_one_that_keeps_asking_is_not_forgotten() -> None:
    buckets = SourceBuckets(1.0, burst=2)
    compiled = Networks(["10.0.0.0/8", "2001:db8::/32"])
    taken = 0
    for number in range(100_000):
        low = f"{number >> 16}.{number >> 8 & 255}.{number & 255}"
        source = f"10.{low}" if number & 1 else f"2001:db8:{number >> 16:x}:{number & 0xFFFF:x}::1"
        assert compiled.contains(source)
        assert buckets.take(source, 0.0) is None
        if number % 1000 == 0 and buckets.take("192.0.2.1", 0.0) is None:
            taken += 1
    assert taken == 2
    assert len(buckets) == SOURCES_MAX
    assert len(compiled._known) <= SOURCES_MAX and source_key.cache_info().currsize <= SOURCES_MAX


def test_starts_are_bounded_per_source_and_in_all() -> None:
    budget = StartBudget(1.0, 3.0)
    assert budget.take("192.0.2.1", 10.0) is None
    assert budget.take("192.0.2.1", 10.0) == pytest.approx(1.0, abs=1e-5)
    assert [budget.take(f"192.0.2.{last}", 10.0) is None for last in (2, 3, 4)] == [True, True, False]
    assert budget.take("192.0.2.9", 10.0) == pytest.approx(1 / 3, abs=1e-5)
    assert budget.take("192.0.2.9", 10.34) is None


def test_a_source_over_its_budget_leaves_the_others_theirs() -> None:
    budget = StartBudget(1.0, 5.0)
    for _ in range(1000):
        budget.take("192.0.2.1", 10.0)
    assert [budget.take(f"198.51.100.{last}", 10.0) for last in range(4)] == [None] * 4


def test_a_source_refused_by_the_budget_of_all_keeps_its_own() -> None:
    budget = StartBudget(0.001, 1.0)
    assert budget.take("192.0.2.1", 10.0) is None
    assert budget.take("192.0.2.2", 10.0) is not None
    assert budget.take("192.0.2.2", 11.0) is None


@pytest.mark.parametrize(("per_source", "everyones"), [(None, None), (None, 1e9), (1e9, None)])
def test_a_budget_without_a_figure_sets_no_limit(per_source: float | None, everyones: float | None) -> None:
    budget = StartBudget(per_source, everyones)
    assert all(budget.take("192.0.2.1", 10.0) is None for _ in range(500))
    assert StartBudget(0.0, None).take("192.0.2.1", 10.0) == math.inf


def test_a_source_gets_its_rate_and_no_burst_above_it() -> None:
    budget = StartBudget(5.0, 100.0)
    assert [budget.take("a", 100.0) is None for _ in range(8)] == [True] * 5 + [False] * 3
    assert [budget.take("a", 100.4) is None for _ in range(4)] == [True] * 2 + [False] * 2
    assert sum(budget.take("a", 100.0 + step / 100) is None for step in range(50, 1050)) in (49, 50, 51)


def test_all_sources_together_get_no_more_than_the_whole_budget() -> None:
    budget = StartBudget(5.0, 100.0)
    assert sum(budget.take(f"10.0.{number // 250}.{number % 250}", 100.0) is None for number in range(5000)) == 100
    assert sum(budget.take(f"10.1.{number // 250}.{number % 250}", 100.5) is None for number in range(5000)) == 50


def test_a_refused_source_does_not_use_up_the_others_budget() -> None:
    budget = StartBudget(1.0, 10.0)
    for _ in range(1000):
        budget.take("flood", 100.0)
    assert sum(budget.take(f"10.0.0.{number}", 100.0) is None for number in range(9)) == 9


def test_sources_remembered_are_bounded() -> None:
    budget = StartBudget(5.0, 1e9)
    for number in range(SOURCES_MAX * 2):
        assert budget.take(str(number), 100.0) is None
    assert budget._sources is not None and len(budget._sources) <= SOURCES_MAX


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_a_rate_below_one_a_second_lets_one_through_now_and_then(rate: float) -> None:
    budget = StartBudget(rate, rate)
    taken = sum(budget.take("a", 100.0 + second) is None for second in range(100))
    assert taken in (int(100 * rate), int(100 * rate) + 1)


def test_a_rate_of_none_lets_nothing_through() -> None:
    assert all(StartBudget(0.0, 100.0).take("a", 100.0 + second) == math.inf for second in range(100))
    assert all(StartBudget(5.0, 0.0).take("a", 100.0 + second) == math.inf for second in range(100))


# --- wake rules


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/", "/"),
        (b"", ""),
        (b"*", "*"),
        (b"/a/b?c=/../d", "/a/b"),
        (b"/%77p-login.php", "/wp-login.php"),
        (b"/%2577p", "/%77p"),
        (b"//a///b/", "/a/b/"),
        (b"/a/./b/../c", "/a/c"),
        (b"/%2e%2e/%2E/x", "/x"),
        (b"/a%2f..%2fb", "/b"),
        (b"/../../x", "/x"),
        (b"/a/..", "/"),
        (b"/a/b/.", "/a/b/"),
        (b"/.well-known/x", "/.well-known/x"),
        (b"/a..b/...", "/a..b/..."),
        (b"/a%3Fb", "/a?b"),
        (b"/%C3%A9", "/é"),
        (b"/%zz%", "/%zz%"),
    ],
)
def test_a_target_means_a_path(target: bytes, path: str) -> None:
    assert plain_path(target) == path


@given(st.binary(max_size=60))
def test_a_plain_path_has_no_dots_no_double_slashes_and_never_raises(rest: bytes) -> None:
    path = plain_path(b"/" + rest)
    assert path.startswith("/") and "//" not in path
    assert not {".", ".."} & set(path.split("/"))


PROBES = WakeRules(
    ignore_paths=("/healthz", "/wp-*", "*.php", "/v?/status", "/[ab]/x", "/a*b*c"),
    ignore_methods=("head", "PROPFIND"),
    ignore_agents=("UptimeRobot", "bot/"),
    ignore_sources=("198.51.100.0/24", "2001:db8::/32"),
)


@pytest.mark.parametrize(
    ("method", "path", "agent", "source", "reason"),
    [
        (b"GET", b"/", b"Mozilla/5.0", "192.0.2.1", None),
        (b"GET", b"/healthz", b"", "192.0.2.1", "'/healthz'"),
        (b"GET", b"/healthz?now", b"", "192.0.2.1", "'/healthz'"),
        (b"GET", b"/%68ealth%7A", b"", "192.0.2.1", "'/healthz'"),
        (b"GET", b"/healthz/", b"", "192.0.2.1", None),
        (b"GET", b"/Healthz", b"", "192.0.2.1", None),
        (b"GET", b"/x?/healthz", b"", "192.0.2.1", None),
        (b"POST", b"/wp-admin/setup", b"", "192.0.2.1", "'/wp-*'"),
        (b"GET", b"//wp-login", b"", "192.0.2.1", "'/wp-*'"),
        (b"GET", b"/shop/../wp-login", b"", "192.0.2.1", "'/wp-*'"),
        (b"GET", b"/deep/down/x.php", b"", "192.0.2.1", "'*.php'"),
        (b"GET", b"/v2/status", b"", "192.0.2.1", "'/v?/status'"),
        (b"GET", b"/b/x", b"", "192.0.2.1", "'/[ab]/x'"),
        (b"GET", b"/c/x", b"", "192.0.2.1", None),
        (b"GET", b"/a/b/c", b"", "192.0.2.1", "'/a*b*c'"),
        (b"HEAD", b"/", b"", "192.0.2.1", "method HEAD"),
        (b"PROPFIND", b"/", b"", "192.0.2.1", "method PROPFIND"),
        (b"GET", b"/", b"Mozilla/5.0 (compatible; UPTIMEROBOT/2.0)", "192.0.2.1", "uptimerobot"),
        (b"GET", b"/", b"GoogleBot/2.1", "192.0.2.1", "bot/"),
        (b"GET", b"/", b"robot", "192.0.2.1", None),
        (b"GET", b"/", b"", "198.51.100.77", "source 198.51.100.77"),
        (b"GET", b"/", b"", "2001:db8::7", "source 2001:db8::7"),
    ],
)
def test_a_request_wakes_nothing_for_a_reason(
    method: bytes, path: bytes, agent: bytes, source: str, reason: str | None
) -> None:
    found = WakeFilter(PROBES).ignores(method, path, agent, source)
    assert found is None if reason is None else found is not None and reason in found


def test_empty_rules_and_empty_entries_ignore_nothing() -> None:
    assert WakeFilter(WakeRules()).is_empty
    filter = WakeFilter(WakeRules(ignore_agents=("",), ignore_paths=("",)))
    assert filter.is_empty and filter.ignores(b"GET", b"/", b"anyone", "192.0.2.1") is None


def test_a_hello_knows_only_the_source() -> None:
    filter = WakeFilter(PROBES)
    assert filter.ignores_source("198.51.100.1") and not filter.ignores_source("192.0.2.1")
    assert not WakeFilter(WakeRules(ignore_paths=("*",))).ignores_source("192.0.2.1")


GLOBS = st.text("ab/*?[]!-.", min_size=1, max_size=8)


@given(st.lists(GLOBS, min_size=1, max_size=4), st.text("ab/-.", max_size=12))
@example(["*"], "")
@example(["/["], "[")
def test_globs_match_as_fnmatch_has_it(globs: list[str], rest: str) -> None:
    path = plain_path(b"/" + rest.encode())
    found = WakeFilter(WakeRules(ignore_paths=tuple(globs))).ignores(b"GET", b"/" + rest.encode(), b"", "192.0.2.1")
    assert (found is not None) is any(fnmatchcase(path, glob) for glob in globs)


@given(st.binary(max_size=8), st.binary(max_size=80), st.binary(max_size=40), st.text(max_size=20))
def test_a_filter_takes_any_request(method: bytes, path: bytes, agent: bytes, source: str) -> None:
    found = WakeFilter(PROBES).ignores(method, path, agent, source)
    assert found is None or found.encode()  # fit for a log


def test_many_stars_against_a_long_path_end_soon() -> None:
    filter = WakeFilter(WakeRules(ignore_paths=("/" + "*a" * 40 + "b",)))
    assert filter.ignores(b"GET", b"/" + b"a" * 16_000, b"", "192.0.2.1") is None

"""decide/replay_cache.py, replay_key.py: what is remembered, for whom, how long, and who cannot be led astray by it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.decide.replay import CacheOrder, Directive, Fallback, Transform
from proxy.decide.replay_cache import Found, ReplayCache, why_not_kept
from proxy.decide.replay_key import SessionKey, SessionRules, is_under, normal_path, session_value, split_pattern
from proxy.errors import Code, ProxyError
from proxy.model import AppName, ReplayCacheRule

ROUTER, TENANT = AppName("router"), AppName("tenant")
HOST = "router.test"


def to(app: str, prefix: bytes | None = None, ttl_s: int = 60, allow_bypass: bool = False, **more: Any) -> Directive:
    order = None if prefix is None else CacheOrder(prefix, ttl_s, allow_bypass)
    return Directive(app=AppName(app), cache=order, **more)


class Clients:
    """A cache, and what requests to the router's host find in it."""

    def __init__(self, **bounds: int) -> None:
        self.cache = ReplayCache(**bounds)
        self.now = 1000.0

    def note(
        self, target: bytes, directive: Directive, session: SessionKey | None = None, is_apps_own: bool = True,
        app: AppName = ROUTER, host: str = HOST,
    ) -> None:  # fmt: skip
        self.cache.note(app, host, target, session, directive, is_apps_own, self.now)

    def found(
        self,
        target: bytes,
        session: SessionKey | None = None,
        skips: bool = False,
        app: AppName = ROUTER,
        host: str = HOST,
    ) -> Found | None:
        return self.cache.find(app, host, target, session, skips, self.now)

    def led_to(self, target: bytes, session: SessionKey | None = None, host: str = HOST) -> str | None:
        found = self.found(target, session, host=host)
        return None if found is None else found.directive.app


def noted(target: bytes, directive: Directive, **more: Any) -> Clients:
    clients = Clients()
    clients.note(target, directive, **more)
    return clients


# --- by path (spec routing §4.1)


@pytest.mark.parametrize(
    ("pattern", "target", "hits", "misses"),
    [
        (
            b"/a/*",
            b"/a/b",
            [b"/a/b", b"/a/c/d", b"/a", b"/a/", b"/a?x=/b", b"/a/b?c"],
            [b"/", b"/ab", b"/b/a", b"/A/b"],
        ),
        (b"/a", b"/a", [b"/a", b"/a/b"], [b"/ab", b"/a-b", b"/a%20", b"/a;b"]),
        (b"/a/", b"/a/b", [b"/a", b"/a/b"], [b"/ab"]),
        (b"/*", b"/x", [b"/", b"/x", b"/x/y", b"/?q"], [b"*"]),
        (b"/", b"/", [b"/", b"/x"], []),
        (b"router.test/a/*", b"/a/b", [b"/a/b"], [b"/b"]),
        (b"Router.TEST./a/*", b"/a/b", [b"/a/b"], [b"/b"]),
        (b"router.test/*", b"/a/b", [b"/a/b", b"/"], []),
        (b"/%61/%7euser/*", b"/a/~user/x", [b"/a/~user", b"/%61/%7Euser/y", b"/a/%7euser"], [b"/a/%user", b"/a"]),
        (b"/caf%c3%a9", b"/caf%C3%A9", [b"/caf%c3%a9/x"], [b"/caf\xc3\xa9", b"/cafe"]),
        (b"/.well-known/x", b"/.well-known/x", [b"/.well-known/x"], [b"/.well-known"]),
    ],
)
def test_a_pattern_is_for_its_path_and_all_below(
    pattern: bytes, target: bytes, hits: list[bytes], misses: list[bytes]
) -> None:
    clients = noted(target, to("a", pattern))
    assert [one for one in hits if clients.led_to(one) != "a"] == []
    assert [one for one in misses if clients.led_to(one) is not None] == []


def test_the_longest_prefix_wins_in_whatever_order_they_came() -> None:
    for order in ([b"/", b"/a", b"/a/b"], [b"/a/b", b"/a", b"/"]):
        clients = Clients()
        for prefix in order:
            clients.note(b"/a/b/c", to("to" + prefix.decode().replace("/", "-"), prefix))
        assert [clients.led_to(one) for one in (b"/x", b"/a/x", b"/a/b/x")] == ["to-", "to-a", "to-a-b"]


def test_a_later_order_for_the_same_prefix_replaces_the_earlier() -> None:
    clients = noted(b"/a", to("old", b"/a"))
    clients.note(b"/a/x", to("new", b"/%61/*"))
    assert clients.led_to(b"/a") == "new"
    assert len(clients.cache) == 1


def test_an_entry_ends_when_its_lifetime_does_and_a_shorter_prefix_takes_over() -> None:
    clients = noted(b"/a", to("short", b"/a", 10))
    clients.note(b"/a", to("long", b"/", 60))
    clients.now += 9.9
    assert clients.led_to(b"/a") == "short"
    clients.now += 0.2
    assert clients.led_to(b"/a") == "long"
    clients.now += 60
    assert clients.led_to(b"/a") is None
    assert len(clients.cache) == clients.cache.held_bytes == 0


def test_what_is_kept_is_where_to_go_and_no_order() -> None:
    found = noted(b"/a", to("a", b"/a", regions=("ams", "any"), prefer_instance="m1")).found(b"/a")
    assert found is not None
    assert found.directive == Directive(
        app=AppName("a"), regions=("ams", "any"), prefer_instance=found.directive.prefer_instance
    )
    assert found.directive.prefer_instance == "m1"


def test_without_an_order_nothing_is_remembered() -> None:
    assert len(noted(b"/a", to("a")).cache) == 0


@pytest.mark.parametrize(
    "more",
    [
        {"state": b"x"}, {"state": b""}, {"timeout_s": 1.0}, {"fallback": Fallback.FORCE_SELF},
        {"transform": Transform(b"/x")}, {"elsewhere": True},
    ],
)  # fmt: skip
def test_what_may_not_be_cached_is_refused_with_an_order_and_passed_over_without(more: dict[str, Any]) -> None:
    with pytest.raises(ProxyError, match="cannot be kept") as caught:
        noted(b"/a", to("a", b"/a", **more))
    assert caught.value.code is Code.REPLAY_INVALID
    clients = noted(b"/a", to("a", **more), session=session_of("v"))
    assert len(clients.cache) == 0
    assert why_not_kept(to("a", **more)) is not None


def test_a_client_skips_an_entry_only_if_that_allows_it() -> None:
    strict, lax = noted(b"/a", to("a", b"/a")), noted(b"/a", to("a", b"/a", allow_bypass=True))
    assert [one.found(b"/a", skips=True).is_bypassed for one in (strict, lax)] == [False, True]
    assert not lax.found(b"/a").is_bypassed


def test_what_led_to_a_target_is_forgotten_at_its_word() -> None:
    clients = noted(b"/a", to("a", b"/a"))
    clients.note(b"/", to("all", b"/"))
    clients.note(b"/a/x", Directive(app=ROUTER, cache=CacheOrder(invalidate=True)), is_apps_own=False)
    assert clients.led_to(b"/a/x") == "all"
    assert clients.led_to(b"/b") == "all"


def test_an_entry_can_be_dropped_by_who_found_it_once() -> None:
    clients = noted(b"/a", to("a", b"/a"))
    found = clients.found(b"/a")
    assert found is not None
    assert [clients.cache.drop(found.key), clients.cache.drop(found.key)] == [True, False]
    assert clients.led_to(b"/a") is None


# --- poisoning (attacks A21)


@pytest.mark.parametrize(
    "pattern",
    [
        b"*", b"**", b"*/a", b"*.test/a", b"/a*", b"/a/*/b", b"/a/**", b"/a?x", b"/a#x", b"a", b"router.test",
        b"\xff/a",
        b"/\xff", b"/a/../", b"/a/./b", b"//a", b"/a//b", b"/a%2fb", b"/a\\b", b"/a%5Cb", b"/a%00", b"/a%", b"/a%2",
        b"/a%zz", b"/%2e%2e/a", b"other.test/a/*", b"test/a", b"router.test:80/a", b"router.test:443/a",
        b"xrouter.test/a",
        b"/b", b"/a/b/c", b"/ab", b"/A", b"http://router.test/a",
    ],
)  # fmt: skip
def test_a_pattern_that_is_none_or_not_this_requests_is_refused(pattern: bytes) -> None:
    clients = Clients()
    with pytest.raises(ProxyError) as caught:
        clients.note(b"/a/b", to("evil", pattern))
    assert caught.value.code is Code.REPLAY_INVALID
    assert len(clients.cache) == 0


ODD = [
    b"/a/../b", b"/a/..", b"/a/.", b"/a/./b", b"/a//b", b"//a", b"/a\\..\\b", b"/a/%2e%2e/b", b"/a/%2E./b", b"/a/.%2e",
    b"/a%2F..%2Fb", b"/a/..%2fb", b"/a/..%5cb", b"/a/..;/b", b"/a/..;x=1/b", b"/a/%2e%2e;/b", b"/a/..%3B/b", b"/a/%00",
    b"/a/%25%32%65", b"/a/%252e%252e/b", b"/a/%", b"/a/%1", b"/a/%gg", b"*", b"", b"a/b", b"?/a",
]  # fmt: skip


@pytest.mark.parametrize("target", ODD)
def test_a_path_that_origins_may_read_in_two_ways_is_neither_found_nor_remembered(target: bytes) -> None:
    assert normal_path(target) is None
    assert noted(b"/a", to("a", b"/")).led_to(target) is None
    assert len(noted(target, to("a", b"/*")).cache) == 0


def test_no_host_and_no_app_finds_what_another_has() -> None:
    clients = noted(b"/a", to("a", b"/"))
    assert clients.led_to(b"/a", host="other.test") is None
    assert clients.found(b"/a", app=TENANT) is None
    assert clients.led_to(b"/a") == "a"


def test_a_target_remembers_nothing_for_its_sources_host() -> None:
    clients = noted(b"/a", to("evil", b"/"), is_apps_own=False, session=session_of("v"))
    assert len(clients.cache) == 0


def test_a_target_undoes_only_what_fits_the_request_it_got() -> None:
    clients = noted(b"/a", to("a", b"/a"))
    clients.note(b"/b", to("b", b"/b"))
    invalidate = Directive(app=ROUTER, cache=CacheOrder(invalidate=True))
    clients.note(b"/b", invalidate, is_apps_own=False)
    clients.note(b"/a", invalidate, is_apps_own=False, host="other.test")
    clients.note(b"/a", invalidate, is_apps_own=False, app=TENANT)
    assert (clients.led_to(b"/a"), clients.led_to(b"/b")) == ("a", None)


pieces = st.sampled_from(
    [b"/", b"a", b"B", b".", b"..", b"%2e", b"%2F", b"%61", b"~", b"%7E", b";", b"\\", b"%", b"?", b"%C3"]
)
paths = st.lists(pieces, max_size=10).map(b"".join).map(b"/".__add__)


@given(paths)
def test_a_normal_path_is_its_own_normal_form_and_has_no_way_up(target: bytes) -> None:
    path = normal_path(target)
    if path is not None:
        assert normal_path(path) == path
        assert not {b".", b".."} & set(path.split(b"/"))
        assert b"//" not in path and b"\\" not in path


@given(st.binary(max_size=30) | paths)
def test_no_pattern_and_no_path_breaks_anything(raw: bytes) -> None:
    split = split_pattern(raw)
    assert split is None or split[1] == b"" or (split[1][:1] == b"/" and split[1][-1:] != b"/")
    clients = Clients()
    if split is None or split[0] is not None or not is_under(b"/a/b", split[1]):
        with pytest.raises(ProxyError, match="cannot be kept"):
            clients.note(b"/a/b", to("x", raw))
    else:
        clients.note(b"/a/b", to("x", raw))
        assert clients.led_to(b"/a/b") == "x"
    assert clients.led_to(raw) in (None, "x")


# --- by session (spec routing §4.2)

COOKIE = ReplayCacheRule("/", 300, "cookie", "sid")
HEADER = ReplayCacheRule("/api", 600, "header", "X-Tenant", allow_bypass=True)


def session_of(value: str, rule: ReplayCacheRule = COOKIE, target: bytes = b"/x") -> SessionKey:
    fields = ((b"Cookie", b"sid=" + value.encode()), (b"X-Tenant", value.encode()))
    found = SessionRules([rule]).key(HOST, target, flat(*fields), frozenset())
    assert found is not None
    return found


def flat(*fields: tuple[bytes, bytes]) -> list[bytes]:
    return [part for name, value in fields for part in (name, b": ", value, b"\r\n")]


def test_a_session_goes_straight_to_its_target_and_no_other_does() -> None:
    clients = noted(b"/x", to("a"), session=session_of("one"))
    assert clients.led_to(b"/y", session_of("one")) == "a"
    assert clients.led_to(b"/y", session_of("two")) is None
    assert clients.led_to(b"/y") is None
    assert clients.led_to(b"/y", session_of("one"), host="other.test") is None
    clients.now += 300
    assert clients.led_to(b"/y", session_of("one")) is None


def test_a_rules_bypass_and_lifetime_hold_and_no_lifetime_is_below_ten_seconds() -> None:
    clients = noted(b"/api/x", to("a"), session=session_of("acme", HEADER, b"/api/x"))
    found = clients.found(b"/api/y", session_of("acme", HEADER, b"/api/y"), skips=True)
    assert found is not None and found.is_bypassed
    short = session_of("v", ReplayCacheRule("/", 1, "cookie", "sid"))
    clients = noted(b"/x", to("a"), session=short)
    clients.now += 9
    assert clients.led_to(b"/x", short) == "a"


def test_a_session_goes_before_a_path_of_the_same_length_and_after_a_longer_one() -> None:
    clients = noted(b"/x", to("by-session"), session=session_of("v"))
    clients.note(b"/x", to("by-path", b"/"))
    clients.note(b"/a", to("by-longer-path", b"/a"))
    assert clients.led_to(b"/x", session_of("v")) == "by-session"
    assert clients.led_to(b"/a", session_of("v")) == "by-longer-path"
    assert clients.led_to(b"/x") == "by-path"


def test_invalidation_forgets_the_session_too() -> None:
    clients = noted(b"/x", to("a"), session=session_of("v"))
    clients.note(b"/y", Directive(app=ROUTER, cache=CacheOrder(invalidate=True)), session_of("v"), is_apps_own=False)
    assert clients.led_to(b"/x", session_of("v")) is None
    assert len(clients.cache) == 0


def applied(rules: list[ReplayCacheRule], target: bytes, *fields: tuple[bytes, bytes], host: str = HOST) -> str | None:
    found = SessionRules(rules).key(host, target, flat(*fields), frozenset())
    return None if found is None else found.rule.name


BOTH = ((b"cookie", b"sid=1"), (b"x-tenant", b"acme"))


@pytest.mark.parametrize(
    ("target", "fields", "expected"),
    [
        (b"/", BOTH, "sid"), (b"/api", BOTH, "X-Tenant"), (b"/api/x?y", BOTH, "X-Tenant"), (b"/apis", BOTH, "sid"),
        (b"/%61pi/x", BOTH, "X-Tenant"), (b"/api/../x", BOTH, None), (b"/api", BOTH[:1], None), (b"/x", BOTH[1:], None),
        (b"/x", (), None),
    ],
)  # fmt: skip
def test_the_rule_with_the_longest_prefix_is_the_one_that_counts(
    target: bytes, fields: tuple[tuple[bytes, bytes], ...], expected: str | None
) -> None:
    assert applied([COOKIE, HEADER], target, *fields) == expected


def test_of_rules_with_one_prefix_the_first_whose_value_is_there_applies() -> None:
    rules = [COOKIE, ReplayCacheRule("/", 60, "header", "X-Tenant")]
    assert applied(rules, b"/x", *BOTH) == "sid"
    assert applied(rules, b"/x", *BOTH[1:]) == "X-Tenant"


def test_a_rule_may_name_a_host_and_one_that_is_no_prefix_never_applies() -> None:
    rules = [ReplayCacheRule("api.test/v1", 60, "header", "X-Tenant"), ReplayCacheRule("v1", 60, "cookie", "sid")]
    assert applied(rules, b"/v1/x", *BOTH, host="api.test") == "X-Tenant"
    assert applied(rules, b"/v1/x", *BOTH) is None
    assert not SessionRules([]) and SessionRules(rules)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([(b"Cookie", b"sid=abc")], b"abc"),
        ([(b"Cookie", b"a=b; sid=abc ;c=d")], b"abc"),
        ([(b"Cookie", b'sid="a b=c"')], b'"a b=c"'),
        ([(b"Cookie", b"xsid=abc; sidx=d; ")], None),
        ([(b"Cookie", b"sid=")], None),
        ([(b"Cookie", b"sid")], None),
        ([], None),
        # what a machine might read otherwise
        ([(b"Cookie", b"sid=a; sid=b")], None),
        ([(b"Cookie", b"sid=a; SID=b")], None),
        ([(b"Cookie", b"sid=a; s%69d=b")], None),
        ([(b"Cookie", b"sid=a; sid%20=b")], None),
        ([(b"Cookie", b"SID=a")], None),
        ([(b"Cookie", b"s%69d=a")], None),
        ([(b"Cookie", b"sid=a"), (b"cookie", b"sid=b")], None),
    ],
)
def test_a_cookie_counts_if_there_is_but_one(fields: list[tuple[bytes, bytes]], expected: bytes | None) -> None:
    assert session_value(COOKIE, flat(*fields), frozenset()) == expected


@pytest.mark.parametrize(
    ("fields", "hops", "expected"),
    [
        ([(b"X-TENANT", b"acme")], b"", b"acme"),
        ([(b"X-Tenant", b"")], b"", None),
        ([(b"X-Tenant", b"acme"), (b"x-tenant", b"evil")], b"", None),
        ([(b"X-Tenant", b"acme"), (b"X_Tenant", b"evil")], b"", None),
        ([(b"X_Tenant", b"acme")], b"", None),
        ([(b"X-Tenant", b"acme")], b"x-tenant", None),
        ([(b"X-Tenant", b"acme")], b"x-other", b"acme"),
    ],
)
def test_a_header_counts_if_a_machine_sees_it_and_no_other_of_its_name(
    fields: list[tuple[bytes, bytes]], hops: bytes, expected: bytes | None
) -> None:
    assert session_value(HEADER, flat(*fields), frozenset({hops})) == expected


def test_no_value_is_kept_in_clear() -> None:
    assert b"hush" not in repr(session_of("hush")).encode()


# --- bounds


def test_the_least_recently_used_entry_goes_first() -> None:
    clients = Clients(max_entries=3)
    for name in (b"a", b"b", b"c"):
        clients.note(b"/" + name, to(name.decode(), b"/" + name))
    assert clients.led_to(b"/a") == "a"
    clients.note(b"/d", to("d", b"/d"))
    assert [clients.led_to(b"/" + name) for name in (b"a", b"b", b"c", b"d")] == ["a", None, "c", "d"]


def test_bytes_are_bounded_whatever_the_entries() -> None:
    clients = Clients(max_bytes=20_000)
    for at in range(100):
        prefix = b"/%d/" % at + b"x" * 900
        clients.note(prefix, to("a", prefix))
        assert clients.cache.held_bytes <= 20_000
    assert 0 < len(clients.cache) < 20
    assert len(noted(b"/a", to("a", b"/a")).cache) == 1
    small = Clients(max_bytes=10)
    small.note(b"/a", to("a", b"/a"))
    assert len(small.cache) == 0


def test_an_app_that_goes_takes_its_entries_along() -> None:
    clients = noted(b"/a", to("a", b"/a"), session=session_of("v"))
    clients.note(b"/a", to("a", b"/a"), host="second.test")
    clients.note(b"/a", to("b", b"/a"), app=TENANT)
    clients.cache.forget_app(ROUTER)
    clients.cache.forget_app(AppName("never-seen"))
    assert len(clients.cache) == 1
    assert clients.found(b"/a", app=TENANT) is not None


segments = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=4).map(lambda parts: b"/" + b"/".join(parts))
hosts = st.sampled_from([HOST, "second.test"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("path"), hosts, segments, segments, st.integers(10, 30)),
        st.tuples(st.just("session"), hosts, segments, st.sampled_from(["v", "w"]), st.just(0)),
        st.tuples(st.just("forget"), hosts, segments, st.just(b""), st.just(0)),
        st.tuples(st.just("wait"), st.just(HOST), st.just(b"/"), st.just(b""), st.integers(1, 20)),
        st.tuples(st.just("find"), hosts, segments, st.just(b""), st.just(0)),
    ),
    max_size=30,
)


@given(steps)
@settings(max_examples=200)
def test_the_cache_finds_what_a_plain_list_of_orders_would_have_it_find(
    steps: list[tuple[str, str, Any, Any, int]],
) -> None:
    """Sessions live for 300 s, so no sequence here outlives one; the model is all orders, the newest of a key last."""
    clients = Clients()
    model: dict[tuple[str, bytes, bytes], tuple[float, str]] = {}
    for at, (step, host, target, what, number) in enumerate(steps):
        name = f"a{at}"
        if step == "wait":
            clients.now += number / 10
        elif step == "session":
            clients.note(target, to(name), session_of(what), host=host)
            model[host, b"", what.encode()] = (clients.now + 300, name)
        elif step == "forget":
            clients.note(target, Directive(app=ROUTER, cache=CacheOrder(invalidate=True)), session_of("v"), host=host)
            key = best(model, host, target, None, clients.now, alive_only=False)
            model.pop((host, b"", b"v"), None)
            if key is not None:
                del model[key]
        elif step == "path":
            prefix = what.rstrip(b"/")
            if is_under(target, prefix):
                clients.note(target, to(name, what, number), host=host)
                model[host, prefix, b""] = (clients.now + number, name)
            else:
                with pytest.raises(ProxyError):
                    clients.note(target, to(name, what, number), host=host)
        for value in (None, "v", "w"):
            session = None if value is None else session_of(value)
            key = best(model, host, target, value, clients.now)
            assert clients.led_to(target, session, host=host) == (None if key is None else model[key][1])


def best(
    model: dict[tuple[str, bytes, bytes], tuple[float, str]], host: str, target: bytes, value: str | None, now: float,
    alive_only: bool = True,
) -> tuple[str, bytes, bytes] | None:  # fmt: skip
    for key in [key for key, (expires, _) in model.items() if now >= expires]:
        del model[key]
    fitting = [
        key for key in model
        if key[0] == host and is_under(target, key[1]) and key[2] in (b"", (value or "").encode())
    ]  # fmt: skip
    return max(fitting, key=lambda key: (len(key[1]), key[2]), default=None)

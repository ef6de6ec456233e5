from __future__ import annotations

from proxy.decide.on_demand import Answers, NameBuckets, is_allowed


def test_rules_permit_a_name_or_all_below_a_suffix() -> None:
    rules = ("exact.example", "*.customers.example")
    assert is_allowed("exact.example", rules) and is_allowed("a.customers.example", rules)
    assert is_allowed("a.b.customers.example", rules)
    for name in ("customers.example", "acustomers.example", "x.exact.example", "evil.example"):
        assert not is_allowed(name, rules)


def test_a_refusal_holds_for_its_time() -> None:
    refusals = Answers()
    refusals.add("a.example", "no", 10.0)
    assert refusals.of("a.example", 9.9) == "no" and refusals.of("b.example", 0.0) is None
    assert refusals.of("a.example", 10.0) is None


def test_refusals_are_bounded_and_the_oldest_goes() -> None:
    refusals = Answers(most=3)
    for name in "abcd":
        refusals.add(name, name, 10.0)
    assert [refusals.of(name, 0.0) for name in "abcd"] == [None, "b", "c", "d"]


def test_a_domain_has_its_burst_then_its_rate_and_others_are_untouched() -> None:
    buckets = NameBuckets()
    assert [buckets.take("a.example", 2, 60.0, 0.0) for _ in range(3)] == [True, True, False]
    assert buckets.take("b.example", 2, 60.0, 0.0)
    assert not buckets.take("a.example", 2, 60.0, 59.0)
    assert buckets.take("a.example", 2, 60.0, 60.0)
    assert [buckets.take("a.example", 2, 60.0, 1e6) for _ in range(3)] == [True, True, False]


def test_a_refused_name_does_not_push_the_refill_away() -> None:
    buckets = NameBuckets()
    assert buckets.take("a.example", 1, 3600.0, 0.0)
    assert not any(buckets.take("a.example", 1, 3600.0, tenth / 10) for tenth in range(1, 10))
    assert buckets.take("a.example", 1, 3600.0, 1.01)


def test_room_is_told_without_taking_it() -> None:
    buckets = NameBuckets()
    assert all(buckets.has_room("a.example", 1, 60.0, 0.0) for _ in range(3))
    assert buckets.take("a.example", 1, 60.0, 0.0) and not buckets.has_room("a.example", 1, 60.0, 59.0)
    assert buckets.has_room("a.example", 1, 60.0, 60.0) and buckets.has_room("b.example", 1, 60.0, 0.0)

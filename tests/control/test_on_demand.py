from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.config import OnDemandSection
from proxy.control.on_demand import OnDemand
from proxy.model import AppName
from tests.support.ask import AskServer, Mode
from tests.support.clock import FakeClock

WEB, OTHER = AppName("web"), AppName("other")


class Gate:
    """Decisions with one app's rules, the URL that it has asked, and a clock that stands still."""

    def __init__(self) -> None:
        self.ask = AskServer()
        self.clock = FakeClock()
        self.gate = OnDemand(self.clock)
        self.rule()

    def rule(self, app: AppName = WEB, **keys: object) -> None:
        section = OnDemandSection(**({"ask": self.ask.url, "negative_ttl_s": 60.0} | keys))  # type: ignore[arg-type]  # by name
        self.gate.set_rules([(app, section)])

    async def decide(self, name: str, domain: str = "example.com") -> AppName | None:
        return (await self.gate.app_of(name, domain))[0]


@pytest_asyncio.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    await made.gate.close()
    await asyncio.to_thread(made.ask.close)


@pytest.mark.parametrize("mode", ["no", "fail", "cut", "flood"])
async def test_a_name_is_asked_for_once_while_a_refusal_holds(gate: Gate, mode: Mode) -> None:
    gate.ask.forget(mode)
    for _ in range(3):
        assert await gate.decide("a.example.com") is None
    assert gate.ask.asked == {"a.example.com": 1}
    await gate.clock.advance(60.0)
    gate.ask.mode = "yes"
    assert await gate.decide("a.example.com") == WEB
    assert gate.ask.asked == {"a.example.com": 2}


async def test_what_was_permitted_is_not_asked_for_again_until_it_is_taken(gate: Gate) -> None:
    gate.ask.forget("yes")
    for _ in range(3):
        assert await gate.decide("a.example.com") == WEB
    assert gate.ask.asked == {"a.example.com": 1}
    assert gate.gate.take(WEB, "a.example.com", "example.com") == ""
    assert await gate.decide("a.example.com") == WEB and gate.ask.asked["a.example.com"] == 2


async def test_nobody_is_asked_about_a_domain_whose_bucket_is_empty(gate: Gate) -> None:
    gate.rule(domain_burst=1, domain_hour=1.0)
    gate.ask.forget("yes")
    assert await gate.decide("a.example.com") == WEB
    assert gate.gate.take(WEB, "a.example.com", "example.com") == ""
    assert await gate.gate.app_of("b.example.com", "example.com") == (
        None,
        "too many new names of example.com on demand",
    )
    assert await gate.decide("c.example.net", "example.net") == WEB
    assert set(gate.ask.asked) == {"a.example.com", "c.example.net"}
    await gate.clock.advance(3600.0)
    assert await gate.decide("b.example.com") == WEB


async def test_all_new_names_together_have_a_bucket_too(gate: Gate) -> None:
    gate.rule(names_burst=2, names_hour=0.0)
    gate.ask.forget("yes")
    assert [gate.gate.take(WEB, name, name) for name in ("a.example", "b.example")] == ["", ""]
    assert gate.gate.take(WEB, "c.example", "c.example") == "too many new names on demand"
    assert await gate.decide("c.example", "c.example") is None and not gate.ask.asked


@pytest.mark.slow
async def test_who_comes_while_too_many_are_asked_for_is_refused_now_and_not_later(gate: Gate) -> None:
    gate.rule(ask_timeout_s=0.5)
    gate.ask.forget("hang")
    crowd = [asyncio.ensure_future(gate.decide(f"n{number}.example.com")) for number in range(16)]
    await asyncio.sleep(0.2)
    assert await gate.gate.app_of("late.example.com", "example.com") == (None, "too many names are asked for at once")
    assert await asyncio.gather(*crowd) == [None] * 16
    gate.ask.mode = "yes"
    assert await gate.decide("late.example.com") == WEB
    assert await gate.decide("n0.example.com") is None, "it was asked for, and the answer holds"


async def test_a_rule_permits_without_a_question(gate: Gate) -> None:
    gate.rule(allow=("*.customers.example",))
    assert await gate.decide("a.customers.example", "customers.example") == WEB
    assert not gate.ask.asked


async def test_what_is_refused_for_another_reason_holds_as_long(gate: Gate) -> None:
    gate.ask.forget("yes")
    assert await gate.decide("a.example.com") == WEB
    gate.gate.refuse("a.example.com", WEB, "it leads elsewhere")
    assert await gate.gate.app_of("a.example.com", "example.com") == (None, "it leads elsewhere")
    await gate.clock.advance(60.0)
    assert await gate.decide("a.example.com") == WEB and gate.ask.asked["a.example.com"] == 2

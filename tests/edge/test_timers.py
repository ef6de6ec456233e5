"""edge/timers.py: deadlines on one coarse wheel are met late by a tick at most, and never early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.clock import monotonic
from proxy.edge import timers
from proxy.edge.timers import NEVER, TICK_S, Call, Wheel


class Fake:
    """Stands in for the loop: keeps what was asked to be called, and what was reported."""

    def __init__(self) -> None:
        self.reported: list[dict[str, Any]] = []

    def call_later(self, delay: float, callback: Any) -> Any:
        self.turn = callback
        return self

    def cancel(self) -> None:
        self.turn = None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.reported.append(context)


class Hand:
    """A wheel turned by hand: `to(t)` is `t` seconds after the start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 1000.0
        monkeypatch.setattr(timers, "monotonic", lambda: self.time)
        self.loop = Fake()
        self.wheel = Wheel(self.loop)  # type: ignore[arg-type]  # it asks the loop for two things only

    def to(self, seconds: float) -> None:
        """Turn tick by tick, as the loop would."""
        while self.time < 1000.0 + seconds - 1e-9:
            self.time = min(self.time + TICK_S, 1000.0 + seconds)
            self.loop.turn()


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    return Hand(monkeypatch)


def test_a_deadline_is_met_within_a_tick_and_never_early(hand: Hand) -> None:
    met: list[float] = []
    for at in range(1, 40):
        seconds = at * 0.07
        hand.wheel.call_later(seconds, lambda due=seconds: met.append(hand.time - 1000.0 - due))  # type: ignore[misc]
    hand.to(5)
    assert len(met) == 39 and min(met) >= -1e-9 and max(met) <= 2 * TICK_S


def test_arming_again_puts_a_deadline_off_or_forward(hand: Hand) -> None:
    met: list[float] = []
    call = hand.wheel.call_later(1, lambda: met.append(hand.time))
    hand.to(0.9)
    hand.wheel.arm(call, 2)
    hand.to(2.5)
    assert met == []
    hand.wheel.arm(call, 0.1)  # nearer than before
    hand.to(2.9)
    assert len(met) == 1


def test_disarmed_dropped_and_cancelled_entries_are_left_alone(hand: Hand) -> None:
    met: list[str] = []
    one, two, three = (hand.wheel.call_later(0.5, lambda n=n: met.append(n)) for n in "abc")  # type: ignore[misc]
    hand.wheel.disarm(one)
    hand.wheel.drop(two)
    three.cancel()
    assert one.deadline == NEVER and two.wheel_tick == 0
    hand.to(2)
    assert met == []
    hand.wheel.arm(one, 0.5)  # a disarmed one may be armed again
    hand.to(4)
    assert met == ["a"]


def test_one_entry_may_drop_another_of_the_same_tick(hand: Hand) -> None:
    calls: list[Call] = []
    met: list[int] = []

    def first(own: int) -> None:
        met.append(own)
        calls[1 - own].cancel()

    calls += [hand.wheel.call_later(0.5, lambda: first(0)), hand.wheel.call_later(0.5, lambda: first(1))]
    hand.to(2)
    assert len(met) == 1


def test_a_handler_may_arm_its_own_entry_anew(hand: Hand) -> None:
    class Again:
        deadline = NEVER
        wheel_tick = 0
        met = 0

        def on_deadline(self) -> None:
            self.met += 1
            if self.met < 3:
                hand.wheel.arm(self, 0.0)

    entry = Again()
    hand.wheel.arm(entry, 0.2)
    hand.to(2)
    assert entry.met == 3


def test_a_fault_in_one_handler_is_reported_and_stops_no_other(hand: Hand) -> None:
    met: list[int] = []

    def fault() -> None:
        raise ZeroDivisionError

    hand.wheel.call_later(0.3, fault)
    hand.wheel.call_later(0.3, lambda: met.append(1))
    hand.to(1)
    assert met == [1] and [type(context["exception"]) for context in hand.loop.reported] == [ZeroDivisionError]


def test_a_loop_that_was_blocked_for_long_meets_all_that_is_due_at_once(hand: Hand) -> None:
    met: list[int] = []
    for at in range(50):
        hand.wheel.call_later(at * 0.1, lambda at=at: met.append(at))  # type: ignore[misc]
    hand.time += 30
    hand.loop.turn()
    assert sorted(met) == list(range(50))


def test_ended_connections_leave_nothing_in_the_wheel(hand: Hand) -> None:
    calls = [hand.wheel.call_later(60 + at, lambda: None) for at in range(1000)]
    for call in calls:
        call.cancel()
    assert all(not bucket for bucket in hand.wheel._buckets.values())
    hand.to(0.2)
    hand.wheel.close()
    assert hand.loop.turn is None and not hand.wheel._buckets


@pytest.fixture
async def wheel() -> AsyncIterator[Wheel]:
    wheel = Wheel(asyncio.get_running_loop())
    yield wheel
    wheel.close()


async def test_the_wheel_turns_on_a_real_loop(wheel: Wheel) -> None:
    done = asyncio.Event()
    start = monotonic()
    wheel.call_later(0.1, done.set)
    await asyncio.wait_for(done.wait(), 5)
    assert monotonic() - start >= 0.1 - TICK_S / 2

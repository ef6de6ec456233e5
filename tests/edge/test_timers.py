"""The coarse wheel: never early, at most a tick late, and it keeps nothing alive that was dropped."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from proxy.edge.timers import NEVER, TICK_S, Wheel
from tests.support.wheel import Turner


class Entry:
    def __init__(self) -> None:
        self.deadline = NEVER
        self.wheel_tick = 0
        self.rang = 0

    def on_deadline(self) -> None:
        self.rang += 1


@pytest.fixture
def turner(monkeypatch: pytest.MonkeyPatch) -> Turner:
    return Turner(monkeypatch)


@pytest.fixture
def wheel(turner: Turner) -> Iterator[Wheel]:
    wheel = Wheel(turner)  # type: ignore[arg-type]  # of the loop it uses these two methods
    yield wheel
    wheel.close()


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.1, 0.15, 1.0, 59.99])
def test_a_deadline_is_never_met_early_and_at_most_two_ticks_late(turner: Turner, wheel: Wheel, seconds: float) -> None:
    entry = Entry()
    wheel.arm(entry, seconds)
    turner.to(1000.0 + seconds - 0.001)
    assert entry.rang == 0
    turner.to(1000.0 + seconds + 2 * TICK_S)
    assert entry.rang == 1
    turner.to(1000.0 + seconds + 10)
    assert entry.rang == 1, "once"


def test_arming_again_replaces_the_deadline_later_or_sooner(turner: Turner, wheel: Wheel) -> None:
    later, sooner = Entry(), Entry()
    wheel.arm(later, 1.0)
    wheel.arm(sooner, 10.0)
    turner.to(1000.5)
    wheel.arm(later, 2.0)
    wheel.arm(sooner, 0.5)
    turner.to(1001.3)
    assert (later.rang, sooner.rang) == (0, 1)
    turner.to(1002.8)
    assert (later.rang, sooner.rang) == (1, 1)


def test_a_disarmed_entry_rings_never_and_may_be_armed_again(turner: Turner, wheel: Wheel) -> None:
    entry = Entry()
    wheel.arm(entry, 1.0)
    wheel.disarm(entry)
    turner.to(1005.0)
    assert entry.rang == 0
    wheel.arm(entry, 1.0)
    turner.to(1006.2)
    assert entry.rang == 1


def test_an_entry_may_arm_itself_when_it_rings(turner: Turner, wheel: Wheel) -> None:
    class Again(Entry):
        def on_deadline(self) -> None:
            super().on_deadline()
            wheel.arm(self, 1.0)

    entry = Again()
    wheel.arm(entry, 1.0)
    turner.to(1005.0)
    assert entry.rang == 4, "each a tick late at most, so four within five seconds"


def test_a_loop_that_was_blocked_catches_up_on_all_of_it(turner: Turner, wheel: Wheel) -> None:
    entries = [Entry() for _ in range(100)]
    for number, entry in enumerate(entries):
        wheel.arm(entry, number * 0.1)
    turner.jump(1005.0)
    assert [entry.rang for entry in entries[:49]] == [1] * 49
    assert not any(entry.rang for entry in entries[52:])
    turner.to(1011.0)
    assert [entry.rang for entry in entries] == [1] * 100


def test_one_handlers_failure_is_reported_and_harms_no_other(turner: Turner, wheel: Wheel) -> None:
    class Fails(Entry):
        def on_deadline(self) -> None:
            raise ValueError("broken")

    entries = [Entry(), Fails(), Entry()]
    for entry in entries:
        wheel.arm(entry, 0.5)
    turner.to(1001.0)
    assert [entry.rang for entry in entries] == [1, 0, 1]
    assert [str(context["exception"]) for context in turner.errors] == ["broken"]
    late = Entry()
    wheel.arm(late, 0.5)
    turner.to(1002.0)
    assert late.rang == 1


def test_an_entry_dropped_by_another_of_the_same_tick_does_not_ring(turner: Turner, wheel: Wheel) -> None:
    """Two deadlines of one connection at once: the first ends it, and the second must find nothing to do."""
    entries: list[Entry] = []

    class Drops(Entry):
        def on_deadline(self) -> None:
            super().on_deadline()
            for other in entries:
                if other is not self:
                    wheel.drop(other)

    entries += [Drops(), Drops()]
    for entry in entries:
        wheel.arm(entry, 0.5)
    turner.to(1001.0)
    assert sum(entry.rang for entry in entries) == 1


def test_the_wheel_keeps_nothing_alive_that_was_dropped(turner: Turner, wheel: Wheel) -> None:
    entry = Entry()
    wheel.arm(entry, 600.0)
    gone = weakref.ref(entry)
    wheel.drop(entry)
    del entry
    gc.collect()
    assert gone() is None


def test_call_later_calls_once_unless_cancelled(turner: Turner, wheel: Wheel) -> None:
    called: list[str] = []
    wheel.call_later(0.5, lambda: called.append("kept"))
    wheel.call_later(0.5, lambda: called.append("cancelled")).cancel()
    turner.to(1002.0)
    assert called == ["kept"]


async def test_on_a_real_loop_deadlines_come_in_time() -> None:
    loop = asyncio.get_running_loop()
    wheel = Wheel(loop)
    rang: asyncio.Future[float] = loop.create_future()
    began = loop.time()
    wheel.call_later(0.15, lambda: rang.set_result(loop.time() - began))
    assert 0.15 <= await asyncio.wait_for(rang, 5) < 1.0
    wheel.close()

"""Holding requests for a machine that starts: one asking, each told once, bounds on all of it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from proxy.edge.table import AppView, Table
from proxy.edge.timers import Wheel
from proxy.edge.waker import CONTROL_AWAY_S, GRACE_S, SOURCES_MAX, HintBudget, Waker
from proxy.errors import Code, ProxyError
from proxy.ipc import Wake, WakeDone
from proxy.model import App, AppLimits, AppName, Endpoint, Machine, MachineId, MachineState, Port, RegionCode, Service
from tests.support.edge import SentMessages
from tests.support.wheel import Turner

NAME, M1, M2 = AppName("web"), MachineId("m1"), MachineId("m2")


def machine(machine_id: MachineId, state: MachineState = MachineState.STOPPED, version: int = 1) -> Machine:
    endpoints = (Endpoint(8080, "127.0.0.1", 9),) if state is MachineState.STARTED else ()
    return Machine(machine_id, RegionCode("ams"), "app", state, version, 1, endpoints)


def app(*machines: Machine, max_waiters: int = 100) -> App:
    service = Service("tcp", 8080, (Port(80, 80, ("http",)),))
    limits = AppLimits(max_waiters=max_waiters)
    return App(NAME, ("web.apps.test",), (service,), machines, wake_timeout_s=30.0, limits=limits)


class Bench:
    """A waker with its table, its wheel and what it says to control."""

    def __init__(self, turner: Turner) -> None:
        self.turner = turner
        self.wheel = Wheel(turner)  # type: ignore[arg-type]  # of the loop it uses these methods
        self.sent = SentMessages()
        self.table = Table((80,), lambda slot: 0)
        self.waker = Waker(self.wheel, self.sent, self.table, random.Random(1))
        self.told: list[Code | None] = []
        self.table.set_app(app(machine(M1), machine(M2)))

    @property
    def app(self) -> AppView:
        return self.table.apps[NAME]

    @property
    def wakes(self) -> list[Wake]:
        return [one for one in self.sent.messages if isinstance(one, Wake)]

    def hear(self, error: ProxyError | None) -> None:
        self.told.append(error.code if error is not None else None)

    def wait(self, which: MachineId = M1) -> int:
        return self.waker.wait(self.app, which, self.hear)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(Turner(monkeypatch))
    yield bench
    bench.wheel.close()


def test_many_waiters_of_one_machine_ask_once_and_are_each_told_once(bench: Bench) -> None:
    for _ in range(50):
        bench.wait()
    bench.wait(M2)
    assert [(one.machine, one.hint) for one in bench.wakes] == [(M1, False), (M2, False)]
    bench.waker.on_wake_done(WakeDone(NAME, M1, 2))
    assert bench.told == [None] * 50 and bench.waker.waiting == 1
    bench.waker.on_wake_done(WakeDone(NAME, M1, 2))
    assert len(bench.told) == 50


def test_a_record_that_says_started_is_as_good_as_the_answer(bench: Bench) -> None:
    bench.wait()
    bench.table.set_machine(NAME, machine(M1, MachineState.STARTING, 2))
    assert bench.told == []
    bench.table.set_machine(NAME, machine(M1, MachineState.STARTED, 3))
    assert bench.told == [None]


def test_a_failure_carries_controls_code_and_an_unknown_one_is_internal(bench: Bench) -> None:
    bench.wait()
    bench.waker.on_wake_done(WakeDone(NAME, M1, 1, "PM07", "exited with 3", retry_after_s=2))
    bench.wait()
    bench.waker.on_wake_done(WakeDone(NAME, M1, 1, "ZZ99", "of a later version"))
    assert bench.told == [Code.START_FAILED, Code.WAKE_INTERNAL]


def test_one_waiters_leaving_leaves_the_others_and_the_start_goes_on(bench: Bench) -> None:
    first = bench.wait()
    bench.wait()
    bench.waker.cancel(M1, first)
    bench.waker.cancel(M1, first)
    bench.waker.cancel(M2, 99)
    assert bench.waker.waiting == 1
    bench.waker.on_wake_done(WakeDone(NAME, M1, 2))
    assert bench.told == [None] and len(bench.wakes) == 1


def test_a_waiter_that_comes_after_all_have_left_joins_the_same_start(bench: Bench) -> None:
    bench.waker.cancel(M1, bench.wait())
    bench.wait()
    assert len(bench.wakes) == 1


def test_over_the_bound_one_is_refused_at_once(bench: Bench) -> None:
    bench.table.set_app(app(machine(M1), machine(M2), max_waiters=3))
    for _ in range(3):
        bench.wait()
    with pytest.raises(ProxyError) as refused:
        bench.wait()
    assert refused.value.code is Code.TOO_MANY_WAITERS and refused.value.retry_after_s
    bench.waker.on_wake_done(WakeDone(NAME, M1, 2))
    assert bench.told == [None] * 3


def test_every_wait_ends_even_if_control_never_answers(bench: Bench) -> None:
    bench.wait()
    bench.turner.to(1000 + 30 + GRACE_S - 0.2)
    assert bench.told == []
    bench.turner.to(1000 + 30 + GRACE_S + 0.3)
    assert bench.told == [Code.WAKE_TIMEOUT] and bench.waker.waiting == 0


def test_while_control_is_away_the_wait_is_shorter_and_says_so(bench: Bench) -> None:
    bench.sent.is_up = False
    bench.wait()
    bench.turner.to(1000 + CONTROL_AWAY_S + 0.3)
    assert bench.told == [Code.CONTROL_UNAVAILABLE]


def test_a_control_that_comes_back_is_asked_again_for_all_that_is_waited_for(bench: Bench) -> None:
    bench.sent.is_up = False
    bench.wait(M1)
    bench.wait(M2)
    bench.turner.to(1005.0)
    bench.sent.is_up = True
    bench.waker.on_connected()
    assert {one.machine for one in bench.wakes} == {M1, M2}
    bench.turner.to(1000 + CONTROL_AWAY_S + 5)
    assert bench.told == [], "now the longer time runs"
    bench.waker.on_connected()
    assert len(bench.wakes) == 4


def test_a_machine_that_is_removed_ends_the_wait(bench: Bench) -> None:
    bench.wait()
    bench.table.set_app(app(machine(M2)))
    assert len(bench.told) == 1 and bench.waker.waiting == 0
    bench.wait(M2)
    bench.table.remove_app(NAME)
    assert len(bench.told) == 2


def test_hints_of_one_machine_are_sent_once_a_second(bench: Bench) -> None:
    for _ in range(5):
        assert bench.waker.hint(bench.app, M1, "10.0.0.1")
    assert [(one.machine, one.hint) for one in bench.wakes] == [(M1, True)]
    bench.turner.to(1001.5)
    assert bench.waker.hint(bench.app, M1, "10.0.0.1")
    assert len(bench.wakes) == 2


def test_a_hint_for_what_is_waited_for_asks_for_nothing(bench: Bench) -> None:
    bench.wait()
    assert bench.waker.hint(bench.app, M1, "10.0.0.1")
    assert len(bench.wakes) == 1


def test_a_request_after_a_hint_asks_in_its_own_right(bench: Bench) -> None:
    bench.waker.hint(bench.app, M1, "10.0.0.1")
    bench.wait()
    assert [one.hint for one in bench.wakes] == [True, False]


def test_a_source_over_its_budget_wakes_nothing_more_and_others_do(bench: Bench) -> None:
    bench.waker.set_budgets(1.0, 100.0)
    assert bench.waker.hint(bench.app, M1, "10.0.0.1")
    assert not bench.waker.hint(bench.app, M2, "10.0.0.1")
    assert bench.waker.hint(bench.app, M2, "10.0.0.2")


# --- the budgets themselves


def test_a_source_gets_its_rate_and_no_burst_above_it() -> None:
    budget = HintBudget(5.0, 100.0)
    assert [budget.take("a", 100.0) for _ in range(8)] == [True] * 5 + [False] * 3
    assert [budget.take("a", 100.4) for _ in range(4)] == [True] * 2 + [False] * 2
    assert sum(budget.take("a", 100.0 + step / 100) for step in range(50, 1050)) in (49, 50, 51)


def test_all_sources_together_get_no_more_than_the_whole_budget() -> None:
    budget = HintBudget(5.0, 100.0)
    assert sum(budget.take(f"10.0.{number // 250}.{number % 250}", 100.0) for number in range(5000)) == 100
    assert sum(budget.take(f"10.1.{number // 250}.{number % 250}", 100.5) for number in range(5000)) == 50


def test_a_refused_source_does_not_use_up_the_others_budget() -> None:
    budget = HintBudget(1.0, 10.0)
    for _ in range(1000):
        budget.take("flood", 100.0)
    assert sum(budget.take(f"10.0.0.{number}", 100.0) for number in range(9)) == 9


def test_sources_remembered_are_bounded() -> None:
    budget = HintBudget(5.0, 1e9)
    for number in range(SOURCES_MAX * 2):
        assert budget.take(str(number), 100.0)
    assert len(budget._sources) <= SOURCES_MAX


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_a_rate_below_one_a_second_lets_one_through_now_and_then(rate: float) -> None:
    budget = HintBudget(rate, rate)
    taken = sum(budget.take("a", 100.0 + second) for second in range(100))
    assert taken in (int(100 * rate), int(100 * rate) + 1)


def test_a_rate_of_none_lets_nothing_through() -> None:
    assert not any(HintBudget(0.0, 100.0).take("a", 100.0 + second) for second in range(100))
    assert not any(HintBudget(5.0, 0.0).take("a", 100.0 + second) for second in range(100))

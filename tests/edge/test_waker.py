"""Holding requests for a machine that starts: one asking, each told once, bounds on all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.edge.table import AppView, Table
from proxy.edge.timers import Wheel
from proxy.edge.waker import ANOTHER_S, CONTROL_AWAY_S, GRACE_S, LOOK_S, NOTED_MAX, HealthWait, Waker
from proxy.errors import Code, ProxyError
from proxy.ipc import Wake, WakeDone
from proxy.model import App, AppLimits, AppName, Endpoint, Machine, MachineId, MachineState, Port, RegionCode, Service
from tests.support.edge import SentMessages
from tests.support.wheel import Turner

NAME, M1, M2 = AppName("web"), MachineId("m1"), MachineId("m2")


STARTED, STOPPED, STOPPING = MachineState.STARTED, MachineState.STOPPED, MachineState.STOPPING


def machine(machine_id: MachineId, state: MachineState = STOPPED, version: int = 1, fails: bool = False) -> Machine:
    endpoints = (Endpoint(8080, "127.0.0.1", 9),) if state is MachineState.STARTED else ()
    failing = (8080,) if fails else ()
    return Machine(machine_id, RegionCode("ams"), "app", state, version, 1, endpoints, failing_ports=failing)


def app(*machines: Machine, max_waiters: int = 100, max_queued: int = 100) -> App:
    service = Service("tcp", 8080, (Port(80, 80, ("http",)),))
    limits = AppLimits(max_waiters=max_waiters, max_queued=max_queued)
    return App(NAME, ("web.apps.test",), (service,), machines, wake_timeout_s=30.0, limits=limits)


class Bench:
    """A waker with its table, its wheel and what it says to control."""

    def __init__(self, turner: Turner) -> None:
        self.turner = turner
        self.wheel = Wheel(turner)  # type: ignore[arg-type]  # of the loop it uses these methods
        self.sent = SentMessages()
        self.table = Table((80,), lambda slot: 0)
        self.waker = Waker(self.wheel, self.sent, self.table)
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

    def wait_for_health(self, seconds: float = 10.0) -> HealthWait:
        return self.waker.wait_for_health(self.app.services[0], self.app, seconds, self.hear)


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


def test_budgets_given_again_as_they_were_give_nobody_a_second_helping(bench: Bench) -> None:
    """Settings come again with every reload and with every control."""
    bench.waker.set_budgets(1.0, 100.0)
    assert bench.waker.hint(bench.app, M1, "10.0.0.1")
    bench.waker.set_budgets(1.0, 100.0)
    assert not bench.waker.hint(bench.app, M2, "10.0.0.1")
    bench.waker.set_budgets(2.0, 100.0)
    assert bench.waker.hint(bench.app, M2, "10.0.0.1")


def test_a_start_for_nobody_is_asked_for_once_a_second_and_no_budget_bounds_it(bench: Bench) -> None:
    bench.waker.set_budgets(0.0, 0.0)
    for _ in range(5):
        bench.waker.start(bench.app, M1)
    assert not bench.waker.hint(bench.app, M2, "10.0.0.1")
    assert [(one.machine, one.hint) for one in bench.wakes] == [(M1, True)]


def test_what_did_not_reach_control_is_asked_for_again_at_the_next_occasion(bench: Bench) -> None:
    bench.sent.is_up = False
    assert not bench.waker.hint(bench.app, M1, "10.0.0.1")
    bench.waker.start(bench.app, M2)
    bench.sent.is_up = True
    assert bench.waker.hint(bench.app, M1, "10.0.0.1")
    bench.waker.start(bench.app, M2)
    assert [one.machine for one in bench.wakes] == [M1, M2]


def test_what_is_remembered_of_starts_is_bounded_and_the_latest_is_not_forgotten(bench: Bench) -> None:
    bench.waker.set_budgets(1e9, 1e9)
    many = [MachineId(f"x{number}") for number in range(NOTED_MAX * 2)]
    for one in many:
        assert bench.waker.hint(bench.app, one, "10.0.0.1")
        assert bench.waker.hint(bench.app, one, "10.0.0.1")
    assert len(bench.wakes) == len(many), "each once, and never all forgotten at a time"
    assert len(bench.waker._hinted) <= NOTED_MAX
    bench.turner.to(1001.5)
    bench.waker.hint(bench.app, M1, "10.0.0.1")
    assert len(bench.waker._hinted) == 1, "what is over is not kept"


def test_a_control_that_comes_back_again_and_again_does_not_keep_requests_waiting_for_ever(bench: Bench) -> None:
    bench.wait()
    for second in range(1005, 1080, 5):
        bench.turner.to(float(second))
        bench.waker.on_connected()
    assert bench.told == [Code.WAKE_TIMEOUT] and bench.waker.waiting == 0


def test_a_wait_that_could_not_be_sent_is_sent_with_the_next_that_joins_it(bench: Bench) -> None:
    """Control had read nothing for a while, so the link took no more; the connection was never lost."""
    bench.sent.is_up = False
    bench.wait()
    bench.turner.to(1005.0)
    bench.wait()
    bench.sent.is_up = True
    bench.turner.to(1009.0)
    bench.wait()
    assert [one.machine for one in bench.wakes] == [M1]
    bench.turner.to(1020.0)
    assert bench.told == [] and bench.waker.waiting == 3


def test_those_who_come_while_control_is_away_do_not_prolong_the_wait_of_the_first(bench: Bench) -> None:
    bench.sent.is_up = False
    for second in range(1000, 1010):
        bench.turner.to(float(second))
        bench.wait()
    bench.turner.to(1000 + CONTROL_AWAY_S + 0.3)
    assert bench.told == [Code.CONTROL_UNAVAILABLE] * 10


# --- waiting for health


def unwell(bench: Bench, *others: Machine, max_queued: int = 100) -> None:
    """Only M1 runs, and its checks fail."""
    bench.table.set_app(app(machine(M1, STARTED, 2, fails=True), *others, max_queued=max_queued))


@pytest.mark.parametrize("most", [0, 2])
def test_a_refused_wait_for_health_leaves_nothing_behind(bench: Bench, most: int) -> None:
    unwell(bench, max_queued=most)
    waits = [bench.wait_for_health() for _ in range(most)]
    with pytest.raises(ProxyError) as refused:
        bench.wait_for_health()
    assert refused.value.code is Code.NO_HEALTHY
    for wait in waits:
        wait.cancel()
    assert not bench.waker._unwell
    bench.turner.to(1020.0)
    assert bench.told == []


def test_those_who_wait_for_health_go_on_when_the_checks_pass_and_are_told_once(bench: Bench) -> None:
    unwell(bench)
    waits = [bench.wait_for_health() for _ in range(3)]
    bench.table.set_machine(NAME, machine(M1, STARTED, 3, fails=True))
    assert bench.told == []
    bench.table.set_machine(NAME, machine(M1, STARTED, 4))
    assert bench.told == [None] * 3
    for wait in waits:
        wait.expire()
        wait.end(None)
    assert bench.told == [None] * 3


def test_one_whose_client_leaves_while_others_are_told_is_told_nothing(bench: Bench) -> None:
    unwell(bench)
    waits: list[HealthWait] = []
    told: list[int] = []

    def leave_together(mine: int) -> None:
        told.append(mine)
        waits[1 - mine].cancel()

    for number in range(2):
        waits.append(
            bench.waker.wait_for_health(
                bench.app.services[0], bench.app, 10.0, lambda error, number=number: leave_together(number)
            )
        )
    bench.table.set_machine(NAME, machine(M1, STARTED, 3))
    assert len(told) == 1


def test_one_waiters_fault_leaves_the_others_of_the_same_wait_told(bench: Bench) -> None:
    unwell(bench)

    def fail(error: ProxyError | None) -> None:
        raise RuntimeError("a client's fault")

    bench.waker.wait_for_health(bench.app.services[0], bench.app, 10.0, fail)
    bench.wait_for_health()
    bench.table.set_machine(NAME, machine(M1, STARTED, 3))
    bench.waker.wait(bench.app, M2, fail)
    bench.wait(M2)
    bench.waker.on_wake_done(WakeDone(NAME, M2, 2))
    assert bench.told == [None, None] and len(bench.turner.errors) == 2


def test_a_wait_for_health_ends_when_its_time_is_over_or_its_app_is_gone(bench: Bench) -> None:
    unwell(bench)
    bench.wait_for_health(5.0)
    bench.turner.to(1005.3)
    assert bench.told == [Code.NO_HEALTHY]
    bench.wait_for_health()
    bench.table.remove_app(NAME)
    assert bench.told == [Code.NO_HEALTHY, None] and not bench.waker._unwell


def test_a_cordon_lifted_again_ends_a_wait_for_health(bench: Bench) -> None:
    """Control thought better of stopping a machine; that is no change of the machine's record."""
    unwell(bench, machine(M2, STARTED, 2))
    bench.table.soft_cordon(NAME, M2, True)
    bench.wait_for_health()
    bench.table.soft_cordon(NAME, M2, False)
    bench.turner.to(1000 + LOOK_S + 0.3)
    assert bench.told == [None]


def test_a_machine_that_has_stopped_meanwhile_is_started_for_those_who_wait_for_health(bench: Bench) -> None:
    unwell(bench, machine(M2, STOPPING, 2))
    bench.waker.start_another(bench.app, bench.app.services[0])
    assert bench.wakes == [], "it is no more and not yet to be had"
    bench.wait_for_health()
    bench.table.set_machine(NAME, machine(M2, STOPPED, 3))
    bench.turner.to(1000 + ANOTHER_S + LOOK_S + 0.3)
    assert {(one.machine, one.hint) for one in bench.wakes} == {(M2, True)}
    bench.table.set_machine(NAME, machine(M2, STARTED, 4))
    assert bench.told == [None]
    asked = len(bench.wakes)
    bench.turner.to(1030.0)
    assert len(bench.wakes) == asked, "nobody waits, so nobody looks"

"""Holding requests while a machine starts: one start however many wait, each told once how it ended.

The starting itself is control's. This side asks for it once per machine, asks again when control was away, bounds how
many may wait, and bounds how much a ClientHello may cause before its client has proved anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeVar

from proxy.clock import unix
from proxy.decide.access import StartBudget
from proxy.decide.balance import recently_started
from proxy.decide.wake import choose_to_wake
from proxy.edge.table import AppView, ServiceView, Table
from proxy.edge.timers import Call, Wheel
from proxy.errors import Code, ProxyError, Source
from proxy.ipc import Message, Wake, WakeDone
from proxy.model import AppName, Machine, MachineId, MachineState

ANOTHER_S = 1.0  # between two starts beside running machines that this worker asks for, for one app
HINT_S = 1.0  # between two of one machine for nobody who waits here
LOOK_S = 1.0  # how often those who wait for health look by themselves: a cordon lifted, a start possible by now
GRACE_S = 5.0  # control's own deadline comes first and says more; ours only bounds the wait
CONTROL_AWAY_S = 10.0
NOTED_MAX = 4096  # moments remembered; what is forgotten may be asked for again early

Waiter = Callable[[ProxyError | None], None]
K = TypeVar("K")


class Link(Protocol):
    def send(self, message: Message) -> bool: ...


class _Wait:
    """All requests that wait for one machine."""

    __slots__ = ("app", "asked", "deadline", "ends_at", "timeout_s", "waiters")

    def __init__(self, app: AppName, timeout_s: float, now: float) -> None:
        self.app = app
        self.waiters: dict[int, Waiter] = {}
        self.deadline: Call | None = None
        self.asked = False
        self.timeout_s = timeout_s
        self.ends_at = now + timeout_s + CONTROL_AWAY_S  # however often control comes back and is asked anew


class Waker:
    """This worker's side of waking."""

    def __init__(self, wheel: Wheel, link: Link, table: Table) -> None:
        self._wheel = wheel
        self._link = link
        self._table = table
        self._waits: dict[MachineId, _Wait] = {}
        self._tickets = 0
        self._budgets = (5.0, 100.0)
        self._hints = StartBudget(*self._budgets)
        self._hinted: OrderedDict[MachineId, float] = OrderedDict()
        self._another: OrderedDict[AppName, float] = OrderedDict()
        self._unwell: dict[AppName, set[HealthWait]] = {}
        self._look: Call | None = None
        self.on_machine: Callable[[AppName, Machine], None] = lambda app, machine: None
        self.on_gone: Callable[[MachineId], None] = lambda machine: None
        self.on_started: Callable[[int], None] = lambda app_slot: None  # a machine of this app may be chosen now
        table.on_machine = self._on_machine
        table.on_machine_gone = self._on_gone

    def set_budgets(self, per_source_s: float, all_s: float) -> None:
        """Take the figures; what sources have used of the same ones stays used."""
        if (per_source_s, all_s) != self._budgets:
            self._budgets = per_source_s, all_s
            self._hints = StartBudget(per_source_s, all_s)

    @property
    def waiting(self) -> int:
        return sum(len(wait.waiters) for wait in self._waits.values())

    def wait(self, app: AppView, machine: MachineId, waiter: Waiter) -> int:
        """Have `machine` started and call `waiter` once: with None when it runs, else with why it does not.

        Returns a ticket for `cancel`. Raises ProxyError(TOO_MANY_WAITERS) over the app's bound.
        """
        name = app.record.name
        wait = self._waits.get(machine)
        if wait is None:
            wait = self._waits[machine] = _Wait(name, app.record.wake_timeout_s + GRACE_S, self._wheel.now)
            self._ask(machine, wait)
        elif not wait.asked:
            self._ask(machine, wait)
        if len(wait.waiters) >= app.record.limits.max_waiters:
            raise ProxyError(
                Code.TOO_MANY_WAITERS, Source.EDGE, detail=f"{len(wait.waiters)} requests wait already", retry_after_s=1
            )
        self._tickets += 1
        wait.waiters[self._tickets] = waiter
        return self._tickets

    def cancel(self, machine: MachineId, ticket: int) -> None:
        """This client has gone. The start goes on: others may wait for it, and it was asked for."""
        wait = self._waits.get(machine)
        if wait is not None:
            wait.waiters.pop(ticket, None)

    def hint(self, app: AppView, machine: MachineId, source: str) -> bool:
        """A ClientHello named the app: start it ahead of the request, within the budgets. Whether it was asked for."""
        if self._is_asked_for(machine):
            return True
        return self._hints.take(source, self._wheel.now) is None and self.start(app, machine)

    def awaits(self, machine: MachineId) -> bool:
        """Whether requests wait for this machine already."""
        return machine in self._waits

    def start(self, app: AppView, machine: MachineId) -> bool:
        """Have a machine started for somebody who does not wait for it here. Whether it was asked for."""
        if self._is_asked_for(machine):
            return True
        if not self._link.send(Wake(app.record.name, machine, hint=True)):
            return False
        _note(self._hinted, machine, self._wheel.now, HINT_S)
        return True

    def _is_asked_for(self, machine: MachineId) -> bool:
        return machine in self._waits or self._hinted.get(machine, -HINT_S) > self._wheel.now - HINT_S

    def may_start_another(self, app: AppView) -> bool:
        """Whether the last start beside running machines of the app was long enough ago."""
        return self._another.get(app.record.name, -ANOTHER_S) <= self._wheel.now - ANOTHER_S

    def start_another(self, app: AppView, service: ServiceView) -> None:
        """All that run are at their soft limit: have one more started beside them, once a second, for nobody to wait.

        Not while one is starting, or one just started has yet to pass its checks (spec routing §5.4, "recent").
        """
        now, name = self._wheel.now, app.record.name
        if not self.may_start_another(app):
            return
        _note(self._another, name, now, ANOTHER_S)
        machines = [one.record for one in service.machines]
        if recently_started(machines, unix(), service.internal_port):
            return
        choice = choose_to_wake((one for one in machines if one.state.is_startable), service.record.processes, unix())
        if isinstance(choice, str):
            self._link.send(Wake(name, choice, hint=True))

    def start_at(self, app: AppView, machine: MachineId) -> None:
        """The same of a machine of another node, which this node's control tells."""
        _note(self._another, app.record.name, self._wheel.now, ANOTHER_S)
        self.start(app, machine)

    def wait_for_health(self, service: ServiceView, app: AppView, seconds: float, waiter: Waiter) -> HealthWait:
        """Call `waiter` once: with None when a machine of the service may be chosen, else with NO_HEALTHY."""
        name = app.record.name
        if len(self._unwell.get(name, ())) >= app.record.limits.max_queued:
            raise ProxyError(Code.NO_HEALTHY, Source.MACHINE, detail="enough requests wait already", retry_after_s=5)
        wait = HealthWait(self, name, service.internal_port, waiter)
        wait.deadline = self._wheel.call_later(seconds, wait.expire)
        self._unwell.setdefault(name, set()).add(wait)
        if self._look is None:
            self._look = self._wheel.call_later(LOOK_S, self._look_again)
        return wait

    def forget(self, wait: HealthWait) -> bool:
        """False if it was over already."""
        waits = self._unwell.get(wait.app)
        if waits is None or wait not in waits:
            return False
        waits.remove(wait)
        if not waits:
            del self._unwell[wait.app]
        return True

    def _look_for_health(self, app: AppName) -> None:
        """Something about the app's machines changed: see who waits no longer."""
        view = self._table.apps.get(app)
        for wait in list(self._unwell.get(app, ())):
            services = view.services if view is not None else ()
            service = next((one for one in services if one.internal_port == wait.internal_port), None)
            if service is None or service.running or not service.is_failing:
                wait.end(None)

    def _look_again(self) -> None:
        """Not all that helps is told as a change of a machine: what stopped may be started a while later."""
        self._look = None
        for name in list(self._unwell):
            self._look_for_health(name)
            view = self._table.apps.get(name)
            if view is None:
                continue
            ports = {wait.internal_port for wait in self._unwell.get(name, ())}
            for service in view.services:
                if service.internal_port in ports and service.record.autostart:
                    self.start_another(view, service)
        if self._unwell and self._look is None:
            self._look = self._wheel.call_later(LOOK_S, self._look_again)

    def report(self, what: str, error: Exception) -> None:
        self._wheel.report(what, error)

    def on_connected(self) -> None:
        """Control is (again) there: ask for all that is still waited for."""
        for machine, wait in list(self._waits.items()):
            self._ask(machine, wait)

    def _ask(self, machine: MachineId, wait: _Wait) -> None:
        wait.asked = self._link.send(Wake(wait.app, machine))
        if wait.deadline is not None:
            if not wait.asked:
                return  # those who come while control is away must not prolong the wait of those who are there
            wait.deadline.cancel()
        seconds = min(wait.timeout_s if wait.asked else CONTROL_AWAY_S, wait.ends_at - self._wheel.now)
        wait.deadline = self._wheel.call_later(seconds, lambda: self._expire(machine))

    def on_wake_done(self, done: WakeDone) -> None:
        error: ProxyError | None = None
        if done.code is not None:
            try:
                code = Code(done.code)
            except ValueError:
                code = Code.WAKE_INTERNAL
            error = ProxyError(code, Source.MACHINE, detail=done.detail, retry_after_s=done.retry_after_s)
        self._hinted.pop(done.machine, None)
        self._end(done.machine, error)

    def _on_machine(self, app: AppName, machine: Machine) -> None:
        if machine.state is MachineState.STARTED:
            self._end(machine.id, None)
        if app in self._unwell:
            self._look_for_health(app)
        view = self._table.apps.get(app)
        if view is not None and machine.state is MachineState.STARTED:
            self.on_started(view.record.slot)
        self.on_machine(app, machine)

    def _on_gone(self, machine: MachineId) -> None:
        self.on_gone(machine)
        self._end(machine, None)  # whoever waited chooses again, by the new table
        for app in list(self._unwell):
            self._look_for_health(app)

    def _expire(self, machine: MachineId) -> None:
        wait = self._waits.get(machine)
        if wait is None:
            return
        wait.deadline = None
        code = Code.WAKE_TIMEOUT if wait.asked else Code.CONTROL_UNAVAILABLE
        self._end(machine, ProxyError(code, Source.EDGE, detail="the machine did not start in time", retry_after_s=5))

    def _end(self, machine: MachineId, error: ProxyError | None) -> None:
        wait = self._waits.pop(machine, None)
        if wait is None:
            return
        if wait.deadline is not None:
            wait.deadline.cancel()
        for waiter in wait.waiters.values():
            try:
                waiter(error)
            except Exception as fault:  # one client's fault must not leave the others waiting
                self._wheel.report("a waiter failed", fault)


class HealthWait:
    """One request that waits for a machine whose checks pass."""

    __slots__ = ("_waiter", "_waker", "app", "deadline", "internal_port")

    def __init__(self, waker: Waker, app: AppName, internal_port: int, waiter: Waiter) -> None:
        self._waker = waker
        self._waiter = waiter
        self.app = app
        self.internal_port = internal_port
        self.deadline: Call | None = None

    def expire(self) -> None:
        self.deadline = None
        self.end(ProxyError(Code.NO_HEALTHY, Source.MACHINE, detail="no machine's checks pass", retry_after_s=5))

    def end(self, error: ProxyError | None) -> None:
        if not self._leave():
            return
        try:
            self._waiter(error)
        except Exception as fault:  # one client's fault must not leave the others waiting
            self._waker.report("a waiter failed", fault)

    def cancel(self) -> None:
        """This client has gone."""
        self._leave()

    def _leave(self) -> bool:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        return self._waker.forget(self)


def _note(moments: OrderedDict[K, float], key: K, now: float, seconds: float) -> None:
    """Remember when something was last done, and forget what lies further back than `seconds`."""
    moments[key] = now
    moments.move_to_end(key)
    while len(moments) > NOTED_MAX or next(iter(moments.values())) <= now - seconds:
        moments.popitem(last=False)

"""Holding requests while a machine starts: one start however many wait, each told once how it ended.

The starting itself is control's. This side asks for it once per machine, asks again when control was away, bounds how
many may wait, and bounds how much a ClientHello may cause before its client has proved anything.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from proxy.clock import unix
from proxy.decide.balance import recently_started
from proxy.decide.wake import choose_to_wake
from proxy.edge.table import AppView, ServiceView, Table
from proxy.edge.timers import Call, Wheel
from proxy.errors import Code, ProxyError, Source
from proxy.ipc import Message, Wake, WakeDone
from proxy.model import AppName, Machine, MachineId, MachineState

ANOTHER_S = 1.0  # between two starts beside running machines that this worker asks for, for one app
GRACE_S = 5.0  # control's own deadline comes first and says more; ours only bounds the wait
CONTROL_AWAY_S = 10.0
SOURCES_MAX = 4096

Waiter = Callable[[ProxyError | None], None]


class Link(Protocol):
    def send(self, message: Message) -> bool: ...


class _Wait:
    """All requests that wait for one machine."""

    __slots__ = ("app", "asked", "deadline", "timeout_s", "waiters")

    def __init__(self, app: AppName) -> None:
        self.app = app
        self.waiters: dict[int, Waiter] = {}
        self.deadline: Call | None = None
        self.asked = False
        self.timeout_s = 0.0


class Waker:
    """This worker's side of waking."""

    def __init__(self, wheel: Wheel, link: Link, table: Table, rng: random.Random) -> None:
        self._wheel = wheel
        self._link = link
        self._table = table
        self._rng = rng
        self._waits: dict[MachineId, _Wait] = {}
        self._tickets = 0
        self._hints = HintBudget(5.0, 100.0)
        self._hinted: dict[MachineId, float] = {}
        self._another: dict[AppName, float] = {}
        self._unwell: dict[AppName, set[HealthWait]] = {}
        self.on_machine: Callable[[AppName, Machine], None] = lambda app, machine: None
        self.on_gone: Callable[[MachineId], None] = lambda machine: None
        self.on_started: Callable[[int], None] = lambda app_slot: None  # a machine of this app may be chosen now
        table.on_machine = self._on_machine
        table.on_machine_gone = self._on_gone

    def set_budgets(self, per_source_s: float, all_s: float) -> None:
        self._hints = HintBudget(per_source_s, all_s)

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
            wait = self._waits[machine] = _Wait(name)
            wait.timeout_s = app.record.wake_timeout_s + GRACE_S
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
        now = self._wheel.now
        if machine in self._waits or self._hinted.get(machine, -1.0) > now - 1.0:
            return True
        if not self._hints.take(source, now):
            return False
        if len(self._hinted) > SOURCES_MAX:
            self._hinted.clear()
        self._hinted[machine] = now
        return self._link.send(Wake(app.record.name, machine, hint=True))

    def awaits(self, machine: MachineId) -> bool:
        """Whether requests wait for this machine already."""
        return machine in self._waits

    def start(self, app: AppView, machine: MachineId) -> None:
        """Have a machine started for somebody who does not wait for it here."""
        now = self._wheel.now
        if machine in self._waits or self._hinted.get(machine, -1.0) > now - 1.0:
            return
        if len(self._hinted) > SOURCES_MAX:
            self._hinted.clear()
        self._hinted[machine] = now
        self._link.send(Wake(app.record.name, machine, hint=True))

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
        if len(self._another) > SOURCES_MAX:
            self._another.clear()
        self._another[name] = now
        machines = [one.record for one in service.machines]
        if recently_started(machines, unix(), service.internal_port):
            return
        choice = choose_to_wake((one for one in machines if one.state.is_startable), service.record.processes, unix())
        if isinstance(choice, str):
            self._link.send(Wake(name, choice, hint=True))

    def wait_for_health(self, service: ServiceView, app: AppView, seconds: float, waiter: Waiter) -> HealthWait:
        """Call `waiter` once: with None when a machine of the service may be chosen, else with NO_HEALTHY."""
        waits = self._unwell.setdefault(app.record.name, set())
        if len(waits) >= app.record.limits.max_queued:
            raise ProxyError(Code.NO_HEALTHY, Source.MACHINE, detail="enough requests wait already", retry_after_s=5)
        wait = HealthWait(self, app.record.name, service.internal_port, waiter)
        wait.deadline = self._wheel.call_later(seconds, wait.expire)
        waits.add(wait)
        return wait

    def forget(self, wait: HealthWait) -> None:
        waits = self._unwell.get(wait.app)
        if waits is not None:
            waits.discard(wait)
            if not waits:
                del self._unwell[wait.app]

    def _look_for_health(self, app: AppName) -> None:
        """Something about the app's machines changed: see who waits no longer."""
        view = self._table.apps.get(app)
        for wait in list(self._unwell.get(app, ())):
            services = view.services if view is not None else ()
            service = next((one for one in services if one.internal_port == wait.internal_port), None)
            if service is None or service.running or not service.is_failing:
                wait.end(None)

    def report(self, what: str, error: Exception) -> None:
        self._wheel.report(what, error)

    def on_connected(self) -> None:
        """Control is (again) there: ask for all that is still waited for."""
        for machine, wait in list(self._waits.items()):
            self._ask(machine, wait)

    def _ask(self, machine: MachineId, wait: _Wait) -> None:
        wait.asked = self._link.send(Wake(wait.app, machine))
        if wait.deadline is not None:
            wait.deadline.cancel()
        seconds = wait.timeout_s if wait.asked else CONTROL_AWAY_S
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
        self.cancel()
        try:
            self._waiter(error)
        except Exception as fault:  # one client's fault must not leave the others waiting
            self._waker.report("a waiter failed", fault)

    def cancel(self) -> None:
        """This client has gone."""
        self._waker.forget(self)
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


class HintBudget:
    """How many starts ClientHellos may cause: per source address and in all. Token buckets, bounded in number.

    A bucket holds one second's worth, but at least one start, so that a rate below one a second lets some through.
    """

    __slots__ = ("_all", "_all_max", "_all_s", "_at", "_per_source_max", "_per_source_s", "_sources")

    def __init__(self, per_source_s: float, all_s: float) -> None:
        self._per_source_s = per_source_s
        self._all_s = all_s
        self._per_source_max = max(1.0, per_source_s) if per_source_s > 0 else 0.0
        self._all_max = max(1.0, all_s) if all_s > 0 else 0.0
        self._all = self._all_max
        self._at = 0.0
        self._sources: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, source: str, now: float) -> bool:
        """Whether one more start on behalf of `source` is within the budgets, and if so count it."""
        self._all = min(self._all_max, self._all + (now - self._at) * self._all_s)
        self._at = now
        left, at = self._sources.get(source, (self._per_source_max, now))
        left = min(self._per_source_max, left + (now - at) * self._per_source_s)
        if left < 1.0 or self._all < 1.0:
            return False
        self._all -= 1.0
        self._sources[source] = (left - 1.0, now)
        self._sources.move_to_end(source)
        if len(self._sources) > SOURCES_MAX:
            self._sources.popitem(last=False)
        return True

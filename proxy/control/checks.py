"""Runs the health checks of this node's machines and tells what they come to.

Checks of services gate routing: a port with one that does not pass is among the machine's `failing_ports`, which
workers pass by. Checks of fly.toml's top level are run and shown, no more. A machine that does not run is not checked,
and what was found last stays; after a cold start that is void and `first_pass` holds the wake until it is known anew;
after a resume, and for machines that ran before this control did, the last results stand until the next.

No task waits for a check to come due: there is a heap of moments and one alarm. What runs at once is bounded in all and
per app, so that an app whose machines all hang delays its own checks alone. What a result means is decide/health.py's,
how it is got is check_client.py's.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import logging
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from proxy.clock import spawn
from proxy.control.check_client import CheckClient, Finding, Target
from proxy.control.machines import Fleet, Owned
from proxy.control.plan import AppPlan
from proxy.control.prober import Alarm, AlarmClock, SocketMaker
from proxy.decide.health import CheckState, Status, restart_is_due
from proxy.model import AppName, Check, MachineId, MachineState

log = logging.getLogger(__name__)

AT_ONCE = 256
APP_AT_ONCE = 32
_BURST = 16  # begun in one turn of the loop, which a wake may be waiting for
_SPREAD_S = 0.004  # per check: over how long those of machines that ran before us are spread
_STALE_MAX = 1000
_NOT_YET = "not checked yet"


@dataclass(frozen=True, slots=True)
class Definition:
    """A check as a machine has it."""

    name: str
    check: Check
    port: int  # as the app calls it
    is_gate: bool  # of a service, so that routing heeds it


@dataclass(slots=True, eq=False)
class Watch:
    """One check of one machine."""

    of: Watched
    definition: Definition
    state: CheckState
    output: str = _NOT_YET
    updated_at: float = 0.0  # unix seconds of the last result
    ticket: int = 0  # of its one valid place in the heap or the queue; another one is out of date
    task: asyncio.Task[Finding] | None = None


@dataclass(slots=True, eq=False)
class Watched:
    """The checks of one machine."""

    machine: Owned
    plan: AppPlan
    watches: tuple[Watch, ...] = ()  # replaced whole: read by the scraper's thread
    is_active: bool = False
    passed: asyncio.Future[None] | None = None  # a wake waits for the first pass
    restart_refused: bool = False

    @property
    def gates(self) -> Iterator[Watch]:
        return (watch for watch in self.watches if watch.definition.is_gate)


@dataclass(slots=True)
class _AppChecks:
    """What is under way for one app."""

    running: int = 0
    queued: deque[tuple[int, Watch]] = field(default_factory=deque)


class Checks:
    """Keeps machines.HealthWatch for a fleet. `close` it before the loop ends."""

    def __init__(self, fleet: Fleet, clock: AlarmClock, rng: random.Random, make_socket: SocketMaker) -> None:
        self._fleet = fleet
        self._clock = clock
        self._rng = rng
        self._client = CheckClient(make_socket)
        self._watched: dict[MachineId, Watched] = {}
        self._due: list[tuple[float, int, Watch]] = []
        self._tickets = 0
        self._running = 0
        self._stale = 0  # places in the heap that count no more, about
        self._apps: dict[AppName, _AppChecks] = {}
        self._alarm: Alarm | None = None

    async def settle(self) -> None:
        """Until the checks that run now have come to something. For tests."""
        tasks = {watch.task for watched in self._watched.values() for watch in watched.watches}
        if running := {task for task in tasks if task is not None}:
            await asyncio.wait(running)

    async def close(self) -> None:
        tasks = []
        for watched in self._watched.values():
            tasks += [watch.task for watch in watched.watches if watch.task is not None]
            self._leave_off(watched)
        self._due.clear()
        self._apps.clear()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._alarm is not None:
            self._alarm.close()

    # --- machines (machines.HealthWatch)

    def look(self, machine: Owned) -> None:
        watched = self._watched.get(machine.id)
        if watched is None and not _has_checks(machine.app):
            return
        if machine.state is not MachineState.STARTED:
            if watched is not None and watched.is_active and machine.state is not MachineState.STARTING:
                self._leave_off(watched)
            return
        is_new = watched is None
        watched = self._up_to_date(machine)
        if not watched.is_active:
            watched.is_active = True
            for watch in watched.watches:
                self._go_on(watch, is_new)
        self._tell(watched)

    def _go_on(self, watch: Watch, is_new: bool) -> None:
        """The machine runs, and not through a start that we waited for: it was resumed, or ran before us."""
        now = self._clock.monotonic()
        watch.state.resumed(now)
        wait = 0.0
        if is_new:
            wait = self._rng.uniform(0.0, min(watch.definition.check.interval_s, _SPREAD_S * len(self._due)))
        self._schedule(watch, now + wait)

    async def first_pass(self, machine: Owned, deadline: float) -> None:
        """Check at once and often. Returns when every service check has passed, or the time for that is over."""
        if machine.id not in self._watched and not _has_checks(machine.app):
            self._fleet.set_failing(machine, ())
            return
        watched = self._up_to_date(machine)
        self._leave_off(watched)
        watched.is_active = True
        now = self._clock.monotonic()
        for watch in watched.watches:
            watch.state.started(now)
            watch.output, watch.updated_at = _NOT_YET, 0.0
        self._tell(watched)
        gates = [watch.state for watch in watched.gates]
        watched.passed = asyncio.get_running_loop().create_future() if gates else None
        for watch in watched.watches:
            self._begin(watch)
        if gates:
            await self._wait(watched, min(deadline, max(state.first_pass_by for state in gates)))

    async def _wait(self, watched: Watched, limit: float) -> None:
        passed = watched.passed
        assert passed is not None
        alarm = self._clock.alarm(lambda: _end(passed))
        try:
            alarm.set(max(0.0, limit - self._clock.monotonic()))
            await passed
        finally:
            alarm.close()
            if watched.passed is passed:
                watched.passed = None

    def forget(self, machine: Owned) -> None:
        watched = self._watched.pop(machine.id, None)
        if watched is not None:
            self._leave_off(watched)

    def _leave_off(self, watched: Watched) -> None:
        watched.is_active = False
        for watch in watched.watches:
            self._drop(watch)
        if watched.passed is not None:
            _end(watched.passed)
            watched.passed = None

    def _up_to_date(self, machine: Owned) -> Watched:
        """The machine's checks as its app has them now; those that stayed the same keep what is known of them."""
        watched = self._watched.get(machine.id)
        if watched is None:
            watched = self._watched[machine.id] = Watched(machine, machine.app)
        elif watched.machine is machine and watched.plan is machine.app:
            return watched
        watched.machine, watched.plan = machine, machine.app
        now, failing = self._clock.monotonic(), machine.row.failing_ports
        known = {watch.definition: watch for watch in watched.watches}
        watches = []
        for definition in definitions(machine):
            watch = known.pop(definition, None)
            if watch is None:
                is_failing = definition.is_gate and definition.port in failing and not watched.watches
                held = Status.CRITICAL if is_failing else Status.PASSING
                watch = Watch(watched, definition, CheckState(definition.check, now, held))
                if watched.is_active:
                    self._go_on(watch, is_new=True)
            watches.append(watch)
        for watch in known.values():
            self._drop(watch)
        watched.watches = tuple(watches)
        return watched

    # --- moments

    def _schedule(self, watch: Watch, at: float) -> None:
        self._tickets += 1
        watch.ticket = self._tickets
        heapq.heappush(self._due, (at, watch.ticket, watch))
        if self._due[0][2] is watch:
            self._set_alarm()

    def _set_alarm(self) -> None:
        """For the earliest moment. While as many run as may, the end of one takes its place."""
        if self._due and self._running < AT_ONCE:
            if self._alarm is None:
                self._alarm = self._clock.alarm(self._ring)
            self._alarm.set(max(0.0, self._due[0][0] - self._clock.monotonic()))

    def _ring(self) -> None:
        now = self._clock.monotonic()
        for _ in range(_BURST):
            if not self._due or self._running >= AT_ONCE or self._due[0][0] > now:
                break
            _, ticket, watch = heapq.heappop(self._due)
            if watch.ticket != ticket:
                self._stale -= 1
                continue
            app = self._app(watch)
            if app.running >= APP_AT_ONCE:
                app.queued.append((ticket, watch))
            else:
                self._begin(watch)
        self._set_alarm()

    def _app(self, watch: Watch) -> _AppChecks:
        return self._apps.setdefault(watch.of.plan.name, _AppChecks())

    def _drop(self, watch: Watch) -> None:
        """Its place in the heap, and what runs of it, count no more."""
        if watch.task is not None:
            watch.task.cancel()
            watch.task = None
        elif watch.ticket:
            self._stale += 1
        watch.ticket = 0
        if self._stale > _STALE_MAX and self._stale > len(self._due) // 2:
            self._due = [one for one in self._due if one[1] == one[2].ticket]
            heapq.heapify(self._due)
            self._stale = 0

    # --- checks

    def _begin(self, watch: Watch) -> None:
        """Run it now. A wake's first checks come straight here: wakes have budgets of their own."""
        self._tickets += 1
        watch.ticket = self._tickets
        app = self._app(watch)
        app.running += 1
        self._running += 1
        watch.task = spawn(self._run(watch), f"check {watch.of.machine.id}")
        watch.task.add_done_callback(functools.partial(self._ended, watch, app, watch.ticket))

    async def _run(self, watch: Watch) -> Finding:
        definition, machine = watch.definition, watch.of.machine
        try:
            return await self._client.check(definition.check, _target(machine, definition.port))
        except Exception as error:  # a fault of ours must not end the check for ever
            log.exception("check %s of machine %s failed in an unforeseen way", definition.name, machine.id)
            return Finding(False, f"{type(error).__name__}: {error}")

    def _ended(self, watch: Watch, app: _AppChecks, ticket: int, task: asyncio.Task[Finding]) -> None:
        """Called for every check that began, also for one that was cancelled before its first step."""
        app.running -= 1
        self._running -= 1
        try:
            if watch.ticket == ticket:
                watch.task = None
                if not task.cancelled():
                    self._heard(watch, task.result())
        finally:
            self._next_of(watch.of.plan.name, app)
            self._set_alarm()

    def _next_of(self, name: AppName, app: _AppChecks) -> None:
        while app.queued and app.running < APP_AT_ONCE:
            ticket, watch = app.queued.popleft()
            if watch.ticket == ticket:
                self._begin(watch)
        if not app.running and not app.queued and self._apps.get(name) is app:
            del self._apps[name]

    def _heard(self, watch: Watch, finding: Finding) -> None:
        now, watched = self._clock.monotonic(), watch.of
        watch.output, watch.updated_at = finding.output, self._clock.unix()
        before = watch.state.status
        watch.state.heard(finding.passes, now)
        self._schedule(watch, watch.state.next_check(now, self._rng))
        self._log(watch, before)
        self._tell(watched)
        if watched.passed is not None and all(one.state.is_passing and one.state.is_known for one in watched.gates):
            _end(watched.passed)
        after_s = watched.plan.restart_on_checks
        if restart_is_due((one.state for one in watched.gates), after_s, now):
            self._restart(watched, f"its checks have failed for {after_s:g} s: {watch.definition.name}: {watch.output}")
        else:
            watched.restart_refused = False

    def _log(self, watch: Watch, before: Status) -> None:
        status, machine = watch.state.status, watch.of.machine
        if status is not before and Status.CRITICAL in (status, before):
            level = logging.WARNING if status is Status.CRITICAL else logging.INFO
            text = "machine %s of %s: check %s is %s: %s"
            log.log(level, text, machine.id, machine.app.name, watch.definition.name, status, watch.output)

    def _restart(self, watched: Watched, why: str) -> None:
        machine = watched.machine
        if machine.state is not MachineState.STARTED:
            return
        if self._fleet.restart_failing(machine, why):
            watched.restart_refused = False
            log.warning("machine %s of %s is restarted: %s", machine.id, machine.app.name, why)
        elif not watched.restart_refused:
            watched.restart_refused = True
            log.warning("machine %s of %s is not restarted now, although %s", machine.id, machine.app.name, why)

    def _tell(self, watched: Watched) -> None:
        ports = {watch.definition.port for watch in watched.gates if not watch.state.is_passing}
        self._fleet.set_failing(watched.machine, tuple(sorted(ports)))

    # --- what is told

    def checks_of(self, machine: Owned) -> list[dict[str, Any]]:  # Any: JSON
        """`checks` of a Machine as Fly's API has it. One that has not been run counts as a warning."""
        watched = self._watched.get(machine.id)
        if watched is None:
            return [_json(one.name, Status.WARNING, _NOT_YET, 0.0) for one in definitions(machine)]
        return [
            _json(one.definition.name, _shown_status(one.state), one.output, one.updated_at) for one in watched.watches
        ]

    def statuses(self, machine: MachineId) -> list[tuple[str, str]]:
        """Names and statuses. May be called in any thread."""
        watched = self._watched.get(machine)
        if watched is None:
            return []
        return [(watch.definition.name, _shown_status(watch.state).value) for watch in watched.watches]


def definitions(machine: Owned) -> list[Definition]:
    """The checks of a machine, with Fly's names (spec routing §5.4): `servicecheck-00-http-8080`."""
    app, group = machine.app, machine.row.group
    services = app.services_of(group)
    found: list[Definition] = []
    for service in services:
        for check in service.checks:
            name = f"servicecheck-{len(found):02}-{check.type}-{service.internal_port}"
            found.append(Definition(name, check, service.internal_port, is_gate=True))
    for named in app.checks:
        if group in named.processes or not named.processes:
            port = named.port or next((service.internal_port for service in services), None)
            if port is not None:
                found.append(Definition(named.name, named.check, port, is_gate=False))
    return found


def _has_checks(app: AppPlan) -> bool:
    return bool(app.checks) or any(service.checks for service in app.services)


def _target(machine: Owned, port: int) -> Target:
    """Where the machine's program listens for this port. A port of no service is taken as it is written."""
    netns_pid = machine.running.netns_pid if machine.running is not None else 0
    endpoints = machine.spec.endpoints
    for endpoint in endpoints:
        if endpoint.internal_port == port:
            return Target(endpoint.host, endpoint.port, netns_pid)
    return Target(endpoints[0].host if endpoints else "127.0.0.1", port, netns_pid)


def _shown_status(state: CheckState) -> Status:
    return state.status if state.is_known else Status.WARNING


def _json(name: str, status: Status, output: str, updated_at: float) -> dict[str, Any]:
    at = datetime.fromtimestamp(updated_at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"name": name, "status": status.value, "output": output, "updated_at": at if updated_at else None}


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

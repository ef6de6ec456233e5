"""The one owner of machine state on this node: starts, stops, suspends, and what follows from ends.

Every change of state goes through `Fleet._change` and the table in lifecycle.py, gives the machine a higher version,
is kept in the store and told to whoever publishes it. At most one flight (a start or resume) and one ending (a stop or
suspend) is under way per machine:

- a flight is shared by all who ask meanwhile; nobody's leaving ends it, only a stop does;
- a wake that comes while the machine ends waits for the end and starts it again;
- a machine is stopped for idleness only after every live worker has said that it sends nothing new (see Cordons).

How machines are run is the driver's; which are idle, idle.py's; what they are, plan.py's and specs.py's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from signal import SIGKILL
from typing import Any, Protocol

from proxy.clock import spawn
from proxy.control.lifecycle import LIVE, Change, next_state
from proxy.control.plan import AppPlan, GroupPlan
from proxy.control.prober import AlarmClock, SocketMaker, connect_when_listening, wait_until_listening
from proxy.control.specs import digest_of, with_version
from proxy.control.store import Event, MachineRow, Store
from proxy.control.ulid import new_ulid
from proxy.decide.restart import hold_left_s, hold_s, restart_pause_s
from proxy.errors import Code
from proxy.machines.driver import Driver, DriverError, Exit, MachineSpec, Running
from proxy.model import Autostop, Endpoint, Machine, MachineId, MachineState, RegionCode, RestartPolicy
from proxy.state import SharedMemory

log = logging.getLogger(__name__)

_VERSIONS_PER_EPOCH = 20  # bits
_OTHER_PORTS_S = 2.0  # what the second and further ports of a machine get once the first one answers
_DRAIN_POLL_S = 0.05
_END_S = 2.0  # for the word how a machine ended
_NOT_STARTED = frozenset(MachineState) - {MachineState.STARTED}
_GOODBYE_S = 1.0  # what tunnels get to end, once workers were told to end them
_RECHECK_S = 1.0
_FAILING_DRAIN_S = 5.0  # what a machine with failing checks gets to finish what it has, before its restart
_TELL_S = 0.05  # of a start under way: telling takes the processor from it, and most are over by then
_NOTE_S = 0.005


class Cordons(Protocol):
    """How workers are made to send nothing new to a machine, and given its first connection (link.py)."""

    async def cordon(self, machine: Owned) -> bool:
        """True once every live worker has acknowledged; False when that took too long."""

    def lift(self, machine: Owned) -> None: ...

    def end_tunnels(self, machine: Owned) -> None:
        """Have workers end what is open to it, WebSockets with 1001."""

    def hand_on(self, machine: Owned, internal_port: int, sock: socket.socket) -> None:
        """It has accepted this connection, and is told started next: for the first request, if a worker has one that
        waits. The caller closes its own descriptor."""


class HealthWatch(Protocol):
    """Who checks machines (checks.py). It says what it finds by `Fleet.set_failing` and `Fleet.restart_failing`."""

    def look(self, machine: Owned) -> None:
        """The machine's state or its app changed: begin, go on or leave off."""

    async def first_pass(self, machine: Owned, deadline: float) -> None:
        """It has just been started and listens: wait until its service checks passed once, or that takes too long."""

    def forget(self, machine: Owned) -> None: ...


class NoHealthWatch:
    """Nothing is checked."""

    def look(self, machine: Owned) -> None:
        pass

    async def first_pass(self, machine: Owned, deadline: float) -> None:
        pass

    def forget(self, machine: Owned) -> None:
        pass


class Refused(Exception):
    """What was asked is not possible in the state the machine is in."""


@dataclass(frozen=True, slots=True)
class WakeResult:
    """How a wake ended. `code` is None when the machine runs."""

    version: int
    code: Code | None = None
    detail: str = ""
    retry_after_s: int | None = None


@dataclass(slots=True)
class WakePhases:
    """When each step of a wake was done: monotonic seconds, 0 for a step that was not come to."""

    asked_at_unix: float
    source: str
    from_state: str
    asked: float
    journalled: float = 0.0
    forked: float = 0.0
    listening: float = 0.0
    answered: float = 0.0
    code: str | None = None

    def as_ms(self) -> dict[str, Any]:  # Any: numbers and names, for JSON
        def since(moment: float) -> float | None:
            return round((moment - self.asked) * 1e3, 3) if moment else None

        return {
            "asked_at": self.asked_at_unix, "source": self.source, "from_state": self.from_state,
            "asked": 0.0, "journalled": since(self.journalled), "forked": since(self.forked),
            "listening": since(self.listening), "answered": since(self.answered), "code": self.code,
        }  # fmt: skip


class Flight:
    """A start or resume under way."""

    __slots__ = ("cut", "cut_by", "fault", "is_resume", "phases", "probe", "result", "spec")

    def __init__(self, phases: WakePhases) -> None:
        loop = asyncio.get_running_loop()
        self.result: asyncio.Future[WakeResult] = loop.create_future()
        self.cut: asyncio.Future[None] = loop.create_future()
        self.cut_by = ""  # "stop" or "exit"
        self.probe: asyncio.Task[bool] | None = None
        self.phases = phases
        self.spec: MachineSpec | None = None  # what is to be started, once that is in the journal
        self.fault: Exception | None = None  # of a start that was tried at once
        self.is_resume = False

    def cut_short(self, by: str) -> None:
        self.cut_by = self.cut_by or by
        if not self.cut.done():
            self.cut.set_result(None)
        if self.probe is not None:
            self.probe.cancel()


@dataclass(slots=True, eq=False)
class Owned:
    """A machine of this node, with all that goes on around it."""

    row: MachineRow
    app: AppPlan
    group: GroupPlan
    spec: MachineSpec
    driver: Driver
    region: RegionCode
    running: Running | None = None
    next_spec: MachineSpec | None = None  # takes the place of `spec` at the next start
    digested: MachineSpec | None = None  # the spec that row.digest was last compared with
    flight: Flight | None = None
    ending: asyncio.Task[None] | None = None
    restarting: asyncio.Task[None] | None = None
    rechecking: asyncio.Task[None] | None = None
    handshake: asyncio.Future[None] | None = None  # a soft-cordon under way; done = a wake has won over it
    is_leaving: bool = False  # no longer configured: nothing starts it any more
    unreached: bool = False  # it is being stopped because it never listened
    restarts: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    watchers: list[asyncio.Future[None]] = field(default_factory=list)
    last_wake: WakePhases | None = None
    begun: WakePhases | None = None  # a start that is not in the history yet
    untold: tuple[WakePhases, WakeResult] | None = None  # a resume that is not in the history yet
    last_pid: int | None = None
    admitted: int = 0  # as last looked at by idle.py
    idle_since: float = 0.0
    note: str = ""  # what an operator should know

    @property
    def id(self) -> MachineId:
        return MachineId(self.row.id)

    @property
    def state(self) -> MachineState:
        return MachineState(self.row.state)

    @property
    def is_static(self) -> bool:
        return self.app.driver == "static"

    def record(self) -> Machine:
        """As workers get it."""
        row = self.row
        return Machine(
            id=self.id, region=self.region, group=row.group, state=self.state, version=row.version, slot=row.slot,
            endpoints=self.spec.endpoints, netns_pid=self.running.netns_pid if self.running else 0,
            cordoned=row.cordoned, hold_reason=row.hold_reason, hold_until=row.hold_until,
            failing_ports=row.failing_ports, started_at=row.started_at,
        )  # fmt: skip


class Fleet:
    """All machines of this node."""

    def __init__(
        self, drivers: Mapping[str, Driver], store: Store, memory: SharedMemory, clock: AlarmClock, cordons: Cordons,
        make_socket: SocketMaker, epoch: int,
    ) -> None:  # fmt: skip
        self._drivers = drivers
        self._store = store
        self._memory = memory
        self._clock = clock
        self._cordons = cordons
        self._make_socket = make_socket
        self._epoch = epoch << _VERSIONS_PER_EPOCH
        self._machines: dict[MachineId, Owned] = {}
        self._ending_all = False
        self.health: HealthWatch = NoHealthWatch()
        self.on_change: Callable[[Owned], None] = lambda machine: None
        self.on_wake: Callable[[Owned, WakeResult], None] = lambda machine, result: None
        for driver in drivers.values():
            driver.set_on_exit(self._on_exit)

    # --- what there is

    def get(self, machine: MachineId) -> Owned | None:
        return self._machines.get(machine)

    def all(self) -> list[Owned]:
        return list(self._machines.values())

    def driver(self, name: str) -> Driver:
        return self._drivers[name]

    def add(self, machine: Owned) -> None:
        """Own a machine: known to be stopped, or about to be adopted. Versions go on above all earlier ones."""
        self._machines[machine.id] = machine
        machine.row.version = self._next_version(machine.row.version)
        machine.idle_since = self._clock.monotonic()
        if machine.is_static:
            machine.row.state = MachineState.STARTED
            self.health.look(machine)
        if not machine.row.instance_id:
            self._new_instance(machine)
        self._store.save_later(machine.row)

    def adopt(self, machine: Owned, found: Running | None) -> None:
        """Find a machine that an earlier control may have started; `found` is what runs under its id, if anything."""
        row = machine.row
        kept = Running(row.pid, row.start_ticks, row.netns_pid) if row.pid else None
        if machine.is_static or (machine.state not in LIVE and found is None):
            return
        running = machine.driver.adopt(machine.spec, kept) if kept is not None else None
        if running is None and found is not None:
            running = machine.driver.adopt(machine.spec, None)
        if running is None:
            if machine.state in LIVE:  # else it was a left-over that has ended since
                self._lost(machine)
            return
        machine.running = running
        row.pid, row.start_ticks, row.netns_pid = running.pid, running.start_ticks, running.netns_pid
        self._store.save_later(row)
        self._go_on(machine)

    def _go_on(self, machine: Owned) -> None:
        """Finish what the control before was in the middle of."""
        match machine.state:
            case MachineState.STARTED if machine.driver.is_frozen(machine.id):  # its suspend did not come on record
                self._change(machine, Change.SUSPEND)
                machine.ending = spawn(self._suspend_steps(machine, False), f"suspend {machine.id}")
            case MachineState.STARTED:
                self.health.look(machine)
            case MachineState.SUSPENDED if machine.driver.is_frozen(machine.id):
                return
            case MachineState.STOPPING:
                machine.ending = spawn(self._stop_steps(machine), f"stop {machine.id}")
            case MachineState.SUSPENDING:
                machine.ending = spawn(self._suspend_steps(machine, False), f"suspend {machine.id}")
            case _:
                if machine.state is not MachineState.STARTING:
                    self._change(machine, Change.START)
                self._launch_flight(machine, "flyd")

    def _lost(self, machine: Owned) -> None:
        """It ended while nobody watched: exit unknown, unless the supervisor still tells."""
        was = machine.state
        machine.last_pid = machine.row.pid
        self._record_exit(machine, Exit(), requested=was is MachineState.STOPPING)
        self._change(machine, Change.EXITED, at_once=True)
        if was is MachineState.STARTED:
            self._after_exit(machine, Exit())

    def exited_elsewhere(self, pid: int, end: Exit) -> None:
        """The supervisor saw an orphan end. On return it is on record, or it was no machine of ours."""
        for driver in self._drivers.values():
            if driver.exited_elsewhere(pid, end):
                return
        for machine in self._machines.values():
            row = machine.row
            if machine.last_pid == pid and row.exit_code is None and row.exit_signal is None:
                row.exit_code, row.exit_signal, row.oom_killed = end.code, end.signal, end.oom_killed
                machine.last_pid = None
                self._store.save(row)
                return

    # --- wake

    def wake(self, machine_id: MachineId, source: str = "proxy") -> asyncio.Future[WakeResult]:
        """Start or resume a machine, or join the start under way. The future is shared: await it through shield."""
        machine = self._machines.get(machine_id)
        if machine is None:
            return _done(WakeResult(0, Code.MACHINE_GONE, f"there is no machine {machine_id} here"))
        if machine.handshake is not None and not machine.handshake.done():
            machine.handshake.set_result(None)
            self._cordons.lift(machine)  # before the answer: who asked chooses again as soon as it has it
        if machine.flight is not None:
            return machine.flight.result
        if machine.state is MachineState.STARTED and machine.ending is None:
            if machine.driver.has_ended(machine_id):
                return spawn(self._wake_again(machine, source), f"wake {machine_id} once its end is on record")
            return _done(WakeResult(machine.row.version))
        if (refusal := self._refusal(machine, source)) is not None:
            return _done(refusal)
        return self._launch_flight(machine, source).result

    async def _wake_again(self, machine: Owned, source: str) -> WakeResult:
        """It has ended, and the word how is on its way: who asks has met its closed port, and would again."""
        if not await self.wait_for(machine, _NOT_STARTED, _END_S):
            return WakeResult(machine.row.version)
        return await asyncio.shield(self.wake(machine.id, source))

    def _refusal(self, machine: Owned, source: str) -> WakeResult | None:
        version, row = machine.row.version, machine.row
        if self._ending_all:
            return WakeResult(version, Code.START_CANCELLED, "the node is shutting down")
        if machine.is_leaving:
            return WakeResult(version, Code.MACHINE_GONE, "it is no longer configured")
        if source != "proxy":
            return None
        services = machine.app.services_of(row.group)
        if not any(service.autostart for service in services):
            return WakeResult(version, Code.NOT_STARTABLE, "auto_start_machines is off")
        left = hold_left_s(row.hold_until, self._clock.unix())
        if left:  # whatever its state: one that never listened may still be stopping
            return WakeResult(version, Code.WAKE_HELD, row.hold_reason or "", max(1, round(left)))
        return None

    def _launch_flight(self, machine: Owned, source: str) -> Flight:
        self._note_past(machine)
        now = self._clock.monotonic()
        flight = Flight(WakePhases(self._clock.unix(), source, machine.row.state, now))
        machine.flight = flight
        machine.last_wake = flight.phases
        if machine.restarting is not None and source != "flyd":
            machine.restarting.cancel()
            machine.restarting = None
        if machine.ending is None:  # what needs no waiting is done before the loop turns
            if machine.state is MachineState.SUSPENDED and self._jump(machine, flight):
                return flight
            if machine.state.is_startable and machine.state is not MachineState.SUSPENDED:
                self._take_off(machine, flight, now + machine.app.wake_timeout_s)
        spawn(self._fly(machine, flight), f"wake {machine.id}")
        return flight

    def _take_off(self, machine: Owned, flight: Flight, deadline: float) -> None:
        """Write the start in the journal, and make it at once where the driver can."""
        try:
            row = machine.row
            self._take_next_spec(machine)
            row.stopped_by, row.pid = "", None
            self._change(machine, Change.START, at_once=True, tell_soon=True)  # the journal: about to start
            flight.phases.journalled = self._clock.monotonic()
            machine.begun = flight.phases
            asyncio.get_running_loop().call_later(_TELL_S, self._note_past, machine)
            flight.spec = with_version(machine.spec, row.instance_id)
            running = machine.driver.start_at_once(flight.spec)
            if running is not None:
                self._forked(machine, flight, running)
                flight.probe = self._begin_probe(machine, flight, deadline)  # its turn comes before the flight's
        except Exception as error:  # the flight ends with it
            flight.fault = error

    def _forked(self, machine: Owned, flight: Flight, running: Running, save: bool = False) -> None:
        row = machine.row
        machine.running = running
        machine.last_pid = None
        row.pid, row.start_ticks, row.netns_pid = running.pid, running.start_ticks, running.netns_pid
        flight.phases.forked = self._clock.monotonic()
        if save:
            self._store.save(row)

    def _jump(self, machine: Owned, flight: Flight) -> bool:
        """Resume within this turn of the loop, where the driver can. It listened when it was frozen: nothing to probe.

        The signal comes first. Until the new state is in the store, a control that is killed leaves a machine that
        runs and a journal that says suspended; the next control sees that it does not stand still (`_go_on`).
        """
        if not machine.driver.resume_at_once(machine.id):
            return False
        flight.phases.forked = self._clock.monotonic()
        self._change(machine, Change.START, passing=True)
        self._reached(machine, flight)
        result = WakeResult(machine.row.version)
        self._settle(machine, flight, result)
        machine.untold = flight.phases, result
        asyncio.get_running_loop().call_later(_NOTE_S, self._note_past, machine)
        return True

    def _note_past(self, machine: Owned) -> None:
        """Tell of a start or resume once the request is on its way: this is history, and that one waits for the
        processor. Or before, when more happens to the machine: what comes first is told first."""
        begun, machine.begun = machine.begun, None
        if begun is not None:
            self._event(machine, "start", "starting", begun.source, at=begun.asked_at_unix)
        untold, machine.untold = machine.untold, None
        if untold is None:
            return
        phases, result = untold
        self.on_wake(machine, result)
        self._event(machine, "start", "starting", phases.source, at=phases.asked_at_unix)
        self._event(machine, "start", "started", "flyd", at=phases.asked_at_unix)

    def _land(self, machine: Owned, flight: Flight, result: WakeResult) -> None:
        self._settle(machine, flight, result)
        self.on_wake(machine, result)

    def _settle(self, machine: Owned, flight: Flight, result: WakeResult) -> None:
        machine.flight = None
        flight.phases.answered = self._clock.monotonic()
        flight.phases.code = result.code.value if result.code else None
        flight.result.set_result(result)

    async def _fly(self, machine: Owned, flight: Flight) -> None:
        result = WakeResult(machine.row.version, Code.START_CANCELLED, "control is ending")
        try:
            result = await self._bring_up(machine, flight)
        except Exception as error:
            log.exception("wake of %s failed in an unforeseen way", machine.id)
            result = WakeResult(machine.row.version, Code.WAKE_INTERNAL, f"{type(error).__name__}: {error}")
            if machine.state is MachineState.STARTING:
                result = self._give_up(machine, Code.WAKE_INTERNAL, result.detail)
        finally:
            self._land(machine, flight, result)

    async def _bring_up(self, machine: Owned, flight: Flight) -> WakeResult:
        deadline = self._clock.monotonic() + machine.app.wake_timeout_s
        while (ending := machine.ending) is not None and not flight.cut.done():
            left = deadline - self._clock.monotonic()
            if left <= 0:
                return WakeResult(machine.row.version, Code.WAKE_TIMEOUT, f"it was still {machine.state} in the end")
            await asyncio.wait({ending, flight.cut}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if flight.cut.done():
            return self._cancelled(machine) if flight.cut_by == "stop" else self._failed(machine, Code.START_FAILED)
        if machine.state is MachineState.STARTED and flight.spec is None:
            return WakeResult(machine.row.version)
        if machine.state is MachineState.SUSPENDED or (
            machine.state is MachineState.STARTING and machine.driver.is_frozen(machine.id)  # adopted before its resume
        ):
            failure = await self._resume(machine, flight)
        else:
            if flight.spec is None and machine.state is not MachineState.STARTING:
                self._take_off(machine, flight, deadline)
            failure = await self._start(machine, flight)
        return failure or await self._reach(machine, flight, deadline)

    async def _start(self, machine: Owned, flight: Flight) -> WakeResult | None:
        """Make the start that is in the journal, unless that was done at once or by an earlier control."""
        try:
            if flight.fault is not None:
                raise flight.fault
            if flight.spec is not None and not flight.phases.forked:
                await machine.driver.start(flight.spec, lambda running: self._forked(machine, flight, running, True))
            elif flight.spec is not None:
                self._store.save(machine.row)
        except DriverError as error:
            if machine.state is not MachineState.STARTING:  # it forked, and its end was reported
                return self._failed(machine, Code.START_FAILED)
            return self._give_up(machine, Code.START_FAILED, str(error))
        return None

    async def _resume(self, machine: Owned, flight: Flight) -> WakeResult | None:
        flight.is_resume = True
        if machine.state is not MachineState.STARTING:
            self._change(machine, Change.START, tell_soon=True)
        asyncio.get_running_loop().call_soon(self._event, machine, "start", "starting", flight.phases.source)
        try:
            await machine.driver.resume(machine.id)
        except DriverError as error:
            if machine.state is not MachineState.STARTING:
                return self._failed(machine, Code.START_FAILED)
            return self._give_up(machine, Code.START_FAILED, str(error))
        flight.phases.forked = self._clock.monotonic()
        return None

    async def _reach(self, machine: Owned, flight: Flight, deadline: float) -> WakeResult:
        """Wait until it listens; the one prober of this machine."""
        reached = False
        if not flight.cut.done():
            flight.probe = flight.probe or self._begin_probe(machine, flight, deadline)
            try:
                reached = await flight.probe
            except asyncio.CancelledError:
                if not flight.cut_by:
                    raise
            finally:
                flight.probe = None
        if flight.cut_by == "stop":
            return self._cancelled(machine)
        if reached and machine.state is MachineState.STARTED:
            self._event(machine, "start", "started", "flyd")
            return WakeResult(machine.row.version)
        if machine.state is not MachineState.STARTING:
            return self._failed(machine, Code.START_FAILED)
        waited = machine.app.wake_timeout_s
        ports = ", ".join(str(endpoint.port) for endpoint in machine.spec.endpoints[:1])
        return self._give_up(machine, Code.WAKE_TIMEOUT, f"nothing listened on port {ports} within {waited:g} s")

    def _reached(self, machine: Owned, flight: Flight, accepted: socket.socket | None = None) -> None:
        """`accepted`: a connection to the one port that it has, for whoever waits most."""
        now, row = self._clock.monotonic(), machine.row
        flight.phases.listening = flight.phases.listening or now
        row.failures, row.hold_until, row.hold_reason = 0, 0.0, None
        row.stopped_by = ""
        row.started_at = self._clock.unix()
        machine.idle_since = now
        self._change(machine, Change.REACHED, passing=True)
        if accepted is not None:
            self._cordons.hand_on(machine, self._probed(machine)[0].internal_port, accepted)
        self._tell(machine)
        self.health.look(machine)

    def _begin_probe(self, machine: Owned, flight: Flight, deadline: float) -> asyncio.Task[bool]:
        return spawn(self._probe(machine, flight, deadline), f"probe {machine.id}")

    async def _probe(self, machine: Owned, flight: Flight, deadline: float) -> bool:
        """The first port must answer by the deadline; the others get a moment more, and a note if they do not. Then
        the checks of its services must pass once; one that does not in time keeps nobody waiting any longer.

        That it was reached is told from here, as all who wait are waiting for that, not for the end of the flight.
        """
        endpoints = self._probed(machine)
        netns_pid = machine.running.netns_pid if machine.running else 0
        accepted: socket.socket | None = None
        try:
            for place, endpoint in enumerate(endpoints):
                limit = deadline if place == 0 else min(deadline, self._clock.monotonic() + _OTHER_PORTS_S)
                sock = await connect_when_listening(endpoint, netns_pid, limit, self._clock, self._make_socket)
                if sock is not None and self._is_first_use(machine, endpoints):
                    accepted = sock
                elif sock is not None:
                    sock.close()
                elif place == 0:
                    return False
                else:
                    machine.note = f"port {endpoint.port} (internal_port {endpoint.internal_port}) does not listen"
            if machine.state is not MachineState.STARTING or flight.cut.done():
                return False
            if not flight.is_resume:  # one that was frozen goes on as it was, with what its checks said last
                flight.phases.listening = self._clock.monotonic()
                await self.health.first_pass(machine, deadline)
                if machine.state is not MachineState.STARTING or flight.cut.done():
                    return False
            self._reached(machine, flight, accepted)
            return True
        finally:
            if accepted is not None:
                accepted.close()

    def _is_first_use(self, machine: Owned, endpoints: list[Endpoint]) -> bool:
        """Whether what comes next to a machine that accepts connections is a request. Not another port, and not a
        check: a program that serves one connection after the other would let it wait behind ours."""
        return len(endpoints) == 1 and not any(one.checks for one in machine.app.services_of(machine.row.group))

    def _probed(self, machine: Owned) -> list[Endpoint]:
        tcp = {one.internal_port for one in machine.app.services_of(machine.row.group) if one.protocol == "tcp"}
        return [endpoint for endpoint in machine.spec.endpoints if endpoint.internal_port in tcp]

    def _cancelled(self, machine: Owned) -> WakeResult:
        return WakeResult(machine.row.version, Code.START_CANCELLED, "the machine was stopped while it started")

    def _give_up(self, machine: Owned, code: Code, detail: str) -> WakeResult:
        """A start came to nothing: hold further ones, and end what is there."""
        self._count_failure(machine, detail)
        if machine.running is None:
            self._change(machine, Change.FAIL, at_once=True)
        else:
            machine.unreached = True
            self._change(machine, Change.STOP, at_once=True)
            machine.ending = spawn(self._stop_steps(machine), f"stop {machine.id}")
        self._event(machine, "start", "failed", "flyd", {"reason": detail})
        return self._failed(machine, code)

    def _failed(self, machine: Owned, code: Code) -> WakeResult:
        row = machine.row
        left = max(1, round(hold_left_s(row.hold_until, self._clock.unix()))) if row.hold_until else None
        return WakeResult(row.version, code, row.hold_reason or f"it is {machine.state}", left)

    def _count_failure(self, machine: Owned, reason: str) -> None:
        row = machine.row
        row.failures += 1
        row.hold_until = self._clock.unix() + hold_s(row.failures)
        row.hold_reason = reason

    # --- ends

    def _on_exit(self, machine: MachineId, running: Running, end: Exit) -> None:
        """A driver saw a machine end. It is on record before it is reaped."""
        owned = self._machines.get(machine)
        if owned is None or (owned.running is not None and owned.running != running):
            log.warning("an end of machine %s (pid %d) that nobody waits for", machine, running.pid)
            if owned is None:
                for driver in self._drivers.values():
                    driver.forget(machine)
            return
        was, flight = owned.state, owned.flight
        self._record_exit(owned, end, requested=was is MachineState.STOPPING)
        owned.running = None
        if was is MachineState.STARTING:
            listened = flight is not None and flight.phases.listening
            missed = "its checks passed" if listened else "it listened"
            self._count_failure(owned, f"it ended before {missed}: {_how(end)}")
        self._change(owned, Change.FAIL if owned.unreached else Change.EXITED, at_once=True)
        owned.unreached = False
        owned.driver.forget(machine)
        if was is MachineState.STARTING and flight is not None:
            flight.cut_short("exit")
        elif was is MachineState.STARTED and owned.ending is None:
            self._after_exit(owned, end)

    def _record_exit(self, machine: Owned, end: Exit, requested: bool) -> None:
        row = machine.row
        row.exit_code, row.exit_signal, row.oom_killed = end.code, end.signal, end.oom_killed
        row.exit_at = self._clock.unix()
        row.pid = None
        exit_event = {
            "requested_stop": requested, "restarting": False, "guest_exit_code": end.code, "guest_signal": end.signal,
            "exit_code": end.code, "signal": end.signal, "oom_killed": end.oom_killed,
            "exited_at": int(row.exit_at * 1000),
        }  # fmt: skip
        request = {"exit_event": exit_event, "restart_count": row.restart_count}
        self._event(machine, "exit", "stopped", "flyd", request)

    def _after_exit(self, machine: Owned, end: Exit) -> None:
        """It ended by itself: the restart policy."""
        if self._ending_all or machine.is_leaving or machine.restarting is not None:
            return
        group, now = machine.group, self._clock.monotonic()
        pause = restart_pause_s(group.restart, end.code, end.signal, machine.restarts, now, group.restart_retries)
        if pause is None:
            return
        machine.restarts.append(now)
        machine.row.restart_count += 1
        machine.restarting = spawn(self._restart(machine, pause), f"restart {machine.id}")

    async def _restart(self, machine: Owned, pause_s: float) -> None:
        if pause_s:
            await self._clock.sleep(pause_s)
        machine.restarting = None
        if machine.state.is_startable and machine.flight is None and not self._ending_all:
            self._event(machine, "restart", "starting", "flyd", {"restart_count": machine.row.restart_count})
            result = await asyncio.shield(self.wake(machine.id, "flyd"))
            if result.code in (Code.START_FAILED, Code.WAKE_TIMEOUT):
                self._after_exit(machine, Exit())

    # --- stop, suspend

    def stop(
        self, machine: Owned, source: str, signal: int | None = None, timeout_s: float | None = None,
        drain_s: float | None = None,
    ) -> asyncio.Task[None] | None:  # fmt: skip
        """Begin a stop, or join the one under way. None: it does not run.

        With `drain_s` it is given that long to finish what it has; requests that come then wait for its next start.
        """
        self._refuse_static(machine)
        if machine.restarting is not None:
            machine.restarting.cancel()
            machine.restarting = None
        flight, previous = machine.flight, machine.ending
        if flight is not None:
            flight.cut_short("stop")
        elif previous is not None and machine.state is MachineState.STOPPING:
            self._keep_stopper(machine, source)
            return previous
        elif machine.state not in LIVE:
            self._keep_stopper(machine, source)
            if machine.state in (MachineState.CREATED, MachineState.FAILED):
                self._change(machine, Change.REST)
            else:
                self._store.save_later(machine.row)
            return None
        self._keep_stopper(machine, source)
        self._event(machine, "stop", "stopping", source)
        if flight is None and previous is None and machine.state is not MachineState.STOPPING:
            self._change(machine, Change.STOP)
        if source == "user" and drain_s is None:
            drain_s = 0.0
        steps = self._stop_steps(machine, previous, flight, signal, timeout_s, drain_s)
        machine.ending = spawn(steps, f"stop {machine.id}")
        return machine.ending

    def _keep_stopper(self, machine: Owned, source: str) -> None:
        """What a user stopped stays stopped by them, whoever stops it once more: the node as it ends, say."""
        if source == "user" or machine.state is MachineState.STARTED or machine.row.stopped_by != "user":
            machine.row.stopped_by = source

    async def _stop_steps(
        self,
        machine: Owned,
        previous: asyncio.Task[None] | None = None,
        flight: Flight | None = None,
        signal: int | None = None,
        timeout_s: float | None = None,
        drain_s: float | None = None,
    ) -> None:
        """`drain_s`: it may be in use. Workers are first made to send nothing new, then it may finish for so long."""
        spec = machine.spec
        try:
            if previous is not None:
                await asyncio.wait({previous})
            if flight is not None:
                await asyncio.wait({flight.result})
            if machine.state not in LIVE:
                return
            if machine.state is not MachineState.STOPPING:
                self._change(machine, Change.STOP)
            if drain_s is not None:
                await self._cordons.cordon(machine)
                self._cordons.lift(machine)
                await self._say_goodbye(machine, drain_s if signal == SIGKILL else max(drain_s, _GOODBYE_S))
            await machine.driver.stop(
                machine.id, spec.kill_signal if signal is None else signal,
                spec.kill_timeout_s if timeout_s is None else timeout_s,
            )  # fmt: skip
        except DriverError as error:
            machine.note = f"could not be stopped: {error}"
            log.error("machine %s of %s %s", machine.id, machine.app.name, machine.note)
        else:
            if machine.state is MachineState.STOPPING:  # the driver had nothing to stop
                self._record_exit(machine, Exit(), requested=True)
                machine.running = None
                self._change(machine, Change.FAIL if machine.unreached else Change.EXITED, at_once=True)
                machine.unreached = False
        finally:
            self._ended(machine)

    async def _say_goodbye(self, machine: Owned, seconds: float) -> None:
        """Workers choose it no more: end its tunnels, and give all that is open so long to finish."""
        leaving = machine.state
        if self._memory.in_flight(machine.row.slot) > 0:
            self._cordons.end_tunnels(machine)
        limit = self._clock.monotonic() + seconds
        while self._memory.in_flight(machine.row.slot) > 0 and self._clock.monotonic() < limit:
            if machine.state is not leaving:  # it ended by itself
                return
            await self._clock.sleep(_DRAIN_POLL_S)

    def suspend(self, machine: Owned, source: str, or_stop: bool = False) -> asyncio.Task[None] | None:
        """Begin to freeze a started machine. None: it is suspended. `or_stop`: where it can't be frozen, stop it.

        Raises Refused in any other state.
        """
        self._refuse_static(machine)
        if machine.state is MachineState.SUSPENDED and machine.flight is None and machine.ending is None:
            return None
        if machine.state is not MachineState.STARTED or machine.ending is not None or machine.flight is not None:
            raise Refused(f"machine {machine.id} is {machine.state}; only a started one can be suspended")
        if not machine.driver.can_suspend:
            raise Refused(f"the {machine.driver.name} driver cannot suspend machines")
        machine.row.stopped_by = source
        self._event(machine, "suspend", "suspending", source)
        self._change(machine, Change.SUSPEND)
        steps = self._suspend_steps(machine, or_stop, is_in_use=source == "user")
        machine.ending = spawn(steps, f"suspend {machine.id}")
        return machine.ending

    async def _suspend_steps(self, machine: Owned, or_stop: bool, is_in_use: bool = False) -> None:
        """`is_in_use`: no worker has been asked yet to send nothing new, and what comes to a frozen machine is lost."""
        try:
            if is_in_use:
                await self._cordons.cordon(machine)
                self._cordons.lift(machine)
            if machine.state is not MachineState.SUSPENDING:
                return
            await self._say_goodbye(machine, _GOODBYE_S)
            if machine.state is not MachineState.SUSPENDING:  # it ended by itself
                return
            await machine.driver.suspend(machine.id)
            if machine.state is MachineState.SUSPENDING:
                self._change(machine, Change.FROZEN)
                self._event(machine, "suspend", "suspended", "flyd")
        except DriverError as error:
            machine.note = f"could not be suspended: {error}"
            if machine.state is MachineState.SUSPENDING and or_stop:
                self._change(machine, Change.STOP)
                await self._stop_steps(machine)
            elif machine.state is MachineState.SUSPENDING:
                self._change(machine, Change.NOT_FROZEN)
        finally:
            self._ended(machine)

    def _ended(self, machine: Owned) -> None:
        if machine.ending is asyncio.current_task():
            machine.ending = None
            self._tell_watchers(machine)

    async def end_if_unused(
        self, machine: Owned, mode: Autostop, drain_s: float = 0.0, may_end: Callable[[], bool] = lambda: True
    ) -> bool:
        """Stop or suspend a machine that nothing uses: the handshake. True if it began to end.

        Soft-cordon → every live worker acknowledges → the counters are read again → only then the end; else the cordon
        is lifted. With `drain_s` it is given that long to finish what it has. A wake that comes meanwhile wins, and so
        does `may_end` when it says no in the end.
        """
        if machine.handshake is not None or not self._is_steady(machine):
            return False
        won = machine.handshake = asyncio.get_running_loop().create_future()
        version = machine.row.version
        try:
            if not await self._cordons.cordon(machine):
                return False
            if drain_s and not won.done() and self._memory.in_flight(machine.row.slot):
                self._cordons.end_tunnels(machine)
            limit = self._clock.monotonic() + drain_s
            while self._memory.in_flight(machine.row.slot) and self._clock.monotonic() < limit and not won.done():
                await self._clock.sleep(_DRAIN_POLL_S)
            if won.done() or not self._is_steady(machine) or self._memory.in_flight(machine.row.slot):
                return False
            if machine.row.cordoned or not may_end():  # a cordon came meanwhile: the machine is the operator's
                return False
            if machine.row.version != version:  # with a newer record, of its checks say, workers choose it again
                return False
            if mode is Autostop.SUSPEND and machine.driver.can_suspend:
                self.suspend(machine, "proxy", or_stop=True)
            else:
                self.stop(machine, "proxy")
            return True
        finally:
            machine.handshake = None
            self._cordons.lift(machine)  # after the new state, so that nothing is sent in between

    async def cordon(self, machine: Owned) -> bool:
        """Send it nothing new until `uncordon`; what it has goes on. True once every live worker keeps to that."""
        self._set_cordoned(machine, True)
        if machine.handshake is not None or not self._is_steady(machine):
            return True  # nothing was sent to it anyway, or a handshake of its own sees to that
        won = machine.handshake = asyncio.get_running_loop().create_future()
        try:
            return await self._cordons.cordon(machine) and not won.done()  # a wake ended the wait, no worker's word
        finally:
            machine.handshake = None
            self._cordons.lift(machine)

    def uncordon(self, machine: Owned) -> None:
        self._set_cordoned(machine, False)

    def _set_cordoned(self, machine: Owned, cordoned: bool) -> None:
        row = machine.row
        if row.cordoned is not cordoned:
            row.cordoned = cordoned
            row.version = self._next_version(row.version)
            row.updated_at = self._clock.unix()
            self._store.save(row)
            self._event(machine, "cordon" if cordoned else "uncordon", row.state, "user")
            self._tell(machine)

    def _is_steady(self, machine: Owned) -> bool:
        return machine.state is MachineState.STARTED and machine.flight is None and machine.ending is None

    @property
    def is_ending(self) -> bool:
        """Whether nothing is started any more."""
        return self._ending_all

    async def stop_all(self) -> None:
        """Stop every machine, at the same time. Nothing is started any more."""
        self._ending_all = True
        ends = [self.stop(machine, "flyd") for machine in self.all() if not machine.is_static]
        if tasks := {end for end in ends if end is not None}:
            await asyncio.wait(tasks)
        for machine in self.all():
            if machine.state in LIVE and not machine.is_static:
                log.error("machine %s of %s still runs: %s", machine.id, machine.app.name, machine.note)

    def halt(self) -> None:
        """Control ends and leaves machines as they are: no more starts."""
        self._ending_all = True
        for machine in self.all():
            if machine.restarting is not None:
                machine.restarting.cancel()

    async def remove(self, machine: Owned) -> None:
        """Stop a machine and forget it: its app, or its place in it, is no longer configured."""
        machine.is_leaving = True
        if not machine.is_static:
            if (end := self.stop(machine, "flyd")) is not None:
                await asyncio.wait({end})
            if machine.flight is not None:
                await asyncio.wait({machine.flight.result})
            machine.driver.release(machine.id)
            if machine.state not in LIVE:
                self._change(machine, Change.DESTROY)
        self.health.forget(machine)
        del self._machines[machine.id]
        self._store.delete_machine(machine.id)

    def send_signal(self, machine: Owned, number: int) -> None:
        """Send a signal to the machine's first process. Raises Refused if it does not run."""
        if machine.running is None or machine.state not in (MachineState.STARTED, MachineState.STARTING):
            raise Refused(f"machine {machine.id} is {machine.state}; only a running one can be signalled")
        try:
            os.kill(machine.running.pid, number)  # not reaped before its end is on record: the pid is still its own
        except (ProcessLookupError, PermissionError) as error:
            raise Refused(f"machine {machine.id} cannot be signalled: {error.strerror}") from error

    # --- what others saw

    def heard_failure(self, machine_id: MachineId, version: int, code: str) -> None:
        """A worker could not connect: look for ourselves, once at a time, if that was the machine as it is now."""
        machine = self._machines.get(machine_id)
        if machine is None or machine.rechecking is not None or version != machine.row.version:
            return
        if machine.is_static or not self._is_steady(machine):
            return
        machine.rechecking = spawn(self._recheck(machine, code), f"recheck {machine.id}")

    async def _recheck(self, machine: Owned, code: str) -> None:
        try:
            endpoints = self._probed(machine)
            netns_pid = machine.running.netns_pid if machine.running else 0
            limit = self._clock.monotonic() + _RECHECK_S
            for endpoint in endpoints:
                listens = await wait_until_listening(endpoint, netns_pid, limit, self._clock, self._make_socket)
                if not listens and self._is_steady(machine):
                    machine.note = f"it runs, but port {endpoint.port} does not accept connections ({code})"
                    log.warning("machine %s of %s: %s", machine.id, machine.app.name, machine.note)
                    return
            machine.note = ""
        finally:
            machine.rechecking = None

    # --- what its checks say

    def set_failing(self, machine: Owned, ports: tuple[int, ...]) -> None:
        """The internal ports of its services with a check that does not pass: told to workers while it runs."""
        row = machine.row
        if row.failing_ports == ports:
            return
        row.failing_ports = ports
        if machine.state is MachineState.STARTED:
            row.version = self._next_version(row.version)
            if ports:
                self._store.save(row)  # a control that dies now must not leave the next one believing it is well
            else:
                self._store.save_later(row)
            self._tell(machine)

    def restart_failing(self, machine: Owned, reason: str) -> bool:
        """Restart a machine for its failing checks, as its app asks for. False: not now, or not any more.

        These restarts count with those after exits, and make them wait: see decide/restart.py.
        """
        if machine.is_static or machine.is_leaving or machine.row.cordoned or self._ending_all:
            return False
        if machine.handshake is not None or not self._is_steady(machine):
            return False
        now, tries = self._clock.monotonic(), machine.restarts
        retries = machine.group.restart_retries
        pause = restart_pause_s(RestartPolicy.ON_FAILURE, None, None, tries, now, retries)
        if pause is None or (tries and now - tries[-1] < pause):
            return False
        tries.append(now)
        machine.row.restart_count += 1
        request = {"restart_count": machine.row.restart_count, "reason": reason}
        self._event(machine, "restart", "stopping", "flyd", request)
        spawn(self._restart_steps(machine), f"restart {machine.id}")
        return True

    async def _restart_steps(self, machine: Owned) -> None:
        end = self.stop(machine, "flyd", drain_s=_FAILING_DRAIN_S)
        if end is not None:
            await asyncio.wait({end})
        is_ours = machine.row.stopped_by == "flyd"  # a user who stops it meanwhile is obeyed
        if is_ours and machine.state.is_startable and machine.flight is None and not self._ending_all:
            result = await asyncio.shield(self.wake(machine.id, "flyd"))
            if result.code in (Code.START_FAILED, Code.WAKE_TIMEOUT):
                self._after_exit(machine, Exit())

    # --- waiting for a state

    async def wait_for(
        self, machine: Owned, states: Iterable[str], timeout_s: float, is_enough: Callable[[], bool] = lambda: True
    ) -> bool:
        """True once it is in one of the states and that `is_enough`, which is asked at every change and event."""
        self._note_past(machine)
        wanted = frozenset(states)
        watcher: asyncio.Future[None] | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while machine.row.state not in wanted or not is_enough():
                    watcher = asyncio.get_running_loop().create_future()
                    machine.watchers.append(watcher)
                    await watcher
        except TimeoutError:
            return False
        finally:
            if watcher in machine.watchers:
                machine.watchers.remove(watcher)
        return True

    # --- the one place where state changes

    def _change(
        self, machine: Owned, change: Change, at_once: bool = False, tell_soon: bool = False, passing: bool = False
    ) -> None:
        """`at_once`: on record before anything else happens. `tell_soon`: on the way to a start, which nobody need
        hear of unless it takes a while. `passing`: the next change follows in this turn, so nobody hears of it."""
        row = machine.row
        row.state = next_state(machine.state, change)
        row.version = self._next_version(row.version)
        row.updated_at = self._clock.unix()
        if at_once:
            self._store.save(row)
        else:
            self._store.save_later(row)
        if change is Change.START:
            machine.note = ""
        if passing:
            return
        if tell_soon:
            asyncio.get_running_loop().call_later(_TELL_S, self._tell_if_still, machine, row.version)
        else:
            self._tell(machine)
        self.health.look(machine)

    def _tell_if_still(self, machine: Owned, version: int) -> None:
        if machine.row.version == version and self._machines.get(machine.id) is machine:
            self._tell(machine)

    def _tell(self, machine: Owned) -> None:
        self.on_change(machine)
        self._tell_watchers(machine)

    def _next_version(self, version: int) -> int:
        return max(version + 1, self._epoch)

    def _tell_watchers(self, machine: Owned) -> None:
        watchers, machine.watchers = machine.watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def _take_next_spec(self, machine: Owned) -> None:
        if machine.next_spec is not None:
            machine.spec, machine.next_spec = machine.next_spec, None
        if machine.digested is not machine.spec and machine.row.digest != digest_of(machine.spec):
            self._new_instance(machine)
        machine.digested = machine.spec

    def _new_instance(self, machine: Owned) -> None:
        machine.row.digest = digest_of(machine.spec)
        machine.row.instance_id = new_ulid(self._clock.unix())

    def _refuse_static(self, machine: Owned) -> None:
        if machine.is_static:
            raise Refused(f"machine {machine.id} is static: it is not started or stopped from here")

    def _event(
        self, machine: Owned, kind: str, status: str, source: str, request: dict[str, Any] | None = None,
        at: float | None = None,
    ) -> None:  # fmt: skip
        self._note_past(machine)
        now = self._clock.unix() if at is None else at
        self._store.add_event(machine.id, Event(new_ulid(now), kind, status, source, int(now * 1000), request))
        if machine.watchers:
            self._tell_watchers(machine)


def _done(result: WakeResult) -> asyncio.Future[WakeResult]:
    future: asyncio.Future[WakeResult] = asyncio.get_running_loop().create_future()
    future.set_result(result)
    return future


def _how(end: Exit) -> str:
    if end.signal is not None:
        return f"killed by signal {end.signal}" + (" (out of memory)" if end.oom_killed else "")
    return "exit code unknown" if end.code is None else f"exit code {end.code}"

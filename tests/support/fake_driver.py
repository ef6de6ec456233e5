"""A machine driver without processes, for tests of those who use one. It passes the contract test of the real ones.

`FakeHost` is what outlives a driver, as machines outlive control: give one host to two drivers in turn and the second
finds what the first started. A test makes things happen with the host's `end`, and with the driver's `fail_start`,
`hold_start` and `ignores_signals`; what was asked is in `calls`.
"""

from __future__ import annotations

import asyncio
import itertools
import signal as signals
from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.clock import Clock, SystemClock
from proxy.machines.driver import DriverError, Exit, ExitCallback, MachineSpec, Running, Stats
from proxy.model import MachineId


@dataclass(slots=True)
class FakeProcess:
    """One start of one machine. `end` is set once it has ended; it stays until somebody forgets it."""

    machine: MachineId
    running: Running
    frozen: bool = False
    end: Exit | None = None
    parent: FakeDriver | None = None  # whoever watches it


@dataclass(slots=True)
class FakeHost:
    """The processes there are, whoever watches them."""

    processes: dict[MachineId, FakeProcess] = field(default_factory=dict)
    pids: itertools.count[int] = field(default_factory=lambda: itertools.count(1_000_000))

    def end(self, machine: MachineId, end: Exit) -> None:
        """The machine ends by itself, or by a signal; whoever watches it hears of it in the next turn of the loop."""
        process = self.processes[machine]
        if process.end is None:
            process.end = end
            if process.parent is not None:
                process.parent.saw_end(process)

    def is_running(self, machine: MachineId) -> bool:
        process = self.processes.get(machine)
        return process is not None and process.end is None

    def is_frozen(self, machine: MachineId) -> bool:
        return self.is_running(machine) and self.processes[machine].frozen


class FakeDriver:
    """Keeps the contract of proxy.machines.driver.Driver in memory."""

    name = "fake"

    def __init__(self, host: FakeHost | None = None, clock: Clock | None = None, can_suspend: bool = True) -> None:
        self.host = host or FakeHost()
        self.can_suspend = can_suspend
        self.calls: list[tuple[str, MachineId]] = []
        self.specs: dict[MachineId, MachineSpec] = {}  # the last spec each machine was prepared or started with
        self.fail_start: dict[MachineId, str] = {}  # a start of these raises DriverError with the text
        self.hold_start: dict[MachineId, asyncio.Event] = {}  # a start of these waits for the event before it forks
        self.ignores_signals: set[MachineId] = set()  # these end by SIGKILL only
        self.at_once = True  # whether it can do without waiting what a real driver can
        self.closed = False
        self._clock = clock or SystemClock()
        self._on_exit: ExitCallback | None = None
        self._reported: dict[MachineId, asyncio.Event] = {}

    def set_on_exit(self, callback: ExitCallback) -> None:
        self._on_exit = callback

    def prepare(self, spec: MachineSpec) -> None:
        self.calls.append(("prepare", spec.id))
        self.specs[spec.id] = spec

    async def start(self, spec: MachineSpec, on_forked: Callable[[Running], None]) -> Running:
        self.calls.append(("start", spec.id))
        self.specs[spec.id] = spec
        if (gate := self.hold_start.get(spec.id)) is not None:
            await gate.wait()
        running = self._start(spec)
        on_forked(running)
        return running

    def start_at_once(self, spec: MachineSpec) -> Running | None:
        if not self.at_once or spec.id in self.hold_start:
            return None
        self.calls.append(("start", spec.id))
        self.specs[spec.id] = spec
        return self._start(spec)

    def _start(self, spec: MachineSpec) -> Running:
        if (reason := self.fail_start.get(spec.id)) is not None:
            raise DriverError(reason)
        process = self.host.processes.get(spec.id)
        if process is None or process.end is not None:
            pid = next(self.host.pids)
            running = Running(pid, start_ticks=pid * 10, netns_pid=pid if spec.own_network else 0)
            process = FakeProcess(spec.id, running)
            self.host.processes[spec.id] = process
        self._watch(process)
        return process.running

    def adopt(self, spec: MachineSpec, running: Running | None) -> Running | None:
        self.calls.append(("adopt", spec.id))
        self.specs[spec.id] = spec
        process = self.host.processes.get(spec.id)
        if process is None or (running is not None and running != process.running):
            return None
        if running is None and process.end is not None:
            return None
        self._watch(process)
        if process.end is not None:
            self.saw_end(process)
        return process.running

    def find_machines(self) -> dict[MachineId, Running]:
        return {one: process.running for one, process in self.host.processes.items() if process.end is None}

    async def stop_stray(self, machine: MachineId, running: Running, timeout_s: float) -> None:
        self.calls.append(("stop_stray", machine))
        process = self.host.processes.get(machine)
        if process is not None and process.running == running:
            del self.host.processes[machine]

    async def stop(self, machine: MachineId, signal: int, timeout_s: float) -> None:
        self.calls.append(("stop", machine))
        process = self._watched(machine)
        if process is None:
            return
        process.frozen = False
        if machine in self.ignores_signals and signal != signals.SIGKILL and process.end is None:
            await self._clock.sleep(timeout_s)
            signal = signals.SIGKILL
        self.host.end(machine, Exit(signal=signal))
        await self._reported[machine].wait()

    async def suspend(self, machine: MachineId) -> None:
        self.calls.append(("suspend", machine))
        process = self._watched(machine)
        if not self.can_suspend:
            raise DriverError("this driver cannot suspend")
        if process is None or process.end is not None:
            raise DriverError(f"machine {machine} is not running")
        process.frozen = True

    def resume_at_once(self, machine: MachineId) -> bool:
        process = self._watched(machine)
        if not self.at_once or process is None or process.end is not None:
            return False
        self.calls.append(("resume", machine))
        process.frozen = False
        return True

    def is_frozen(self, machine: MachineId) -> bool:
        return self.host.is_frozen(machine)

    async def resume(self, machine: MachineId) -> None:
        self.calls.append(("resume", machine))
        process = self._watched(machine)
        if process is None or process.end is not None:
            raise DriverError(f"machine {machine} is not running")
        process.frozen = False

    def has_ended(self, machine: MachineId) -> bool:
        process = self._watched(machine)
        return process is not None and process.end is not None and not self._reported[machine].is_set()

    def exited_elsewhere(self, pid: int, end: Exit) -> bool:
        for process in self.host.processes.values():
            if process.running.pid == pid and process.parent is self:
                self.host.end(process.machine, end)
                return True
        return False

    def forget(self, machine: MachineId) -> None:
        self.calls.append(("forget", machine))
        process = self._watched(machine)
        if process is not None and process.end is not None:
            del self.host.processes[machine]

    def release(self, machine: MachineId) -> None:
        self.calls.append(("release", machine))
        self.specs.pop(machine, None)

    def stats(self, machine: MachineId) -> Stats | None:
        process = self._watched(machine)
        return None if process is None or process.end is not None else Stats(rss_bytes=1 << 20, cpu_s=0.1)

    async def close(self) -> None:
        self.closed = True
        for process in self.host.processes.values():
            if process.parent is self:
                process.parent = None

    def saw_end(self, process: FakeProcess) -> None:
        """Called by the host; reports in the next turn of the loop, as a real driver's reader would."""
        asyncio.get_running_loop().call_soon(self._report, process)

    def _report(self, process: FakeProcess) -> None:
        reported = self._reported[process.machine]
        if process.parent is not self or process.end is None or reported.is_set():
            return
        if self._on_exit is not None:
            self._on_exit(process.machine, process.running, process.end)
        reported.set()

    def _watch(self, process: FakeProcess) -> None:
        if process.parent is not self:
            process.parent = self
            self._reported[process.machine] = asyncio.Event()

    def _watched(self, machine: MachineId) -> FakeProcess | None:
        process = self.host.processes.get(machine)
        return process if process is not None and process.parent is self else None

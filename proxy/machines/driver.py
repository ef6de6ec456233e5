"""The contract of a machine driver: what control may ask of whatever runs machines.

A driver acts and reports; it decides nothing. States, versions, restart policy, back-off, single flight and the
journal are control's. Every method may be called again after control was killed in the middle of it, by a control that
knows only what the journal says: so each is idempotent on what it finds.

`Running` is the driver's durable name of a started machine. Control writes it to the journal and gives it back after a
restart through `adopt`, which answers whether that very machine still runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from proxy.model import AppName, Endpoint, MachineId


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume: a folder under data_dir, seen by the machine at `destination` where that is permitted."""

    source: str  # absolute path of the folder
    destination: str  # absolute path inside the machine
    name: str


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """All that is needed to start a machine. Made by control from config.toml and fly.toml: nothing to look up."""

    id: MachineId
    app: AppName
    group: str
    command: tuple[str, ...]  # argv; {port} and {port:N} already replaced
    cwd: str
    env: tuple[tuple[str, str], ...]  # complete environment
    endpoints: tuple[Endpoint, ...]
    kill_signal: int
    kill_timeout_s: float
    user: str | None = None  # name or uid[:gid]; None = ours
    own_network: bool = False  # a network namespace of its own, so that count > 1 may use one fixed port
    mounts: tuple[Mount, ...] = ()
    log_path: str = ""  # output is appended here


@dataclass(frozen=True, slots=True)
class Running:
    """Names one start of a machine. `start_ticks` (field 22 of /proc/PID/stat) tells it from a reused pid."""

    pid: int
    start_ticks: int
    netns_pid: int = 0


@dataclass(frozen=True, slots=True)
class Exit:
    """How a machine ended. Both None: unknown (it ended while nobody could watch)."""

    code: int | None = None
    signal: int | None = None
    oom_killed: bool = False


class ExitCallback(Protocol):
    def __call__(self, machine: MachineId, running: Running, end: Exit) -> None: ...


class DriverError(Exception):
    """A driver could not do what was asked. The message says what was tried and what the system answered."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A sample of what a machine uses."""

    rss_bytes: int = 0
    cpu_s: float = 0.0
    open_files: int = 0
    extra: dict[str, float] = field(default_factory=dict)


class Driver(Protocol):
    """One way to run machines. All coroutines are bounded in time by the driver itself.

    `on_exit` is called on the loop, once per start, after the machine has ended and before it is reaped: the reap
    happens when control calls `forget`, after it has recorded the end.
    """

    name: str
    can_suspend: bool

    def set_on_exit(self, callback: ExitCallback) -> None: ...

    def prepare(self, spec: MachineSpec) -> None:
        """Do ahead of time what a start would otherwise pay for (open logs, make a namespace). Cheap to repeat."""

    async def start(self, spec: MachineSpec, on_forked: Callable[[Running], None]) -> Running:
        """Start it. `on_forked` is called as soon as the process exists (it may not listen yet).

        Raises DriverError if it cannot be started (command not found, no such user, no such folder).
        """

    def start_at_once(self, spec: MachineSpec) -> Running | None:
        """Start it within this call, if that takes no more than the time of one fork. None: use `start`.

        Raises DriverError as `start` does.
        """

    def adopt(self, spec: MachineSpec, running: Running | None) -> Running | None:
        """Watch a machine started by an earlier control. `running` None: look for it by its id. None: not there."""

    async def stop(self, machine: MachineId, signal: int, timeout_s: float) -> None:
        """Signal, resume if frozen, and kill its whole group after `timeout_s`. Returns when the exit was reported."""

    async def suspend(self, machine: MachineId) -> None:
        """Freeze every process of it. Returns when all stand still. Raises DriverError where it can't."""

    async def resume(self, machine: MachineId) -> None:
        """The opposite of suspend; returns when it may run again."""

    def resume_at_once(self, machine: MachineId) -> bool:
        """Resume it within this call, if that needs no waiting. False: use `resume`, which also says what is wrong."""

    def is_frozen(self, machine: MachineId) -> bool:
        """Whether it stands still, as this driver last saw it: a suspend or resume may have been cut off midway."""

    def has_ended(self, machine: MachineId) -> bool:
        """Whether it has ended and `on_exit` is still to come."""

    def exited_elsewhere(self, pid: int, end: Exit) -> bool:
        """The supervisor, parent of orphans, saw this pid end. True if it is a machine watched here: then `on_exit`
        was called. False: nobody's, so it may be reaped."""

    def forget(self, machine: MachineId) -> None:
        """The exit is on record: reap it, kill what is left of its group."""

    def stats(self, machine: MachineId) -> Stats | None: ...

    def find_machines(self) -> dict[MachineId, Running]:
        """Every machine of this node that runs now, watched or not, also of apps no longer configured. For control's
        start: adopt those that are wanted, `stop_stray` the others. Adopt before you hear the supervisor's exits."""

    async def stop_stray(self, machine: MachineId, running: Running, timeout_s: float) -> None:
        """End a machine that no spec names any more (SIGTERM, then SIGKILL); no exit is reported. Returns when gone."""

    def release(self, machine: MachineId) -> None:
        """The machine is no longer configured and does not run: free what `prepare` made for it."""

    async def close(self) -> None:
        """Stop watching. Machines go on."""

"""Machines that exist already and that somebody else runs: always started, never stopped, frozen or reaped by us.

They have no process here, so their `Running` is all zeros. What control may do without harm succeeds and does nothing;
what it can't have is a DriverError.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.machines.driver import DriverError, Exit, ExitCallback, MachineSpec, Running, Stats
from proxy.model import MachineId

_ALWAYS = Running(pid=0, start_ticks=0)


class StaticDriver:
    """Keeps the contract of proxy.machines.driver.Driver."""

    name = "static"
    can_suspend = False

    def set_on_exit(self, callback: ExitCallback) -> None:
        """Never called: nobody tells us of their end. Health checks and connections do."""

    def prepare(self, spec: MachineSpec) -> None: ...

    async def start(self, spec: MachineSpec, on_forked: Callable[[Running], None]) -> Running:
        on_forked(_ALWAYS)
        return _ALWAYS

    def start_at_once(self, spec: MachineSpec) -> Running | None:
        return _ALWAYS

    def adopt(self, spec: MachineSpec, running: Running | None) -> Running | None:
        return _ALWAYS

    async def stop(self, machine: MachineId, signal: int, timeout_s: float) -> None:
        raise DriverError(f"machine {machine} is static: whoever runs it stops it")

    async def suspend(self, machine: MachineId) -> None:
        raise DriverError(f"machine {machine} is static: it cannot be suspended from here")

    async def resume(self, machine: MachineId) -> None: ...

    def resume_at_once(self, machine: MachineId) -> bool:
        return False

    def is_frozen(self, machine: MachineId) -> bool:
        return False

    def has_ended(self, machine: MachineId) -> bool:
        return False

    def exited_elsewhere(self, pid: int, end: Exit) -> bool:
        return False

    def forget(self, machine: MachineId) -> None: ...

    def stats(self, machine: MachineId) -> Stats | None:
        return None

    def find_machines(self) -> dict[MachineId, Running]:
        return {}

    async def stop_stray(self, machine: MachineId, running: Running, timeout_s: float) -> None:
        raise DriverError(f"machine {machine} is static: whoever runs it stops it")

    def release(self, machine: MachineId) -> None: ...

    async def close(self) -> None: ...

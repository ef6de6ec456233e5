"""One connection ahead to each suspended machine, so that its first request leaves the moment it is resumed.

A frozen program's socket accepts: the connection waits in its backlog, and the program finds it when it goes on. Making
it takes a quarter of the time of a wake from suspended (0.25 of 1.1 ms). It is taken by requests that may be sent again
only, since a program may have dropped what sent nothing for so long; a bound keeps descriptors for clients.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from proxy.edge.table import MachineView
from proxy.edge.upstream import Pool, pool_for
from proxy.model import AppName, Machine, MachineId, MachineState

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext

MOST = 64  # machines, those suspended last


class Warmth:
    """This worker's connections ahead."""

    def __init__(self, edge: EdgeContext, most: int = MOST) -> None:
        self._edge = edge
        self._most = most
        self._pools: OrderedDict[MachineId, Pool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pools)

    def on_machine(self, name: AppName, machine: Machine) -> None:
        """A machine's record changed."""
        if machine.state is MachineState.SUSPENDED:
            self._keep(name, machine)
            return
        pool = self._pools.pop(machine.id, None)
        if pool is not None and machine.state is MachineState.STARTED:
            pool.cool()

    def on_gone(self, machine: MachineId) -> None:
        self._pools.pop(machine, None)  # closed with its pools

    def _keep(self, name: AppName, machine: Machine) -> None:
        """Hold one to this machine. Each record of a suspended machine closes its pools: so ask for the pool anew."""
        found = self._find(name, machine.id)
        if found is None:
            before = self._pools.pop(machine.id, None)
            if before is not None:
                before.drop_warm()
            return
        self._pools[machine.id] = found
        self._pools.move_to_end(machine.id)
        found.warm()
        if len(self._pools) > self._most:
            _, coldest = self._pools.popitem(last=False)
            coldest.drop_warm()

    def _find(self, name: AppName, machine: MachineId) -> Pool | None:
        """The pool that the first request after a wake would take from; None where no request wakes the machine."""
        app = self._edge.table.apps.get(name)
        view = app.machines.get(machine) if app is not None else None
        if app is None or view is None:
            return None
        service = next((one for one in app.services if self._is_served(one.machines, view, one.internal_port)), None)
        if service is None or not service.record.autostart:
            return None
        return pool_for(self._edge, view, service, app)

    @staticmethod
    def _is_served(machines: list[MachineView], view: MachineView, internal_port: int) -> bool:
        return view in machines and view.record.endpoint(internal_port) is not None

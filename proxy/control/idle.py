"""Watches how machines are used, and ends those that decide/autostop.py picks.

Two looks: every quarter of the shortest `idle_timeout` (at most 5 s apart) for machines unused for that long, and every
`autostop_interval` for one excess machine per app, group and region, as Fly does. Use is read from shared memory, where
open tunnels and connections count like requests; a machine's end goes through the handshake of `Fleet.end_if_unused`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proxy.clock import Clock, spawn
from proxy.control.machines import Fleet, Owned
from proxy.control.plan import AppPlan
from proxy.decide.autostop import Policy, Use, choose_excess, choose_idle, policy_of
from proxy.model import Autostop, MachineState
from proxy.state import SharedMemory

log = logging.getLogger(__name__)

_LONGEST_LOOK_S = 5.0
_SHORTEST_LOOK_S = 0.1
_EXCESS_DRAIN_S = 10.0  # what an excess machine gets to finish what it has
_AT_ONCE = 64  # machines looked at between two turns of the loop


@dataclass(frozen=True, slots=True)
class Pool:
    """The machines that autostop weighs against each other: one group of one app on this node."""

    app: AppPlan
    group: str
    machines: tuple[Owned, ...]


class IdleWatch:
    """Runs for as long as control does."""

    def __init__(
        self, fleet: Fleet, memory: SharedMemory, clock: Clock, pools: Callable[[], Iterable[Pool]], region: str,
        interval_s: Callable[[], float],
    ) -> None:  # fmt: skip
        self._fleet = fleet
        self._memory = memory
        self._clock = clock
        self._pools = pools
        self._region = region
        self._interval_s = interval_s
        self._next_pass = clock.monotonic() + interval_s()
        self._ending: set[asyncio.Task[bool]] = set()

    async def run(self) -> None:
        while True:
            await self._clock.sleep(self.pause_s())
            await self.look()

    def pause_s(self) -> float:
        """Until the next look."""
        timeouts = [pool.app.idle_timeout_s for pool in self._pools() if pool.app.idle_timeout_s > 0]
        pause = min([_LONGEST_LOOK_S, *(timeout / 4 for timeout in timeouts)])
        until_pass = self._next_pass - self._clock.monotonic()
        return max(_SHORTEST_LOOK_S, min(pause, until_pass))

    async def look(self) -> None:
        """One look at every pool; begins the ends it comes to and does not wait for them."""
        now = self._clock.monotonic()
        is_pass = now >= self._next_pass
        if is_pass:
            self._next_pass = now + self._interval_s()
        seen = 0
        for pool in list(self._pools()):
            self._look_at(pool, now, is_pass)
            seen += len(pool.machines)
            if seen >= _AT_ONCE:
                seen = 0
                await asyncio.sleep(0)

    def _look_at(self, pool: Pool, now: float, is_pass: bool) -> None:
        running = [one for one in pool.machines if one.state is MachineState.STARTED and not one.is_static]
        uses = [self._use(machine, now) for machine in running]
        policy = self.policy(pool)
        if policy.mode is Autostop.OFF or not uses:
            return
        chosen = []
        if pool.app.idle_timeout_s > 0:
            chosen = choose_idle(uses, policy, now, pool.app.idle_timeout_s)
        for machine in running:
            if machine.id in chosen:
                self._end(machine, policy, 0.0, f"unused for {now - machine.idle_since:.0f} s")
        if is_pass and not chosen and (excess := choose_excess(uses, policy)) is not None:
            machine = next(one for one in running if one.id == excess)
            drain_s = _EXCESS_DRAIN_S if len(running) > 1 else 0.0
            self._end(machine, policy, drain_s, f"{len(running)} machines run, and fewer are needed")

    def policy(self, pool: Pool) -> Policy:
        is_primary = pool.app.primary_region in (None, self._region)
        return policy_of(pool.app.services_of(pool.group), is_primary)

    def _use(self, machine: Owned, now: float) -> Use:
        slot = machine.row.slot
        load, admitted = self._memory.in_flight(slot), self._memory.admitted(slot)
        if load > 0 or admitted != machine.admitted:
            machine.admitted = admitted
            machine.idle_since = now
        return Use(machine.id, max(0, load), machine.idle_since)

    def _end(self, machine: Owned, policy: Policy, drain_s: float, why: str) -> None:
        if machine.handshake is not None or machine.ending is not None or machine.flight is not None:
            return
        log.info("machine %s of %s: %s", machine.id, machine.app.name, why)
        task = spawn(self._fleet.end_if_unused(machine, policy.mode, drain_s), f"idle {machine.id}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def settle(self) -> None:
        """Until the ends begun so far have come to something. For tests and the drain."""
        while self._ending:
            await asyncio.wait(set(self._ending))

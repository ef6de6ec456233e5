"""Watches how machines are used: ends those that decide/autostop.py picks, and keeps as many warm as it says.

Two looks: every quarter of the shortest `idle_timeout` (at most 5 s apart) for machines unused for that long, and every
`autostop_interval` for excess machines per app and group, as Fly does. Use is read from shared memory, where open
tunnels and connections count like requests; a machine that says it is busy is passed by (control/busy.py); a machine's
end goes through the handshake of `Fleet.end_if_unused`. In an app's warm hours missing machines are started, one of a
group at a time. A cordoned machine is the operator's: it is not counted, not stopped and not started.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from proxy.clock import Clock, spawn
from proxy.control.busy import says_it_is_busy
from proxy.control.machines import Fleet, Owned, WakeResult
from proxy.control.plan import AppPlan
from proxy.control.prober import SocketMaker, plain_socket
from proxy.decide.autostop import (
    BUSY_KEY,
    Policy,
    Resting,
    Use,
    choose_excess,
    choose_idle,
    choose_to_warm,
    is_busy_until,
    policy_of,
)
from proxy.decide.restart import hold_left_s
from proxy.model import AppName, Autostop, MachineId, MachineState
from proxy.state import SharedMemory

log = logging.getLogger(__name__)

_LONGEST_LOOK_S = 5.0
_SHORTEST_LOOK_S = 0.1
_EXCESS_DRAIN_S = 10.0  # what an excess machine gets to finish what it has
_BUSY_FOR_S = 15.0  # a machine that said it is busy is not asked again for so long
_ASKED_AT_ONCE = 64
_WARMED_AT_ONCE = 4
_AT_ONCE = 64  # machines looked at between two turns of the loop

Key = tuple[AppName, str]  # app and group


@dataclass(frozen=True, slots=True)
class Pool:
    """The machines that autostop weighs against each other: one group of one app on this node."""

    app: AppPlan
    group: str
    machines: tuple[Owned, ...]

    @property
    def key(self) -> Key:
        return (self.app.name, self.group)


class IdleWatch:
    """Runs for as long as control does."""

    def __init__(
        self, fleet: Fleet, memory: SharedMemory, clock: Clock, pools: Callable[[], Iterable[Pool]], region: str,
        interval_s: Callable[[], float], make_socket: SocketMaker = plain_socket,
    ) -> None:  # fmt: skip
        """`interval_s`: the node's `autostop_interval`, for apps without one. `make_socket`: to ask machines with."""
        self._fleet = fleet
        self._memory = memory
        self._clock = clock
        self._pools = pools
        self._region = region
        self._interval_s = interval_s
        self._make_socket = make_socket
        self._began = clock.monotonic()
        self._is_first_look = True
        self._last_pass: dict[Key, float] = {}
        self._ending: dict[MachineId, asyncio.Task[None]] = {}
        self._busy: dict[MachineId, float] = {}  # until when the last answer counts
        self._asking = asyncio.Semaphore(_ASKED_AT_ONCE)
        self._warming: set[Key] = set()
        self._zones: dict[str, tzinfo] = {}

    async def run(self) -> None:
        while True:
            await self._clock.sleep(self.pause_s())
            await self.look()

    def pause_s(self) -> float:
        """Until the next look."""
        now, pause = self._clock.monotonic(), _LONGEST_LOOK_S
        for pool in self._pools():
            if pool.app.idle_timeout_s > 0:
                pause = min(pause, pool.app.idle_timeout_s / 4)
            pause = min(pause, self._until_pass(pool, now))
        return max(_SHORTEST_LOOK_S, pause)

    def _until_pass(self, pool: Pool, now: float) -> float:
        own = pool.app.autostop_interval_s
        return self._last_pass.get(pool.key, self._began) + (self._interval_s() if own is None else own) - now

    async def look(self) -> None:
        """One look at every pool; begins what it comes to and does not wait for it."""
        now = self._clock.monotonic()
        self._busy = {one: until for one, until in self._busy.items() if until > now}
        pools = list(self._pools())
        first_seen, self._is_first_look = self._began if self._is_first_look else now, False
        self._last_pass = {pool.key: self._last_pass.get(pool.key, first_seen) for pool in pools}
        seen = 0
        for pool in pools:
            self._look_at(pool, now)
            seen += len(pool.machines)
            if seen >= _AT_ONCE:
                seen = 0
                await asyncio.sleep(0)

    def _look_at(self, pool: Pool, now: float) -> None:
        is_pass = self._until_pass(pool, now) <= 0
        if is_pass:
            self._last_pass[pool.key] = now
        policy = self.policy(pool)
        if policy.mode is Autostop.OFF:
            return
        running = [one for one in pool.machines if self._counts(one) and one.state is MachineState.STARTED]
        uses = [self._use(machine, now) for machine in running]
        chosen: list[MachineId] = []
        if pool.app.idle_timeout_s > 0:
            chosen = choose_idle(uses, policy, now, pool.app.idle_timeout_s)
        for machine in running:
            if machine.id in chosen:
                self._end(pool, machine, policy, 0.0, f"unused for {now - machine.idle_since:.0f} s")
        is_last = len(running) == 1 and pool.app.idle_timeout_s > 0  # and idle_timeout says when it goes
        if is_pass and not chosen and not is_last:
            drain_s = _EXCESS_DRAIN_S if len(running) > 1 else 0.0
            excess = choose_excess(uses, policy, pool.app.autostop_at_once)
            for machine in running:
                if machine.id in excess:
                    self._end(pool, machine, policy, drain_s, f"{len(running)} machines run, and fewer are needed")
        if pool.app.warm_hours and self.is_warm(pool.app) and not self._fleet.is_ending:
            self._warm(pool, policy)

    def policy(self, pool: Pool) -> Policy:
        is_primary = pool.app.primary_region in (None, self._region)
        return policy_of(pool.app.services_of(pool.group), is_primary, self.is_warm(pool.app))

    def _counts(self, machine: Owned) -> bool:
        """One that is about to end is not counted on for `min_running` any more."""
        return not machine.is_static and not machine.row.cordoned and machine.id not in self._ending

    def _use(self, machine: Owned, now: float) -> Use:
        slot = machine.row.slot
        load, admitted = self._memory.in_flight(slot), self._memory.admitted(slot)
        if load > 0 or admitted != machine.admitted:
            machine.admitted = admitted
            machine.idle_since = now
        is_busy = self._is_marked_busy(machine) or machine.id in self._busy
        return Use(machine.id, max(0, load), machine.idle_since, is_busy)

    def _is_marked_busy(self, machine: Owned) -> bool:
        return is_busy_until(machine.row.metadata.get(BUSY_KEY), self._clock.unix())

    # --- ends

    def _end(self, pool: Pool, machine: Owned, policy: Policy, drain_s: float, why: str) -> None:
        if machine.handshake is not None or machine.ending is not None or machine.flight is not None:
            return
        task = spawn(self._end_unless_busy(pool, machine, policy, drain_s, why), f"idle {machine.id}")
        self._ending[machine.id] = task
        task.add_done_callback(lambda _: self._ending.pop(machine.id, None))

    async def _end_unless_busy(self, pool: Pool, machine: Owned, policy: Policy, drain_s: float, why: str) -> None:
        if pool.app.busy is not None:
            async with self._asking:
                is_busy = await says_it_is_busy(machine, pool.app.busy, self._make_socket)
            if is_busy:
                log.info("machine %s of %s stays: it says that it is busy", machine.id, machine.app.name)
                self._busy[machine.id] = self._clock.monotonic() + _BUSY_FOR_S
                if drain_s:  # the pass came to nothing: let the next look choose another
                    self._last_pass[pool.key] = -math.inf
                return
        log.info("machine %s of %s: %s", machine.id, machine.app.name, why)
        await self._fleet.end_if_unused(machine, policy.mode, drain_s, lambda: not self._is_marked_busy(machine))

    # --- warm hours

    def is_warm(self, app: AppPlan) -> bool:
        unix_s = self._clock.unix()
        for hours in app.warm_hours:
            local = datetime.fromtimestamp(unix_s, self._zone(hours.zone))
            if hours.contains(local.weekday(), local.hour * 60 + local.minute):
                return True
        return False

    def _zone(self, name: str) -> tzinfo:
        """Configuration with a name that is none has faults; one that was good elsewhere may come from a kept plan."""
        zone = self._zones.get(name)
        if zone is None:
            try:
                zone = ZoneInfo(name)
            except (ZoneInfoNotFoundError, ValueError, OSError) as error:
                log.error("warm hours in time zone %s count as UTC: %s", name, error)
                zone = UTC
            self._zones[name] = zone
        return zone

    def _warm(self, pool: Pool, policy: Policy) -> None:
        if pool.key in self._warming or len(self._warming) >= _WARMED_AT_ONCE:
            return
        counted, now = [one for one in pool.machines if self._counts(one)], self._clock.unix()
        resting = [
            Resting(one.id, one.state, hold_left_s(one.row.hold_until, now) > 0 or one.row.stopped_by == "user")
            for one in counted
            if one.flight is None and one.state is not MachineState.STARTED
        ]
        chosen = choose_to_warm(resting, len(counted) - len(resting), policy)
        if chosen is None:
            return
        log.info("machine %s of %s: warm hours", chosen, pool.app.name)
        self._warming.add(pool.key)

        def landed(_: asyncio.Future[WakeResult]) -> None:
            self._warming.discard(pool.key)

        self._fleet.wake(chosen, "flyd").add_done_callback(landed)

    async def settle(self) -> None:
        """Until the ends begun so far have come to something. For tests and the drain."""
        while self._ending:
            await asyncio.wait(set(self._ending.values()))

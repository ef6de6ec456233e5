"""Which idle machine to stop: Fly's rule of excess, and ours of `idle_timeout`. Values in, a choice out.

Fly's rule (docs, "Autostop/autostart Machines"; spec machines §2) stops at most one machine a pass. `idle_timeout` is
ours and stops every machine that nothing has used for that long. Both leave `min_running` machines in the primary
region, and choose the least loaded, then the one with the lowest id (Fly's choice is not published).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from proxy.model import Autostop, MachineId, Service


@dataclass(frozen=True, slots=True)
class Use:
    """How a running machine is used now."""

    id: MachineId
    load: int  # requests, connections and tunnels in flight, over all workers
    idle_since: float  # monotonic seconds since when it has had no load and no new request; `now` while it has


@dataclass(frozen=True, slots=True)
class Policy:
    """What the services of a process group say together."""

    mode: Autostop
    soft_limit: int
    min_running: int  # 0 outside the primary region


def policy_of(services: Iterable[Service], is_primary: bool) -> Policy:
    """Join the settings of all services that a machine has.

    It may be stopped only if every one of them may (spec: all services must be idle), suspended only if every one asks
    for that. No services: nothing can wake it again, so it is never stopped.
    """
    services = tuple(services)
    modes = {service.autostop for service in services}
    if not services or Autostop.OFF in modes:
        return Policy(Autostop.OFF, 0, 0)
    mode = Autostop.SUSPEND if modes == {Autostop.SUSPEND} else Autostop.STOP
    least = max(service.min_machines_running for service in services) if is_primary else 0
    return Policy(mode, min(service.soft_limit for service in services), least)


def choose_excess(running: Sequence[Use], policy: Policy) -> MachineId | None:
    """The one machine to stop in this pass by Fly's formula, or None.

    With n running, of which `over` are above the soft limit: n > 1 stops one if n - (over + 1) >= 1; n = 1 stops it if
    it has no load. Never below `min_running`.
    """
    count = len(running)
    if policy.mode is Autostop.OFF or count <= policy.min_running:
        return None
    if count == 1:
        return running[0].id if running[0].load == 0 else None
    over = sum(1 for one in running if one.load > policy.soft_limit)
    if count - (over + 1) < 1:
        return None
    return min(running, key=lambda one: (one.load, one.id)).id


def choose_idle(running: Sequence[Use], policy: Policy, now: float, idle_timeout_s: float) -> list[MachineId]:
    """Every machine unused for `idle_timeout_s`, longest first, as many as `min_running` permits."""
    if policy.mode is Autostop.OFF:
        return []
    idle = [one for one in running if one.load == 0 and now - one.idle_since >= idle_timeout_s]
    idle.sort(key=lambda one: (one.idle_since, one.id))
    return [one.id for one in idle[: max(0, len(running) - policy.min_running)]]

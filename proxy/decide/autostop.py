"""Which machines to stop, which are not to be stopped now, and which to keep warm. Values in, choices out.

Fly's rule (docs, "Autostop/autostart Machines"; spec machines §2) stops at most one machine a pass; `at_once` lets a
pass stop more, where those left can carry the load. `idle_timeout` is ours and stops every machine that nothing has
used for that long. Both leave `min_running` machines, take none that says it is busy, and choose the least loaded, then
the one with the lowest id (Fly's choice is not published). In warm hours `min_running` is at least 1, and machines are
started up to it. What time it is, and how a machine is asked whether it is busy, is control/idle.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from proxy.model import Autostop, MachineId, MachineState, Service

BUSY_KEY = "wakefront_busy"  # of a machine's metadata
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = 24 * 60


@dataclass(frozen=True, slots=True)
class Use:
    """How a running machine is used now."""

    id: MachineId
    load: int  # requests, connections and tunnels in flight, over all workers
    idle_since: float  # monotonic seconds since when it has had no load and no new request; `now` while it has
    is_busy: bool = False  # it says that it works on something that no request waits for


@dataclass(frozen=True, slots=True)
class Resting:
    """A machine that does not run."""

    id: MachineId
    state: MachineState
    is_held: bool = False  # after failed starts, by a user's stop, by a cordon: not to be started unasked


@dataclass(frozen=True, slots=True)
class Policy:
    """What the services of a process group, and the hour, say together."""

    mode: Autostop
    soft_limit: int
    min_running: int  # outside the primary region only that of warm hours


def policy_of(services: Iterable[Service], is_primary: bool, is_warm: bool = False) -> Policy:
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
    return Policy(mode, min(service.soft_limit for service in services), max(least, int(is_warm)))


def choose_excess(running: Sequence[Use], policy: Policy, at_once: int = 1) -> list[MachineId]:
    """The machines to stop in this pass, the first by Fly's formula.

    With n running, of which `over` are above the soft limit: n > 1 stops one if n - (over + 1) >= 1; n = 1 stops it if
    it has no load. Never below `min_running`. Beyond the first, up to `at_once`, only while those left would have all
    of the load within their soft limits: one pass must not undo what the next has to start again.
    """
    count = len(running)
    over = sum(1 for one in running if one.load > policy.soft_limit)
    excess = count - (over + 1) if count > 1 else int(count == 1 and running[0].load == 0)
    room = min(excess, count - policy.min_running, at_once)
    if policy.mode is Autostop.OFF or room < 1:
        return []
    load = sum(one.load for one in running)
    chosen: list[MachineId] = []
    for one in sorted((one for one in running if not one.is_busy), key=lambda one: (one.load, one.id))[:room]:
        if chosen and load > policy.soft_limit * (count - len(chosen) - 1):
            break
        chosen.append(one.id)
    return chosen


def choose_idle(running: Sequence[Use], policy: Policy, now: float, idle_timeout_s: float) -> list[MachineId]:
    """Every machine unused for `idle_timeout_s`, longest first, as many as `min_running` permits."""
    if policy.mode is Autostop.OFF:
        return []
    idle = [one for one in running if one.load == 0 and not one.is_busy and now - one.idle_since >= idle_timeout_s]
    idle.sort(key=lambda one: (one.idle_since, one.id))
    return [one.id for one in idle[: max(0, len(running) - policy.min_running)]]


def choose_to_warm(resting: Sequence[Resting], running: int, policy: Policy) -> MachineId | None:
    """The next machine to start so that `min_running` run; a frozen one before a cold one. `running`: and starting."""
    if policy.mode is Autostop.OFF or running >= policy.min_running:
        return None
    able = [one for one in resting if one.state.is_startable and not one.is_held]
    able.sort(key=lambda one: (one.state is not MachineState.SUSPENDED, one.id))
    return able[0].id if able else None


# --- busy


def is_busy_until(value: str | None, unix_s: float) -> bool:
    """What the metadata key `wakefront_busy` says: `true`, or the unix time until which the machine is busy."""
    if value is None or value == "true":
        return value is not None
    try:
        return float(value) > unix_s
    except ValueError:
        return False


def is_busy_value(value: str) -> bool:
    """Whether `value` is one that `wakefront_busy` may have."""
    return value in ("true", "false") or re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", value, re.ASCII) is not None


# --- warm hours


@dataclass(frozen=True, slots=True)
class WarmHours:
    """A stretch of some days of the week, by the clock on the wall of a time zone."""

    days: tuple[int, ...]  # on which it begins; 0 = Monday
    begin: int  # minutes after midnight
    end: int  # the same, up to 1440; not after `begin`: it ends on the day after
    zone: str = "UTC"  # a name of the tz database

    def contains(self, weekday: int, minute: int) -> bool:
        """Whether this local day and minute after midnight are in it."""
        if self.end > self.begin:
            return weekday in self.days and self.begin <= minute < self.end
        return (weekday in self.days and minute >= self.begin) or ((weekday - 1) % 7 in self.days and minute < self.end)


_HOURS = re.compile(r"(\S+)\s+([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})(?:\s+(\S+))?", re.ASCII)


def parse_warm_hours(text: str) -> WarmHours:
    """Read `mon-fri 08:00-18:00 Europe/Amsterdam`.

    Days are `mon` to `sun`, ranges and lists of them, or `daily`. Hours that end before they begin go on into the next
    day. Without a zone they are UTC. Whether there is such a zone is left to the caller. Raises ValueError.
    """
    match = _HOURS.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected days, hours and a time zone, such as mon-fri 08:00-18:00 Europe/Amsterdam")
    begin, end = _minute(match[2], match[3]), _minute(match[4], match[5])
    if begin in (_DAY, end):
        raise ValueError(f"{match[2]}:{match[3]}-{match[4]}:{match[5]} is no stretch of time; all day is 00:00-24:00")
    return WarmHours(_days(match[1].lower()), begin, end, match[6] or "UTC")


def _minute(hour: str, minute: str) -> int:
    value = int(hour) * 60 + int(minute)
    if int(minute) > 59 or value > _DAY:
        raise ValueError(f"{hour}:{minute} is no time of day")
    return value


def _days(text: str) -> tuple[int, ...]:
    if text == "daily":
        return tuple(range(7))
    days: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        begin = _day(first)
        days.update((begin + step) % 7 for step in range((_day(last) - begin) % 7 + 1 if dash else 1))
    return tuple(sorted(days))


def _day(name: str) -> int:
    if name not in _DAYS:
        raise ValueError(f"{name!r} is no day: expected one of {', '.join(_DAYS)}, or daily")
    return _DAYS.index(name)

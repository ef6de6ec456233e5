"""Which of the running machines gets a request, and whether one more should be started (spec routing §5.1).

Loads are read one by one, over all workers, and that is what a choice costs: so machines are drawn and looked at, and
all are gone through only if several draws came to nothing. Filling the list of candidates (running, not cordoned,
checks passing, not tried already), starting, waiting and admitting are the caller's; response times and reported loads
are ewma.py's.
"""

from __future__ import annotations

import enum
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from proxy.model import Balance, Machine, MachineId, MachineState

RECENT_S = 20.0  # a machine started so lately may yet pass its checks (spec routing §5.4, "recent")

_FEW = 16  # up to so many machines, all of them are looked at before one above its soft limit is taken
_FEW_DRAWS = 4  # before they are
_MANY_DRAWS = 16  # of more machines than that
_NO_LIMIT = sys.maxsize


class Candidate(Protocol):
    @property
    def slot(self) -> int: ...


C = TypeVar("C", bound=Candidate)
T = TypeVar("T")


class Scores(Protocol):
    """What is known of a machine besides its load; `now` is monotonic seconds. See ewma.MachineScores."""

    def response_time(self, slot: int, now: float) -> float:
        """Seconds that a request there is expected to take."""

    def reported_load(self, slot: int, now: float) -> float | None:
        """What the app said of itself, or None if it said nothing lately."""


def choose_machine(
    candidates: Sequence[C],
    in_flight: Callable[[int], int],
    soft_limit: int,
    hard_limit: int | None,
    rng: random.Random,
    policy: Balance = Balance.FLY,
    scores: Scores | None = None,
    now: float = 0.0,
) -> C | None:
    """Pick one of `candidates`, or None if there is none or all are at their hard limit: then the request waits.

    `fly`: those below the soft limit before those above it, and an even draw within the band; load decides by band, not
    by count (Fly docs, "Concurrency"). Of more than 16 machines that rule is kept nearly always: where 16 draws find
    none below its soft limit, only one choice in n/16 goes through all n, lest overload make every choice dear.

    `least-loaded`, `peak-ewma`, `app-load`: the better of two drawn. They keep the hard limit but no bands: each orders
    machines by more than a band does, and a slow machine below its soft limit would go before a fast one above it.
    The last two need `scores` and `now`.
    """
    count = len(candidates)
    if count == 0:
        return None
    full = _NO_LIMIT if hard_limit is None else hard_limit
    if count == 1:
        return candidates[0] if hard_limit is None or in_flight(candidates[0].slot) < full else None
    if policy is Balance.FLY:
        return _by_band(candidates, in_flight, min(soft_limit, full), full, rng)
    return _better_of_two(candidates, in_flight, full, rng, policy, scores, now)


def _by_band(
    candidates: Sequence[C], in_flight: Callable[[int], int], room: int, full: int, rng: random.Random
) -> C | None:
    count = len(candidates)
    between: C | None = None
    for _ in range(_FEW_DRAWS if count <= _FEW else _MANY_DRAWS):
        one = candidates[int(rng.random() * count)]
        load = in_flight(one.slot)
        if load < room:
            return one
        if between is None and load < full:
            between = one
    if between is not None and rng.random() * count >= _FEW:
        return between
    below, above = [], []
    for one in candidates:
        load = in_flight(one.slot)
        if load < room:
            below.append(one)
        elif load < full:
            above.append(one)
    return _draw(below or above, rng)


def _better_of_two(
    candidates: Sequence[C],
    in_flight: Callable[[int], int],
    full: int,
    rng: random.Random,
    policy: Balance,
    scores: Scores | None,
    now: float,
) -> C | None:
    """Two drawn come within a hair of the best of all, and workers that choose at once do not all take the same one."""
    drawn = _draw_two(candidates, in_flight, full, rng)
    if drawn is None:
        return None
    one, load, other, other_load = drawn
    if other is None:
        return one
    if policy is Balance.LEAST_LOADED:
        return other if other_load < load else one
    if scores is None:
        raise ValueError(f"{policy.value} needs scores")
    if policy is Balance.PEAK_EWMA:
        cost = (load + 1) * scores.response_time(one.slot, now)
        return other if (other_load + 1) * scores.response_time(other.slot, now) < cost else one
    if policy is Balance.APP_LOAD:
        reported, other_reported = scores.reported_load(one.slot, now), scores.reported_load(other.slot, now)
        if reported is None or other_reported is None or reported == other_reported:
            return other if other_load < load else one  # one's word and the other's count have no common measure
        return other if other_reported < reported else one
    raise AssertionError(f"{policy.value} draws no two")


def _draw_two(
    candidates: Sequence[C], in_flight: Callable[[int], int], full: int, rng: random.Random
) -> tuple[C, int, C | None, int] | None:
    """Two different machines below `full` with their loads, every pair as likely as any; one, if draws find but one."""
    count = len(candidates)
    first, first_at, first_load = None, count, 0
    for _ in range(_FEW_DRAWS if count <= _FEW else _MANY_DRAWS):
        at = int(rng.random() * (count if first is None else count - 1))
        if at >= first_at:
            at += 1
        one = candidates[at]
        load = in_flight(one.slot)
        if load >= full:
            continue
        if first is not None:
            return first, first_load, one, load
        first, first_at, first_load = one, at, load
    if first is not None and count > _FEW:
        return first, first_load, None, 0
    open_ones = [(one, load) for one in candidates if (load := in_flight(one.slot)) < full]
    if len(open_ones) < 2:
        return (*open_ones[0], None, 0) if open_ones else None
    return (*open_ones.pop(int(rng.random() * len(open_ones))), *open_ones[int(rng.random() * len(open_ones))])


def _draw(band: Sequence[T], rng: random.Random) -> T | None:
    return band[int(rng.random() * len(band))] if band else None


# --- a machine that is asked for by name


@dataclass(frozen=True, slots=True)
class Preference:
    """Which machine a request, its cookie or a replay asks for. `NOTHING`, as most requests, leaves it to the load.

    `exclude` wins over both: whoever wants several attempts at a forced machine leaves it out.
    """

    force: MachineId | None = None  # only that machine (fly-force-instance-id, replay `instance`)
    prefer: MachineId | None = None  # that machine if it has room (fly-prefer-instance-id, `prefer_instance`, cookie)
    exclude: frozenset[MachineId] = frozenset()  # tried already, or the one that said `elsewhere`


NOTHING = Preference()


class Asked(enum.Enum):
    """What came of asking for a machine by name."""

    NOT = "not"  # none is named: choose by load
    CHOSEN = "chosen"  # `machine` gets the request
    UNAVAILABLE = "unavailable"  # the preferred one cannot take it: choose by load, and say `unavailable`
    FULL = "full"  # the forced one, `machine`, is at its hard limit: wait for it
    MISSING = "missing"  # the forced one does not run: start it if it is there and stopped, else refuse


@dataclass(frozen=True, slots=True)
class Named(Generic[C]):
    outcome: Asked
    machine: C | None = None
    unavailable: MachineId | None = None  # for the header fly-preferred-instance-unavailable


def pick_named(
    want: Preference,
    started: Mapping[MachineId, C],
    is_healthy: Callable[[C], bool],
    in_flight: Callable[[int], int],
    hard_limit: int | None,
) -> Named[C]:
    """Look for the machine that `want` names among those that run, serve the port and are not cordoned.

    A forced one is taken even if its checks fail, and no other in its place; a preferred one only if it is healthy and
    below its hard limit (spec routing §3, §2.1). If both are named, the forced one is meant.
    """
    wanted = want.force if want.force is not None else want.prefer
    if wanted is None:
        return Named(Asked.NOT)
    machine = started.get(wanted) if wanted not in want.exclude else None
    if machine is not None and want.force is None and not is_healthy(machine):
        machine = None
    has_room = machine is not None and (hard_limit is None or in_flight(machine.slot) < hard_limit)
    if has_room:
        return Named(Asked.CHOSEN, machine)
    if want.force is None:
        return Named(Asked.UNAVAILABLE, unavailable=wanted)
    return Named(Asked.MISSING) if machine is None else Named(Asked.FULL, machine)


# --- one more machine


def wants_another(loads: Iterable[int], soft_limit: int) -> bool:
    """Whether machines run, all at or above their soft limit: then one more is started beside them (machines §3).

    Stops at the first load below the limit. With none running a start is not beside anything: see wake.py.
    """
    some = False
    for load in loads:
        if load < soft_limit:
            return False
        some = True
    return some


def recently_started(machines: Iterable[Machine], now: float, internal_port: int) -> bool:
    """Whether a start has yet to bear fruit for a service, so that no further one is made; `now` is unix seconds.

    That is: a machine is starting, or was started less than 20 s ago and its checks fail (spec routing §5.4).
    """
    return any(_is_pending(one, now, internal_port) for one in machines)


def _is_pending(machine: Machine, now: float, internal_port: int) -> bool:
    if machine.state is MachineState.STARTING:
        return True
    is_recent = 0.0 <= now - machine.started_at < RECENT_S  # and a clock set back holds nothing up
    return machine.state is MachineState.STARTED and is_recent and internal_port in machine.failing_ports


def spared(candidates: Sequence[C], is_avoided: Callable[[C], bool]) -> Sequence[C]:
    """Candidates less those that failed lately (ewma.PassiveHealth); if that leaves none, all: better one than none."""
    kept = [one for one in candidates if not is_avoided(one)]
    return kept or candidates

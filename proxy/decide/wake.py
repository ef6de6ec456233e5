"""Which machine to start for a request that finds none running (spec machines §3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proxy.decide.restart import hold_left_s
from proxy.model import Machine, MachineId, MachineState

# Nearest to answering first: one that runs or is starting already, then a frozen one, then a cold one. One that runs
# and could not be chosen is about to be stopped for idleness: asking for it keeps it running.
_RANK = {
    MachineState.STARTED: 0,
    MachineState.STARTING: 0,
    MachineState.SUSPENDED: 1,
    MachineState.SUSPENDING: 2,
    MachineState.STOPPED: 3,
    MachineState.CREATED: 3,
    MachineState.STOPPING: 4,
    MachineState.FAILED: 5,
}


@dataclass(frozen=True, slots=True)
class Held:
    """All machines that could be started are held back after failed starts; `until` is the earliest end (unix s)."""

    reason: str
    until: float


def choose_to_wake(machines: Iterable[Machine], groups: tuple[str, ...], now: float) -> MachineId | Held | None:
    """The machine to start or to wait for; Held if the breaker is open on all; None if there is no machine at all.

    `now` is unix seconds. Cordoned machines are not started. Ties go to the lowest id, so that many requests (and
    workers) that ask at once agree on one machine.
    """
    best: tuple[int, str] | None = None
    held: Held | None = None
    for machine in machines:
        rank = _RANK.get(machine.state)
        if rank is None or machine.cordoned or machine.group not in groups:
            continue
        reason = machine.hold_reason if hold_left_s(machine.hold_until, now) else None
        if reason is not None and machine.state is not MachineState.STARTING:
            if held is None or machine.hold_until < held.until:
                held = Held(reason, machine.hold_until)
            continue
        key = (rank, machine.id)
        if best is None or key < best:
            best = key
    return MachineId(best[1]) if best is not None else held

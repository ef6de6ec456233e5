"""The states a machine goes through, as one table. An event that has no row here is a fault of ours and raises.

    created ──start──▶ starting ──reached──▶ started ──stop──▶ stopping ──exited──▶ stopped
    stopped, failed ───────┘ │ ▲               │ │  ▲                                 ▲
                       failed│ │start          │ └─suspend─▶ suspending ──frozen─▶ suspended
                             ▼ │               └──exited (by itself) ───────────────▶─┘
                           failed            suspending, suspended ──start──▶ starting (resume)
                                             suspended ──stop──▶ stopping;  created, failed ──rest──▶ stopped

Source: Fly docs, "Machine states" (spec machines §1). `failed` is a start that came to nothing: the program could not
be executed, ended before it listened, or never listened.
"""

from __future__ import annotations

import enum

from proxy.model import MachineState as S


class Change(enum.StrEnum):
    START = "start"  # asked to start or resume
    REACHED = "reached"  # it listens
    FAIL = "fail"  # the start came to nothing
    STOP = "stop"
    SUSPEND = "suspend"
    FROZEN = "frozen"
    NOT_FROZEN = "not-frozen"  # the driver could not suspend it: it runs on
    EXITED = "exited"
    REST = "rest"  # asked to stop while it does not run anyway
    DESTROY = "destroy"


TRANSITIONS: dict[tuple[S, Change], S] = {
    (S.CREATED, Change.START): S.STARTING,
    (S.STOPPED, Change.START): S.STARTING,
    (S.FAILED, Change.START): S.STARTING,
    (S.SUSPENDED, Change.START): S.STARTING,
    (S.SUSPENDING, Change.START): S.STARTING,
    (S.STARTING, Change.REACHED): S.STARTED,
    (S.STARTING, Change.FAIL): S.FAILED,
    (S.STARTING, Change.EXITED): S.FAILED,
    (S.STARTING, Change.STOP): S.STOPPING,
    (S.STARTED, Change.STOP): S.STOPPING,
    (S.STARTED, Change.SUSPEND): S.SUSPENDING,
    (S.STARTED, Change.EXITED): S.STOPPED,
    (S.STOPPING, Change.EXITED): S.STOPPED,
    (S.STOPPING, Change.FAIL): S.FAILED,
    (S.SUSPENDING, Change.FROZEN): S.SUSPENDED,
    (S.SUSPENDING, Change.NOT_FROZEN): S.STARTED,
    (S.SUSPENDING, Change.STOP): S.STOPPING,
    (S.SUSPENDING, Change.EXITED): S.STOPPED,
    (S.SUSPENDED, Change.STOP): S.STOPPING,
    (S.SUSPENDED, Change.EXITED): S.STOPPED,
    (S.CREATED, Change.REST): S.STOPPED,
    (S.FAILED, Change.REST): S.STOPPED,
    (S.CREATED, Change.DESTROY): S.DESTROYED,
    (S.STOPPED, Change.DESTROY): S.DESTROYED,
    (S.FAILED, Change.DESTROY): S.DESTROYED,
}

#: States in which a process of the machine exists, or may.
LIVE = frozenset({S.STARTING, S.STARTED, S.STOPPING, S.SUSPENDING, S.SUSPENDED})


class ImpossibleChange(Exception):
    """An event came in a state that has no row for it."""


def next_state(state: S, change: Change) -> S:
    """The state after `change`. Raises ImpossibleChange."""
    try:
        return TRANSITIONS[state, change]
    except KeyError:
        raise ImpossibleChange(f"a machine that is {state} cannot {change}") from None

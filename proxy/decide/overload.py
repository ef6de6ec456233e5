"""Whether a worker has more to do than it can, and what it gives up first: a pure judgement with hysteresis.

    NORMAL            everything is served
    CROWDED           connections or memory run short: kept connections are let go sooner, answers end theirs
    SHED_CONNECTIONS  new connections are refused, requests on those there are go on
    SHED_REQUESTS     new requests are refused too, those under way go on

Each measure has a mark at which a stage begins and a lower one at which it ends; a stage is kept for `HOLD_S` at
least. Lag is the least of the last `LAG_SAMPLES` samples: one long turn of the loop is no overload. Marks and what led
to them: decision 0010.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

HOLD_S = 1.0
LAG_SAMPLES = 3


class Stage(enum.IntEnum):
    NORMAL = 0
    CROWDED = 1
    SHED_CONNECTIONS = 2
    SHED_REQUESTS = 3


@dataclass(frozen=True, slots=True)
class Pressure:
    """What was measured. Shares are of what there may be at most: 1.0 is all of it."""

    connections: float  # client connections open
    memory: float  # resident memory
    lag_s: float  # how late the loop came to its timer


@dataclass(frozen=True, slots=True)
class _Mark:
    """A stage begins where a measure reaches `begin` and may end below `end`."""

    stage: Stage
    measure: str
    begin: float
    end: float


# For whoever reads the log: the setting that a measure is a share of.
_WHOLE = {"connections": " of max_connections", "memory": " of max_memory", "lag_s": ""}
MARKS = (
    _Mark(Stage.CROWDED, "connections", 0.90, 0.80),
    _Mark(Stage.CROWDED, "memory", 0.80, 0.75),
    _Mark(Stage.SHED_CONNECTIONS, "memory", 0.90, 0.85),
    _Mark(Stage.SHED_CONNECTIONS, "lag_s", 0.5, 0.2),
    _Mark(Stage.SHED_REQUESTS, "memory", 0.97, 0.92),
    _Mark(Stage.SHED_REQUESTS, "lag_s", 1.5, 0.5),
)


class Overload:
    """The stage of one worker. `look` is called a few times a second."""

    def __init__(self) -> None:
        self.stage = Stage.NORMAL
        self.why = ""  # the measure behind the stage, for a message
        self._lags: deque[float] = deque(maxlen=LAG_SAMPLES)
        self._since = float("-inf")

    def look(self, pressure: Pressure, now: float) -> Stage:
        """The stage from here on. `now`: monotonic seconds."""
        self._lags.append(pressure.lag_s)
        lag = min(self._lags) if len(self._lags) == LAG_SAMPLES else 0.0
        measured = {"connections": pressure.connections, "memory": pressure.memory, "lag_s": lag}
        begun = [mark for mark in MARKS if measured[mark.measure] >= mark.begin]
        kept = [mark for mark in MARKS if mark.stage <= self.stage and measured[mark.measure] >= mark.end]
        due = max((mark.stage for mark in begun), default=Stage.NORMAL)
        held = max((mark.stage for mark in kept), default=Stage.NORMAL)
        if due > self.stage:
            self._change(due, now)
        elif max(due, held) < self.stage and now - self._since >= HOLD_S:
            self._change(max(due, held), now)
        if marks := [mark for mark in (begun or kept) if mark.stage == self.stage]:
            measure = marks[0].measure
            self.why = f"{measure} {measured[measure]:.2f}{_WHOLE[measure]}"
        return self.stage

    def _change(self, stage: Stage, now: float) -> None:
        self.stage, self._since = stage, now
        if stage is Stage.NORMAL:
            self.why = ""

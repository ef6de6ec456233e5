"""What the results of a health check come to: passing, warning or critical, and when to check again.

One result flips a check; there are no thresholds (spec fly-toml §6). After a start nothing is known to pass, and the
check runs at a much shorter interval until its first pass, or until two of its own intervals have passed (spec routing
§5.4). Fly does not publish what failures within the grace period are: here the check runs nevertheless, so that a
machine is sent to as soon as it can be, and a failure before the first pass is a `warning`. Warnings keep a machine out
of routing like any failure, but nothing is ever restarted for them.

Waits for nothing and asks nobody: see control/checks.py.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable

from proxy.model import Check

QUICK_INTERVALS = 2
SHORTEST_PAUSE_S = 0.1
PAUSE_SHARE = 0.1  # of the time since the start
LONGEST_QUICK_PAUSE_S = 1.0
JITTER = 0.1


class Status(enum.StrEnum):
    PASSING = "passing"
    WARNING = "warning"
    CRITICAL = "critical"


class CheckState:
    """One check of one machine. `started` and `resumed` say what became of the machine, `heard` what was found."""

    __slots__ = (
        "_began",
        "_grace_s",
        "_interval_s",
        "_is_quick",
        "_was_spread",
        "critical_since",
        "is_known",
        "status",
    )

    def __init__(self, check: Check, now: float, status: Status) -> None:
        """For a machine that runs already: `status` is what is held of it until the first result."""
        self._interval_s = check.interval_s
        self._grace_s = check.grace_period_s
        self._began = now
        self._is_quick = False  # it has yet to pass since the last start
        self._was_spread = False
        self.status = status
        self.is_known = False  # whether `status` rests on a result
        self.critical_since: float | None = now if status is Status.CRITICAL else None

    @property
    def is_passing(self) -> bool:
        return self.status is Status.PASSING

    @property
    def first_pass_by(self) -> float:
        """Until then a first pass may be waited for: the grace period and the two intervals of quick checks."""
        return self._began + self._grace_s + QUICK_INTERVALS * self._interval_s

    def started(self, now: float) -> None:
        """The machine has been started anew: what was known of it is void."""
        self._begin(now)
        self.status = Status.WARNING
        self.is_known = False
        self.critical_since = None

    def resumed(self, now: float) -> None:
        """The machine stood still and goes on as it was: the last result holds until the next."""
        self._begin(now)
        if self.critical_since is not None:
            self.critical_since = now

    def _begin(self, now: float) -> None:
        self._began = now
        self._is_quick = True
        self._was_spread = False

    def heard(self, passes: bool, now: float) -> None:
        """Take a result."""
        if passes:
            self.status = Status.PASSING
            self._is_quick = False
            self.critical_since = None
        elif self._is_quick and self.status is not Status.CRITICAL and now < self._began + self._grace_s:
            self.status = Status.WARNING
        else:
            self.status = Status.CRITICAL
            if self.critical_since is None:
                self.critical_since = now
        self.is_known = True

    def next_check(self, now: float, rng: random.Random) -> float:
        """The moment of the next check, after one that ended now.

        Regular checks are spread by chance, the first of them the most, so that machines started together are not
        checked together for ever.
        """
        since = now - self._began
        if self._is_quick and since < QUICK_INTERVALS * self._interval_s:
            pause = min(max(SHORTEST_PAUSE_S, PAUSE_SHARE * since), LONGEST_QUICK_PAUSE_S, self._interval_s)
            return now + pause
        least = 1.0 - JITTER if self._was_spread else 0.5
        self._was_spread = True
        return now + self._interval_s * rng.uniform(least, 1.0)


def restart_is_due(states: Iterable[CheckState], after_s: float, now: float) -> bool:
    """Whether a check has been critical for `after_s` seconds without a pass between. 0: never."""
    if after_s <= 0:
        return False
    return any(state.critical_since is not None and now - state.critical_since >= after_s for state in states)

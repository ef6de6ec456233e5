"""What is known of another node: whether it is heard of, whether requests get there, and how many it takes just now.

    Lease      what it publishes of itself, every 250 ms or so; held where publications arrive (control)
    Suspicion  what requests met on the way there; held by the worker that met it, and true at once

            heard                failed                 time
    silent -------> healthy ---------------> suspect ---------> healthy, at a tenth of its share, then more
      ^               |  ^ draining, undrained
      +- lease over --+  +------> draining

Time is ours alone, monotonic seconds at receipt. The sender's clock says when it started (its epoch) and nothing else,
and may be minutes off: an epoch tells starts apart, and the order of two starts only where that can wait for a lease.
"""

from __future__ import annotations

import enum
import math
import random
from collections import deque
from typing import Final

EPOCHS_KEPT: Final = 16  # earlier starts of a node, whose late publications mean nothing
_LARGEST: Final = 2**63 - 1

FIRST_SHARE: Final = 0.1
DOUBLES_S: Final = 2.0  # all of its share 6.6 s after it is back

_SUSPECT_S: Final = 1.0  # twice as long for each failure that still counts
_SUSPECT_MAX_S: Final = 30.0
_FAILURES_HALVE_S: Final = 10.0
_FAILURES_MAX: Final = 8.0


class PeerState(enum.StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"  # requests could not be delivered there lately
    SILENT = "silent"  # its lease is over, or has not begun
    DRAINING = "draining"  # it asks for no new requests


def share_since(back_s: float) -> float:
    """The share of its requests that a node takes so long after it came back: a tenth, doubling every 2 s."""
    if back_s >= 10.0:
        return 1.0
    return min(1.0, FIRST_SHARE * math.exp2(max(0.0, back_s) / DOUBLES_S))


def takes(share: float, rng: random.Random) -> bool:
    """Whether a node with this share gets a request that it would otherwise get. Draws only where it matters."""
    return share >= 1.0 or rng.random() < share


class Lease:
    """A node's publications: they are numbered, and each accepted one is good for `lease_s`.

    A node that is heard of for the first time has its whole share: it may be we who have just come. One that was
    silent, or has started anew, gets its share bit by bit.
    """

    __slots__ = ("_at", "_back_at", "_epoch", "_is_draining", "_lease_s", "_retired", "_sequence")

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._epoch: int | None = None
        self._sequence = -1
        self._retired: deque[int] = deque(maxlen=EPOCHS_KEPT)
        self._at = -math.inf
        self._back_at = -math.inf
        self._is_draining = False

    def heard(self, epoch: int, sequence: int, now: float, *, is_draining: bool = False) -> bool:
        """A publication has come. False: it is old or a replay, and nothing that it says counts.

        An epoch before the one that is known is refused while the lease lasts, for that is what a late message looks
        like; after it, that is a node which started again with its clock set back. One that was followed by another
        never counts again. Raises ValueError for numbers that no node sends.
        """
        for name, value in (("epoch", epoch), ("sequence", sequence)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
                raise ValueError(f"{name}: expected a whole number from 0 to 2^63-1, saw {str(value)[:40]}")
        is_live = now < self._at + self._lease_s
        if epoch == self._epoch:
            if sequence <= self._sequence:
                return False
            if not is_live:
                self._back_at = now
        elif epoch in self._retired:
            return False
        elif self._epoch is not None:
            if epoch < self._epoch and is_live:
                return False
            self._retired.append(self._epoch)
            self._back_at = now
        self._epoch, self._sequence, self._at = epoch, sequence, now
        self._is_draining = is_draining
        return True

    def lost(self) -> None:
        """What it publishes over has ended: it is silent until it is heard again."""
        self._at = -math.inf

    def state(self, now: float) -> PeerState:
        """Healthy, silent or draining."""
        if now >= self._at + self._lease_s:
            return PeerState.SILENT
        return PeerState.DRAINING if self._is_draining else PeerState.HEALTHY

    def share(self, now: float) -> float:
        return share_since(now - self._back_at) if self.state(now) is PeerState.HEALTHY else 0.0

    @property
    def epoch(self) -> int | None:
        """Which start of the node is heard of: what was known of an earlier one is void."""
        return self._epoch


class Suspicion:
    """Failures to deliver requests to a node. The first makes it suspect at once, for 1 s; the next for 2, 4 ... 30.

    Failures halve every 10 s, but not while it is suspect: it had no occasion to do better. Publications do not end it:
    that they arrive does not say that requests get there.
    """

    __slots__ = ("_at", "_back_at", "_failures", "_until")

    def __init__(self) -> None:
        self._failures = 0.0
        self._at = -math.inf  # to which `_failures` is counted
        self._until = -math.inf
        self._back_at = -math.inf

    def failed(self, now: float) -> None:
        """A request could not be delivered there. While it is suspect that is one sent before, and no news."""
        if self.is_suspect(now):
            return
        self._failures = min(_FAILURES_MAX, self._left(now) + 1.0)
        self._until = now + min(_SUSPECT_MAX_S, _SUSPECT_S * math.exp2(self._failures - 1.0))
        self._at = self._back_at = self._until

    def succeeded(self, now: float) -> bool:
        """A request got there: what was held against it counts half, and it need not wait any longer.

        Whether that ended a suspicion.
        """
        if not self._failures:
            return False
        self._failures = self._left(now) / 2.0
        self._at = now
        if not self.is_suspect(now):
            return False
        self._until = self._back_at = now
        return True

    def is_suspect(self, now: float) -> bool:
        return now < self._until

    def share(self, now: float) -> float:
        return 0.0 if now < self._until else share_since(now - self._back_at)

    @property
    def until(self) -> float:
        """When it may be tried again, with a small share."""
        return self._until

    def _left(self, now: float) -> float:
        return self._failures * math.exp2(min(0.0, self._at - now) / _FAILURES_HALVE_S)

"""New workers take over from those that serve, without a connect refused or a request lost: how far that has come.

    STARTING  the new ones start beside the old, on the same sockets and whatever else is to be listened on
    SETTLING  all are ready, and have a moment to fail in
    done      the old ones retire: they accept no more, and keep their connections until these end or their time is over
    failed    one of the new ones ended, or was not ready in time: the new ones go, and nothing has changed

The supervisor starts, watches and ends processes; here is what is known of one such change. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proxy.binding import Bindings
from proxy.children import Place
from proxy.process import ServePlan

START_S = 30.0  # from the fork to the word of the last new worker that it serves
SETTLE_S = 0.5  # and this long they must live before the old ones go

Done = Callable[[list[str]], None]  # called once: with why it failed, or with nothing


@dataclass(slots=True)
class Turnover:
    """One change of workers under way."""

    plan: ServePlan
    bindings: Bindings
    places: list[Place]
    deadline: float
    done: Done
    fault: str = ""
    settled_at: float | None = None

    def judge(self, now: float) -> bool | None:
        """True: the old ones may go. False: it has failed, see `fault`. None: wait."""
        if self.fault:
            return False
        if all(place.child is not None and place.child.ready for place in self.places):
            if self.settled_at is None:
                self.settled_at = now + SETTLE_S
            return True if now >= self.settled_at else None
        if now >= self.deadline:
            late = [place.name for place in self.places if place.child is None or not place.child.ready]
            self.fault = f"{', '.join(late)} did not become ready within {START_S:g} s"
            return False
        return None

    @property
    def due_at(self) -> float:
        """When to judge again, if nothing happens before."""
        return self.deadline if self.settled_at is None else self.settled_at


def free_rows(number: int, rows: int, taken: Iterable[int]) -> list[int]:
    """The lowest rows that no worker has; fewer than asked for if there are not so many."""
    used = set(taken)
    return [row for row in range(rows) if row not in used][:number]

"""Which of the running machines gets a request (spec routing §5.1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    @property
    def slot(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def choose_machine(
    candidates: Sequence[C], in_flight: Callable[[int], int], soft_limit: int, rng: random.Random
) -> C | None:
    """Pick one of `candidates` (running, not cordoned), or None if there is none.

    Those below `soft_limit` go before those at or above it; among equals a draw from `rng`. Load decides by band, not
    by count (Fly docs, "Concurrency").
    """
    if not candidates:
        return None
    if len(candidates) == 1:
        return candidates[0]
    below = [one for one in candidates if in_flight(one.slot) < soft_limit]
    return rng.choice(below or candidates)

"""When a certificate is due, and when what failed is tried again. Pure: times are unix seconds, chance an argument."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from certs.errors import Failure

_DAY_S = 86_400.0
_HOUR_S = 3600.0
SHORT_LIFE_S = 10 * _DAY_S  # a life as short as this is renewed at its half, as its CAs ask
_JITTER = 1 / 60  # of the life: 36 h of 90 days


@dataclass(frozen=True, slots=True)
class RenewalWindow:
    """What the CA suggests (RFC 9773 §4.2)."""

    begins_at: float
    ends_at: float
    explanation: str = ""


def due_at(valid_from: float, expires_at: float, window: RenewalWindow | None, identity: str) -> float:
    """The moment to renew.

    With the CA's window, a moment in it; else at two thirds of the life (half, if it is short), less some jitter. The
    place within is drawn from `identity` (name and serial), so that it is the same whenever it is asked for and spread
    over names. Never later than an hour before the end, whatever the CA says.
    """
    draw = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) / 2**64
    life = expires_at - valid_from
    if window is not None and window.begins_at < window.ends_at:
        due = window.begins_at + (window.ends_at - window.begins_at) * draw
    else:
        share = 0.5 if life <= SHORT_LIFE_S else 2 / 3
        due = valid_from + life * (share - _JITTER * draw)
    return min(due, expires_at - min(_HOUR_S, life / 10))


# Seconds after the first, second, ... failure in a row; the last stands for all after it.
_BACK_OFF: dict[Failure, tuple[float, ...]] = {
    Failure.NETWORK: (5, 15, 30, 60, 120, 300, 600, 1800),
    Failure.SERVER: (10, 30, 60, 300, 600, 1800, 3600),
    Failure.RATE_LIMITED: (3600, 3 * 3600, 6 * 3600, 12 * 3600, _DAY_S),
    # a CA permits five failed validations an hour and name (Let's Encrypt): this makes three in the first
    Failure.VALIDATION: (300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600, _DAY_S),
    Failure.REFUSED: (6 * 3600, _DAY_S),
    Failure.ACCOUNT: (5, 300, 3600, 6 * 3600),
    Failure.STUCK: (60, 300, 900, 3600),
    Failure.WRONG_CERTIFICATE: (60, 3600, 6 * 3600, _DAY_S),
    Failure.DNS_HOOK: (30, 60, 300, 900, 3600),
    # a look at DNS costs nobody but us: often while somebody may be waiting, then seldom
    Failure.NOT_POINTED: (2,) * 60 + (10,) * 60 + (60,) * 120 + (600,) * 144 + (3600,),
    Failure.STORAGE: (10, 30, 60, 300, 600),
}
_SPREAD = 0.2  # of the wait: names that failed together do not come back together


def retry_at(failure: Failure, in_a_row: int, retry_after_s: float, now: float, rng: random.Random) -> float:
    """When to try again after `in_a_row` failures of this kind, the one just now counted. What the CA asks is kept."""
    table = _BACK_OFF[failure]
    wait = float(table[min(in_a_row, len(table)) - 1])
    if retry_after_s > 0:
        wait = max(wait if failure is not Failure.RATE_LIMITED else 0.0, min(retry_after_s, 7 * _DAY_S))
    return now + wait * (1 + _SPREAD * rng.random())

"""What may be asked of a CA, kept below its own limits, so that no name is shut out because of others.

Counts lie in a store, one record an event, and are read back at the start. Pure beside that: `now` is unix seconds.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import logging
import os
import threading
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from certs.errors import AcmeError, CertificateError, Failure
from certs.names import registered_domain
from certs.store import Store

_log = logging.getLogger("wakefront.certs")

_HOUR_S = 3600
_WEEK_S = 7 * 24 * _HOUR_S


class Event(enum.StrEnum):
    ORDER = "order"  # counted by account
    CERTIFICATE = "certificate"  # by registered domain
    DUPLICATE = "duplicate"  # by the very set of names
    FAILED_VALIDATION = "failed"  # by name


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `events` in `window_s`."""

    events: int
    window_s: int


# Let's Encrypt's, "Rate Limits" in its documentation: 300 orders in 3 hours, 50 certificates a registered domain and 5
# a set of names in a week, 5 failed validations an hour. Ours are a fifth and more below.
LETS_ENCRYPT = {
    Event.ORDER: Limit(240, 3 * _HOUR_S),
    Event.CERTIFICATE: Limit(40, _WEEK_S),
    Event.DUPLICATE: Limit(4, _WEEK_S),
    Event.FAILED_VALIDATION: Limit(3, _HOUR_S),
}
# Of a CA whose limits we do not know: those that keep us from doing foolish things over and over.
OTHERS = {
    Event.DUPLICATE: Limit(20, _WEEK_S),
    Event.FAILED_VALIDATION: Limit(10, _HOUR_S),
}
_LONGEST_S = _WEEK_S
_UNDER_WAY_S = 10.0
_PRUNE_EVERY = 256  # counted events
ON_DEMAND_SHARE = 0.5  # of the orders: names that strangers ask for leave the other half to those that were added


def limits_of(directory_url: str) -> dict[Event, Limit]:
    host = urlsplit(directory_url).hostname or ""
    return LETS_ENCRYPT if host == "letsencrypt.org" or host.endswith(".letsencrypt.org") else OTHERS


class Budget:
    """Counts what was asked of one CA. `load` it; its methods block for a write each, so call them in a thread."""

    def __init__(self, store: Store, now: Callable[[], float], limits: dict[Event, Limit]) -> None:
        self._store = store
        self._now = now
        self._limits = limits
        self._spent: dict[tuple[Event, str], list[float]] = {}
        self._lock = threading.Lock()  # of `_spent`; never held over a write
        self._spends = 0
        self._held: Counter[tuple[Event, str]] = Counter()  # of orders under way

    def load(self) -> None:
        """Read what was counted; what no window reaches any more is deleted."""
        oldest = self._now() - _LONGEST_S
        stale: list[str] = []
        for key, entry in self._store.items("spent", lambda key, error: stale.append(key)):
            kind, _, subject = entry.value.decode().partition(" ")
            at = _time_of(key)
            if at < oldest or kind not in set(Event):
                stale.append(key)
            elif Event(kind) in self._limits:
                insort(self._spent.setdefault((Event(kind), subject), []), at)
        for key in stale:
            self._store.delete(key)

    def spend(self, event: Event, subject: str) -> None:
        """Count it. Raises OSError where that cannot be kept."""
        now = self._now()
        if event not in self._limits:
            return
        self._store.put(f"spent/{int(now * 1000):014d}-{os.urandom(4).hex()}", f"{event} {subject}".encode())
        with self._lock:
            insort(self._spent.setdefault((event, subject), []), now)
            self._spends += 1
            is_time = self._spends % _PRUNE_EVERY == 0
        if is_time:
            try:
                self._prune(now)
            except (CertificateError, OSError) as error:  # this event is counted: it is no failure of its order
                _log.warning("what was counted of orders long ago cannot be removed: %s", error)

    def _prune(self, now: float) -> None:
        """Forget what no window reaches any more, here and in the store."""
        for key in list(self._spent):
            with self._lock:
                if not self._within(key, now):
                    del self._spent[key]
        stale: list[str] = []
        for name, _ in self._store.items("spent", lambda name, error: stale.append(name)):
            if _time_of(name) >= now - _LONGEST_S:
                break  # they come in the order of time
            stale.append(name)
        for name in stale:
            self._store.delete(name)

    def _within(self, key: tuple[Event, str], now: float) -> list[float]:
        """The times that its window reaches, oldest first."""
        spent = self._spent.get(key, [])
        del spent[: bisect_right(spent, now - self._limits[key[0]].window_s)]
        return spent

    def free_at(self, event: Event, subject: str, share: float = 1.0) -> float:
        """When one more is within the limit: `now` or earlier if it is at once."""
        limit = self._limits.get(event)
        if limit is None:
            return 0.0
        now = self._now()
        allowed = max(1, int(limit.events * share)) - max(0, self._held[event, subject])
        if allowed <= 0:
            return now + _UNDER_WAY_S  # some of those under way may come to nothing
        with self._lock:
            spent = self._within((event, subject), now)
            return spent[-allowed] + limit.window_s if len(spent) >= allowed else 0.0

    @contextlib.contextmanager
    def hold(self, names: Sequence[str], *, is_renewal: bool, is_on_demand: bool) -> Iterator[None]:
        """`check`, and count the order as long as it is under way: others at the same time are checked against it too.

        What comes of it is to be spent within.
        """
        self.check(names, is_renewal=is_renewal, is_on_demand=is_on_demand)
        held = [(Event.ORDER, ""), (Event.DUPLICATE, set_of(names))]
        held += [(Event.CERTIFICATE, domain) for domain in {registered_domain(name) for name in names}]
        self._held.update(held)
        try:
            yield
        finally:
            self._held.subtract(held)

    def check(self, names: Sequence[str], *, is_renewal: bool, is_on_demand: bool) -> None:
        """Raise AcmeError(RATE_LIMITED), with the time to wait, if an order for these names is beyond a limit.

        A renewal that names what it replaces is exempt from all but failures (RFC 9773 §5, Let's Encrypt's docs).
        """
        share = ON_DEMAND_SHARE if is_on_demand else 1.0
        checks = [(Event.FAILED_VALIDATION, name, 1.0, f"failed validations of {name}") for name in names]
        if not is_renewal:
            checks.append((Event.ORDER, "", share, "orders"))
            checks.append((Event.DUPLICATE, set_of(names), 1.0, f"certificates for {', '.join(names)}"))
            checks += [
                (Event.CERTIFICATE, domain, share, f"certificates below {domain}")
                for domain in {registered_domain(name) for name in names}
            ]
        now = self._now()
        for event, subject, part, what in checks:
            at = self.free_at(event, subject, part)
            if at > now:
                limit = self._limits[event]
                raise AcmeError(
                    Failure.RATE_LIMITED,
                    f"our own limit, kept below the CA's, is reached: {max(1, int(limit.events * part))} {what} "
                    f"in {limit.window_s // _HOUR_S} h",
                    retry_after_s=at - now,
                )


def _time_of(key: str) -> float:
    return float(key.split("/")[1].split("-")[0]) / 1000


def set_of(names: Sequence[str]) -> str:
    """A short name for a set of names."""
    return hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:32]

"""Whether a certificate may be made for a name that nobody has added: rules, and how many new names are let in.

Pure: `now` is monotonic seconds. Who is asked, and what comes of it, is control/on_demand.py's. A client that invents
names (attack A17) costs one question a name, and no more of them than the bucket of its registered domain lets in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

_MOST_NAMES = 20_000
_MOST_DOMAINS = 10_000


def is_allowed(name: str, rules: Sequence[str]) -> bool:
    """Whether a rule permits it: the name itself, or `*.suffix` for whatever is below the suffix."""
    return any(name == rule or (rule.startswith("*.") and name.endswith(rule[1:])) for rule in rules)


class Answers:
    """What was said of names, each for a while: why one is refused, or whose it is. The oldest make room."""

    def __init__(self, most: int = _MOST_NAMES) -> None:
        self._most = most
        self._until: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def add(self, name: str, said: str, until: float) -> None:
        self._until[name] = until, said
        self._until.move_to_end(name)
        if len(self._until) > self._most:
            self._until.popitem(last=False)

    def of(self, name: str, now: float) -> str | None:
        """What was said, while that holds."""
        found = self._until.get(name)
        if found is None:
            return None
        if now >= found[0]:
            del self._until[name]
            return None
        return found[1]

    def forget(self, name: str) -> None:
        self._until.pop(name, None)


class NameBuckets:
    """New names by registered domain: `burst` at once, then `per_hour`."""

    def __init__(self, most: int = _MOST_DOMAINS) -> None:
        self._most = most
        self._filled: OrderedDict[str, tuple[float, float]] = OrderedDict()  # domain -> names left, when counted

    def has_room(self, domain: str, burst: int, per_hour: float, now: float) -> bool:
        """Whether `take` would take one now."""
        return self._left(domain, burst, per_hour, now) >= 1.0

    def take(self, domain: str, burst: int, per_hour: float, now: float) -> bool:
        """Whether there is room for one more name of this domain; it is taken."""
        left = self._left(domain, burst, per_hour, now)
        if left < 1.0:
            self._filled[domain] = left, now
            return False
        self._filled[domain] = left - 1.0, now
        self._filled.move_to_end(domain)
        if len(self._filled) > self._most:
            self._filled.popitem(last=False)
        return True

    def _left(self, domain: str, burst: int, per_hour: float, now: float) -> float:
        left, at = self._filled.get(domain, (float(burst), now))
        return min(float(burst), left + (now - at) * per_hour / 3600.0)

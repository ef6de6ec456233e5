"""What is remembered of machines between requests: response times, the load they report, failures. All of it fades.

Values of one worker, kept without locks; `now` is monotonic seconds, given by the caller. What follows from them is
decided in balance.py. How health checks judge a machine is health.py's.
"""

from __future__ import annotations

import math
import re

LOAD_HEADER = b"wakefront-machine-load"  # ours, so that no name of Fly's is taken; not passed on to clients
LOAD_MAX_BYTES = 16
LOAD_TTL_S = 10.0

FADE_S = 10.0  # time constant of response times: what is left of a peak is a third after it, 2 % after four times that
FIRST_GUESS_S = 0.001  # of a machine that has answered nothing yet: it is to be tried
_LEAST_S = 0.000_01  # what a peak fades to: below any real answer, so that a slow machine is tried again in the end
_FAILURE_S = 1.0  # a failure counts as an answer of this long, or twice what was expected, whichever is more
_FAILURE_MAX_S = 60.0

_STRIKES = 3.0  # failures within a few seconds from which on a machine is avoided
_STRIKES_MAX = 8.0
_STRIKES_HALVE_S = 10.0
_AVOID_S = 1.0
_AVOID_MAX_S = 30.0
_ALMOST = 0.5  # strikes that fell due within seconds of one another are not quite whole any more

_LOAD = re.compile(rb"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\Z")


class PeakEwma:
    """A moving average of response times that a slower answer raises at once and faster ones lower bit by bit.

    So a machine that turns slow is noticed by its first slow answer, and one that is not asked any more is forgiven as
    time goes by (after Twitter's Finagle, "Peak EWMA"). A constant rate of answers is not assumed: weight follows time.
    """

    __slots__ = ("_at", "_seconds")

    def __init__(self) -> None:
        self._seconds = FIRST_GUESS_S
        self._at = -math.inf  # never yet

    def observe(self, now: float, seconds: float) -> None:
        """An answer took this long."""
        if seconds < self._seconds:
            kept = math.exp(min(0.0, self._at - now) / FADE_S)
            seconds += (self._seconds - seconds) * kept
        self._seconds = seconds
        self._at = now

    def observe_error(self, now: float, seconds: float) -> None:
        """An answer of status 5xx took this long. A machine that fails fast must not draw requests off those that work.

        So it counts as twice as slow as was expected, up to the time that a failure counts for.
        """
        self.observe(now, max(seconds, min(_FAILURE_S, 2.0 * self.score(now))))

    def observe_failure(self, now: float) -> None:
        """A connection failed, or ended without an answer. It may have been quick: that must not look like speed."""
        self.observe(now, min(_FAILURE_MAX_S, max(_FAILURE_S, 2.0 * self.score(now))))

    def score(self, now: float) -> float:
        """Seconds that the next answer is expected to take."""
        if self._at == -math.inf:
            return self._seconds
        faded = self._seconds * math.exp(min(0.0, self._at - now) / FADE_S)
        return faded if faded > _LEAST_S else _LEAST_S


class AppLoad:
    """The load that an app last reported of itself, for as long as that is news."""

    __slots__ = ("_at", "_load")

    def __init__(self) -> None:
        self._load = 0.0
        self._at = -math.inf

    def report(self, now: float, load: float) -> None:
        self._load = load
        self._at = now

    def value(self, now: float) -> float | None:
        return self._load if now - self._at < LOAD_TTL_S else None


def parse_load(value: bytes) -> float | None:
    """A reported load: a decimal number of 0 or more, at most 16 bytes, usually up to 1. Else None: it is ignored."""
    value = value.strip(b" \t")
    if len(value) > LOAD_MAX_BYTES or _LOAD.match(value) is None:
        return None
    return float(value)


class MachineScores:
    """All of a worker's PeakEwma and AppLoad by machine slot: what balance.Scores asks for."""

    __slots__ = ("_latencies", "_loads")

    def __init__(self) -> None:
        self._latencies: dict[int, PeakEwma] = {}
        self._loads: dict[int, AppLoad] = {}

    def observe(self, slot: int, now: float, seconds: float) -> None:
        self._latency(slot).observe(now, seconds)

    def observe_error(self, slot: int, now: float, seconds: float) -> None:
        self._latency(slot).observe_error(now, seconds)

    def observe_failure(self, slot: int, now: float) -> None:
        self._latency(slot).observe_failure(now)

    def report(self, slot: int, now: float, value: bytes) -> None:
        """Take the value of a LOAD_HEADER; what is no load changes nothing."""
        load = parse_load(value)
        if load is not None:
            known = self._loads.get(slot)
            if known is None:
                known = self._loads[slot] = AppLoad()
            known.report(now, load)

    def forget(self, slot: int) -> None:
        """The machine stopped or is gone: what comes next in its slot starts anew."""
        self._latencies.pop(slot, None)
        self._loads.pop(slot, None)

    def response_time(self, slot: int, now: float) -> float:
        known = self._latencies.get(slot)
        return known.score(now) if known is not None else FIRST_GUESS_S

    def reported_load(self, slot: int, now: float) -> float | None:
        known = self._loads.get(slot)
        return known.value(now) if known is not None else None

    def _latency(self, slot: int) -> PeakEwma:
        known = self._latencies.get(slot)
        if known is None:
            known = self._latencies[slot] = PeakEwma()
        return known


class PassiveHealth:
    """Failures of a machine as requests meet them: after three at short intervals it is avoided, for 1, 2, 4 ... 30 s.

        fine --failed, failed, failed--> avoided --time--> on trial --failed--> avoided for twice as long
          ^                                                   |
          +-------------------- time, or successes -----------+

    Strikes halve every 10 s, but not while the machine is avoided: it had no occasion to do better. A success halves
    them too. Whether an avoided machine is chosen all the same, since there is no other, is the caller's to decide.
    """

    __slots__ = ("_at", "_strikes", "avoided_until")

    def __init__(self) -> None:
        self._strikes = 0.0
        self._at = -math.inf
        self.avoided_until = -math.inf

    def failed(self, now: float) -> None:
        """A request could not be delivered there, or got no answer.

        While the machine is avoided these are requests that began before: they tell nothing new, and lengthen nothing.
        """
        if now < self.avoided_until:
            return
        self._set(now, min(_STRIKES_MAX, self._left(now) + 1.0))
        if self._strikes > _STRIKES - _ALMOST:
            # A trial that fails doubles the last term: the count of whole strikes past the third says which it is.
            trials = round(self._strikes - _STRIKES)
            self.avoided_until = now + min(_AVOID_MAX_S, _AVOID_S * 2.0 ** max(0, trials))

    def succeeded(self, now: float) -> None:
        if self._strikes:
            self._set(now, self._left(now) / 2.0)

    def is_avoided(self, now: float) -> bool:
        return now < self.avoided_until

    def _left(self, now: float) -> float:
        since = now - max(self._at, self.avoided_until)
        return self._strikes * 0.5 ** (since / _STRIKES_HALVE_S) if since > 0.0 else self._strikes

    def _set(self, now: float, strikes: float) -> None:
        self._strikes = strikes
        self._at = now

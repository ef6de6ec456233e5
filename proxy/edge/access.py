"""An app's access rules at work in one worker: which sources are let in, and how much each may do.

`access_gate` gives no gate for open rules, so that they cost a test for None. The gate answers with errors; sending
them, and calling `leave` for every `enter`, are the callers'.

What holds where: networks and the largest body hold as written. Rates are divided by the number of workers, since the
kernel spreads a source's connections over them: all together keep the figure, and a source with a single connection
gets one worker's share of it. The burst stays whole in each worker, and so does the number of connections, since a
browser's six may well meet in one.
"""

from __future__ import annotations

import math

from proxy.decide.access import Networks, SourceBuckets, source_key
from proxy.errors import Code, ProxyError, Source
from proxy.model import AccessRules

HANDSHAKES_BURST = 10.0  # a browser begins half a dozen at once
RETRY_AFTER_MAX_S = 3600


def access_gate(rules: AccessRules, workers: int, old: AccessGate | None = None) -> AccessGate | None:
    """The gate for an app's rules, None if they are open. `old`: the one of the app's record before this.

    Rules that did not change keep their gate, with all it has counted; else the new gate goes on counting the
    connections that are open, and rates begin afresh. Raises ValueError for a network that is none.
    """
    if rules.is_open:
        return None
    if old is not None and old.rules == rules and old.workers == workers:
        return old
    return AccessGate(rules, workers, old)


class AccessGate:
    """The rules of one app, and what its sources have used of them in this worker."""

    __slots__ = (
        "_allow", "_connections_max", "_deny", "_handshakes", "_max_body_bytes", "_open", "_requests", "rules",
        "workers",
    )  # fmt: skip

    def __init__(self, rules: AccessRules, workers: int, old: AccessGate | None = None) -> None:
        if workers < 1:
            raise ValueError(f"expected at least one worker: {workers}")
        self.rules = rules
        self.workers = workers
        self._allow = Networks(rules.allow) if rules.allow else None
        self._deny = Networks(rules.deny) if rules.deny else None
        self._requests: SourceBuckets | None = None
        if rules.requests_per_s is not None:
            self._requests = SourceBuckets(rules.requests_per_s / workers, float(rules.requests_burst))
        self._handshakes: SourceBuckets | None = None
        if rules.handshakes_per_s is not None:
            burst = max(HANDSHAKES_BURST, rules.handshakes_per_s)
            self._handshakes = SourceBuckets(rules.handshakes_per_s / workers, burst)
        self._connections_max = rules.connections
        self._max_body_bytes = rules.max_body_bytes
        # as many entries as there are connections at most; an earlier gate's connections leave through the same
        self._open: dict[str | int, int] = old._open if old is not None else {}

    def denies(self, source: str) -> bool:
        """Whether the lists exclude a source. What is no address is excluded by every list: nobody vouches for it."""
        deny, allow = self._deny, self._allow
        if deny is not None and deny.find(source) is not False:
            return True
        return allow is not None and not allow.contains(source)

    def admit(self, source: str, content_length: int, now: float) -> ProxyError | None:
        """Judge a request before anything is done for it; None lets it in and counts it.

        `content_length`: as announced, negative if it is not (then `body_over` is asked as the body comes).
        """
        if (self._deny is not None or self._allow is not None) and self.denies(source):
            return _denied(source)
        if self._requests is not None:
            seconds = self._requests.take(source, now)
            if seconds is not None:
                return ProxyError(
                    Code.SOURCE_REQUESTS, Source.DOWNSTREAM,
                    detail=f"{source} is over {self.rules.requests_per_s:g} requests/s", retry_after_s=_whole(seconds),
                )  # fmt: skip
        if self.body_over(content_length):
            return self.body_error(content_length)
        return None

    def body_over(self, seen_bytes: int) -> bool:
        """Whether a body of which this much has come is larger than allowed."""
        return self._max_body_bytes is not None and seen_bytes > self._max_body_bytes

    def body_error(self, seen_bytes: int) -> ProxyError:
        """What to answer when `body_over` is true."""
        return ProxyError(
            Code.BODY_TOO_LARGE, Source.DOWNSTREAM,
            detail=f"expected at most {self._max_body_bytes} bytes, announced or seen: {seen_bytes}",
        )  # fmt: skip

    def enter(self, source: str) -> ProxyError | None:
        """Count a connection that turns out to be for this app. None: it is counted, and `leave` must follow."""
        if self.denies(source):
            return _denied(source)
        limit = self._connections_max
        if limit is None:
            return None
        key = source_key(source)
        count = self._open.get(key, 0)
        if count >= limit:
            return ProxyError(
                Code.SOURCE_CONNECTIONS, Source.DOWNSTREAM,
                detail=f"{source} has {count} connections open of {limit}", retry_after_s=1,
            )  # fmt: skip
        self._open[key] = count + 1
        return None

    def leave(self, source: str) -> None:
        """A connection has ended that this gate let in. Call it on the gate that was entered, not on a newer one."""
        if self._connections_max is None:
            return
        key = source_key(source)
        count = self._open.pop(key, 0)
        if count > 1:
            self._open[key] = count - 1

    def handshake(self, source: str, now: float) -> bool:
        """Whether `source` may begin another TLS handshake for the app's names. False: PT01."""
        return self._handshakes is None or self._handshakes.take(source, now) is None


def _denied(source: str) -> ProxyError:
    return ProxyError(Code.ACCESS_DENIED, Source.DOWNSTREAM, detail=f"the access rules exclude {source!r}")


def _whole(seconds: float) -> int:
    return max(1, math.ceil(min(seconds, RETRY_AFTER_MAX_S)))

"""What one source address may have of this worker, over all apps and ports: connections, connects and handshakes.

It keeps a single source from taking what is there for all; what an app allows its own clients is edge/access.py's.
Connections count in each worker, as `max_connections` does: one source may have `source_connections` of them, a quarter
of all by default. Rates hold for the node and are divided by its workers, over which the kernel spreads a source's
connections. Who is over is refused at the cheapest place: at accept, before a byte is read or a record decrypted;
handshakes, at the ClientHello. Nothing is done for a request.

Bounds: as many counted sources as there are connections; `SOURCES_MAX` rates, of which the one unused longest is
forgotten first (it is full again by then, or its flood is being refused and so in use).
"""

from __future__ import annotations

import logging
import sys

from proxy.clock import monotonic
from proxy.decide.access import Networks, SourceBuckets, source_key
from proxy.ipc import Settings

DEFAULT_SHARE = 4  # one source may have a quarter of a worker's connections
LEAST_DEFAULT = 64
TOLD_EVERY_S = 10.0

log = logging.getLogger("sources")


class Sources:
    """Counted by the listeners of one worker."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._open: dict[str | int, int] = {}
        self._connects: SourceBuckets | None = None
        self._handshakes: SourceBuckets | None = None
        self._exempt = Networks(())
        self._settings: tuple[object, ...] = ()
        self._most = sys.maxsize  # until settings come
        self._handed_on = ""
        self._refused = 0
        self._told_at = float("-inf")

    def apply(self, settings: Settings, connections: int) -> None:
        """Take new settings; `connections` is what the worker may have in all."""
        self._most = settings.source_connections or max(LEAST_DEFAULT, connections // DEFAULT_SHARE)
        known = (settings.source_connects_s, settings.source_handshakes_s, settings.exempt_sources)
        if known == self._settings:
            return
        self._settings = known
        self._exempt = Networks(settings.exempt_sources)
        self._connects = self._buckets(settings.source_connects_s)
        self._handshakes = self._buckets(settings.source_handshakes_s)

    def _buckets(self, rate_s: float) -> SourceBuckets | None:
        """A second's worth may come at once to one worker; 0 sets no limit."""
        return SourceBuckets(rate_s / self._workers, max(1.0, rate_s)) if rate_s else None

    def enter(self, source: str) -> bool:
        """Count a connection; whether the source may have it. `leave` must follow in any case."""
        if self._handed_on == source:
            self._handed_on = ""
            return True
        key = source_key(source)
        count = self._open.get(key, 0) + 1
        self._open[key] = count
        connects = self._connects
        if count <= self._most and connects is None:
            return True
        if self._exempt and self._exempt.contains(source):
            return True
        if count > self._most:
            self._tell(source, f"{count - 1} connections are open, of {self._most} ([limits] source_connections)")
            return False
        if connects is not None and connects.take(source, monotonic()) is not None:
            self._tell(source, f"it connects more than {self._settings[0]:g} times a second ([limits] source_connects)")
            return False
        return True

    def hand_on(self, source: str) -> None:
        """The next to enter, within this call, has the connection of one that did."""
        self._handed_on = source

    def leave(self, source: str) -> None:
        key = source_key(source)
        count = self._open.pop(key, 0)
        if count > 1:
            self._open[key] = count - 1

    def may_shake_hands(self, source: str) -> bool:
        """Whether a source may begin another TLS handshake."""
        buckets = self._handshakes
        if buckets is None or (self._exempt and self._exempt.contains(source)):
            return True
        return buckets.take(source, monotonic()) is None

    def __len__(self) -> int:
        return len(self._open)

    def _tell(self, source: str, why: str) -> None:
        """One line in `TOLD_EVERY_S`, however many are refused."""
        self._refused += 1
        now = monotonic()
        if now - self._told_at >= TOLD_EVERY_S:
            log.warning("%d connections refused, the last of %s: %s", self._refused, source, why)
            self._refused, self._told_at = 0, now

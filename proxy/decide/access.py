"""Who may ask, how often, and what wakes nothing: networks, token buckets per source, and wake rules.

Values only: which address a connection has, which error is sent and when a limit applies are the edge's
(`edge/access.py`). Sources are addresses as text. Everything kept per source is bounded, and the least recently used
goes first: a forgotten source starts with a full bucket, so that a crowd of addresses costs memory of a fixed size
and never refuses anyone who is within the limit.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from fnmatch import translate
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from proxy.model import WakeRules

SOURCES_MAX = 4096
SLACK_S = 1e-6  # who waits as long as it was told to is let in, whatever rounding did

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# --- addresses and networks


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[int, int]:
    """Version and number; an IPv4 address written in IPv6 (::ffff:a.b.c.d) is the IPv4 address."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (4, int(mapped)) if mapped is not None else (address.version, int(address))


@lru_cache(SOURCES_MAX)
def source_key(source: str) -> str | int:
    """What limits count as one source: an IPv4 address, an IPv6 /64 (one customer has at least that), else the text."""
    if ":" not in source:
        return source
    try:
        version, number = _plain(ipaddress.IPv6Address(source))
    except ValueError:
        return source
    return str(ipaddress.IPv4Address(number)) if version == 4 else number >> 64


def network_fault(text: str) -> str | None:
    """What is wrong with a network in CIDR notation, as a message about the value; None if nothing is."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return f'expected an address or a network such as "192.0.2.0/24" or "2001:db8::/32": {text!r} is neither'
    if "%" in text:
        return f"expected a network without a zone: {text!r}"
    address = ipaddress.ip_address(text.partition("/")[0])
    if address != network.network_address:
        return f'{text!r} has bits beyond its prefix: "{network}" is the network, "{address}" the one address'
    return None


def parse_networks(text: str) -> tuple[list[str], list[tuple[int, str]]]:
    """Read a list of networks, one a line, `#` starting a comment: (networks, [(line, what is wrong with it)])."""
    networks: list[str] = []
    faults: list[tuple[int, str]] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        fault = network_fault(entry)
        if fault is not None:
            faults.append((number, fault))
        else:
            networks.append(entry)
    return networks, faults


class Networks:
    """A set of networks, compiled: one dictionary look-up for each prefix length that occurs.

    An IPv4 address written in IPv6 counts as IPv4, in networks and in addresses alike; so `::/0` is all of IPv6 and
    none of IPv4. Answers are remembered for a bounded number of addresses (measured: 0.1 us known, 3 to 5 us new).
    """

    __slots__ = ("_by_version", "_known")

    def __init__(self, networks: Iterable[str]) -> None:
        """Raises ValueError for a text that is no network: `network_fault` says what is wrong with it."""
        lengths: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for text in networks:
            version, shift, prefix = _compiled(ipaddress.ip_network(text, strict=False))
            lengths[version].setdefault(shift, set()).add(prefix)
        # the widest first: it is the likeliest to hold an address
        self._by_version = {
            version: tuple((shift, frozenset(found[shift])) for shift in sorted(found, reverse=True))
            for version, found in lengths.items()
        }
        self._known: dict[str, bool | None] = {}

    def __bool__(self) -> bool:
        return any(self._by_version.values())

    def contains(self, source: str) -> bool:
        """Whether an address is in one of the networks. A text that is no address is in none."""
        return self.find(source) is True

    def find(self, source: str) -> bool | None:
        """As `contains`, with None for a text that is no address, for callers who must then refuse."""
        if source in self._known:
            return self._known[source]
        answer = self._look_up(source)
        if len(self._known) >= SOURCES_MAX:
            self._known.clear()
        self._known[source] = answer
        return answer

    def _look_up(self, source: str) -> bool | None:
        try:
            version, number = _plain(ipaddress.ip_address(source))
        except ValueError:
            return None
        return any(number >> shift in prefixes for shift, prefixes in self._by_version[version])


def _compiled(network: _Network) -> tuple[int, int, int]:
    """Version, bits to shift away, and what is then left of every address in the network."""
    version, number = _plain(network.network_address)
    shift = network.max_prefixlen - network.prefixlen
    if version == 4 and shift > 32:  # ::ffff:0:0 with a prefix wider than all of IPv4: an ordinary network of IPv6
        version, number = 6, int(network.network_address)
    return version, shift, number >> shift


# --- rates


class Bucket:
    """A token bucket, kept as the moment at which it is full again: one float, and no loss by adding up."""

    __slots__ = ("_full_at", "_rate")

    def __init__(self, rate_s: float, burst: float | None = None) -> None:
        self._rate = _Rate(rate_s, burst)
        self._full_at = -math.inf

    def wait(self, now: float) -> float:
        """Seconds until one may be taken; 0 if now, infinity if never."""
        return self._rate.wait(self._full_at, now)

    def spend(self, now: float) -> None:
        """Take one, which `wait` has allowed."""
        self._full_at = max(self._full_at, now) + self._rate.interval_s


class _Rate:
    """`rate_s` a second on average and `burst` at once; without a figure one second's worth, but at least one.

    A rate of zero or less allows nothing, ever.
    """

    __slots__ = ("interval_s", "tolerance_s")

    def __init__(self, rate_s: float, burst: float | None) -> None:
        self.interval_s = 0.0
        self.tolerance_s = -math.inf
        if rate_s > 0:
            self.interval_s = 1.0 / rate_s
            self.tolerance_s = (max(1.0, rate_s if burst is None else burst) - 1.0) * self.interval_s

    def wait(self, full_at: float, now: float) -> float:
        if self.tolerance_s < 0:
            return math.inf
        seconds = full_at - now - self.tolerance_s
        return seconds if seconds > SLACK_S else 0.0


class SourceBuckets:
    """A token bucket for each source, at most `sources_max` of them (measured: 0.6 us a take)."""

    __slots__ = ("_full_at", "_rate", "_sources_max")

    def __init__(self, rate_s: float, burst: float | None = None, sources_max: int = SOURCES_MAX) -> None:
        self._rate = _Rate(rate_s, burst)
        self._sources_max = sources_max
        self._full_at: OrderedDict[str | int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, source: str, now: float) -> float | None:
        """Take one for `source`: None if that is within its limit, else seconds until it will be."""
        key = source_key(source)
        seconds = self._wait(key, now)
        if seconds > 0:
            return seconds
        self._spend(key, now)
        return None

    def wait(self, source: str, now: float) -> float:
        """Seconds until `source` may take one; 0 if now, infinity if never. Takes nothing."""
        return self._wait(source_key(source), now)

    def spend(self, source: str, now: float) -> None:
        """Take one, which `wait` has allowed."""
        self._spend(source_key(source), now)

    def _wait(self, key: str | int, now: float) -> float:
        full_at = self._full_at.get(key)
        if full_at is None:
            return self._rate.wait(-math.inf, now)
        self._full_at.move_to_end(key)  # also when refused: who keeps asking is not to be forgotten
        return self._rate.wait(full_at, now)

    def _spend(self, key: str | int, now: float) -> None:
        sources = self._full_at
        sources[key] = max(sources.get(key, now), now) + self._rate.interval_s
        if len(sources) > self._sources_max:
            sources.popitem(last=False)


class StartBudget:
    """How many starts requests may cause: those of one source, and of all together. None sets no limit."""

    __slots__ = ("_all", "_sources")

    def __init__(self, per_source_s: float | None, all_s: float | None, sources_max: int = SOURCES_MAX) -> None:
        self._sources = SourceBuckets(per_source_s, sources_max=sources_max) if per_source_s is not None else None
        self._all = Bucket(all_s) if all_s is not None else None

    def take(self, source: str, now: float) -> float | None:
        """Count one more start on behalf of `source`: None if both budgets have it, else seconds until they will.

        A refused start counts in neither: one source over its budget leaves the others theirs.
        """
        mine, everyones = self._sources, self._all
        seconds = max(
            mine.wait(source, now) if mine is not None else 0.0, everyones.wait(now) if everyones is not None else 0.0
        )
        if seconds > 0:
            return seconds
        if mine is not None:
            mine.spend(source, now)
        if everyones is not None:
            everyones.spend(now)
        return None


# --- what wakes nothing

_GLOB = re.compile(r"[*?\[]")
_DOT_SEGMENT = re.compile(r"/\.{1,2}(?:/|$)")


def plain_path(target: bytes) -> str:
    """The path that a request target means: without query, percent-decoded once, without `//`, `.` and `..`.

    Bytes that are not UTF-8 become surrogates, so that no two paths become one.
    """
    path = unquote_to_bytes(target.partition(b"?")[0]).decode("utf-8", "surrogateescape")
    if "//" in path:
        path = re.sub("/{2,}", "/", path)
    return _without_dots(path) if _DOT_SEGMENT.search(path) else path


def _without_dots(path: str) -> str:
    """RFC 3986 §5.2.4: `..` above the root stays at the root."""
    kept: list[str] = []
    segments = path.split("/")
    for segment in segments[1:]:
        if segment == "..":
            kept[-1:] = []
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


class WakeFilter:
    """Requests that wake nothing, compiled from an app's wake rules.

    A path is compared in its plain form, so that `/%77p-login.php`, `//wp-login.php` and `/x/../wp-login.php` are
    what they mean. A rule can only leave an app asleep: who writes a path so that it slips by causes a start within
    the budgets, and harms nothing else. In a glob `*` also matches `/`, `?` is any one character, `[abc]` one of some.
    """

    __slots__ = ("_agents", "_exact", "_globs", "_methods", "_prefixes", "_sources", "is_empty")

    def __init__(self, rules: WakeRules) -> None:
        """Raises ValueError for a source that is no network."""
        self._methods = frozenset(method.upper().encode("utf-8", "replace") for method in rules.ignore_methods)
        self._agents = tuple(part.lower().encode("utf-8", "replace") for part in rules.ignore_agents if part)
        self._sources = Networks(rules.ignore_sources)
        globs = [glob for glob in rules.ignore_paths if glob]
        self._exact = frozenset(glob for glob in globs if not _GLOB.search(glob))
        self._prefixes = tuple(glob[:-1] for glob in globs if glob.endswith("*") and not _GLOB.search(glob[:-1]))
        simple = self._exact | {prefix + "*" for prefix in self._prefixes}
        self._globs = tuple((glob, re.compile(translate(glob)).match) for glob in globs if glob not in simple)
        self.is_empty = not (self._methods or self._agents or self._sources or globs)

    def ignores(self, method: bytes, path: bytes, agent: bytes, source: str) -> str | None:
        """Why a request wakes nothing, for the log; None if it may wake. `path` may carry its query."""
        if self.is_empty:
            return None
        if method in self._methods:
            return f"wake_rules ignore the method {method.decode('latin-1')}"
        if self.ignores_source(source):
            return f"wake_rules ignore the source {source}"
        if self._agents and agent:
            lower = agent.lower()
            for part in self._agents:
                if part in lower:
                    return f"wake_rules ignore agents with {part.decode('utf-8')!r}"
        return self._ignored_path(path)

    def ignores_source(self, source: str) -> bool:
        """The part that is known before there is a request: at a ClientHello, or of raw TCP."""
        return bool(self._sources) and self._sources.contains(source)

    def _ignored_path(self, target: bytes) -> str | None:
        if not (self._exact or self._prefixes or self._globs):
            return None
        path = plain_path(target)
        if path in self._exact:
            return f"wake_rules ignore the path {path!r}"
        if self._prefixes and path.startswith(self._prefixes):
            prefix = next(prefix for prefix in self._prefixes if path.startswith(prefix))
            return f"wake_rules ignore paths like {prefix + '*'!r}"
        for glob, match in self._globs:
            if match(path):
                return f"wake_rules ignore paths like {glob!r}"
        return None

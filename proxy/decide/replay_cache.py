"""Remembered replays: by path (as a machine orders) and by session (as fly.toml configures); spec routing §4.

One per worker, bounded in entries and bytes, the least recently used going first. An entry belongs to the app and the
host that the request named, and is found by requests to that host alone. It saves a detour and decides nothing new:
whether the remembered replay may still be followed is replay.judge's, where it leads the Exchange's.

Poisoning (somebody's request makes another's go elsewhere): only the app whose host it is may have a replay
remembered, of a request as the client sent it, so that no target can redirect its source's clients. Which requests
are alike, replay_key.py says.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import msgspec

from proxy.decide.replay import MIN_CACHE_TTL_S, Directive
from proxy.decide.replay_key import SessionKey, is_under, normal_path, split_pattern
from proxy.errors import Code, ProxyError, Source
from proxy.model import AppName

MAX_ENTRIES: Final = 16_384
MAX_BYTES: Final = 16 * 1024 * 1024
_ENTRY_BYTES = 900  # of an entry without its texts: key, record and its places in three tables


# --- what is found


_Key = tuple[AppName, str, bytes, SessionKey | None]  # app, host, prefix, session


class Found(msgspec.Struct, frozen=True):
    """An entry that fits a request."""

    directive: Directive
    key: _Key
    is_bypassed: bool = False  # the client skips it, and may: go to the source, and say `bypass` to its target


class _Entry:
    __slots__ = ("allow_bypass", "bytes", "directive", "expires")

    def __init__(self, directive: Directive, expires: float, allow_bypass: bool, size: int) -> None:
        self.directive = directive
        self.expires = expires
        self.allow_bypass = allow_bypass
        self.bytes = size


class _Host:
    """What is remembered for one host: the prefixes, and how long they are, longest first."""

    __slots__ = ("lengths", "ordered", "prefixes", "sessions")

    def __init__(self) -> None:
        self.prefixes: dict[bytes, _Key] = {}
        self.lengths: dict[int, int] = {}  # length -> how many prefixes have it
        self.ordered: tuple[int, ...] = ()
        self.sessions: dict[SessionKey, _Key] = {}

    def longest(self, path: bytes) -> _Key | None:
        for length in self.ordered:
            if len(path) == length or path[length : length + 1] == b"/":
                key = self.prefixes.get(path[:length])
                if key is not None:
                    return key
        return None

    def add(self, key: _Key) -> None:
        _, _, prefix, session = key
        if session is not None:
            self.sessions[session] = key
            return
        self.prefixes[prefix] = key
        length = len(prefix)
        self.lengths[length] = self.lengths.get(length, 0) + 1
        self._order()

    def remove(self, key: _Key) -> bool:
        """Whether something is left."""
        _, _, prefix, session = key
        if session is not None:
            del self.sessions[session]
        else:
            del self.prefixes[prefix]
            self.lengths[len(prefix)] -= 1
            if not self.lengths[len(prefix)]:
                del self.lengths[len(prefix)]
                self._order()
        return bool(self.prefixes or self.sessions)

    def _order(self) -> None:
        if len(self.lengths) != len(self.ordered):
            self.ordered = tuple(sorted(self.lengths, reverse=True))


class ReplayCache:
    """`now` is monotonic seconds. Hosts are as `RequestHead.host` has them, targets as `RequestHead.target`."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._apps: dict[AppName, dict[str, _Host]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def find(
        self, app: AppName, host: str, target: bytes, session: SessionKey | None, skips: bool, now: float
    ) -> Found | None:
        """The entry for a request, if there is one. An app without any costs one look-up in a dict.

        The longest prefix wins, whichever kind it is of; of two equal ones the session's, which says more of the
        request (choice; unknown at Fly). `skips`: the client sent `fly-replay-cache-control: skip`.
        """
        hosts = self._apps.get(app)
        if hosts is None:
            return None
        of = hosts.get(host)
        path = normal_path(target) if of is not None else None
        if of is None or path is None:
            return None
        while True:
            key = self._find(of, path, session)
            if key is None:
                return None
            entry = self._entries[key]
            if now < entry.expires:
                break
            self.drop(key)  # a shorter prefix may live longer
        if skips and entry.allow_bypass:
            return Found(entry.directive, key, is_bypassed=True)
        self._entries.move_to_end(key)
        return Found(entry.directive, key)

    @staticmethod
    def _find(of: _Host, path: bytes, session: SessionKey | None) -> _Key | None:
        key = of.longest(path)
        by_session = of.sessions.get(session) if session is not None else None
        if by_session is not None and (key is None or len(by_session[2]) >= len(key[2])):
            return by_session
        return key

    def note(
        self,
        app: AppName,
        host: str,
        target: bytes,
        session: SessionKey | None,
        directive: Directive,
        is_apps_own: bool,
        now: float,
    ) -> None:
        """Take note of a replay that is about to be followed: forget or remember, as it orders and as rules have it.

        `app`: whose host the request named. `is_apps_own`: a machine of that app answered, to the request as the client
        sent it. Others may have what led to them forgotten, and nothing remembered; that is no error, since at Fly too
        what comes of a second cached replay is undefined (spec routing §4.3).
        Raises ProxyError(REPLAY_INVALID) for a pattern that does not fit the request, or beside a replay that may not
        be remembered. A session's rule asks nothing of the single replay: what may not be remembered then just is not.
        """
        order = directive.cache
        if order is not None and order.invalidate:
            self.invalidate(app, host, target, session)
            return
        if not is_apps_own:
            return
        fault = why_not_kept(directive)
        if order is not None and order.prefix is not None:
            prefix = _fitting(order.prefix, host, target)
            if fault is not None:
                raise _invalid(fault)
            if prefix is not None:
                self._put((app, host, prefix, None), directive, order.ttl_s, order.allow_bypass, now)
        if session is not None and fault is None:
            ttl_s = max(MIN_CACHE_TTL_S, session.rule.ttl_s)
            self._put((app, host, session.prefix, session), directive, ttl_s, session.rule.allow_bypass, now)

    def _put(self, key: _Key, directive: Directive, ttl_s: int, allow_bypass: bool, now: float) -> None:
        self.drop(key)
        kept = directive if directive.cache is None else msgspec.structs.replace(directive, cache=None)
        size = _ENTRY_BYTES + len(key[1]) + len(key[2]) + sum(len(name) + 50 for name in kept.regions)
        if size > self._max_bytes or self._max_entries < 1:
            return
        app, host, _, _ = key
        self._entries[key] = _Entry(kept, now + ttl_s, allow_bypass, size)
        self._apps.setdefault(app, {}).setdefault(host, _Host()).add(key)
        self._bytes += size
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            self.drop(next(iter(self._entries)))

    def invalidate(self, app: AppName, host: str, target: bytes, session: SessionKey | None) -> int:
        """Forget what a request like this would find, by path and by session; how many entries that was.

        `app` is, as in `find`, the one whose host the request named. So a target can undo what led to it, and no more.
        """
        of = self._apps.get(app, {}).get(host)
        path = normal_path(target) if of is not None else None
        if of is None or path is None:
            return 0
        keys = (of.longest(path), of.sessions.get(session) if session is not None else None)
        return sum(self.drop(key) for key in keys if key is not None)

    def drop(self, key: _Key) -> bool:
        """Forget one entry, as when what it leads to cannot be reached (spec routing §4.3); whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._bytes -= entry.bytes
        app, host, _, _ = key
        hosts = self._apps[app]
        if not hosts[host].remove(key):
            del hosts[host]
            if not hosts:
                del self._apps[app]
        return True

    def forget_app(self, app: AppName) -> None:
        """An app is gone or was changed."""
        for host in list(self._apps.get(app, {}).values()):
            for key in (*host.prefixes.values(), *host.sessions.values()):
                self.drop(key)


def why_not_kept(directive: Directive) -> str | None:
    """What keeps a replay from being remembered (spec routing §4.3), or None."""
    if directive.state is not None:
        return "a replay with state"
    if directive.timeout_s is not None or directive.fallback is not None:
        return "a replay with timeout or fallback"
    if directive.transform is not None:
        return "a replay that transforms the request"
    if directive.elsewhere:  # "not the machine that answered": from the cache, none has
        return "a replay elsewhere"
    return None


def _invalid(fault: str) -> ProxyError:
    return ProxyError(Code.REPLAY_INVALID, Source.MACHINE, detail=f"fly-replay-cache: cannot be kept: {fault}")


def _fitting(pattern: bytes, host: str, target: bytes) -> bytes | None:
    """The prefix to remember for a request, None if the request's own path has no one reading.

    Raises ProxyError(REPLAY_INVALID) if the pattern is none, or is another host's or path's than the request's: what a
    request brings about may concern only requests like it (attacks A21).
    """
    split = split_pattern(pattern)
    if split is None:
        raise _invalid("expected [host]/path/*")
    named, prefix = split
    if named is not None and named != host:
        raise _invalid("the pattern names another host than the request, or a port")
    path = normal_path(target)
    if path is None:
        return None
    if not is_under(path, prefix):
        raise _invalid("the pattern does not match the request's path")
    return prefix

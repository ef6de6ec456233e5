"""What of a request its remembered replay is kept under: a path in its one form, a session's value (spec routing §4).

For replay_cache.py, and against poisoning: two requests that a machine may tell apart must never have one key.
- A path counts only in a form that every origin reads alike: with `.` and `..` segments, empty ones, backslashes and
  encoded slashes it has no key; unreserved characters count as themselves, however encoded.
- A session counts only if a machine can see no second value for it under that name, nor be kept from seeing it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from proxy.model import ReplayCacheRule

# --- paths

_ODD_PATH = re.compile(rb"//|\\|/\.{1,2}(?:[/;%]|\Z)").search
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")  # RFC 3986 §2.3
_READ_IN_TWO_WAYS = frozenset(b"/\\%\0")  # once decoded, some origins see a separator, an escape or an end


def normal_path(target: bytes) -> bytes | None:
    """A target's path in the one form that stands for all its spellings (RFC 3986 §6.2.2).

    None if origins may differ on what it names: `/a/../b`, `/a/..;/b`, `/a//b`, `/a%2Fb`.
    """
    path = target.partition(b"?")[0]
    if path[:1] != b"/":
        return None
    if b"%" in path:
        decoded = _decode(path)
        if decoded is None:
            return None
        path = decoded
    if (b"//" in path or b"/." in path or b"\\" in path) and _ODD_PATH(path):
        return None
    return path


def _decode(path: bytes) -> bytes | None:
    parts: list[bytes] = []
    at = 0
    for escape in _ESCAPE.finditer(path):
        digits = escape[1]
        octet = int(digits, 16) if digits else 0
        if octet in _READ_IN_TWO_WAYS:
            return None
        parts += (path[at : escape.start()], bytes((octet,)) if octet in _UNRESERVED else escape[0].upper())
        at = escape.end()
    parts.append(path[at:])
    return b"".join(parts)


def split_pattern(pattern: bytes) -> tuple[str | None, bytes] | None:
    """The host (None: whichever) and the normal prefix of `[host]/path/*`; None if it is no such pattern.

    The star at the end may be left out, and so may the slash before it; the whole host is the prefix b"".
    """
    host, slash, rest = pattern.partition(b"/")
    path = slash + rest
    if not slash or b"//" in path or not pattern.isascii():
        return None
    path = path.removesuffix(b"*").removesuffix(b"/") if path.endswith(b"/*") else path
    if b"*" in path or b"?" in path or b"#" in path:
        return None
    prefix = normal_path(path or b"/")
    if prefix is None:
        return None
    return host.decode().lower().rstrip(".") if host else None, prefix.removesuffix(b"/")


def is_under(path: bytes, prefix: bytes) -> bool:
    return path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix) : len(prefix) + 1] == b"/")


# --- sessions


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A request's session: the rule that applies to it, and what the rule's cookie or header holds."""

    rule: ReplayCacheRule
    prefix: bytes  # the rule's, without its host
    digest: bytes  # of the value, which may be a secret


class SessionRules:
    """A port's `replay_cache` rules, ready to be asked for each request: longest prefix first, else as they came."""

    __slots__ = ("_rules",)

    def __init__(self, rules: Sequence[ReplayCacheRule]) -> None:
        """A rule whose `path_prefix` is no `[host]/path` never applies; that it isn't, the check of fly.toml says."""
        split = [(rule, split_pattern(rule.path_prefix.encode())) for rule in rules]
        self._rules = sorted(
            ((host_prefix[0], host_prefix[1], rule) for rule, host_prefix in split if host_prefix is not None),
            key=lambda one: -len(one[1]),
        )

    def __bool__(self) -> bool:
        return bool(self._rules)

    def key(
        self, host: str, target: bytes, passed: Sequence[bytes], listed_hops: frozenset[bytes]
    ) -> SessionKey | None:
        """The session of a request under the rule that fits its host and path and whose value it carries.

        Of several the longest prefix alone is heeded (spec routing §4.2); among equal ones, the first whose value is
        there. `passed`, `listed_hops`: as in RequestHead. A request without the value is nobody's session.
        About 5 µs for ten fields and a cookie, so asked only where a port has rules.
        """
        path = normal_path(target)
        if path is None:
            return None
        longest = -1
        for named, prefix, rule in self._rules:
            if len(prefix) < longest:
                return None
            if (named is None or named == host) and is_under(path, prefix):
                longest = len(prefix)
                value = session_value(rule, passed, listed_hops)
                if value is not None:
                    return SessionKey(rule, prefix, hashlib.blake2b(value, digest_size=16).digest())
        return None


def session_value(rule: ReplayCacheRule, passed: Sequence[bytes], listed_hops: frozenset[bytes]) -> bytes | None:
    """What a rule's cookie or header holds; None if it is absent, or if the machine might see another value.

    It might if the field comes twice, or once more with `_` for `-`, or if the client's Connection names it: then we
    drop it. With a value that is no secret (a tenant's name), such requests would let anyone decide where others go.
    """
    is_cookie = rule.kind == "cookie"
    wanted = b"cookie" if is_cookie else rule.name.lower().encode()
    dashed = wanted.replace(b"_", b"-")
    if wanted in listed_hops:
        return None
    value = None
    for at in range(0, len(passed), 4):
        if len(passed[at]) != len(wanted):
            continue
        lower = passed[at].lower()
        if lower == wanted or lower.replace(b"_", b"-") == dashed:
            if value is not None or lower != wanted:
                return None
            value = passed[at + 2]
    if value is None or not is_cookie:
        return value or None
    return _cookie(value, rule.name.encode())


def _cookie(header: bytes, name: bytes) -> bytes | None:
    """The value of the cookie of this name; None if by some reading of names (decoded, in any case) there are two."""
    lower, found = name.lower(), None
    for pair in header.split(b";"):
        given, equals, value = pair.partition(b"=")
        given = given.strip()
        plain = unquote_to_bytes(given) if b"%" in given else given
        if plain.strip().lower() != lower:
            continue
        if found is not None or given != name or not equals:
            return None
        found = value.strip()
    return found or None

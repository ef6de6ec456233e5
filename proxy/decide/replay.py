"""fly-replay: a machine's answer read as a directive, and whether it may be followed (spec routing §2).

The header, the JSON form and the fields beside them are read into one `Directive`; what may be wrong with them is one
error, REPLAY_INVALID. Here is also what a replayed request says of itself, and what a directive changes of it. Keeping
the body, reaching the target and counting time are the Exchange's; remembered directives are replay_cache.py's.

What a directive says ends up in the head that another machine reads. So `state` and what is transformed may hold no
byte that ends a line, and may not touch what we vouch for: framing, identity, the other fields of replay.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from proxy.decide.headers import is_reserved
from proxy.decide.steering import MAX_REGIONS, STEERING_FIELDS, is_machine_id, is_region
from proxy.errors import Code, ProxyError, Source
from proxy.model import App, AppName, MachineId

MAX_REPLAYS: Final = 10  # of one request (spec routing §2.5)
MAX_HEADER_BYTES: Final = 8_192
MAX_JSON_BYTES: Final = 65_536
MAX_STATE_BYTES: Final = 4_096  # more would make heads that common servers refuse
MAX_TARGET_BYTES: Final = 16_384  # as of a client's request
MAX_TRANSFORM_FIELDS: Final = 64  # deleted or set
MAX_TIMEOUT_S: Final = 3_600.0
MIN_CACHE_TTL_S: Final = 10  # spec routing §2.5
MAX_CACHE_TTL_S: Final = 30 * 86_400
MAX_PREFIX_BYTES: Final = 1_024


class Fallback(enum.StrEnum):
    """Who gets the request when a replay fails."""

    FORCE_SELF = "force_self"  # the machine that asked for the replay, or nobody
    PREFER_SELF = "prefer_self"  # that machine, else any of its app


class FailReason(enum.StrEnum):
    """Why a replay failed, in Fly's words (spec routing §2.3)."""

    TIMEOUT = "timeout"
    RETRIES_EXHAUSTED = "retries_exhausted"
    NO_CANDIDATE = "no_candidate"


class Transform(msgspec.Struct, frozen=True):
    """What becomes of the request on its way to the target. Deletions come first."""

    path: bytes | None = None  # with its query
    delete_headers: tuple[bytes, ...] = ()  # lower case
    set_headers: tuple[tuple[bytes, bytes], ...] = ()


class CacheOrder(msgspec.Struct, frozen=True):
    """What a machine asks of the path cache: to remember this replay, or to forget one (spec routing §4.1)."""

    prefix: bytes | None = None  # the pattern as it came
    ttl_s: int = 0
    allow_bypass: bool = False
    invalidate: bool = False


class Directive(msgspec.Struct, frozen=True):
    """A replay as asked for. A struct, since it is made eight times as fast as a frozen dataclass of this size."""

    regions: tuple[str, ...] = ()  # codes and aliases in order, no others; see region.RegionWish
    instance: MachineId | None = None
    prefer_instance: MachineId | None = None
    app: AppName | None = None  # None = the app that answered
    state: bytes | None = None
    elsewhere: bool = False  # not to the machine that answered
    timeout_s: float | None = None
    fallback: Fallback | None = None
    transform: Transform | None = None
    cache: CacheOrder | None = None


def _invalid(detail: str) -> ProxyError:
    return ProxyError(Code.REPLAY_INVALID, Source.MACHINE, detail=f"fly-replay: {detail}")


def _shown(value: bytes) -> str:
    return repr(value[:40])[1:]


# --- values

_APP = re.compile(rb"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?").fullmatch
_TIMEOUT_PART = re.compile(rb"([0-9]{1,9}(?:\.[0-9]{0,9})?)(ms|s|m|h)")
_TIMEOUT = re.compile(rb"(?:[0-9]{1,9}(?:\.[0-9]{0,9})?(?:ms|s|m|h)){1,4}").fullmatch
_USUAL_TIMEOUT = re.compile(rb"([0-9]{1,9})(ms|s)?").fullmatch
_NUMBER = re.compile(rb"[0-9]{1,9}").fullmatch
_UNIT_MS: Final = {b"": 1, b"ms": 1, b"s": 1000, b"m": 60_000, b"h": 3_600_000}
_FALLBACKS: Final = {one.value.encode(): one for one in Fallback}
_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,255}").fullmatch  # RFC 9110 §5.6.2
_TEXT = re.compile(rb"[\t\x20-\x7e\x80-\xff]*").fullmatch  # what a field value may hold, RFC 9110 §5.5
_TARGET = re.compile(rb"/[!\"$-~]*").fullmatch  # visible, without `#`: RFC 9112 §3.2.1 origin-form, read generously


def _read_regions(value: bytes) -> tuple[str, ...]:
    if is_region(value):
        return (value.decode("ascii"),)
    names = value.split(b",", MAX_REGIONS)
    if len(names) > MAX_REGIONS:
        raise _invalid(f"region: more than {MAX_REGIONS} of them")
    regions = []
    for name in names:
        code = name.strip(b" \t").lower()
        if is_region(code):
            regions.append(code.decode("ascii"))
        elif code:  # an empty element of a list means nothing (RFC 9110 §5.6.1)
            raise _invalid(f"region: expected codes or areas, saw {_shown(code)}")
    if not regions:
        raise _invalid("region: names none")
    return tuple(regions)


def _read_machine(value: bytes) -> MachineId:
    if not is_machine_id(value):
        raise _invalid(f"instance: expected a machine's id, saw {_shown(value)}")
    return MachineId(value.decode("ascii"))


def _read_app(value: bytes) -> AppName:
    if not _APP(value):
        raise _invalid(f"app: expected an app's name, saw {_shown(value)}")
    return AppName(value.decode("ascii"))


def _read_state(value: bytes) -> bytes:
    # In fly-replay-src a `;` would begin a field of its own, which then said what we seem to have said.
    if b";" in value or not _TEXT(value):
        raise _invalid("state: may hold no `;` and no control characters")
    if len(value) > MAX_STATE_BYTES:
        raise _invalid(f"state: more than {MAX_STATE_BYTES} bytes")
    return value


def _read_flag(value: bytes) -> bool:
    if value not in (b"true", b"false"):
        raise _invalid(f"elsewhere: expected true or false, saw {_shown(value)}")
    return value == b"true"


def _read_timeout(value: bytes) -> float:
    """`10s`, `800ms`, `1m30s`. A bare number is milliseconds: the one seen in use, 1500, makes no sense in seconds."""
    usual = _USUAL_TIMEOUT(value)
    if usual is not None:
        ms = float(usual[1]) * _UNIT_MS[usual[2] or b""]
    elif _TIMEOUT(value):
        ms = sum(float(number) * _UNIT_MS[unit] for number, unit in _TIMEOUT_PART.findall(value))
    else:
        raise _invalid(f"timeout: expected a duration such as 10s or 800ms, saw {_shown(value)}")
    if ms <= 0:
        raise _invalid("timeout: expected more than nothing")
    return min(ms / 1000, MAX_TIMEOUT_S)


def _read_fallback(value: bytes) -> Fallback:
    fallback = _FALLBACKS.get(value)
    if fallback is None:
        raise _invalid(f"fallback: expected force_self or prefer_self, saw {_shown(value)}")
    return fallback


_Read = Callable[[bytes], object]
_FIELDS: Final[dict[bytes, tuple[str, _Read]]] = {
    b"region": ("regions", _read_regions),
    b"instance": ("instance", _read_machine),
    b"prefer_instance": ("prefer_instance", _read_machine),
    b"app": ("app", _read_app),
    b"state": ("state", _read_state),
    b"elsewhere": ("elsewhere", _read_flag),
    b"timeout": ("timeout_s", _read_timeout),
    b"fallback": ("fallback", _read_fallback),
}


def _whole(values: dict[str, Any]) -> Directive:
    """A directive of values that their readers gave: their types are held by the tests, not by mypy."""
    directive = Directive(**values)
    if directive.instance is not None:
        if directive.prefer_instance is not None:
            raise _invalid("instance and prefer_instance contradict each other")
    elif not (directive.regions or directive.app or directive.prefer_instance or directive.elsewhere):
        # It would come back to the machine that answered, as often as we let it.
        raise _invalid("names no region, instance, app or elsewhere")
    return directive


# --- the header


def parse_header(value: bytes) -> Directive:
    """Read the value of `fly-replay` (spec routing §2.1).

    Spaces and tabs around names, `=`, values and `;` are ignored, so are empty fields. A value in quotes is what stands
    between them, with no escapes; one without is all up to the next `;`. A field that is given twice is refused: who
    wrote it meant one of them. A field that we do not know is ignored, as unknown directives are in HTTP: Fly adds some
    now and then, and an app that uses a newer one is better off replayed than refused.

    Raises ProxyError(REPLAY_INVALID).
    """
    known = _headers.get(value)
    if known is None:
        known = _parse(value)
        if len(value) <= _HEADER_KEPT_BYTES:
            if len(_headers) >= _HEADERS_MAX:
                _headers.clear()
            _headers[value] = known
    return known


_HEADER_KEPT_BYTES = 256
_HEADERS_MAX = 1024
_headers: dict[bytes, Directive] = {}  # apps say the same again and again: 0.2 µs for 2 to 4


def _parse(value: bytes) -> Directive:
    if len(value) > MAX_HEADER_BYTES:
        raise _invalid(f"more than {MAX_HEADER_BYTES} bytes")
    values: dict[str, Any] = {}
    if b'"' in value:
        _read_quoted(values, value)
    else:
        for field in value.split(b";"):
            _read_field(values, field)
    return _whole(values)


def _read_field(values: dict[str, Any], field: bytes) -> None:
    name, equals, text = field.partition(b"=")
    if equals:
        _add(values, name, text.strip(b" \t"), b"," not in text)
    elif field.strip(b" \t"):
        raise _invalid(f"expected name=value, saw {_shown(field)}")


def _add(values: dict[str, Any], name: bytes, text: bytes, is_value: bool) -> None:
    """`is_value`: in quotes, or without a comma."""
    known = _FIELDS.get(name)
    if known is None:
        name = name.strip(b" \t")
        known = _FIELDS.get(name.lower())
        if known is None:
            if not _TOKEN(name):
                raise _invalid(f"expected a field's name, saw {_shown(name)}")
            return
    key, read = known
    if key in values:
        raise _invalid(f"{_shown(name)} is given twice")
    if not is_value and key != "state":  # two headers that were joined into one, perhaps
        raise _invalid(f"{_shown(name)}: a value with commas must be in quotes")
    values[key] = read(text)


_QUOTED = re.compile(rb'([^=;"]*)=[ \t]*"([^"]*)"[ \t]*(?:;|\Z)')


def _read_quoted(values: dict[str, Any], value: bytes) -> None:
    """As the split at each `;`, where some values are in quotes."""
    at, end = 0, len(value)
    while at < end:
        quoted = _QUOTED.match(value, at)
        if quoted is not None:
            _add(values, quoted[1], quoted[2], True)
            at = quoted.end()
            continue
        stop = value.find(b";", at)
        stop = end if stop < 0 else stop
        field = value[at:stop]
        if field.partition(b"=")[2].lstrip(b" \t").startswith(b'"'):
            raise _invalid(f"expected a quoted value that ends, and `;` after it, saw {_shown(value[at:])}")
        _read_field(values, field)
        at = stop + 1


def parse_headers(fields: Sequence[tuple[bytes, bytes]]) -> Directive | None:
    """What an answer's (lower-case name, value) pairs ask for, with the order to the cache; None if no replay.

    Cache fields without a replay mean nothing. Raises ProxyError(REPLAY_INVALID).
    """
    value = None
    has_order = False
    for name, text in fields:
        if name == b"fly-replay":
            if value is not None:
                raise _invalid("the header comes more than once")
            value = text
        elif name in _CACHE_FIELDS:
            has_order = True
    if value is None:
        return None
    directive = parse_header(value)
    return msgspec.structs.replace(directive, cache=cache_order(fields)) if has_order else directive


# --- the cache's fields


def cache_order(fields: Sequence[tuple[bytes, bytes]]) -> CacheOrder | None:
    """Read `fly-replay-cache`, `-ttl-secs`, `-allow-bypass` from (lower-case name, value) pairs (spec routing §4.1).

    Raises ProxyError(REPLAY_INVALID). Whether the pattern fits the request is replay_cache's to see.
    """
    given: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in _CACHE_FIELDS:
            if name in given:
                raise _invalid(f"{name.decode()} comes more than once")
            given[name] = value.strip(b" \t")
    pattern = given.get(b"fly-replay-cache")
    if pattern is None:
        return None
    if pattern.lower() == b"invalidate":
        return CacheOrder(invalidate=True)
    seconds = given.get(b"fly-replay-cache-ttl-secs", b"")
    if not _NUMBER(seconds):
        raise _invalid(f"fly-replay-cache-ttl-secs: expected a number of seconds, saw {_shown(seconds)}")
    bypass = given.get(b"fly-replay-cache-allow-bypass", b"no").lower()
    if bypass not in _BYPASS:
        raise _invalid(f"fly-replay-cache-allow-bypass: expected yes or no, saw {_shown(bypass)}")
    return _storing(pattern, int(seconds), _BYPASS[bypass])


_CACHE_FIELDS: Final = frozenset({b"fly-replay-cache", b"fly-replay-cache-ttl-secs", b"fly-replay-cache-allow-bypass"})
_BYPASS: Final = {b"yes": True, b"true": True, b"no": False, b"false": False}


def _storing(pattern: bytes, ttl_s: int, allow_bypass: bool) -> CacheOrder:
    if not pattern or len(pattern) > MAX_PREFIX_BYTES:
        raise _invalid(f"cache: expected a pattern of 1 to {MAX_PREFIX_BYTES} bytes")
    if ttl_s < MIN_CACHE_TTL_S:
        raise _invalid(f"cache: expected a lifetime of {MIN_CACHE_TTL_S} s or more, saw {ttl_s}")
    return CacheOrder(pattern, min(ttl_s, MAX_CACHE_TTL_S), allow_bypass)


# --- the JSON form


class _JsonHeader(msgspec.Struct):
    name: str
    value: str


class _JsonTransform(msgspec.Struct):
    path: str | None = None
    delete_headers: list[str] | None = None
    set_headers: list[_JsonHeader] | None = None


class _JsonCache(msgspec.Struct):
    prefix: str | None = None
    ttl: int | None = None
    invalidate: bool | None = None
    allow_bypass: bool | None = None


class _JsonReplay(msgspec.Struct):
    region: str | None = None
    instance: str | None = None
    prefer_instance: str | None = None
    app: str | None = None
    state: str | None = None
    elsewhere: bool | None = None
    timeout: str | int | None = None
    fallback: str | None = None
    transform: _JsonTransform | None = None
    cache: _JsonCache | None = None
    allow_bypass: bool | None = None  # its place is not documented: taken here and in `cache`


_json = msgspec.json.Decoder(_JsonReplay)
_JSON_TEXTS: Final = ("region", "instance", "prefer_instance", "app", "state", "fallback")


def parse_json(body: bytes) -> Directive:
    """Read an answer of type application/vnd.fly.replay+json (spec routing §2.4).

    Values are read as those of the header. Members that we do not know are ignored; null, and an empty string (what
    some languages write for a member that is not set), are as if absent; of a member given twice the last counts, as
    in most readers of JSON. Raises ProxyError(REPLAY_INVALID).
    """
    if len(body) > MAX_JSON_BYTES:
        raise _invalid(f"JSON: more than {MAX_JSON_BYTES} bytes")
    try:
        given = _json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _invalid(f"JSON: {error}") from error
    values: dict[str, Any] = {}
    for member in _JSON_TEXTS:
        text: str | None = getattr(given, member)
        if text:
            key, read = _FIELDS[member.encode()]
            values[key] = read(text.encode())
    if given.timeout not in (None, ""):
        values["timeout_s"] = _read_timeout(str(given.timeout).encode())
    if given.elsewhere:
        values["elsewhere"] = True
    if given.transform is not None:
        values["transform"] = _read_transform(given.transform)
    if given.cache is not None:
        values["cache"] = _read_json_cache(given.cache, given.allow_bypass)
    return _whole(values)


def _read_json_cache(given: _JsonCache, allow_bypass: bool | None) -> CacheOrder | None:
    if given.invalidate:
        if given.prefix:
            raise _invalid("cache: prefix and invalidate contradict each other")
        return CacheOrder(invalidate=True)
    if not given.prefix:
        return None
    if given.ttl is None:
        raise _invalid("cache: expected a ttl beside the prefix")
    return _storing(given.prefix.encode(), given.ttl, bool(given.allow_bypass or allow_bypass))


# --- transforms

# Beside what is reserved: Via is each hop's own (RFC 9110 §7.6.3), and a 100-continue was settled with the client.
_NOT_TO_CHANGE: Final = frozenset({b"via", b"expect"})


def _read_transform(given: _JsonTransform) -> Transform | None:
    deleted, fields = given.delete_headers or (), given.set_headers or ()
    if len(deleted) > MAX_TRANSFORM_FIELDS or len(fields) > MAX_TRANSFORM_FIELDS:
        raise _invalid(f"transform: more than {MAX_TRANSFORM_FIELDS} fields")
    path = given.path.encode() if given.path else None
    if path is not None and (len(path) > MAX_TARGET_BYTES or not _TARGET(path)):
        raise _invalid(f"transform.path: expected a path with its query, as in a request line, saw {_shown(path)}")
    setting: dict[bytes, tuple[bytes, bytes]] = {}
    for field in fields:
        name, value = _read_name(field.name, "set"), field.value.strip(" \t").encode()
        if not _TEXT(value):
            raise _invalid(f"transform: the value for {_shown(name)} has control characters")
        setting[name.lower()] = (name, value)  # each overwrites those of its name that came before it
    transform = Transform(path, tuple(_read_name(name, "delete").lower() for name in deleted), tuple(setting.values()))
    return None if transform == _NO_TRANSFORM else transform


_NO_TRANSFORM: Final = Transform()


def _read_name(text: str, verb: str) -> bytes:
    name = text.encode()
    if not _TOKEN(name):
        raise _invalid(f"transform: expected a field's name, saw {_shown(name)}")
    lower = name.lower()
    dashed = lower.replace(b"_", b"-")  # as an origin reads it that maps names as CGI does
    if verb == "delete" and lower in STEERING_FIELDS:
        return name  # the client's own; the target need not see them
    if dashed in _NOT_TO_CHANGE or is_reserved(dashed) or is_reserved(lower):
        raise _invalid(f"transform: may not {verb} {_shown(lower)}")
    return name


def apply_transform(
    passed: list[bytes], transform: Transform, listed_hops: frozenset[bytes] = frozenset()
) -> list[bytes]:
    """A request's flat field list (`RequestHead.passed`) as the target is to see it.

    Names are compared with `_` as `-`: else a client's `X_User` would stand beside the `X-User` that the app set, and
    an origin that reads both as one might take the client's. `listed_hops`, what the client's Connection names, is left
    out before anything is set; what is then sent must not be filtered by it again, or a client could have the app's
    fields dropped by naming them there.
    """
    gone = {name.replace(b"_", b"-") for name in transform.delete_headers}
    gone.update(name.lower().replace(b"_", b"-") for name, _ in transform.set_headers)
    changed: list[bytes] = []
    for at in range(0, len(passed), 4):
        lower = passed[at].lower()
        if lower.replace(b"_", b"-") not in gone and (lower not in listed_hops or lower == b"host"):
            changed += passed[at : at + 4]
    for name, value in transform.set_headers:
        changed += (name, b": ", value, b"\r\n")
    return changed


# --- what a replayed request says of itself


def replay_src(instance: str, region: str, t_us: int, state: bytes | None) -> bytes:
    """The value of `fly-replay-src`: who asked for the replay, where and when (spec routing §2.3).

    `state` comes last, so that no text in it can stand before a field of ours.
    """
    source = f"instance={instance};region={region};t={t_us}".encode()
    return source if state is None else source + b";state=" + state


def replay_failed(directive: Directive, app: str, source_instance: str, reason: FailReason, elapsed_ms: int) -> bytes:
    """The value of `fly-replay-failed`, for the machine that a fallback gives the request back to (spec routing §2.3).

    Of several regions all are named, as they were; what the directive did not name is left out.
    """
    instance = directive.instance or directive.prefer_instance
    fields = (
        ("instance", instance), ("app", app), ("region", ",".join(directive.regions)),
        ("replay_source", source_instance), ("reason", reason.value), ("elapsed_ms", elapsed_ms),
    )  # fmt: skip
    return ";".join(f"{name}={value}" for name, value in fields if value or value == 0).encode()


# --- may it be followed


def may_replay(source: App, target: App) -> bool:
    """Whether `source` may have its requests replayed to `target`: of one organization, or let in by name.

    There is one private network here, so Fly's rule for several does not arise (spec routing §2.6).
    """
    return (
        source.name == target.name
        or source.organization == target.organization
        or source.organization in target.replay_sources
    )


def judge(
    directive: Directive, replays: int, came_by_fallback: bool, source: App, target: App | None
) -> ProxyError | None:
    """Why a directive may not be followed, or None. Ask again where a remembered one is used: the rules may be newer.

    `replays`: how often the request was replayed before. `target`: the app that the directive names, None if there is
    none of that name; `source` itself where it names none.

    A request that a fallback gave back may not be replayed again (spec routing §2.2). The answer that asks for it is
    not passed to the client either: its status means nothing (LiteFS says 200 for a write that was not done), and a
    JSON one may hold the app's secrets.
    """
    if came_by_fallback:
        return _refused(Code.REPLAY_LOOP, "a request that a fallback gave back is not replayed again")
    if replays >= MAX_REPLAYS:
        return _refused(Code.REPLAY_LOOP, f"replayed {replays} times already")
    if target is None:
        return _refused(Code.REPLAY_APP_UNKNOWN, f"there is no app {directive.app}")
    if not may_replay(source, target):
        return _refused(Code.REPLAY_APP_FORBIDDEN, f"{target.name} takes no replays from {source.organization}")
    instance = directive.instance
    if target.name != source.name and instance is not None and any(one.id == instance for one in source.machines):
        return _refused(Code.REPLAY_INVALID, f"{instance} is a machine of {source.name}, not of {target.name}")
    return None


def _refused(code: Code, detail: str) -> ProxyError:
    return ProxyError(code, Source.MACHINE, detail=detail)

"""What must hold of each parser for any bytes. A target takes bytes and returns, or raises what is wrong.

Where a stream may be cut, the first byte of the input says in how many places and the next ones where.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable
from typing import TypeVar

from proxy.decide.replay import (
    MAX_STATE_BYTES,
    Directive,
    apply_transform,
    cache_order,
    parse_header,
    parse_headers,
    parse_json,
    replay_src,
)
from proxy.decide.replay_key import is_under, normal_path, split_pattern
from proxy.errors import Code, ProxyError
from proxy.wire.client_hello import MAX_RAW_BYTES, ClientHello, HelloError, HelloReader
from proxy.wire.fly_keys import classify_keys
from proxy.wire.fly_toml import read_fly_toml
from proxy.wire.http1 import Limits, normalize_host
from proxy.wire.toml_table import line_of, locate_keys, parse_duration_s, parse_size_bytes, render_value, suggest
from proxy.wire.websocket import FrameTracker
from tests.wire.http1_support import Seen, h11_requests, httptools_requests, read_requests, read_responses, reframed

T = TypeVar("T")
LIMITS = Limits(max_head_bytes=2000, max_headers=20, max_target_bytes=300)  # within a fuzzer's reach
ENDS_OF_LINES = b"\r\n\0"


def cut(data: bytes) -> tuple[bytes, list[bytes]]:
    """The stream, and the same in pieces."""
    count = data[0] % 5 if data else 0
    places, stream = data[1 : 1 + count], data[1 + count :]
    at = sorted({place * len(stream) // 255 for place in places} | {0, len(stream)})
    return stream, [stream[one:other] for one, other in itertools.pairwise(at)]


def told(seen: Seen) -> list[str]:
    """The events; of a refusal only that it was one: a bound may be passed before the fault comes, or behind it."""
    return ["refused" if one.startswith("refused ") else one for one in seen.events]


def http1_requests(data: bytes) -> None:
    """Cuts change nothing; one error; bounds; what goes on is found again by two other parsers."""
    stream, pieces = cut(data)
    whole = read_requests(stream, limits=LIMITS)
    assert told(read_requests(*pieces, limits=LIMITS)) == told(whole), "a cut changes what is read"
    for head in whole.heads:
        assert len(head.target) <= 300 and len(head.fields) <= 20 and head.length >= -1
        assert not any(set(name + value) & set(ENDS_OF_LINES) for name, value in head.fields)
    assert sum(map(len, whole.bodies)) <= len(stream)
    if not any(head.upgrade is not None for head in whole.heads):
        again = reframed(whole)
        assert httptools_requests(again) == whole.requests
        assert h11_requests(again) == (whole.requests, None)


def first_answer(seen: Seen) -> list[str]:
    """The events to the end of an answer: nothing is read from a machine before it is asked again."""
    ends = (at for at, one in enumerate(seen.events) if one.startswith("end"))
    return seen.events[: next(ends, len(seen.events)) + 1]


def http1_responses(data: bytes) -> None:
    """One error; no more bytes than came; what is read without a fault is read so in pieces."""
    head_only = bool(data[:1]) and data[0] >= 128
    stream, pieces = cut(data)
    whole = read_responses(stream, head_only=head_only, eof=True, limits=LIMITS)
    parts = read_responses(*pieces, head_only=head_only, eof=True, limits=LIMITS)
    if whole.error is None and not head_only:  # after the answer to HEAD what came with it is passed over
        is_early = parts.error is not None and "bytes after the end" in str(parts.error)  # a line end: seen, or skipped
        assert is_early or first_answer(parts) == first_answer(whole), "a cut changes what is read"
    for head in whole.responses:
        assert 100 <= head.status <= 599 and len(head.fields) <= 20
        assert not set(head.reason) & set(ENDS_OF_LINES)
        assert not any(set(name + value) & set(ENDS_OF_LINES) for name, value in head.fields)


def client_hello(data: bytes) -> None:
    """A cut changes nothing; what is read is what was asked for."""
    stream, pieces = cut(data)
    whole, parts = _hello([stream]), _hello(pieces)
    assert whole == parts, (whole, parts)
    if isinstance(whole, ClientHello) and whole.server_name is not None:
        name = whole.server_name
        assert name == name.lower() and 0 < len(name) <= 253 and name.encode() in stream.lower()


def _hello(pieces: list[bytes]) -> ClientHello | int | None:
    reader = HelloReader()
    try:
        for piece in pieces:
            hello = reader.feed(piece)
            assert len(reader.raw) <= MAX_RAW_BYTES + len(piece)
            if hello is not None:
                return hello
    except HelloError as error:
        return error.alert
    return None


def websocket(data: bytes) -> None:
    """A cut changes nothing, at no place."""
    stream, pieces = cut(data)
    whole, parts = FrameTracker(), FrameTracker()
    whole.feed(stream)
    for piece in pieces:
        parts.feed(piece)
    assert (parts.at_boundary, parts.saw_close, parts.is_lost) == (whole.at_boundary, whole.saw_close, whole.is_lost)


def fly_toml(data: bytes) -> None:
    """Whatever the document, faults are listed and nothing is raised; all keys are classified."""
    try:
        text = data.decode()
        document = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        return
    result = read_fly_toml(document)
    lines = locate_keys(text)
    for fault in result.faults:
        assert str(fault)
        line_of(lines, fault.path)
    for use in classify_keys(document):
        assert use.path


def toml_table(data: bytes) -> None:
    """Scalars are read or refused, and lines are found within the text, valid or not."""
    text = data.decode("utf-8", "replace")
    seconds, size = parse_duration_s(text, 1.0), parse_size_bytes(text, 1)
    assert seconds is None or isinstance(seconds, float | int)
    assert size is None or size >= 0
    assert len(render_value(text)) < 1000
    suggest(text[:50], ("app", "services", "internal_port"))
    count = text.count("\n") + 1
    assert all(1 <= line <= count for line in locate_keys(text).values())


def replay_header(data: bytes) -> None:
    """One error; what is taken goes into heads of ours, and can end no line and no field there."""
    names = (b"fly-replay", b"fly-replay-cache", b"fly-replay-cache-ttl-secs", b"fly-replay-cache-allow-bypass")
    fields = list(zip(names, data.split(b"\n"), strict=False))
    for read in (lambda: parse_header(data), lambda: parse_headers(fields)):
        directive = _one_error(Code.REPLAY_INVALID, read)
        if directive is not None:
            _hold(directive)
    _one_error(Code.REPLAY_INVALID, lambda: cache_order(fields))


def replay_json(data: bytes) -> None:
    """As the header; and a transform writes nothing that ends a line, nor what is ours."""
    directive = _one_error(Code.REPLAY_INVALID, lambda: parse_json(data))
    if directive is None:
        return
    _hold(directive)
    if directive.transform is not None:
        passed = [b"Host", b": ", b"a.test", b"\r\n", b"X-User", b": ", b"b", b"\r\n"]
        changed = apply_transform(passed, directive.transform)
        assert len(changed) % 4 == 0 and b"Host" in changed[0::4]
        for name, value in zip(changed[0::4], changed[2::4], strict=True):
            assert name and not set(name) & set(b"\r\n\0: ") and not set(value) & set(ENDS_OF_LINES)
            assert not name.lower().replace(b"_", b"-").startswith((b"fly-client", b"x-forwarded-", b"content-length"))
        path = directive.transform.path
        assert path is None or (path.startswith(b"/") and not set(path) & set(b"\r\n\0 #"))


def replay_key(data: bytes) -> None:
    """A normal path is its own normal form and leads nowhere up; a pattern's prefix is one."""
    path = normal_path(data)
    if path is not None:
        assert normal_path(path) == path and b"/../" not in path and b"//" not in path and is_under(path, b"")
    found = split_pattern(data)
    if found is not None:
        assert found[1] == b"" or normal_path(found[1]) == found[1]


def host(data: bytes) -> None:
    """One error; a host is lower case and holds nothing that could stand for another."""
    found = _one_error(Code.BAD_REQUEST, lambda: normalize_host(data))
    if found is not None:
        assert found and found == found.lower() == normalize_host(data)
        assert not set(found) & set(" \t\r\n/@#?,%\\")


def _one_error(code: Code, what: Callable[[], T]) -> T | None:
    """None if it is refused as it ought to be; any other error passes."""
    try:
        return what()
    except ProxyError as error:
        if error.code is not code:
            raise
        return None


def _hold(directive: Directive) -> None:
    assert directive.regions or directive.instance or directive.prefer_instance or directive.app or directive.elsewhere
    state = directive.state
    assert state is None or (len(state) <= MAX_STATE_BYTES and not set(state) & set(b"\r\n\0;"))
    source = replay_src("0" * 14, "ams", 1, state)
    assert not set(source) & set(ENDS_OF_LINES) and source.count(b";") == (2 if state is None else 3)
    assert directive.timeout_s is None or 0 < directive.timeout_s <= 3600


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (
        http1_requests, http1_responses, client_hello, websocket, fly_toml, toml_table, replay_header, replay_json,
        replay_key, host,
    )
}  # fmt: skip

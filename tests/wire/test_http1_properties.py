"""wire/http1.py under generated traffic: cuts change nothing, noise raises one error only, and what goes on is ours.

h11 is the oracle. It is laxer than we are nearly everywhere; where it is the stricter one, the difference is named in
`STRICTER` with the reason why we take it.
"""

from __future__ import annotations

import re

import h11
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.wire.http1_support import (
    Request,
    Seen,
    h11_requests,
    httptools_requests,
    read_requests,
    read_responses,
    reframed,
)

MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FEWER = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

METHODS = [b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"HEAD"]
NAMES = [b"Accept", b"X-A", b"x-b", b"Cookie", b"Fly-Client-IP", b"X-Forwarded-For", b"x_under", b"Content-Type", b"TE"]
SAFE = st.text("abcXYZ019 ,;=/\"'\t~!", max_size=12).map(lambda text: text.strip().encode())
TARGETS = st.text("ab/?&=%.;-_~:@", max_size=12).map(lambda text: b"/" + text.encode())


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes, bytes]:
    """Framing field lines, the body as sent, the body as meant."""
    kind = draw(st.sampled_from(["none", "length", "chunks"]))
    if kind == "none":
        return b"", b"", b""
    body = draw(st.binary(max_size=60))
    if kind == "length":
        return b"Content-Length: %d\r\n" % len(body), body, body
    sent = b""
    at = 0
    while at < len(body):
        size = draw(st.integers(1, len(body) - at))
        zeros = b"0" * draw(st.integers(0, 3))
        extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b c"']))
        sent += zeros + b"%X" % size + extension + b"\r\n" + body[at : at + size] + b"\r\n"
        at += size
    trailer = draw(st.sampled_from([b"", b"X-Sum: 1\r\n", b"X-A: \r\nFly-Region: b\r\n"]))
    return b"Transfer-Encoding: chunked\r\n", sent + b"0\r\n" + trailer + b"\r\n", body


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, Request]:
    method, target = draw(st.sampled_from(METHODS)), draw(TARGETS)
    framing, sent, body = draw(bodies())
    lines = [b"Host: a.test\r\n", framing]
    lines += [
        name + b": " + value + b"\r\n"
        for name, value in draw(st.lists(st.tuples(st.sampled_from(NAMES), SAFE), max_size=5))
    ]
    if draw(st.booleans()):
        lines.append(b"Connection: keep-alive\r\n")
    order = draw(st.permutations(lines))
    return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, target, b"".join(order), sent), (method, target, body)


PIPELINES = st.lists(requests(), min_size=1, max_size=4)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted({place % (len(data) + 1) for place in places})
    pieces = [data[one:other] for one, other in zip([0, *at], [*at, len(data)], strict=True)]
    return [piece for piece in pieces if piece]


@MANY
@given(PIPELINES, st.lists(st.integers(0, 5000), max_size=12))
def test_valid_requests_come_out_the_same_however_the_stream_is_cut(
    pipeline: list[tuple[bytes, Request]], places: list[int]
) -> None:
    data = b"".join(raw for raw, _ in pipeline)
    whole = read_requests(data)
    assert whole.error is None and whole.requests == [meant for _, meant in pipeline]
    assert read_requests(*cut(data, places)).events == whole.events


NASTY = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\x00",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"\x0b",
    b"\x0c",
    b"\x80",
    b"_",
    b"#",
    b"0",
    b"-",
    b"+",
    b"1",
    b"HTTP/1.0",
    b"HTTP/1.2",
    b"HTTP/2.0",
    b"Host: b.test\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n",
    b"Connection: close\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: X-A, Host, Content-Length\r\n",
    b"GET ",
    b"CONNECT ",
    b"http://a.test/",
    b"*",
    b"\r\n ",
    b" chunked",
    b"GET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Valid requests in which bytes were put in, taken out, replaced or moved."""
    data = b"".join(raw for raw, _ in draw(st.lists(requests(), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["put", "take", "replace", "copy", "line"]))
        piece = draw(st.sampled_from(NASTY))
        if kind == "put":
            data = data[:at] + piece + data[at:]
        elif kind == "take":
            data = data[:at] + data[at + draw(st.integers(1, 4)) :]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "line":  # a field more, where a field may stand
            at = data.find(b"\r\n") + 2
            data = data[:at] + piece + data[at:]
        else:
            data = data[:at] + data[at : at + 20] + data[at:]
    return data


@MANY
@given(mutated(), st.lists(st.integers(0, 5000), max_size=8))
def test_broken_requests_come_out_the_same_however_the_stream_is_cut(data: bytes, places: list[int]) -> None:
    """What is refused is refused with the same code; what came whole before it was told before it."""
    whole, pieces = read_requests(data), read_requests(*cut(data, places))
    assert pieces.events == whole.events


@FEWER
@given(st.one_of(st.binary(max_size=300), mutated()), st.lists(st.integers(0, 300), max_size=5), st.booleans())
def test_bytes_of_any_kind_raise_the_documented_error_or_none(data: bytes, places: list[int], head: bool) -> None:
    for seen in (read_requests(*cut(data, places)), read_responses(*cut(data, places), head_only=head, eof=True)):
        assert isinstance(seen, Seen)  # anything but a ProxyError would have come through


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    status = draw(st.sampled_from([b"200 OK", b"404 ", b"204 No", b"304 Same", b"500 Oh no"]))
    framing, sent, _ = draw(bodies())
    if status[:3] in (b"204", b"304"):
        framing, sent = b"", b""
    elif not framing:
        framing = b"Content-Length: 0\r\n"
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\n"]))
    return interim + b"HTTP/1.1 " + status + b"\r\nX: 1\r\n" + framing + b"\r\n" + sent


@MANY
@given(answers(), st.lists(st.integers(0, 5000), max_size=12))
def test_answers_come_out_the_same_however_the_stream_is_cut(data: bytes, places: list[int]) -> None:
    whole = read_responses(data)
    assert whole.error is None and whole.events[-1].startswith("end")
    assert read_responses(*cut(data, places)).events == whole.events


# --- property 1: what the origin sees was framed by us, and no two parsers disagree about it


@MANY
@given(st.one_of(mutated(), PIPELINES.map(lambda pipeline: b"".join(raw for raw, _ in pipeline))))
@example(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: Content-Length, Host\r\nContent-Length: 3\r\n\r\nabc")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nCookie: b\r\nFly-Region: x\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n")
def test_two_other_parsers_find_exactly_the_requests_that_we_passed_on(data: bytes) -> None:
    seen = read_requests(data)
    if any(head.upgrade is not None for head in seen.heads):
        return  # a tunnel has the connection to itself: its bytes are nobody's request
    again = reframed(seen)
    assert httptools_requests(again) == seen.requests
    assert h11_requests(again) == (seen.requests, None)


def test_what_an_upgrade_sends_on_is_one_request_without_a_body() -> None:
    seen = read_requests(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nraw bytes")
    again = reframed(seen)
    assert h11_requests(again) == ([(b"GET", b"/ws", b"")], None)
    assert httptools_requests(again) == [(b"GET", b"/ws", b"")] and b"raw" not in again


# --- differences from h11

# What we take and h11 does not, by the words of its refusal. Either way one request goes on, in our own writing.
STRICTER = {
    "illegal request line": "llhttp lets several blanks stand between the line's parts, and skips a CR before it",
    "no request line received": "llhttp skips blank lines, LF alone among them, before a request; h11 takes none first",
}


def reduced(target: bytes) -> bytes:
    """An absolute-form target as we pass it on."""
    return re.sub(rb"\Ahttps?://[^/?]*(?=/)", b"", target, flags=re.IGNORECASE)


@MANY
@given(mutated())
def test_what_we_take_h11_reads_as_the_same_requests(data: bytes) -> None:
    """Where both go on, they see the same methods, targets and bodies; where h11 stops first, STRICTER says why."""
    seen = read_requests(data)
    if any(head.upgrade is not None for head in seen.heads):
        return
    ours = seen.requests
    theirs, refusal = h11_requests(data)
    common = min(len(ours), len(theirs))
    assert [(m, reduced(t), b) for m, t, b in theirs[:common]] == ours[:common]
    if len(theirs) < len(ours):
        # h11 stops without a word at an Upgrade that no Connection field lists; to us that is a field to drop
        assert b"Upgrade" in data if refusal is None else refusal.split(":")[0] in STRICTER


def test_h11_is_the_version_the_differences_were_written_for() -> None:
    assert h11.__version__.startswith("0.16")

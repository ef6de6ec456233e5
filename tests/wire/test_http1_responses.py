"""wire/http1.py, the machine's side: what an answer is taken for, and what is none."""

from __future__ import annotations

import pytest

from proxy.errors import Retry, Source
from proxy.wire.http1 import Limits
from tests.wire.http1_support import read_responses

OK = b"HTTP/1.1 200 OK\r\n"


def answer(*fields: bytes, body: bytes = b"", line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([line, *fields, b"", b""]) + body


HELLO = answer(b"Content-Length: 5", body=b"hello")
UPGRADE = (b"Connection: upgrade", b"Upgrade: websocket")

ANSWERS: dict[str, tuple[bytes, list[str]]] = {
    "length": (HELLO, ["200 OK 5", "body hello", "end"]),
    "length zero": (answer(b"Content-Length: 0"), ["200 OK 0", "end"]),
    "no reason": (answer(b"Content-Length: 0", line=b"HTTP/1.1 200"), ["200  0", "end"]),
    "empty reason": (answer(b"Content-Length: 0", line=b"HTTP/1.1 200 "), ["200  0", "end"]),
    "chunks": (
        answer(b"Transfer-Encoding: chunked", body=b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"),
        ["200 OK chunked", "body hello", "end"],
    ),
    "trailers": (
        answer(b"Transfer-Encoding: chunked", body=b"0\r\nX-Sum: 1\r\n\r\n"),
        ["200 OK chunked", "end X-Sum=1"],
    ),
    "until the close": (answer(body=b"hello"), ["200 OK until-close last", "body hello", "end", "closed well"]),
    "until the close, nothing": (answer(), ["200 OK until-close last", "end", "closed well"]),
    "HTTP/1.0": (
        answer(b"Content-Length: 5", body=b"hello", line=b"HTTP/1.0 200 OK"),
        ["200 OK 5 last", "body hello", "end"],
    ),
    "HTTP/1.0 kept": (
        answer(b"Content-Length: 5", b"Connection: keep-alive", body=b"hello", line=b"HTTP/1.0 200 OK"),
        ["200 OK 5", "body hello", "end"],
    ),
    "close": (
        answer(b"Content-Length: 5", b"Connection: close", body=b"hello"),
        ["200 OK 5 last", "body hello", "end"],
    ),
    "204": (answer(line=b"HTTP/1.1 204 No Content"), ["204 No Content 0", "end"]),
    "204 with a length": (answer(b"Content-Length: 5", line=b"HTTP/1.1 204 No"), ["204 No 0", "end"]),
    "304 with a length": (answer(b"Content-Length: 5", line=b"HTTP/1.1 304 Same"), ["304 Same 5", "end"]),
    "304 without": (answer(line=b"HTTP/1.1 304 Same"), ["304 Same until-close", "end"]),
    "100 and the answer": (
        b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO,
        ["100 Continue 0", "200 OK 5", "body hello", "end"],
    ),
    "103 twice and the answer": (
        b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 103 Early\r\n\r\n" + HELLO,
        ["103 Early 0", "103 Early 0", "200 OK 5", "body hello", "end"],
    ),
    "switch": (
        answer(*UPGRADE, line=b"HTTP/1.1 101 Switching", body=b"\x81\x00"),
        ["101 Switching 0 upgrade=websocket", "raw \x81\x00"],
    ),
    "length past 2^32": (answer(b"Content-Length: 4294967297", body=b"x"), ["200 OK 4294967297", "body x"]),
    "high bytes": (answer(b"X: \xff", b"Content-Length: 0", line=b"HTTP/1.1 200 \xe9"), ["200 \xe9 0", "end"]),
}

REFUSED: dict[str, bytes] = {
    "bytes after the end": HELLO + b"x",
    "a second answer": HELLO + HELLO,
    "a second answer after chunks": answer(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n") + HELLO,
    "a second answer after 204": answer(line=b"HTTP/1.1 204 No") + HELLO,
    "a body after 204": answer(b"Content-Length: 5", line=b"HTTP/1.1 204 No", body=b"hello"),
    "a body after 304": answer(b"Content-Length: 5", line=b"HTTP/1.1 304 Same", body=b"hello"),
    "length and encoding": answer(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "encoding and length": answer(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"),
    "two lengths": answer(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"),
    "length list": answer(b"Content-Length: 5, 5", body=b"hello"),
    "length with sign": answer(b"Content-Length: +5", body=b"hello"),
    "negative length": answer(b"Content-Length: -5", body=b"hello"),
    "empty length": answer(b"Content-Length: ", body=b"hello"),
    "length of 2^63": answer(b"Content-Length: 9223372036854775808"),
    "length of 2^64": answer(b"Content-Length: 18446744073709551616"),
    "gzip, chunked": answer(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "chunked, gzip": answer(b"Transfer-Encoding: chunked, gzip", body=b"0\r\n\r\n"),
    "identity": answer(b"Transfer-Encoding: identity", body=b"hello"),
    "xchunked": answer(b"Transfer-Encoding: xchunked", body=b"hello"),
    "two encodings": answer(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "chunks in HTTP/1.0": answer(b"Transfer-Encoding: chunked", body=b"0\r\n\r\n", line=b"HTTP/1.0 200 OK"),
    "bad chunk size": answer(b"Transfer-Encoding: chunked", body=b"g\r\n"),
    "chunk size overflow": answer(b"Transfer-Encoding: chunked", body=b"10000000000000000\r\n"),
    "chunk without its end": answer(b"Transfer-Encoding: chunked", body=b"5\r\nhelloXX"),
    "LF alone": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "obs-fold": answer(b"X: a\r\n b", b"Content-Length: 0"),
    "space before colon": answer(b"Content-Length : 5", body=b"hello"),
    "NUL in a value": answer(b"X: a\x00b"),
    "bare CR in a value": answer(b"X: a\rb"),
    "empty name": answer(b": x"),
    "name of 256 bytes": answer(b"X" * 256 + b": 1"),
    "HTTP/2.0 is spoken": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "HTTP/1.2": answer(line=b"HTTP/1.2 200 OK"),
    "SSH is spoken": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "status of two digits": answer(line=b"HTTP/1.1 20 OK"),
    "status of four digits": answer(line=b"HTTP/1.1 2000 OK"),
    "status 099": answer(line=b"HTTP/1.1 099 OK"),
    "status 600": answer(line=b"HTTP/1.1 600 OK"),
    "status 999": answer(line=b"HTTP/1.1 999 OK"),
    "NUL in the reason": answer(b"Content-Length: 0", line=b"HTTP/1.1 200 OK\x00"),
    "control in the reason": answer(b"Content-Length: 0", line=b"HTTP/1.1 200 O\x1bK"),
    "101 without Upgrade": answer(line=b"HTTP/1.1 101 S", body=b"raw"),
    "101 without Connection": answer(b"Upgrade: websocket", line=b"HTTP/1.1 101 S", body=b"raw"),
    "101 to h2c": answer(b"Connection: upgrade", b"Upgrade: h2c", line=b"HTTP/1.1 101 S", body=b"raw"),
    "101 with a length": answer(*UPGRADE, b"Content-Length: 3", line=b"HTTP/1.1 101 S", body=b"raw"),
    "101 with chunks": answer(*UPGRADE, b"Transfer-Encoding: chunked", line=b"HTTP/1.1 101 S", body=b"0\r\n\r\n"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_comes_out_as_exactly_these_events(name: str) -> None:
    raw, events = ANSWERS[name]
    eof = events[-1] == "closed well"
    assert read_responses(raw, eof=eof).events == events
    pieces = (raw[at : at + 1] for at in range(len(raw)))
    assert read_responses(*pieces, eof=eof).events == events


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_clear_answer_is_refused_as_the_machines_fault(name: str) -> None:
    error = read_responses(REFUSED[name]).error
    assert error is not None and error.code == "WU01"
    assert error.source is Source.UPSTREAM and error.retry is Retry.NEVER


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_byte_by_byte_too(name: str) -> None:
    raw = REFUSED[name]
    got = read_responses(*(raw[at : at + 1] for at in range(len(raw))))
    if name.startswith(("a second answer", "a body after", "bytes after")):
        # read apart, the end was reported first; the connection's owner takes nothing more (edge/upstream.py)
        assert got.events.count("end") >= 1
    else:
        assert got.error is not None and got.error.code == "WU01"


@pytest.mark.parametrize(
    ("raw", "events"),
    [
        (answer(b"Content-Length: 5"), ["200 OK 5", "end"]),
        (answer(b"Content-Length: 0"), ["200 OK 0", "end"]),
        (answer(), ["200 OK until-close last", "end"]),
        (answer(b"Transfer-Encoding: chunked"), ["200 OK until-close", "end"]),
        (answer(line=b"HTTP/1.1 304 Same"), ["304 Same until-close", "end"]),
        (b"HTTP/1.1 103 Early\r\n\r\n" + answer(b"Content-Length: 5"), ["103 Early 0", "200 OK 5", "end"]),
        (answer(b"Content-Length: 5", body=b"hello"), ["200 OK 5", "refused WU01"]),
        (answer(b"Transfer-Encoding: chunked", body=b"1\r\nx\r\n"), ["200 OK until-close", "refused WU01"]),
    ],
)
def test_the_answer_to_head_has_no_body_whatever_its_fields_say(raw: bytes, events: list[str]) -> None:
    assert read_responses(raw, head_only=True).events == events


def test_a_close_in_the_middle_is_told_from_the_end_of_the_answer() -> None:
    assert read_responses(HELLO[:-1], eof=True).events[-1] == "closed"
    assert read_responses(answer(b"Transfer-Encoding: chunked", body=b"5\r\nhel"), eof=True).events[-1] == "closed"
    assert read_responses(b"HTTP/1.1 200 OK\r\nX: ", eof=True).events == ["closed"]
    assert read_responses(eof=True).events == ["closed"]


def test_one_connection_carries_answers_one_after_another() -> None:
    got = read_responses(HELLO, answer(line=b"HTTP/1.1 204 No"), HELLO)
    assert got.events == ["200 OK 5", "body hello", "end", "204 No 0", "end", "200 OK 5", "body hello", "end"]


def test_server_is_kept_apart_and_our_own_fields_do_not_pass() -> None:
    got = read_responses(answer(b"Server: app", b"Wakefront-Error: x", b"Keep-Alive: 5", b"X: 1", b"Content-Length: 0"))
    assert got.responses[0].server == (b"Server", b"app") and got.responses[0].fields == [(b"X", b"1")]


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"", b"\r\n"),
        (b"HTTP/1.1 200 ", b"a"),
        (OK, b"a"),
        (OK + b"X: ", b"a"),
        (OK, b"X: y\r\n"),
        (answer(b"Transfer-Encoding: chunked", body=b"5;"), b"a"),
        (answer(b"Transfer-Encoding: chunked", body=b"0\r\nX: "), b"a"),
        (answer(b"Transfer-Encoding: chunked", body=b"0\r\n"), b"X: y\r\n"),
    ],
)
def test_a_machine_that_never_ends_its_head_or_trailers_is_cut_off(start: bytes, more: bytes) -> None:
    got = read_responses(start, *([more * (4096 // len(more))] * 33))
    assert got.error is not None and got.error.code == "WU01"


def test_interim_answers_have_a_bound_for_each_request() -> None:
    interim = b"HTTP/1.1 103 Early\r\n\r\n"
    assert read_responses(interim * 200 + HELLO).events[-1] == "end"
    assert read_responses(interim * 201 + HELLO).events[-1] == "refused WU01"
    assert read_responses(*[interim] * 201).events[-1] == "refused WU01"


def test_the_bounds_on_heads_hold_for_answers() -> None:
    limits = Limits(max_head_bytes=1000, max_headers=4)
    assert read_responses(answer(b"A: 1", b"B: 2", b"C: 3", b"D: 4"), limits=limits).error is None
    assert read_responses(answer(*[b"A: 1"] * 5), limits=limits).error is not None
    assert read_responses(answer(b"A: " + b"x" * 1000)[:-2], limits=limits).error is not None

"""wire/http1.py, the client's side: what is refused and with which code, and exactly what is made of the rest.

The tables are the attacks A6, A7, A9, A11, A12 and A15 of the design's list, and what llhttp alone lets through.
"""

from __future__ import annotations

import pytest

from proxy.errors import Code, ProxyError, Source
from proxy.wire import http1
from proxy.wire.http1 import PASS_ALL, FieldRules, Limits, RequestReader, normalize_host
from tests.wire.http1_support import Seen, read_requests

HOST = b"Host: a.test"
GET = b"GET / HTTP/1.1"
POST = b"POST / HTTP/1.1"
NEXT = b"GET /next HTTP/1.1\r\nHost: a.test\r\n\r\n"
NEXT_EVENT = "GET /next a.test 0"


def message(line: bytes, *fields: bytes, body: bytes = b"", host: bytes | None = HOST) -> bytes:
    lines = [line, *((host,) if host is not None else ()), *fields, b"", b""]
    return b"\r\n".join(lines) + body


def post(*fields: bytes, body: bytes = b"abcde") -> bytes:
    return message(POST, *fields, body=body)


def chunked(body: bytes) -> bytes:
    return message(POST, b"Transfer-Encoding: chunked", body=body)


LENGTHS_REFUSED = [
    b"+5",
    b"-5",
    b"5_0",
    b"0x5",
    b"5,5",
    b"5, 5",
    b"5 5",
    b"5;",
    b"5\x0b",
    b"5\x0c",
    b"five",
    b"",
    b" ",
    b"5.0",
    b"5e0",
    b"\xd9\xa5",
    b'"5"',
    b"5\x00",
    b"5\x85",
    b"--5",
    b"0b101",
    b"18446744073709551616",
    b"99999999999999999999",
    b"9" * 400,
    b"9223372036854775808",
    b"18446744073709551615",
]

ENCODINGS_REFUSED = [
    b"chunked, identity",
    b"identity, chunked",
    b"gzip, chunked",
    b"chunked, gzip",
    b"identity",
    b"gzip",
    b"xchunked",
    b"chunkedx",
    b"chunked,",
    b",chunked",
    b"chunked, chunked",
    b"\x0bchunked",
    b"chunked\x0b",
    b"\x0cchunked",
    b"",
    b"chunked;q=1",
    b'"chunked"',
    b"chunk",
    b"x",
    b"chunked\x00",
    b"cow",
    b"chunked identity",
    b"\xa0chunked",
    b"chunked ",
]

FIELDS_REFUSED = {
    "empty name": b": x",
    "space before colon": b"X : y",
    "tab before colon": b"X\t: y",
    "space before name": b" X: y",
    "obs-fold": b"X: a\r\n b",
    "obs-fold with tab": b"X: a\r\n\tb",
    "folded framing": b"Transfer-Encoding:\r\n chunked",
    "bare LF in value": b"X: a\nY: b",
    "bare CR in value": b"X: a\rY: b",
    "CR CR LF": b"X: a\r\r\nY: b",
    "NUL in value": b"X: a\x00b",
    "NUL in name": b"X\x00: a",
    "control in value": b"X: a\x01b",
    "DEL in value": b"X: \x7f",
    "high byte in name": b"X\x80: b",
    "no colon": b"X",
    "parenthesis in name": b"X(: 1",
    "quote in name": b'X": 1',
    "at in name": b"X@: 1",
    "brackets in name": b"[X]: 1",
    "slash in name": b"X/Y: 1",
    "name of 256 bytes": b"X" * 256 + b": 1",
    "name of 65,536 bytes": b"X" * 65_536 + b": 1",
    "Content_Length": b"Content_Length: 5",
    "content_length": b"content_length: 5",
    "Transfer_Encoding": b"Transfer_Encoding: chunked",
    "Transfer_encoding beside a length": b"Transfer_encoding: chunked\r\nContent-Length: 5",
    "two equal lengths": b"Content-Length: 5\r\nContent-Length: 5",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6",
    "two lengths, spelled differently": b"Content-Length: 5\r\ncontent-length: 5",
    "length then encoding": b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    "encoding then length": b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    "length with space before colon": b"Content-Length : 5",
    "encoding with space before colon": b"Transfer-Encoding : chunked",
    "encoding with tab before colon": b"Transfer-Encoding\t: chunked",
    "two encodings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "two encodings, one unknown": b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked",
    "two encodings, last unknown": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "upgrade with a length": b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5",
    "upgrade with chunks": b"Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked",
    "ignored upgrade with a length": b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 5",
}

HEADS_REFUSED = {
    "leading space": (b" GET / HTTP/1.1", Code.METHOD_UNKNOWN),
    "method in lower case": (b"get / HTTP/1.1", Code.METHOD_UNKNOWN),
    "unknown method": (b"FOO / HTTP/1.1", Code.METHOD_UNKNOWN),
    "tab after method": (b"GET\t/ HTTP/1.1", Code.METHOD_UNKNOWN),
    "CONNECT with authority": (b"CONNECT a.test:443 HTTP/1.1", Code.METHOD_UNKNOWN),
    "CONNECT with path": (b"CONNECT / HTTP/1.1", Code.METHOD_UNKNOWN),
    "RTSP": (b"SETUP / RTSP/1.0", Code.METHOD_UNKNOWN),
    "ICE": (b"GET / ICE/1.0", Code.BAD_REQUEST),
    "method of RTSP in HTTP": (b"DESCRIBE / HTTP/1.1", Code.BAD_REQUEST),
    "PRI with HTTP/1.1": (b"PRI * HTTP/1.1", Code.BAD_REQUEST),
    "space after version": (b"GET / HTTP/1.1 ", Code.BAD_REQUEST),
    "tab in line": (b"GET /\t HTTP/1.1", Code.BAD_REQUEST),
    "no version": (b"GET /", Code.VERSION_UNSUPPORTED),
    "HTTP/0.9": (b"GET / HTTP/0.9", Code.VERSION_UNSUPPORTED),
    "HTTP/2.0": (b"GET / HTTP/2.0", Code.VERSION_UNSUPPORTED),
    "HTTP/1.2": (b"GET / HTTP/1.2", Code.BAD_REQUEST),
    "HTTP/3.0": (b"GET / HTTP/3.0", Code.BAD_REQUEST),
    "HTTP/1": (b"GET / HTTP/1", Code.BAD_REQUEST),
    "HTTP/1.10": (b"GET / HTTP/1.10", Code.BAD_REQUEST),
    "HTTP/01.1": (b"GET / HTTP/01.1", Code.BAD_REQUEST),
    "http/1.1": (b"GET / http/1.1", Code.BAD_REQUEST),
    "HTTP/1,1": (b"GET / HTTP/1,1", Code.BAD_REQUEST),
    "fragment": (b"GET /a#b HTTP/1.1", Code.BAD_REQUEST),
    "fragment in absolute form": (b"GET http://a.test/#b HTTP/1.1", Code.BAD_REQUEST),
    "high byte in target": (b"GET /\x80 HTTP/1.1", Code.BAD_REQUEST),
    "control in target": (b"GET /\x01 HTTP/1.1", Code.BAD_REQUEST),
    "NUL in target": (b"GET /\x00 HTTP/1.1", Code.BAD_REQUEST),
    "DEL in target": (b"GET /\x7f HTTP/1.1", Code.BAD_REQUEST),
    "relative target": (b"GET x HTTP/1.1", Code.BAD_REQUEST),
    "authority as target": (b"GET a.test:80 HTTP/1.1", Code.BAD_REQUEST),
    "asterisk with GET": (b"GET * HTTP/1.1", Code.BAD_REQUEST),
    "another host in the target": (b"GET http://b.test/ HTTP/1.1", Code.BAD_REQUEST),
    "another scheme": (b"GET ftp://a.test/ HTTP/1.1", Code.BAD_REQUEST),
    "user in the target": (b"GET http://u@a.test/ HTTP/1.1", Code.BAD_REQUEST),
    "no host in the target": (b"GET http:/// HTTP/1.1", Code.BAD_REQUEST),
}

HOSTS_REFUSED = [
    b"",
    b" ",
    b"a b",
    b"a.test ",
    b"a.test, b.test",
    b"a.test:",
    b"a.test:port",
    b"a.test:123456",
    b"a.test:80:80",
    b"a.test/",
    b"http://a.test",
    b"u@a.test",
    b"a.test#",
    b"a.test?x",
    b"a\\b",
    b"-a.test",
    b".a.test",
    b".",
    b"..",
    b"[::1",
    b"::1]",
    b"[::1]x",
    b"[]",
    b"[g::1]",
    b"a_test:80x",
    b"\xc3\xa4.test",
    b"a%2etest",
    b"a" * 262,
    b"a\tb",
    b"*",
]

CHUNKS_REFUSED = {
    "size with 0x": b"0x5\r\nabcde\r\n0\r\n\r\n",
    "size with sign": b"+5\r\nabcde\r\n0\r\n\r\n",
    "negative size": b"-5\r\nabcde\r\n0\r\n\r\n",
    "size not hexadecimal": b"g\r\nabcde\r\n0\r\n\r\n",
    "no size": b"\r\nabcde\r\n0\r\n\r\n",
    "space before size": b" 5\r\nabcde\r\n0\r\n\r\n",
    "space after size": b"5 \r\nabcde\r\n0\r\n\r\n",
    "size with underscore": b"5_\r\nabcde\r\n0\r\n\r\n",
    "LF alone after size": b"5\nabcde\r\n0\r\n\r\n",
    "CR alone after size": b"5\rabcde\r\n0\r\n\r\n",
    "LF alone after data": b"5\r\nabcde\n0\r\n\r\n",
    "other bytes in place of CRLF": b"5\r\nabcdeXX0\r\n\r\n",
    "data longer than said": b"5\r\nabcdefg\r\n0\r\n\r\n",
    "data shorter than said": b"5\r\nabc\r\n0\r\n\r\n",
    "17 digits, overflow": b"10000000000000005\r\nabcde\r\n0\r\n\r\n",
    "18 digits": b"ffffffffffffffffff\r\nabcde\r\n0\r\n\r\n",
    "LF in an extension": b"5;a=b\nc\r\nabcde\r\n0\r\n\r\n",
    "LF in a quoted extension": b'5;a="b\nc"\r\nabcde\r\n0\r\n\r\n',
    "CR in an extension": b"5;a\rb\r\nabcde\r\n0\r\n\r\n",
    "NUL in an extension": b"5;a\x00\r\nabcde\r\n0\r\n\r\n",
    "Host as a trailer": b"5\r\nabcde\r\n0\r\nHost: b.test\r\n\r\n",
    "length with an underscore as a trailer": b"5\r\nabcde\r\n0\r\nContent_Length: 3\r\n\r\n",
    "trailer's name of 256 bytes": b"5\r\nabcde\r\n0\r\n" + b"X" * 256 + b": a\r\n\r\n",
    "101 trailers": b"5\r\nabcde\r\n0\r\n" + b"X: a\r\n" * 101 + b"\r\n",
    "extensions of 17 KiB in one read": b"5;" + b"a" * 17_000 + b"\r\nabcde\r\n0\r\n\r\n",
    "17 KiB of extensions in one read, a chunk each": b"1;abcdefghijklmnop\r\nx\r\n" * 1000 + b"0\r\n\r\n",
    "length as a trailer": b"5\r\nabcde\r\n0\r\nContent-Length: 3\r\n\r\n",
    "encoding as a trailer": b"5\r\nabcde\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "obs-fold in a trailer": b"5\r\nabcde\r\n0\r\nX: a\r\n b\r\n\r\n",
    "LF alone after a trailer": b"5\r\nabcde\r\n0\r\nX: a\n\r\n",
    "LF alone at the end": b"5\r\nabcde\r\n0\n\n",
    "space before colon in a trailer": b"5\r\nabcde\r\n0\r\nX : a\r\n\r\n",
}


@pytest.mark.parametrize("value", LENGTHS_REFUSED)
def test_a_content_length_that_is_not_plain_digits_below_2_to_the_63_is_refused(value: bytes) -> None:
    assert read_requests(post(b"Content-Length: " + value)).events == ["refused WD01"]


@pytest.mark.parametrize("value", ENCODINGS_REFUSED)
def test_a_transfer_encoding_other_than_chunked_is_refused(value: bytes) -> None:
    raw = post(b"Transfer-Encoding: " + value, body=b"5\r\nabcde\r\n0\r\n\r\n")
    assert read_requests(raw).events == ["refused WD01"]
    assert read_requests(post(b"Content-Length: 5", b"transfer-encoding: " + value)).events == ["refused WD01"]


@pytest.mark.parametrize("name", FIELDS_REFUSED)
def test_a_field_that_two_parsers_could_read_differently_is_refused(name: str) -> None:
    got = read_requests(post(FIELDS_REFUSED[name]) + NEXT)
    assert got.error is not None and got.error.code in (Code.BAD_REQUEST, Code.HEAD_TOO_LARGE)
    assert got.error.source is Source.DOWNSTREAM and got.events == [f"refused {got.error.code.value}"]


@pytest.mark.parametrize("name", HEADS_REFUSED)
def test_a_request_line_in_no_known_form_is_refused(name: str) -> None:
    line, code = HEADS_REFUSED[name]
    assert read_requests(message(line) + NEXT).events == [f"refused {code.value}"]


@pytest.mark.parametrize("host", HOSTS_REFUSED)
def test_a_host_that_is_no_authority_is_refused(host: bytes) -> None:
    assert read_requests(message(GET, host=b"Host: " + host)).events == ["refused WD01"]


@pytest.mark.parametrize("name", CHUNKS_REFUSED)
def test_a_chunked_body_with_other_framing_is_refused_after_its_head(name: str) -> None:
    got = read_requests(chunked(CHUNKS_REFUSED[name]) + NEXT)
    assert got.events[0] == "POST / a.test chunked" and got.events[-1] == "refused WD01"
    assert "end" not in got.events and NEXT_EVENT not in got.events


@pytest.mark.parametrize(
    "raw",
    [
        message(GET, host=None),
        message(b"GET / HTTP/1.0", host=None),
        message(GET, b"Host: a.test"),
        message(GET, b"host: b.test"),
        message(b"GET http://a.test/ HTTP/1.1", host=None),
    ],
)
def test_exactly_one_host_is_asked_for_in_every_version(raw: bytes) -> None:
    assert read_requests(raw).events == ["refused WD01"]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Code.BAD_REQUEST),  # the preface of HTTP/2
        (b"\x16\x03\x01\x02\x00\x01", Code.METHOD_UNKNOWN),  # a TLS hello on a plain port
        (b"\x00", Code.METHOD_UNKNOWN),
        (b"\xff" * 100, Code.METHOD_UNKNOWN),
        (b"SSH-2.0-x\r\n", Code.METHOD_UNKNOWN),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + NEXT, Code.METHOD_UNKNOWN),
        (b"GET / HTTP/1.1\nHost: a.test\n\n", Code.BAD_REQUEST),
        (b"GET / HTTP/1.1\rHost: a.test\r\r", Code.BAD_REQUEST),
        (b"GET / HTTP/1.1\r\nHost: a.test\n\r\n", Code.BAD_REQUEST),
        (b"GET / HTTP/1.1\r\n\r\n", Code.BAD_REQUEST),
        (b"GET\r\n\r\n", Code.METHOD_UNKNOWN),
        (b"HTTP/1.1 200 OK\r\n\r\n", Code.METHOD_UNKNOWN),
    ],
)
def test_bytes_that_are_no_request_are_refused(raw: bytes, code: Code) -> None:
    assert read_requests(raw).events == [f"refused {code.value}"]


VERSIONS_AND_FRAMING = [
    (b"HTTP/1.0", b"Transfer-Encoding: chunked", "refused WD01"),
    (b"HTTP/1.0", b"Transfer-Encoding: chunked\r\nConnection: keep-alive", "refused WD01"),
    (b"HTTP/0.9", b"Transfer-Encoding: chunked", "refused WD05"),
    (b"HTTP/0.9", b"Content-Length: 5", "refused WD05"),
    (b"HTTP/2.0", b"Transfer-Encoding: chunked", "refused WD05"),
    (b"HTTP/2.0", b"Content-Length: 5", "refused WD05"),
    (b"HTTP/1.2", b"Transfer-Encoding: chunked", "refused WD01"),
    (b"HTTP/1.2", b"Content-Length: 5", "refused WD01"),
    (b"HTTP/1.0", b"Content-Length: 5", "POST / a.test 5 1.0 last"),
    (b"HTTP/1.0", b"X: no framing at all", "POST / a.test 0 1.0 last"),  # a body is never delimited by the close
    (b"HTTP/1.1", b"X: no framing at all", "POST / a.test 0"),
    (b"HTTP/1.1", b"Connection: close", "POST / a.test 0 last"),
]


@pytest.mark.parametrize(
    "fields",
    [
        (b"Connection: keep-alive", b"Connection: close"),
        (b"Connection: close", b"Connection: keep-alive"),
        (b"Connection: keep-alive, Close",),
        (b"Connection: CLOSE , keep-alive",),
    ],
)
def test_close_goes_before_keep_alive_in_every_version(fields: tuple[bytes, ...]) -> None:
    for version, mark in ((b"HTTP/1.1", ""), (b"HTTP/1.0", " 1.0")):
        assert read_requests(message(b"GET / " + version, *fields)).events == [f"GET / a.test 0{mark} last"]


@pytest.mark.parametrize(("version", "field", "first"), VERSIONS_AND_FRAMING)
def test_versions_and_body_framing_go_together_or_are_refused(version: bytes, field: bytes, first: str) -> None:
    assert read_requests(message(b"POST / " + version, field, body=b"abcde")).events[0] == first


ACCEPTED: dict[str, tuple[bytes, list[str]]] = {
    "plain": (message(GET), ["GET / a.test 0"]),
    "blank lines before": (b"\r\n\r\n" + message(GET), ["GET / a.test 0"]),
    "two spaces after the method": (message(b"GET  / HTTP/1.1"), ["GET / a.test 0"]),
    "two spaces before the version": (message(b"GET /  HTTP/1.1"), ["GET / a.test 0"]),
    "QUERY": (message(b"QUERY / HTTP/1.1"), ["QUERY / a.test 0"]),
    "two requests": (message(GET) + NEXT, ["GET / a.test 0", NEXT_EVENT]),
    "OPTIONS *": (message(b"OPTIONS * HTTP/1.1"), ["OPTIONS * a.test 0"]),
    "absolute form": (message(b"GET http://a.test/x?y HTTP/1.1"), ["GET /x?y a.test 0"]),
    "absolute form, other case and port": (message(b"GET HTTPS://A.test:81/x HTTP/1.1"), ["GET /x a.test 0"]),
    "absolute form, query alone": (message(b"GET http://a.test?y HTTP/1.1"), ["GET /?y a.test 0"]),
    "absolute form, no path": (message(b"GET http://a.test HTTP/1.1"), ["GET / a.test 0"]),
    "target with two slashes": (message(b"GET //evil.test/ HTTP/1.1"), ["GET //evil.test/ a.test 0"]),
    "target with a URL in its query": (
        message(b"GET /?u=http://b.test/ HTTP/1.1"),
        ["GET /?u=http://b.test/ a.test 0"],
    ),
    "dots in the target stay": (message(b"GET /a/../b%2e HTTP/1.1"), ["GET /a/../b%2e a.test 0"]),
    "empty value": (message(GET, b"X: "), ["GET / a.test 0"]),
    "high bytes in a value": (message(GET, b"X: \xff\x80"), ["GET / a.test 0"]),
    "tab in a value": (message(GET, b"X: a\tb"), ["GET / a.test 0"]),
    "name of 255 bytes": (message(GET, b"X" * 255 + b": 1"), ["GET / a.test 0"]),
    "length": (post(b"Content-Length: 5") + NEXT, ["POST / a.test 5", "body abcde", "end", NEXT_EVENT]),
    "length with blanks": (post(b"Content-Length:\t5 \t"), ["POST / a.test 5", "body abcde", "end"]),
    "length with zeros": (post(b"Content-Length: 0005"), ["POST / a.test 5", "body abcde", "end"]),
    "length zero": (post(b"Content-Length: 0", body=NEXT), ["POST / a.test 0", NEXT_EVENT]),
    "length past 2^32": (post(b"Content-Length: 4294967301"), ["POST / a.test 4294967301", "body abcde"]),
    "largest length": (
        post(b"Content-Length: 9223372036854775807"),
        ["POST / a.test 9223372036854775807", "body abcde"],
    ),
    "GET with a body": (
        message(GET, b"Content-Length: 5", body=b"abcde" + NEXT),
        ["GET / a.test 5", "body abcde", "end", NEXT_EVENT],
    ),
    "CRLF after a body": (
        post(b"Content-Length: 5", body=b"abcde\r\n" + NEXT),
        ["POST / a.test 5", "body abcde", "end", NEXT_EVENT],
    ),
    "chunks": (chunked(b"5\r\nabcde\r\n0\r\n\r\n" + NEXT), ["POST / a.test chunked", "body abcde", "end", NEXT_EVENT]),
    "chunked in capitals, after a tab": (
        post(b"Transfer-Encoding:\tCHUNKED", body=b"0\r\n\r\n"),
        ["POST / a.test chunked", "end"],
    ),
    "chunk extension": (
        chunked(b'5;a=b;c="d"\r\nabcde\r\n0;e\r\n\r\n'),
        ["POST / a.test chunked", "body abcde", "end"],
    ),
    "chunk size with zeros": (
        chunked(b"00000000000000005\r\nabcde\r\n0\r\n\r\n"),
        ["POST / a.test chunked", "body abcde", "end"],
    ),
    "trailers, apart from the head": (
        chunked(b"0\r\nX-Sum: 1\r\nCookie: b.test\r\n\r\n" + NEXT),
        ["POST / a.test chunked", "end X-Sum=1 Cookie=b.test", NEXT_EVENT],
    ),
    "an upgrade in a trailer is none": (
        chunked(b"0\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + NEXT),
        ["POST / a.test chunked", "end Connection=upgrade Upgrade=x", NEXT_EVENT],
    ),
    "upgrade": (
        message(GET, b"Connection: upgrade", b"Upgrade: websocket", body=b"\x81\x00"),
        ["GET / a.test 0 upgrade=websocket", "raw \x81\x00"],
    ),
    "upgrade, what follows is no request": (
        message(GET, b"Connection: keep-alive, Upgrade", b"Upgrade: websocket", body=NEXT),
        ["GET / a.test 0 upgrade=websocket", "raw " + NEXT.decode()],
    ),
    "h2c is not passed on": (
        message(GET, b"Connection: upgrade", b"Upgrade: h2c", body=NEXT),
        ["GET / a.test 0", NEXT_EVENT],
    ),
    "H2C neither": (message(GET, b"Connection: upgrade", b"Upgrade: H2C ,", body=NEXT), ["GET / a.test 0", NEXT_EVENT]),
    "nor in a list": (
        message(GET, b"Connection: upgrade", b"Upgrade: h2c, websocket"),
        ["GET / a.test 0 upgrade=websocket"],
    ),
    "nor in a second field": (
        message(GET, b"Connection: upgrade", b"Upgrade: websocket", b"Upgrade: h2c"),
        ["GET / a.test 0 upgrade=websocket"],
    ),
    "Upgrade without Connection": (message(GET, b"Upgrade: websocket", body=NEXT), ["GET / a.test 0", NEXT_EVENT]),
    "Connection without Upgrade": (message(GET, b"Connection: upgrade", body=NEXT), ["GET / a.test 0", NEXT_EVENT]),
    "upgrade in HTTP/1.0": (
        message(b"GET / HTTP/1.0", b"Connection: upgrade, keep-alive", b"Upgrade: websocket", body=NEXT),
        ["GET / a.test 0 1.0", NEXT_EVENT],
    ),
    "HTTP/1.0": (message(b"GET / HTTP/1.0"), ["GET / a.test 0 1.0 last"]),
    "HTTP/1.0 kept": (
        message(b"GET / HTTP/1.0", b"Connection: keep-alive", body=NEXT),
        ["GET / a.test 0 1.0", NEXT_EVENT],
    ),
    "nothing after close": (message(GET, b"Connection: close", body=NEXT), ["GET / a.test 0 last", "refused WD01"]),
    "nothing after close with a body": (
        post(b"Connection: close", b"Content-Length: 5", body=b"abcde" + NEXT),
        ["POST / a.test 5 last", "body abcde", "end", "refused WD01"],
    ),
    "nothing after HTTP/1.0": (message(b"GET / HTTP/1.0", body=NEXT), ["GET / a.test 0 1.0 last", "refused WD01"]),
    "a blank line after close": (
        post(b"Connection: close", b"Content-Length: 5", body=b"abcde\r\n"),
        ["POST / a.test 5 last", "body abcde", "end"],
    ),
    "expect": (post(b"Expect: 100-Continue", b"Content-Length: 5"), ["POST / a.test 5 expects", "body abcde", "end"]),
    "expect without a body": (message(GET, b"Expect: 100-continue", body=NEXT), ["GET / a.test 0 expects", NEXT_EVENT]),
    "expect in HTTP/1.0 is ignored": (
        message(b"POST / HTTP/1.0", b"Expect: 100-continue", b"Content-Length: 5", body=b"abcde"),
        ["POST / a.test 5 1.0 last", "body abcde", "end"],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_but_clear_requests_come_out_as_exactly_these_events(name: str) -> None:
    raw, events = ACCEPTED[name]
    assert read_requests(raw).events == events


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_same_events_come_byte_by_byte(name: str) -> None:
    raw, events = ACCEPTED[name]
    assert read_requests(*(raw[at : at + 1] for at in range(len(raw)))).events == events


@pytest.mark.parametrize("value", [b"100-continue, x", b"x", b"", b"200-ok", b"100-continue;q=1", b"100-continue x"])
def test_an_expectation_we_do_not_know_is_refused_as_such(value: bytes) -> None:
    assert read_requests(post(b"Expect: " + value, b"Content-Length: 5")).events == ["refused WD10"]


def test_expect_does_not_reach_the_machine_from_http_1_0() -> None:
    got = read_requests(message(b"POST / HTTP/1.0", b"Expect: 100-continue", b"X: 1"))
    assert got.heads[0].fields == [(b"Host", b"a.test"), (b"X", b"1")]


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        (b"a.test", "a.test"), (b"A.Test:8080", "a.test"), (b"a.test.", "a.test"), (b"127.0.0.1:80", "127.0.0.1"),
        (b"[::1]", "[::1]"), (b"[2001:DB8::1]:443", "[2001:db8::1]"), (b"my_app.test", "my_app.test"), (b"a", "a"),
        (b"xn--bcher-kva.test", "xn--bcher-kva.test"), (b"a" * 255, "a" * 255),
    ],
)  # fmt: skip
def test_a_host_is_lower_case_without_port_and_trailing_dot(authority: bytes, host: str) -> None:
    assert normalize_host(authority) == host
    assert read_requests(message(GET, host=b"Host: " + authority)).heads[0].host == host


def test_fields_keep_order_spelling_and_repetition() -> None:
    got = read_requests(message(GET, b"b: 1", b"A: 2", b"b: 3", b"Cookie: x", b"Cookie: y"))
    assert got.heads[0].fields == [
        (b"Host", b"a.test"), (b"b", b"1"), (b"A", b"2"), (b"b", b"3"), (b"Cookie", b"x"), (b"Cookie", b"y"),
    ]  # fmt: skip


def test_names_that_connection_lists_are_reported() -> None:
    got = read_requests(message(GET, b"Connection: close, X-One", b"Connection: x-two,, Keep-Alive"))
    assert got.heads[0].listed_hops == {b"x-one", b"x-two"}


# --- bounds


def test_each_bound_on_a_head_has_its_code() -> None:
    limits = Limits(max_head_bytes=1000, max_headers=4, max_target_bytes=100)

    def code(raw: bytes) -> Code | None:
        error = read_requests(raw, limits=limits).error
        return error.code if error is not None else None

    assert code(message(b"GET /" + b"a" * 99 + b" HTTP/1.1")) is None
    assert code(message(b"GET /" + b"a" * 100 + b" HTTP/1.1")) is Code.TARGET_TOO_LONG
    assert code(message(GET, b"A: 1", b"B: 2", b"C: 3")) is None
    assert code(message(GET, b"A: 1", b"B: 2", b"C: 3", b"D: 4")) is Code.HEAD_TOO_LARGE
    assert code(message(GET, b"A: " + b"x" * 900)) is None
    assert code(message(GET, b"A: " + b"x" * 1000)) is Code.HEAD_TOO_LARGE


def test_the_bound_on_a_head_holds_for_one_that_came_with_the_request_before_it() -> None:
    limits = Limits(max_head_bytes=1000)
    large = message(GET, b"A: " + b"x" * 1000)
    assert read_requests(NEXT + large, limits=limits).events == [NEXT_EVENT, "refused WD02"]
    body = post(b"Content-Length: 5")
    assert read_requests(body + large, limits=limits).events[-1] == "refused WD02"
    assert read_requests(body[:-2], body[-2:] + large, limits=limits).events[-1] == "refused WD02"
    assert read_requests(NEXT * 100, limits=limits).error is None


ENDLESS = {
    "blank lines": (b"", b"\r\n"),
    "target": (b"GET /", b"a"),
    "field name": (message(GET)[:-2], b"a"),
    "field value": (message(GET)[:-2] + b"X: ", b"a"),
    "fields": (message(GET)[:-2], b"X: y\r\n"),
    "cookies": (message(GET)[:-2], b"Cookie: " + b"a=b; " * 100 + b"\r\n"),
    "dropped fields": (message(GET)[:-2], b"X-Forwarded-For: y\r\n"),
    "Connection fields": (message(GET)[:-2], b"Connection: a\r\n"),
    "Upgrade fields": (message(GET)[:-2], b"Upgrade: a\r\n"),
    "chunk size": (chunked(b""), b"0"),
    "chunk extension": (chunked(b"5;"), b"a"),
    "chunk extensions, byte after byte": (chunked(b""), b"1;" + b"a" * 1000 + b"\r\nx\r\n"),
    "trailer name": (chunked(b"0\r\n"), b"a"),
    "trailer value": (chunked(b"0\r\nX: "), b"a"),
    "trailers": (chunked(b"0\r\n"), b"X: y\r\n"),
    "trailer after a large body": (chunked(b"100000\r\n" + b"b" * 0x100000 + b"\r\n0\r\nX: "), b"a"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_refused_within_some_130_kb(name: str) -> None:
    start, more = ENDLESS[name]
    pieces = [start] + [more * (4096 // len(more) + 1)] * 33
    got = read_requests(*pieces)
    assert got.error is not None
    assert got.error.code in (Code.HEAD_TOO_LARGE, Code.TARGET_TOO_LONG, Code.BAD_REQUEST)


def test_one_byte_chunks_without_extensions_may_go_on_for_ever() -> None:
    piece = b"1\r\na\r\n" * 1000
    assert read_requests(chunked(b""), *([piece] * 200), b"0\r\n\r\n").events[-1] == "end"


def test_an_endless_body_of_known_length_is_passed_on_not_kept() -> None:
    got = read_requests(post(b"Content-Length: 1000000", body=b""), *([b"x" * 10_000] * 100), NEXT)
    assert len(got.bodies[0]) == 1_000_000 and got.events[-2:] == ["end", NEXT_EVENT]


def test_spellings_remembered_are_bounded_in_count_and_size() -> None:
    rules = FieldRules(lambda name: False)
    for number in range(10_000):
        rules.judge(b"x-%d" % number)
        rules.judge(b"y" * 300 + b"%d" % number)
    assert len(rules.kinds) <= 4096 and max(map(len, rules.kinds)) <= 255
    assert PASS_ALL.judge(b"") == PASS_ALL.judge(b"z" * 256)


def test_hosts_remembered_are_bounded() -> None:
    for number in range(20_000):
        normalize_host(b"h%d.test" % number)
    assert len(http1._hosts) <= 8192


def test_an_error_of_the_sink_is_not_taken_for_the_clients() -> None:
    class Faulty(Seen):
        def on_body(self, data: bytes) -> None:
            raise ZeroDivisionError

    with pytest.raises(Exception) as caught:
        RequestReader(Faulty(), Limits()).feed(post(b"Content-Length: 5"))
    assert not isinstance(caught.value, ProxyError)

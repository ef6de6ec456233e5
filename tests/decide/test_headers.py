"""decide/headers.py: which fields pass, which end here, which are ours, in both directions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.decide.headers import (
    ResponseRules,
    identity_fields,
    interim_head,
    redirect_target,
    request_head,
    response_framing,
    response_head,
    switching_head,
    trailer_block,
)
from proxy.wire.http1 import CHUNKED, UNTIL_CLOSE, ResponseHead
from tests.wire.http1_support import read_requests, read_responses

ID = b"01ARZ3NDEKTSV4RRFFQ69G5FAV"
TRACE = b"00-0123456789abcdef0123456789abcdef-0123456789abcdef-00"
IDENTITY = identity_fields("192.0.2.7", "198.51.100.1", 443, True, "ams", 1, keep=True)
PLAIN = ResponseRules(False, ())
PRISTINE = ResponseRules(True, ())

Fields = list[tuple[bytes, bytes]]


def split(head: bytes) -> tuple[bytes, Fields]:
    assert head.endswith(b"\r\n\r\n")
    line, *rest = head[:-4].split(b"\r\n")
    fields = []
    for field in rest:
        name, colon, value = field.partition(b": ")
        assert colon
        fields.append((name, value))
    return line, fields


def sent_on(*fields: bytes, line: bytes = b"GET /x HTTP/1.1") -> tuple[bytes, Fields]:
    """What a machine gets for a request with these fields."""
    seen = read_requests(b"\r\n".join([line, b"Host: a.test", *fields, b"", b""]))
    assert seen.error is None and len(seen.heads) == 1
    return split(request_head(seen.heads[0], IDENTITY, ID, 1_700_000_000_123_456, TRACE))


def answer(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK", head_only: bool = False) -> ResponseHead:
    raw = b"\r\n".join([line, *fields, b"", b""])
    return read_responses(raw, head_only=head_only).responses[0]


def sent_back(*fields: bytes, rules: ResponseRules = PLAIN, framing: bytes = b"") -> Fields:
    return split(response_head(answer(*fields), rules, ID, framing, b"wakefront", b""))[1]


# --- requests

OURS = {
    b"fly-client-ip": b"192.0.2.7",
    b"x-forwarded-for": b"192.0.2.7, 198.51.100.1",
    b"fly-forwarded-proto": b"https",
    b"x-forwarded-proto": b"https",
    b"fly-forwarded-ssl": b"on",
    b"x-forwarded-ssl": b"on",
    b"fly-forwarded-port": b"443",
    b"x-forwarded-port": b"443",
    b"fly-region": b"ams",
    b"via": b"1.1 wakefront",
    b"fly-request-id": ID,
    b"x-request-start": b"t=1700000000123456",
    b"fly-traceparent": TRACE,
}


def test_a_machine_gets_the_clients_fields_in_order_and_then_ours() -> None:
    line, fields = sent_on(b"Accept: */*", b"X-B: 1", b"x-b: 2")
    assert line == b"GET /x HTTP/1.1"
    assert fields[:4] == [(b"Host", b"a.test"), (b"Accept", b"*/*"), (b"X-B", b"1"), (b"x-b", b"2")]
    assert dict(fields[4:]) == OURS and len(fields[4:]) == len(OURS)


def test_identity_tells_a_plain_connection_its_version_and_that_it_is_not_kept() -> None:
    _, fields = split(b"x\r\n" + identity_fields("::1", "::2", 8080, False, "fra", 0, keep=False) + b"\r\n")
    assert dict(fields) == {
        b"fly-client-ip": b"::1", b"x-forwarded-for": b"::1, ::2", b"fly-forwarded-proto": b"http",
        b"x-forwarded-proto": b"http", b"fly-forwarded-ssl": b"off", b"x-forwarded-ssl": b"off",
        b"fly-forwarded-port": b"8080", b"x-forwarded-port": b"8080", b"fly-region": b"fra", b"via": b"1.0 wakefront",
        b"connection": b"close",
    }  # fmt: skip


TRUST = [
    b"Fly-Client-IP", b"Fly-Forwarded-Port", b"Fly-Forwarded-Proto", b"Fly-Forwarded-SSL", b"Fly-Region",
    b"Fly-Request-Id",
    b"Fly-Replay-Src", b"Fly-Replay-Failed", b"Fly-Replay-Cache-Status", b"Fly-Preferred-Instance-Unavailable",
    b"Fly-Traceparent", b"Fly-Tracestate", b"Fly-Replay", b"Fly-Anything", b"X-Forwarded-For", b"X-Forwarded-Proto",
    b"X-Forwarded-Port", b"X-Forwarded-SSL", b"X-Forwarded-Host", b"X-Forwarded-Prefix", b"X-Forwarded-Server",
    b"Forwarded", b"X-Real-IP", b"X-Client-IP", b"X-Cluster-Client-IP", b"X-Original-Forwarded-For", b"X-Request-Start",
    b"X-Original-Host", b"X-Original-URL", b"X-Rewrite-URL", b"Wakefront-Internal", b"Wakefront-Error",
    b"X-Original-Proto", b"X-Original-Port", b"Client-IP", b"Forwarded-For", b"X-Forwarded", b"X-Remote-IP",
    b"X-Remote-Addr", b"Proxy-Client-IP", b"WL-Proxy-Client-IP", b"X-ProxyUser-IP", b"Front-End-Https", b"X-URL-Scheme",
    b"X-Scheme", b"Proxy",
]  # fmt: skip
HOP_BY_HOP = [
    b"Keep-Alive", b"Proxy-Connection", b"TE", b"Trailer", b"HTTP2-Settings", b"Proxy-Authenticate",
    b"Proxy-Authorization",
]  # fmt: skip


def spellings(name: bytes) -> list[bytes]:
    under = name.replace(b"-", b"_")
    one = name.replace(b"-", b"_", 1)
    return [name, name.lower(), name.upper(), under, under.upper(), one, name.swapcase()]


@pytest.mark.parametrize("name", TRUST + HOP_BY_HOP)
def test_what_a_client_may_not_say_is_dropped_in_every_spelling(name: bytes) -> None:
    for spelling in spellings(name):
        _, fields = sent_on(spelling + b": 6.6.6.6")
        assert all(value != b"6.6.6.6" for _, value in fields)


@pytest.mark.parametrize("name", [b"CF-Connecting-IP", b"True-Client-IP", b"Fastly-Client-IP"])
def test_what_a_cdn_before_us_says_of_the_client_passes(name: bytes) -> None:
    _, fields = sent_on(name + b": 6.6.6.6")
    assert (name, b"6.6.6.6") in fields


@pytest.mark.parametrize(
    "name",
    [
        b"Fly-Prefer-Region", b"Fly-Force-Region", b"Fly-Prefer-Instance-Id", b"Fly-Force-Instance-Id",
        b"Fly-Replay-Cache-Control",
    ],
)  # fmt: skip
def test_the_fly_fields_that_are_a_clients_to_send_pass_spelled_with_dashes_alone(name: bytes) -> None:
    assert (name, b"v") in sent_on(name + b": v")[1]
    assert (name.lower(), b"v") in sent_on(name.lower() + b": v")[1]
    assert b"v" not in dict(sent_on(name.replace(b"-", b"_") + b": v")[1]).values()


@pytest.mark.parametrize(
    "name",
    [b"Authorization", b"Cookie", b"X-Flying", b"Flyer-Id", b"X-Forward", b"Accept-Encoding", b"Via", b"x_y", b"DNT"],
)
def test_other_fields_pass_as_they_are(name: bytes) -> None:
    assert (name, b"v") in sent_on(name + b": v")[1]


def test_what_connection_lists_ends_here_but_not_host_nor_what_we_say() -> None:
    _, fields = sent_on(
        b"Connection: X-One, x-two, Host, Fly-Client-IP, close", b"X-One: 1", b"X-TWO: 2", b"X-Three: 3"
    )
    names = [name for name, _ in fields]
    assert b"X-One" not in names and b"X-TWO" not in names and (b"X-Three", b"3") in fields
    assert (b"Host", b"a.test") in fields and (b"fly-client-ip", b"192.0.2.7") in fields and b"Connection" not in names


NAME = st.text("abcdefghijklmnopqrstuvwxyzABCXF-_", min_size=1, max_size=24).map(str.encode)
FRAMING_NAMES = {b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"}


@settings(max_examples=300, deadline=None)
@given(st.lists(NAME | st.sampled_from([s for name in TRUST for s in spellings(name)]), max_size=8))
def test_no_set_of_fields_changes_what_we_say_about_a_client(names: list[bytes]) -> None:
    """Read as CGI reads names, each of our fields is there once, with our value."""
    names = [name for name in names if name.lower().replace(b"_", b"-") not in FRAMING_NAMES | {b"via"}]
    _, fields = sent_on(*(name + b": forged" for name in names))
    for ours, value in OURS.items():
        assert [v for n, v in fields if n.lower().replace(b"_", b"-") == ours] == [value]


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        (b"GET /x HTTP/1.1", b"X: 1", None),
        (b"GET /x HTTP/1.1", b"Content-Length: 0", None),
        (b"DELETE /x HTTP/1.1", b"X: 1", None),
        (b"POST /x HTTP/1.1", b"X: 1", (b"content-length", b"0")),
        (b"PUT /x HTTP/1.1", b"Content-Length: 0", (b"content-length", b"0")),
        (b"PATCH /x HTTP/1.0", b"X: 1", (b"content-length", b"0")),
        (b"POST /x HTTP/1.1", b"Content-Length: 0012", (b"content-length", b"12")),
        (b"GET /x HTTP/1.1", b"Content-Length: 3", (b"content-length", b"3")),
        (b"POST /x HTTP/1.1", b"transfer-encoding: CHUNKED", (b"transfer-encoding", b"chunked")),
    ],
)
def test_a_requests_body_is_framed_by_one_field_of_ours(
    line: bytes, field: bytes, expected: tuple[bytes, bytes] | None
) -> None:
    sent_line, fields = sent_on(field, line=line)
    framing = [pair for pair in fields if pair[0].lower() in (b"content-length", b"transfer-encoding")]
    assert framing == ([expected] if expected else []) and sent_line.endswith(b" HTTP/1.1")


def test_an_upgrade_is_asked_of_the_machine_in_our_words() -> None:
    _, fields = sent_on(b"Connection: keep-alive, Upgrade", b"UPGRADE: WebSocket", b"Sec-WebSocket-Key: k")
    assert fields[:4] == [
        (b"Host", b"a.test"), (b"Sec-WebSocket-Key", b"k"), (b"connection", b"upgrade"), (b"upgrade", b"WebSocket"),
    ]  # fmt: skip


# --- answers


def test_a_client_gets_the_answers_fields_then_ours() -> None:
    fields = sent_back(
        b"Server: app", b"Via: 1.1 app", b"X: 1", b"Set-Cookie: a", b"Set-Cookie: b", b"Content-Length: 0"
    )
    assert fields == [
        (b"Via", b"1.1 app"), (b"X", b"1"), (b"Set-Cookie", b"a"), (b"Set-Cookie", b"b"),
        (b"server", b"wakefront"), (b"via", b"1.1 wakefront"), (b"fly-request-id", ID),
    ]  # fmt: skip


def test_pristine_leaves_the_apps_server_and_adds_nothing() -> None:
    assert sent_back(b"Server: app", b"X: 1", rules=PRISTINE) == [(b"X", b"1"), (b"Server", b"app")]
    assert sent_back(b"X: 1", rules=PRISTINE) == [(b"X", b"1")]


def test_response_rules_remove_set_and_set_several() -> None:
    rules = ResponseRules(
        False, (("X-Gone", None), ("X-Set", ("1",)), ("X-Many", ("1", "2")), ("Fly-Request-Id", None))
    )
    fields = sent_back(b"x-gone: app", b"x-set: app", b"x-many: app", b"X: 1", rules=rules)
    assert fields == [
        (b"X", b"1"), (b"server", b"wakefront"), (b"via", b"1.1 wakefront"),
        (b"X-Set", b"1"), (b"X-Many", b"1"), (b"X-Many", b"2"),
    ]  # fmt: skip


def test_response_rules_may_name_the_server_also_where_pristine() -> None:
    assert sent_back(b"Server: app", rules=ResponseRules(True, (("server", None),))) == []
    assert sent_back(b"Server: app", rules=ResponseRules(True, (("Server", ("mine",)),))) == [(b"Server", b"mine")]
    assert (b"server", b"wakefront") not in sent_back(rules=ResponseRules(False, (("Server", ("mine",)),)))


@pytest.mark.parametrize("name", [*HOP_BY_HOP, b"Transfer-Encoding", b"Content-Length", b"Upgrade", b"Wakefront-Error"])
def test_hop_by_hop_fields_of_an_answer_end_here(name: bytes) -> None:
    value = {b"Transfer-Encoding": b"chunked", b"Content-Length": b"5"}.get(name, b"x")
    assert sent_back(name + b": " + value, rules=PRISTINE) == []


def test_what_an_answers_connection_lists_ends_here() -> None:
    assert sent_back(b"Connection: close, X-Hop", b"x-hop: 1", b"X: 1", rules=PRISTINE) == [(b"X", b"1")]


FRAMES = [
    # answer, HEAD asked, client's minor -> framing, in chunks, must close
    (answer(b"Content-Length: 5"), False, 1, (b"content-length: 5\r\n", False, False)),
    (answer(b"Content-Length: 5"), False, 0, (b"content-length: 5\r\n", False, False)),
    (answer(b"Content-Length: 0"), False, 1, (b"content-length: 0\r\n", False, False)),
    (answer(b"Transfer-Encoding: chunked"), False, 1, (b"transfer-encoding: chunked\r\n", True, False)),
    (answer(b"Transfer-Encoding: chunked"), False, 0, (b"", False, True)),
    (answer(), False, 1, (b"transfer-encoding: chunked\r\n", True, False)),
    (answer(), False, 0, (b"", False, True)),
    (answer(b"Content-Length: 5", head_only=True), True, 1, (b"content-length: 5\r\n", False, False)),
    (answer(b"Transfer-Encoding: chunked", head_only=True), True, 1, (b"", False, False)),
    (answer(head_only=True), True, 0, (b"", False, False)),
    (answer(line=b"HTTP/1.1 204 No"), False, 1, (b"", False, False)),
    (answer(b"Content-Length: 5", line=b"HTTP/1.1 204 No"), False, 1, (b"", False, False)),
    (answer(line=b"HTTP/1.1 304 Same"), False, 1, (b"", False, False)),
    (answer(b"Content-Length: 5", line=b"HTTP/1.1 304 Same"), False, 1, (b"content-length: 5\r\n", False, False)),
    (answer(line=b"HTTP/1.1 103 Early"), False, 1, (b"", False, False)),
]


@pytest.mark.parametrize(("head", "head_only", "minor", "expected"), FRAMES)
def test_an_answers_body_is_framed_for_the_clients_version(
    head: ResponseHead, head_only: bool, minor: int, expected: tuple[bytes, bool, bool]
) -> None:
    assert response_framing(head, head_only, minor) == expected


def test_the_framing_table_knows_each_kind_of_length() -> None:
    assert answer(b"Transfer-Encoding: chunked").length == CHUNKED and answer().length == UNTIL_CLOSE


def test_an_interim_answer_passes_without_hop_by_hop_fields_and_without_ours() -> None:
    head = answer(b"Link: </a>", b"Connection: X-Hop", b"X-Hop: 1", b"Server: app", line=b"HTTP/1.1 103 Early Hints")
    assert interim_head(head) == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


def test_a_switch_names_the_machines_protocol() -> None:
    head = answer(b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Accept: x", line=b"HTTP/1.1 101 S")
    line, fields = split(switching_head(head, PRISTINE, ID, b"wakefront"))
    assert line == b"HTTP/1.1 101 S"
    assert fields == [(b"Sec-WebSocket-Accept", b"x"), (b"connection", b"upgrade"), (b"upgrade", b"websocket")]


# --- trailers and redirects


@pytest.mark.parametrize(
    "name",
    [
        b"Host", b"Authorization", b"Cookie", b"Set-Cookie", b"Content-Type", b"Content-Encoding", b"Content-Range",
        b"Content-Length", b"Transfer-Encoding", b"Connection", b"Upgrade", b"Trailer", b"TE", b"Expect", b"Range",
        b"Cache-Control", b"Max-Forwards", b"Location", b"Fly-Client-IP", b"fly_client_ip", b"X-Forwarded-For",
        b"x_forwarded_for", b"Forwarded", b"Wakefront-Error", b"Keep-Alive", b"content_length", b"set_cookie",
        b"Proxy-Authorization", b"Fly-Replay", b"hOST", b"Fly-Force-Region", b"fly_prefer_region",
    ],
)  # fmt: skip
def test_trailers_that_would_frame_route_or_vouch_are_left_out(name: bytes) -> None:
    assert trailer_block([(name, b"x"), (b"X-Sum", b"1")]) == b"0\r\nX-Sum: 1\r\n\r\n"


def test_a_body_without_trailers_ends_plainly() -> None:
    assert trailer_block([]) == b"0\r\n\r\n" and trailer_block([(b"Host", b"x")]) == b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("authority", "host", "bound", "public", "https", "expected"),
    [
        (b"a.test", "a.test", 80, 80, 443, b"https://a.test/x?y"),
        (b"a.test:80", "a.test", 80, 80, 443, b"https://a.test/x?y"),
        (b"A.test.", "a.test", 80, 80, 443, b"https://a.test/x?y"),
        (b"a.test:8080", "a.test", 8080, 80, 8443, b"https://a.test:8443/x?y"),
        (b"a.test", "a.test", 8080, 80, 8443, b"https://a.test/x?y"),  # reached by the public port, mapped outside
        (b"a.test:8080", "a.test", 8080, 80, 443, b"https://a.test/x?y"),
        (b"a.test:9999", "a.test", 8080, 80, 8443, b"https://a.test/x?y"),
        (b"[::1]:8080", "[::1]", 8080, 80, 8443, b"https://[::1]:8443/x?y"),
    ],
)
def test_a_redirect_goes_to_https_on_the_port_that_the_client_can_reach(
    authority: bytes, host: str, bound: int, public: int, https: int, expected: bytes
) -> None:
    assert redirect_target(authority, host, b"/x?y", bound, public, https) == expected

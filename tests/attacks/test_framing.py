"""A9, A11, A12: versions beside framing, names and numbers at their ends, chunk extensions and trailers.

Each case is refused, or one request reaches the origin, framed by us. What bodies are for is none of it: their bytes
are the same on both legs.
"""

from __future__ import annotations

import itertools

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode, rewritten_once

pytestmark = pytest.mark.slow
HOST = b"Host: web.apps.localhost\r\n"
HIDDEN = b"GET /hidden HTTP/1.1\r\n" + HOST + b"\r\n"
CHUNKED = b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"

# --- A9

REFUSED_VERSIONS = [
    b"HTTP/0.9", b"HTTP/0.0", b"HTTP/1", b"HTTP/1.", b"HTTP/1.2", b"HTTP/1.3", b"HTTP/1.9", b"HTTP/1.10", b"HTTP/1.01",
    b"HTTP/01.1", b"HTTP/1.1.1", b"HTTP/2", b"HTTP/2.0", b"HTTP/2.1", b"HTTP/3", b"HTTP/3.0", b"HTTP/9.9", b"HTTP/10.1",
    b"http/1.1", b"Http/1.1", b"HTTP/1,1", b"HTTP/1.1a", b"HTTP/1.1 ", b"HTTP/1.1\t", b"HTTP /1.1", b"HTTP/ 1.1",
    b"HTTP/-1.1", b"HTTP/+1.1", b"HTTP/1.-1", b"HTTP/1.1\x00", b"HTTP/\xb9.1", b"XTTP/1.1", b"ICE/1.1", b"RTSP/2.0",
    b"HTTPS/1.1", b"HTTP", b"HTTP/", b"HTTP/.1", b"HTTP/1.1 HTTP/1.0", b"",
]  # fmt: skip
FRAMINGS = [
    (b"", b""),
    (b"Content-Length: 0\r\n", b""),
    (b"Content-Length: %d\r\n" % len(HIDDEN), HIDDEN),
    (b"Transfer-Encoding: chunked\r\n", b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"),
    (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + HIDDEN),
    (b"Connection: close\r\n", HIDDEN),
    (b"", HIDDEN),
]
METHODS = [b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"PATCH"]


def test_a_version_that_is_not_ours_is_refused_with_every_framing(node: AttackedNode, attack: Begin) -> None:
    with attack("A9", "versions × framing", node) as run:
        for version, (fields, body), method in itertools.product(REFUSED_VERSIONS, FRAMINGS, METHODS[:2]):
            run.case((version, fields, method))
            data = method + b" /x " + version + b"\r\n" + HOST + fields + b"\r\n" + body
            node.attempt(data, half_close=False).assert_refused(400, 501, 505)
        assert node.origin.take() == []


def test_a_name_of_rtsp_where_http_should_be_changes_nothing_of_the_request(node: AttackedNode, attack: Begin) -> None:
    """llhttp reads RTSP/1.x and gives no sign of it. It is refused, or goes on as HTTP with the framing that it has."""
    with attack("A9", "RTSP/1.x", node) as run:
        for version, (fields, body), method in itertools.product((b"RTSP/1.0", b"RTSP/1.1"), FRAMINGS, METHODS):
            run.case((version, fields, method))
            data = method + b" /x " + version + b"\r\n" + HOST + fields + b"Connection: close\r\n\r\n" + body
            got = node.attempt(data, methods=["GET"])
            seen = node.origin.take()
            assert got.closed and len(got.statuses) <= 2
            assert not seen or (rewritten_once(seen, "/x") and seen[0].head.split(b"\r\n")[0].endswith(b" HTTP/1.1"))


def test_a_line_without_a_version_is_no_request(node: AttackedNode, attack: Begin) -> None:
    with attack("A9", "HTTP/0.9", node) as run:
        for data in (b"GET /x\r\n", b"GET /x\r\n\r\n", b"GET /x \r\n\r\n", b"GET /x\n", b"GET /x\r\n" + HIDDEN):
            run.case(data)
            node.attempt(data).assert_refused(0, 400, 505)
        assert node.origin.take() == []


def test_http_1_0_has_a_length_or_no_body(node: AttackedNode, attack: Begin) -> None:
    """A body is never what comes until the close."""
    with attack("A9", "HTTP/1.0 × framing", node) as run:
        keeps = (b"", b"Connection: keep-alive\r\n", b"Connection: close\r\n", b"Keep-Alive: 5\r\n")
        for (fields, body), keep, method in itertools.product(FRAMINGS, keeps, METHODS):
            run.case((fields, keep, method))
            data = method + b" /x HTTP/1.0\r\n" + HOST + keep + fields + b"\r\n" + body
            is_refused = b"chunked" in fields  # with a body, since nobody knows yet that it is the answer to HEAD
            got = node.attempt(data, methods=[] if is_refused else [method.decode()] * 2)
            seen = node.origin.take()
            if is_refused:
                got.assert_refused(400)
                assert seen == []
            elif b"keep-alive" in keep and b"Content-Length" not in fields and b"close" not in fields and body:
                assert [one.target for one in seen] == ["/x", "/hidden"], "kept by request: what follows is the next"
            else:
                assert rewritten_once(seen, "/x") and got.statuses[0] == 200
                assert seen[0].body == (body if b"Content-Length" in fields else b"")
                assert got.statuses[1:] in ([], [400]), "bytes after a request that ends its connection"
                assert seen[0].head.split(b"\r\n")[0].endswith(b" HTTP/1.1")


def test_a_preface_of_http_2_and_a_hello_of_tls_get_no_further_on_a_plain_port(
    node: AttackedNode, attack: Begin
) -> None:
    with attack("A9", "other protocols on a plain port", node) as run:
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        for data in (preface, preface + settings, preface + HIDDEN, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                     b"\x80\x2e\x01\x00\x02", b"SSH-2.0-x\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + HIDDEN,
                     b"\r\n\r\n\x00\x0d\x0a\x51\x55\x49\x54\x0a" + HIDDEN, b"EHLO x\r\n",
    b"*1\r\n$4\r\nPING\r\n"):  # fmt: skip
            run.case(data[:20])
            node.attempt(data, half_close=False).assert_refused(400, 501, 505)
        h2c = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
        run.case("h2c")
        got = node.attempt(b"GET /x HTTP/1.1\r\n" + HOST + h2c + b"\r\n" + preface + settings)
        (seen,) = node.origin.take()
        assert got.statuses[0] == 200 and got.closed
        assert not seen.all("upgrade") and not seen.all("http2-settings") and preface not in seen.raw


# --- A11

NAMES = [
    b"", b" ", b"\t", b"\x00", b"\x7f", b"\x80", b"\xff", b"X\x00", b"X ", b"X\t", b" X", b"X Y", b"X\x0b", b"X\r",
    b"X\n",
    b"X,", b"X;", b"X/Y", b"X@", b"X(", b"X)", b"X<", b"X>", b"X[", b"X]", b"X{", b"X}", b"X?", b"X=", b"X\\", b'"X"',
    b"X" * 256, b"X" * 300, b"X" * 65_535, b"X" * 65_536, b"X" * 65_537, b"X" * 100_000,
]  # fmt: skip
NUMBERS = [2**31, 2**32, 2**32 + 1, 2**33 + 5, 2**53, 2**53 + 1, 2**59]
TOO_LARGE = [2**63, 2**63 + 1, 2**64 - 1, 2**64, 2**64 + 1, 2**64 + 5, 2**65, 2**128, 10**40, int("9" * 400)]
SIZES = [
    b"1" + b"0" * 16, b"0" * 16 + b"1" + b"0" * 16, b"f" * 16, b"f" * 17, b"f" * 32, b"1" + b"0" * 15 + b"5",
    b"8" + b"0" * 15, b"10000000000000005", b"100000000", b"-1", b"+5", b"0x5", b"5h", b"5.0", b"", b" ", b" 5",
    b"5 ", b"\t5", b"5\t", b"5\x0b", b"\x0b5", b"5\x00", b"\x005", b"5_0", b"\xff", b"G", b"0g", b"5,5", b"5 5",
    b"5\x85",
    b"\xa05", b"\r\n5", b"\n5", b"\r5", b"5\n", b"5\r",
]  # fmt: skip


def test_a_field_without_a_proper_name_is_refused(node: AttackedNode, attack: Begin) -> None:
    with attack("A11", "names of fields", node) as run:
        for name, at, rest in itertools.product(NAMES, ("first", "last"), (b": y\r\n", b":\r\n", b"\r\n")):
            run.case((name[:20], len(name), at, rest))
            field = name + rest
            if field in (b"\r\n",):
                continue  # the end of the head
            fields = field + HOST if at == "first" else HOST + field
            data = b"GET /x HTTP/1.1\r\n" + fields + b"\r\n"
            node.attempt(data, half_close=False).assert_refused(400, 431)
        assert node.origin.take() == []


def test_names_and_lengths_that_are_just_allowed_pass_as_they_are(node: AttackedNode, attack: Begin) -> None:
    with attack("A11", "the control: at the bounds", node) as run:
        for name in (b"X" * 255, b"x", b"!#$%&'*+-.^_`|~09azAZ"):
            run.case(name[:20])
            assert node.attempt(b"GET /x HTTP/1.1\r\n" + HOST + name + b": y\r\n\r\n").statuses == [200]
            (seen,) = node.origin.take()
            assert seen.all(name.decode().lower()) == ["y"]
        for size in (b"5", b"05", b"0" * 10 + b"5", b"0005"):
            run.case(size)
            assert node.attempt(CHUNKED + size + b"\r\nabcde\r\n0\r\n\r\n").statuses == [200]
            (seen,) = node.origin.take()
            assert seen.body == b"abcde"


def test_a_length_at_the_ends_of_integers_is_itself_or_refused(node: AttackedNode, attack: Begin) -> None:
    """What is let through is passed on with the same number, of which the client owes the body."""
    with attack("A11", "lengths at 2^32, 2^63, 2^64", node) as run:
        for number in TOO_LARGE:
            run.case(number)
            data = b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % number + HIDDEN
            node.attempt(data, half_close=False).assert_refused(400, 431)
        assert node.origin.take() == []
        for number in NUMBERS:
            run.case(number)
            before = node.origin.count
            with node.peer() as peer:
                peer.send(b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % number + HIDDEN * 3)
                node.origin.wait_count(before + 1)
                sent = b"".join(bytes(one.data) for one in node.origin.connections)
                assert b"\r\ncontent-length: %d\r\n" % number in sent
        assert node.origin.take() == []


@pytest.mark.parametrize("whole", [False, True])
def test_a_chunk_size_is_hexadecimal_digits_of_64_bits_at_most(node: AttackedNode, attack: Begin, whole: bool) -> None:
    with attack("A11", "chunk sizes", node) as run:
        for size in SIZES:
            run.case(size)
            data = CHUNKED + size + b"\r\nabcde\r\n0\r\n\r\n" + (HIDDEN if whole else b"")
            got = node.attempt(data)
            assert got.closed and not got.rest
            # a size that is a number, and owed: the client's end is the end of a request that never was
            assert got.statuses == [400] or (got.statuses == [] and size in (b"100000000", b"f" * 16, b"8" + b"0" * 15,
                                                                             b"1" + b"0" * 15 + b"5")), got  # fmt: skip
        assert node.origin.take() == []


# --- A12

BAD_FRAMES = [
    b"5\r\nabcdeXX0\r\n\r\n", b"5\r\nabcde\n0\r\n\r\n", b"5\r\nabcde\r0\r\n\r\n", b"5\r\nabcde\n\r0\r\n\r\n",
    b"5\r\nabcde0\r\n\r\n", b"5\r\nabcde\r\n\r\n0\r\n\r\n", b"5\r\nabcde\x00\x000\r\n\r\n", b"5\nabcde\r\n0\r\n\r\n",
    b"5\rabcde\r\n0\r\n\r\n", b"5\r\rabcde\r\n0\r\n\r\n", b"5;a\nabcde\r\n0\r\n\r\n", b"5;a=b\nc\r\nabcde\r\n0\r\n\r\n",
    b'5;a="b\nc"\r\nabcde\r\n0\r\n\r\n', b"5;a\rb\r\nabcde\r\n0\r\n\r\n", b"5;\n\r\nabcde\r\n0\r\n\r\n",
    b"5;a\x00\r\nabcde\r\n0\r\n\r\n", b"5;\x01\r\nabcde\r\n0\r\n\r\n", b"5;\x7f\r\nabcde\r\n0\r\n\r\n",
    b"5 ;a\r\nabcde\r\n0\r\n\r\n", b"5;a=\x80\r\nabcde\r\n0\r\n\r\n", b"0\n\n", b"0\r\n\n", b"0\n\r\n",
    b"0\r\nX: y\n\r\n", b"0\r\nX: y\r\r\n", b"0\r\n X: y\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\n: y\r\n\r\n",
    b"0\r\nX: a\r\n b\r\n\r\n", b"0\r\nX: a\x00\r\n\r\n", b"0\r\nX: a\rb\r\n\r\n", b"0\r\nX\r\n\r\n",
    b"0\r\nContent-Length: 5\r\n\r\n", b"0\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\nHost: x\r\n\r\n",
    b"0\r\nhOST: x\r\n\r\n", b"0\r\nContent_Length: 5\r\n\r\n",
    b"0\r\nGET /hidden HTTP/1.1\r\nHost: web.apps.localhost\r\n\r\n", b"0\r\n" + b"X" * 256 + b": y\r\n\r\n",
]  # fmt: skip
DROPPED = [  # trailers that would change framing, routing or trust if they were merged
    "Connection", "TE", "Trailer", "Upgrade", "Expect", "Authorization", "Cookie", "Set-Cookie",
    "Content-Type", "Content-Encoding", "Content-Range", "Range", "Cache-Control", "Max-Forwards", "Location",
    "X-Forwarded-For", "X_Forwarded_For", "Forwarded", "Fly-Client-IP", "Fly-Region", "Fly-Replay", "Fly-Replay-Src",
    "Fly-Force-Instance-Id", "Fly-Prefer-Region", "Proxy-Authorization", "Keep-Alive", "Wakefront-Error", "Via-X",
]  # fmt: skip


def test_what_is_not_exactly_a_chunk_is_refused(node: AttackedNode, attack: Begin) -> None:
    with attack("A12", "other bytes in place of CRLF, LF in extensions, trailers", node) as run:
        for body, behind in itertools.product(BAD_FRAMES, (b"", HIDDEN)):
            run.case(body)
            got = node.attempt(CHUNKED + body + behind)
            assert got.closed and not got.rest and all(one >= 400 for one in got.statuses), got
            assert got.statuses == [400] or not behind
        assert node.origin.take() == []


def flood(start: bytes, piece: bytes, total: int) -> bytes:
    return start + piece * (total // len(piece) + 1)


FLOODS = {
    "1 MB in one extension": flood(b"5;", b"a" * 1024, 1 << 20),
    "1 MB of extensions, a chunk each": flood(b"", b"1;" + b"a" * 1000 + b"\r\nx\r\n", 1 << 20),
    "17 KiB in one extension": b"5;" + b"a" * 17_000 + b"\r\nabcde\r\n0\r\n\r\n",
    "17 KiB in many": b"1;aaaaaaaaaaaaaaaa\r\nx\r\n" * 1000 + b"0\r\n\r\n",
    "17 KiB in names": b"1;" + b";".join(b"%d=%d" % (one, one) for one in range(3000)) + b"\r\nx\r\n0\r\n\r\n",
    "zeros before a size": flood(b"", b"0" * 1024, 1 << 20),
    "10,000 trailers": b"0\r\n" + b"".join(b"X-%d: y\r\n" % one for one in range(10_000)) + b"\r\n",
    "10,000 equal trailers": b"0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "10,000 trailers that are dropped": b"0\r\n" + b"Host: y\r\n" * 10_000 + b"\r\n",
    "a trailer of 1 MB": b"0\r\nX: " + b"y" * (1 << 20) + b"\r\n\r\n",
    "a trailer's name of 1 MB": b"0\r\n" + b"X" * (1 << 20) + b": y\r\n\r\n",
}


@pytest.mark.parametrize("name", FLOODS)
def test_extensions_and_trailers_have_a_bound_in_all(node: AttackedNode, attack: Begin, name: str) -> None:
    with attack("A12", "floods of extensions and trailers", node, growth_mib=16) as run:
        for begun in (b"", b"3\r\nabc\r\n"):
            run.case((name, begun))
            got = node.attempt(CHUNKED + begun + FLOODS[name], half_close=False)
            assert got.closed and got.statuses in ([400], [431]), got
        assert node.origin.take() == []


def test_ten_thousand_trailers_are_a_400(node: AttackedNode, attack: Begin) -> None:
    with attack("A12", "10,000 trailers", node) as run:
        run.case()
        got = node.attempt(CHUNKED + FLOODS["10,000 trailers"], half_close=False)
        got.assert_refused(400)


def test_trailers_are_filtered_and_extensions_end_here(node: AttackedNode, attack: Begin) -> None:
    with attack("A12", "trailers filtered, extensions dropped", node) as run:
        for extension in (b"", b";a", b";a=b", b';a="b"', b';a="b;c"', b";a;b=c", b";" + b"a" * 8_000):
            run.case(extension[:20])
            body = b"5" + extension + b"\r\nabcde\r\n0" + extension[:20] + b"\r\nX-Sum: 1\r\n\r\n"
            assert node.attempt(CHUNKED + body).statuses == [200]
            (seen,) = node.origin.take()
            assert (seen.body, seen.trailers) == (b"abcde", b"X-Sum: 1\r\n")
            assert b";a" not in seen.raw.partition(b"\r\n\r\n")[2]
        for name in DROPPED:
            run.case(name)
            body = f"0\r\n{name}: evil\r\nX-Sum: 1\r\n\r\n".encode()
            assert node.attempt(CHUNKED + body).statuses == [200]
            (seen,) = node.origin.take()
            assert seen.trailers == (b"Via-X: evil\r\nX-Sum: 1\r\n" if name == "Via-X" else b"X-Sum: 1\r\n")

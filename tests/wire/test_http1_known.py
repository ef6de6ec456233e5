"""wire/http1.py: a head met again is told as the parser would tell it, and nothing else is.

A reader that has had as many heads as it learns, each once, leaves all that comes to the parser: what it says is what
any reader has to say of the same bytes.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.decide.headers import REQUEST_RULES, RESPONSE_RULES
from proxy.errors import ProxyError
from proxy.wire import http1
from proxy.wire.http1 import Limits, RequestHead, RequestReader, ResponseHead, ResponseReader
from tests.wire.http1_support import Seen

MANY = settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS = Limits(max_head_bytes=600, max_headers=8, max_target_bytes=60)
PLAIN = b"GET /a?b HTTP/1.1\r\nHost: a.test\r\nAccept: */*\r\nX-Empty:\r\nTE: x\r\nCookie: a: b\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nServer: it\r\nContent-Length: 5\r\n\r\n"


class Readers:
    """Two request readers: one as it is, one that has learned all it will. A fault ends both."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.seen, self.parsed = Seen(), Seen()
        self.reader = RequestReader(self.seen, limits, REQUEST_RULES)
        self._parses = RequestReader(self.parsed, limits, REQUEST_RULES)
        for number in range(http1._LEARNINGS):
            self._parses.feed(b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Number: %d\r\n\r\n" % number)
        del self.parsed.heads[:], self.parsed.events[:]

    def feed(self, *reads: bytes) -> Readers:
        for read in reads:
            if self.seen.error is None and self.parsed.error is None:
                _feed(self.seen, self.reader, read)
                _feed(self.parsed, self._parses, read)
                assert self.seen.events == self.parsed.events
        assert [_all_of(one) for one in self.seen.heads] == [_all_of(one) for one in self.parsed.heads]
        return self

    @property
    def met(self) -> int:
        """Heads that did not pass the parser: of those the lines are joined."""
        assert not any(head.lines for head in self.parsed.heads)
        return sum(bool(head.lines) for head in self.seen.heads)


def _feed(seen: Seen, reader: RequestReader | ResponseReader, data: bytes) -> None:
    try:
        reader.feed(data)
    except ProxyError as error:
        seen.error = error
        seen.events.append(f"refused {error.code.value}")


def _all_of(head: RequestHead) -> object:
    lines = head.lines or b"".join(head.passed)
    return (lines, head.passed, head.authority, head.host, list(head.noted), head.listed_hops, head.keep_alive)


def test_the_same_fields_are_met_again_under_any_plain_request_line() -> None:
    tail = PLAIN.removeprefix(b"GET /a?b HTTP/1.1")
    lines = [b"HEAD / HTTP/1.1", b"DELETE /a%20;,=@!$&'()*+[]|~^`{}<>\" HTTP/1.1", b"OPTIONS /x HTTP/1.1"]
    readers = Readers().feed(PLAIN, PLAIN, *(line + tail for line in lines))
    assert readers.met == 4 and len(readers.seen.heads) == 5
    assert readers.seen.heads[-1].fields == [
        (b"Host", b"a.test"),
        (b"Accept", b"*/*"),
        (b"X-Empty", b""),
        (b"Cookie", b"a: b"),
    ]


def test_a_keep_alive_that_clients_need_not_say_changes_nothing() -> None:
    read = PLAIN.replace(b"TE: x", b"Connection: keep-alive")
    assert Readers().feed(read, read).met == 1


@pytest.mark.parametrize(
    "line",
    [
        b"Connection: close", b"Connection: x-a", b"Connection: TE, keep-alive", b"Content-Length: 3", b"Upgrade: x",
        b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Fly-Prefer-Region: ams", b"Content_Length: 3",
        b"Connection: Upgrade\r\nUpgrade: websocket", b"Host: b.test", b"Proxy-Connection: close",
    ],
)  # fmt: skip
def test_what_frames_steers_or_ends_is_left_to_the_parser(line: bytes) -> None:
    read = PLAIN.replace(b"TE: x", line)
    assert Readers().feed(PLAIN, read, read).met == 0


def test_the_tail_of_a_body_is_no_head() -> None:
    body = b"GET /hidden HTTP/1.1" + PLAIN.removeprefix(b"GET /a?b HTTP/1.1")
    post = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n" % len(body)
    readers = Readers().feed(PLAIN, post, body, PLAIN)
    assert [head.target for head in readers.seen.heads] == [b"/a?b", b"/", b"/a?b"]
    assert readers.seen.bodies[1] == body


@pytest.mark.parametrize("begun", [b"G", b"GET ", b"GET /", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX: "])
def test_a_request_that_has_begun_goes_on_with_the_parser(begun: bytes) -> None:
    readers = Readers().feed(PLAIN, PLAIN, begun, PLAIN)
    assert readers.met == 1
    readers = Readers().feed(PLAIN, PLAIN + begun, PLAIN)
    assert readers.met == 0


def test_what_looks_like_a_head_within_a_fields_value_is_none() -> None:
    """Its request began in the read before, with a Host; met again, it would be a request without one."""
    rest = b"GET /a?b HTTP/1.1\r\nAccept: */*\r\n\r\n"
    readers = Readers().feed(b"GET /a?b HTTP/1.1\r\nHost: a.test\r\nX: ", rest, rest.replace(b"/a?b", b"/b"))
    assert [head.target for head in readers.seen.heads] == [b"/a?b"]
    assert readers.seen.error is not None and "Host" in readers.seen.error.detail


def test_nor_is_it_one_where_the_request_before_ended_in_the_same_read() -> None:
    rest = b"GET /a?b HTTP/1.1\r\nAccept: */*\r\n\r\n"
    readers = Readers().feed(PLAIN + b"GET /a?b HTTP/1.1\r\nHost: a.test\r\nX: ", rest, rest.replace(b"/a?b", b"/b"))
    assert [head.target for head in readers.seen.heads] == [b"/a?b"] * 2
    assert readers.seen.error is not None and "Host" in readers.seen.error.detail


def test_a_line_that_is_not_plain_is_left_to_the_parser() -> None:
    tail = PLAIN.removeprefix(b"GET /a?b HTTP/1.1")
    for line in [
        b"GET  / HTTP/1.1", b"GET / HTTP/1.0", b"GET / HTTP/1.1 ", b"get / HTTP/1.1", b"GET /# HTTP/1.1", b"GET /",
        b"GET http://a.test/ HTTP/1.1", b"GET /\xff HTTP/1.1", b"POST / HTTP/1.1", b"CONNECT / HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET /\r\nX: / HTTP/1.1", b"GET / HTTP/1.1\r\nX: / HTTP/1.1", b"GET /" + b"a" * 60 + b" HTTP/1.1", b"",
    ]:  # fmt: skip
        readers = Readers().feed(PLAIN, PLAIN, line + tail)
        assert readers.met == 1, line


def test_a_request_line_is_bounded_with_fields_that_are_known() -> None:
    tail = b" HTTP/1.1\r\nHost: a.test\r\nX: " + b"x" * 520 + b"\r\n\r\n"
    readers = Readers(Limits(600, 8, 100)).feed(b"GET /" + tail, b"GET /b" + tail, b"GET /" + b"c" * 90 + tail)
    assert readers.met == 1 and readers.seen.error is not None and readers.seen.error.code.value == "WD02"


def test_what_a_sink_makes_of_a_head_is_not_what_is_remembered() -> None:
    class Strips(Seen):
        def on_head(self, head: RequestHead) -> None:
            super().on_head(head)
            head.passed = head.passed[:4]
            assert not head.lines

        def on_response_head(self, head: ResponseHead) -> None:
            super().on_response_head(head)
            head.passed += (b"set-cookie", b": ", b"secret", b"\r\n")
            assert not head.lines

    strips = Strips()
    reader = RequestReader(strips, Limits(), REQUEST_RULES)
    plain = Seen()
    for _ in range(3):
        reader.feed(PLAIN)
        reader._sink = plain
    assert [head.fields[-1] for head in plain.heads] == [(b"Cookie", b"a: b")] * 2
    back = ResponseReader(strips, Limits(), RESPONSE_RULES)
    for _ in range(3):
        back.feed(ANSWER + b"hello")
        back.sink = plain
    assert [head.fields for head in plain.responses] == [[(b"Content-Type", b"text/plain")]] * 2
    assert all(head.lines for head in plain.heads + plain.responses)


READS = [
    PLAIN, PLAIN, PLAIN, PLAIN.replace(b"/a?b", b"/c"), PLAIN.replace(b"GET", b"HEAD"), PLAIN.replace(b"1.1", b"1.0"),
    PLAIN.replace(b"TE: x", b"Content-Length: 0"), PLAIN.replace(b"TE: x", b"Connection: close"), PLAIN + b"\r\n\r\n",
    PLAIN.replace(b"TE: x", b"Content-Length: 9") + b"G\r\n\r\nGET ", PLAIN.replace(b"TE: x", b"Content-Length: 80"),
    PLAIN.replace(b"TE: x", b"Transfer-Encoding: chunked") + b"0\r\n\r\n", b"GET ", b"\r\n", b"G", b"0\r\n\r\n",
    PLAIN.replace(b"TE: x", b"Connection: keep-alive"), PLAIN.replace(b"GET", b"POST"), PLAIN + PLAIN, b"\r\n" + PLAIN,
    PLAIN.replace(b"/a?b", b"http://a.test/a?b"), PLAIN.replace(b"\r\n\r\n", b"\n\r\n"),
    PLAIN.replace(b": */*", b":*/* "),
    PLAIN.replace(b"a.test", b"b.test"), b"GET /a?b HTTP/1.1\r\nHost: a.test\r\nX: ",
    PLAIN.replace(b"Host: a.test\r\n", b""), PLAIN.replace(b"TE: x", b"Proxy-Connection: close"),
    PLAIN + b"GET /a?b HTTP/1.1\r\nHost: a.test\r\nX: ",
]  # fmt: skip


@MANY
@given(st.lists(st.sampled_from(READS), max_size=9), st.lists(st.integers(0, 2000), max_size=3), st.booleans())
def test_whatever_comes_a_reader_that_learns_says_what_one_says_that_does_not(
    reads: list[bytes], places: list[int], joins: bool
) -> None:
    if joins and reads:
        data = b"".join(reads)
        at = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
        reads = [data[one:other] for one, other in itertools.pairwise(at)]
    Readers().feed(*(read for read in reads if read))


# --- answers


class BackReaders:
    """As Readers, for a machine's side. `feed` takes what comes after one request."""

    def __init__(self) -> None:
        self.seen, self.parsed = Seen(), Seen()
        self.reader = ResponseReader(self.seen, LIMITS, RESPONSE_RULES)
        self._parses = ResponseReader(self.parsed, LIMITS, RESPONSE_RULES)
        for number in range(http1._LEARNINGS):
            self._parses.feed(b"HTTP/1.1 200 OK\r\nX-Number: %d\r\nContent-Length: 0\r\n\r\n" % number)
        del self.parsed.responses[:], self.parsed.events[:]

    def feed(self, *reads: bytes, head_only: bool = False) -> BackReaders:
        self.reader.expect(head_only)
        self._parses.expect(head_only)
        for read in reads:
            if self.seen.error is None and self.parsed.error is None:
                _feed(self.seen, self.reader, read)
                _feed(self.parsed, self._parses, read)
                assert self.seen.events == self.parsed.events
        pairs = zip(self.seen.responses, self.parsed.responses, strict=True)
        for one, other in pairs:
            assert (one.passed, one.server, list(one.noted), one.listed_hops) == (
                other.passed, other.server, list(other.noted), other.listed_hops
            )  # fmt: skip
        return self

    @property
    def met(self) -> int:
        assert not any(head.lines for head in self.parsed.responses)
        return sum(bool(head.lines) for head in self.seen.responses)


def test_the_same_head_of_an_answer_is_met_again_whatever_its_body() -> None:
    readers = BackReaders()
    readers.feed(ANSWER + b"hello").feed(ANSWER + b"there").feed(ANSWER, b"he", b"llo").feed(ANSWER + b"he", b"llo")
    assert readers.met == 3 and readers.seen.events.count("end") == 4


def test_a_head_whose_body_came_later_is_learned_too() -> None:
    assert BackReaders().feed(ANSWER, b"hello").feed(ANSWER, b"there").met == 1


def test_a_long_head_is_not_kept() -> None:
    long = ANSWER.replace(b"text/plain", b"t" * 4_096)
    limits = Limits(max_head_bytes=10_000)
    seen = Seen()
    reader = ResponseReader(seen, limits, RESPONSE_RULES)
    for _ in range(3):
        reader.feed(long + b"hello")
    assert [head.lines for head in seen.responses] == [b""] * 3
    requests = Readers(limits)
    requests.feed(*[PLAIN.replace(b"TE: x", b"X: " + b"x" * 2_048)] * 3)
    assert requests.met == 0


def test_the_same_head_in_answer_to_head_has_no_body() -> None:
    readers = BackReaders().feed(ANSWER + b"hello").feed(ANSWER, head_only=True).feed(ANSWER + b"again")
    assert readers.seen.error is None and readers.seen.events.count("end") == 3


def test_what_looks_like_an_answer_within_a_fields_value_is_none() -> None:
    """As where an app echoes what a client sent and writes its fields one by one: the fields before it are that
    client's, and not those of whose answer has such a head."""
    readers = BackReaders().feed(b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nX-Echo: ", ANSWER + b"hello")
    readers.feed(ANSWER + b"there")
    assert [b"Set-Cookie" in head.passed for head in readers.seen.responses] == [True, False]


@pytest.mark.parametrize("reason", [b"OK", b""])
def test_nor_is_it_one_behind_an_interim_answer(reason: bytes) -> None:
    begun = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 %b\r\nSet-Cookie: a\r\nX-Echo: " % reason
    answer = ANSWER.replace(b"OK", reason)
    readers = BackReaders().feed(begun, answer + b"hello").feed(answer + b"there")
    assert [b"Set-Cookie" in head.passed for head in readers.seen.responses] == [False, True, False]


def test_bytes_beyond_an_answer_that_is_known_are_an_error() -> None:
    readers = BackReaders().feed(ANSWER + b"hello").feed(ANSWER + b"hello!")
    assert readers.seen.error is not None


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nFly-Replay: app=b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: x-a\r\nX-A: b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER + b"hello",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.fly.replay+json\r\nContent-Length: 2\r\n\r\n{}",
    ],
)  # fmt: skip
def test_an_answer_that_says_more_is_left_to_the_parser(answer: bytes) -> None:
    assert BackReaders().feed(answer).feed(answer).met == 0


ANSWERS = [
    ANSWER + b"hello", ANSWER + b"hello", ANSWER + b"hello", ANSWER + b"hell", ANSWER, b"hello", b"HTTP/1.1 200 OK\r\n",
    ANSWER + b"hello!", ANSWER.replace(b"200 OK", b"404 Not Found") + b"hello", ANSWER.replace(b"5", b"0"), b"o", b"HT",
    ANSWER.replace(b"1.1", b"1.0") + b"hello", b"HTTP/1.1 103 Early Hints\r\n\r\n",
    ANSWER.replace(b"Server", b"Fly-Replay"),
    ANSWER.replace(b"\r\n\r\n", b"\r\n\n") + b"hello", ANSWER.replace(b"Content-Length: 5", b"X: y"),
    b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nX: ",
]  # fmt: skip


@MANY
@given(st.lists(st.tuples(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=3), st.booleans()), max_size=6))
def test_whatever_a_machine_sends_a_reader_that_learns_says_what_one_says_that_does_not(
    exchanges: list[tuple[list[bytes], bool]],
) -> None:
    readers = BackReaders()
    for reads, head_only in exchanges:
        readers.feed(*reads, head_only=head_only and reads[0].startswith(b"HTTP"))

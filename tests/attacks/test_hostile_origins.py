"""The machine's side of A6 to A12 and A15: answers that smuggle, never end, or are too large.

A machine is an app's own, and may be broken or taken over; its client gets a whole answer, an error of ours, or a
connection that breaks off, never bytes of a second answer. Another client's request never meets what is left.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode, Attempt
from tests.support.processes import wait_for
from tests.support.recording import Seen

pytestmark = pytest.mark.slow
EVIL = b"HTTP/1.1 200 OK\r\nX-Evil: 1\r\nContent-Length: 4\r\n\r\nevil"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def head(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((line, *fields, b"", b""))


BROKEN_HEADS = {  # no answer at all: 502
    "CL+TE": head(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + EVIL,
    "TE+CL": head(b"Transfer-Encoding: chunked", b"Content-Length: 5") + b"0\r\n\r\n" + EVIL,
    "two lengths": head(b"Content-Length: 2", b"Content-Length: 3") + b"ok" + EVIL,
    "two equal lengths": head(b"Content-Length: 2", b"Content-Length: 2") + b"ok" + EVIL,
    "a list of lengths": head(b"Content-Length: 2, 2") + b"ok" + EVIL,
    "length with sign": head(b"Content-Length: +2") + b"ok" + EVIL,
    "negative length": head(b"Content-Length: -2") + b"ok" + EVIL,
    "length in hexadecimal": head(b"Content-Length: 0x2") + b"ok" + EVIL,
    "length of 2^64": head(b"Content-Length: 18446744073709551618") + b"ok" + EVIL,
    "xchunked": head(b"Transfer-Encoding: xchunked") + b"0\r\n\r\n" + EVIL,
    "gzip, chunked": head(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n" + EVIL,
    "chunked, identity": head(b"Transfer-Encoding: chunked, identity") + b"0\r\n\r\n" + EVIL,
    "chunked twice": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + EVIL,
    "chunked with VT": head(b"Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n" + EVIL,
    "folded chunked": head(b"Transfer-Encoding:\r\n chunked") + b"0\r\n\r\n" + EVIL,
    "chunked in HTTP/1.0": head(b"Transfer-Encoding: chunked", line=b"HTTP/1.0 200 OK") + b"0\r\n\r\n" + EVIL,
    "space before colon": head(b"Content-Length : 2") + b"ok" + EVIL,
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok" + EVIL,
    "bare CR in a value": head(b"X: a\rContent-Length: 2") + b"ok",
    "LF in a value": head(b"X: a\nSet-Cookie: evil=1", b"Content-Length: 2") + b"ok",
    "NUL in a value": head(b"X: a\x00b", b"Content-Length: 2") + b"ok",
    "empty name": head(b": x", b"Content-Length: 2") + b"ok",
    "name of 256 bytes": head(b"X" * 256 + b": y", b"Content-Length: 2") + b"ok",
    "HTTP/1.2": head(b"Content-Length: 2", line=b"HTTP/1.2 200 OK") + b"ok",
    "HTTP/2": head(b"Content-Length: 2", line=b"HTTP/2 200 OK") + b"ok",
    "HTTP/0.9": b"hello, no head at all",
    "status 099": head(b"Content-Length: 2", line=b"HTTP/1.1 099 X") + b"ok",
    "status 999": head(b"Content-Length: 2", line=b"HTTP/1.1 999 X") + b"ok",
    "status 20": head(b"Content-Length: 2", line=b"HTTP/1.1 20 X") + b"ok",
    "10,000 fields": head(*(b"X-%d: y" % number for number in range(10_000)), b"Content-Length: 2") + b"ok",
    "10,000 equal fields": head(*([b"X: y"] * 10_000), b"Content-Length: 2") + b"ok",
    "head of 1 MB": head(b"X: " + b"y" * (1 << 20), b"Content-Length: 2") + b"ok",
    "name of 1 MB": head(b"X" * (1 << 20) + b": y", b"Content-Length: 2") + b"ok",
    "reason of 1 MB": head(b"Content-Length: 2", line=b"HTTP/1.1 200 " + b"y" * (1 << 20)) + b"ok",
    "CR LF for ever": b"\r\n" * 500_000,
    "a tunnel nobody asked for": head(b"Connection: upgrade", b"Upgrade: x", line=b"HTTP/1.1 101 S") + EVIL,
    "a request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "an answer twice": OK + EVIL,
    "a length, and more": head(b"Content-Length: 2") + b"ok, and more",
}
BODILESS = {  # the end of the answer is its head's, whatever is behind
    "a body after 204": (head(line=b"HTTP/1.1 204 No") + EVIL, "GET"),
    "a length and a body after 204": (head(b"Content-Length: 4", line=b"HTTP/1.1 204 No") + b"evil" + EVIL, "GET"),
    "chunks after 204": (head(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 204 No") + b"0\r\n\r\n" + EVIL, "GET"),
    "a body after 304": (head(b"Content-Length: 4", line=b"HTTP/1.1 304 Same") + b"evil", "GET"),
    "a second answer after 304": (head(line=b"HTTP/1.1 304 Same") + EVIL, "GET"),
    "a body after HEAD": (head(b"Content-Length: 4") + b"evil", "HEAD"),
    "a second answer after HEAD": (head(b"Content-Length: %d" % len(EVIL)) + EVIL, "HEAD"),
    "chunks after HEAD": (CHUNKED + b"4\r\nevil\r\n0\r\n\r\n", "HEAD"),
}
BROKEN_CHUNKS = {  # broken off, since the head has gone out
    "bad size": b"2\r\nok\r\nzz\r\n" + EVIL,
    "size with sign": b"2\r\nok\r\n+2\r\nok\r\n0\r\n\r\n" + EVIL,
    "size of 17 digits": b"2\r\nok\r\n10000000000000002\r\nok" + EVIL,
    "other bytes in place of CRLF": b"2\r\nokXX0\r\n\r\n" + EVIL,
    "LF in place of CRLF": b"2\nok\n0\n\n" + EVIL,
    "LF in an extension": b"2;a\nb\r\nok\r\n0\r\n\r\n" + EVIL,
    "folded trailer": b"2\r\nok\r\n0\r\nX: a\r\n b\r\n\r\n" + EVIL,
    "10,000 trailers": b"2\r\nok\r\n0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "1 MB of one extension": b"2\r\nok\r\n2;" + b"a" * (1 << 20) + b"\r\nok\r\n0\r\n\r\n",
    "1 MB of one trailer": b"2\r\nok\r\n0\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
}


def answering(node: AttackedNode, answer: bytes, *pieces: bytes, ends: bool = False) -> list[int]:
    """The next answer; later ones are honest. `pieces` are sent apart, `ends` closes behind them.

    Returns a list that gets the number of the connection which carries it.
    """
    asked = itertools.count()
    carriers: list[int] = []

    async def respond(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.target != "/x" or next(asked):
            writer.write(OK)
            return
        carriers.append(seen.connection)
        for piece in (answer, *pieces):
            writer.write(piece)
            await asyncio.sleep(0.005)
        if ends:
            writer.close()

    node.origin.reset()
    node.origin.respond = respond
    return carriers


def ask(node: AttackedNode, method: str = "GET") -> Attempt:
    """One request, then a POST on the same connection, then one on another: each must get what is its own."""
    both = node.head("/x", method=method) + node.head("/y", "Connection: close", method="POST")
    got = node.attempt(both, half_close=False, methods=[method, "POST"])
    after = node.attempt(node.head("/after", "Connection: close"), half_close=False)
    assert after.statuses == [200] and after.answers[0].body == b"ok", "another client met what was left"
    everything = b"".join(one.raw + one.body for one in got.answers + after.answers) + got.rest
    assert b"X-Evil" not in everything or b"X-Evil" in got.answers[0].body, "a second answer was let through"
    return got


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_an_answer_that_is_none_is_an_error_of_ours(node: AttackedNode, attack: Begin, cut: int) -> None:
    with attack("A6", "answers of a machine: framing twice, bad heads, floods of fields", node, growth_mib=32) as run:
        for name, data in BROKEN_HEADS.items():
            run.case((name, cut))
            answering(node, data[:cut], data[cut:]) if cut else answering(node, data)
            got = ask(node)
            if name in ("an answer twice", "a length, and more") and got.statuses[0] == 200:
                assert got.answers[0].body == b"ok"  # the end was known before the rest came
                continue
            assert got.statuses[0] == 502, (name, got)
            assert got.answers[0].all("wakefront-error") in (["WU01"], ["WU03"], ["PU02"]), got.answers[0].raw


@pytest.mark.parametrize("name", BODILESS)
def test_the_end_of_an_answer_without_a_body_is_that_of_its_head(node: AttackedNode, attack: Begin, name: str) -> None:
    data, method = BODILESS[name]
    with attack("A6", "answers of a machine: bodies after 204, 304, HEAD", node) as run:
        run.case("in one piece")
        answering(node, data)
        got = ask(node, method)
        assert got.statuses[0] in (200, 204, 304, 502), got
        # the POST behind may have gone to the same connection already, and is not sent twice
        assert got.statuses[1:] in ([], [200], [502])
        assert all(b"evil" not in one.body for one in got.answers)
        run.case("after a moment")
        at = data.find(b"\r\n\r\n") + 4
        carriers = answering(node, data[:at], data[at:])
        with node.peer() as peer:
            peer.send(node.head("/x", method=method))
            assert peer.read_answer(method).status in (200, 204, 304)
            (carrier,) = [one for one in node.origin.connections if one.number == carriers[0]]
            wait_for(lambda: carrier.ended, 5, "the connection is given up")
            peer.send(node.head("/y", method="POST"))
            assert peer.read_answer().body == b"ok"


def test_a_body_that_goes_wrong_breaks_off_and_is_never_ended_for_the_machine(
    node: AttackedNode, attack: Begin
) -> None:
    with attack("A12", "answers of a machine: chunks, extensions, trailers", node, growth_mib=32) as run:
        for (name, data), pause in itertools.product(BROKEN_CHUNKS.items(), (False, True)):
            run.case((name, pause))
            answering(node, CHUNKED, data) if pause else answering(node, CHUNKED + data)
            got = ask(node)
            assert got.closed and (
                got.statuses == [502] or (got.statuses == [] and not got.rest.endswith(b"0\r\n\r\n"))
            ), (
                name,
                got,
            )


def test_what_a_length_promised_and_the_machine_did_not_send_breaks_off(node: AttackedNode, attack: Begin) -> None:
    with attack("A6", "answers of a machine: cut short", node) as run:
        for data in (head(b"Content-Length: 10") + b"short", CHUNKED + b"5\r\nsho", CHUNKED + b"5\r\nshort\r\n"):
            run.case(data)
            answering(node, data, ends=True)
            got = ask(node)
            assert got.closed and not [one for one in got.answers if one.status == 200], got


@pytest.mark.parametrize("status", [b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 X"])
def test_a_flood_of_interim_answers_is_broken_off(node: AttackedNode, attack: Begin, status: bytes) -> None:
    """20,000 before one answer: an error of ours after the first 200 of them."""
    flood = (b"HTTP/1.1 " + status + b"\r\nLink: </a>\r\n\r\n") * 20_000
    with attack("A15", "answers of a machine: floods of 1xx", node, growth_mib=32) as run:
        for end in (OK, b""):
            run.case((status, bool(end)))
            answering(node, flood, end, ends=not end)
            got = node.attempt(node.head("/x", "Connection: close"), half_close=False)
            assert got.statuses == [502] and got.closed
            after = node.attempt(node.head("/after", "Connection: close"), half_close=False)
            assert after.statuses == [200]


def test_fields_of_an_answer_that_are_ours_or_hop_by_hop_end_here(node: AttackedNode, attack: Begin) -> None:
    fields = [
        b"Connection: X-Secret, close", b"X-Secret: 1", b"Keep-Alive: timeout=5", b"Proxy-Authenticate: x",
    b"Upgrade: h2c",
        b"Wakefront-Error: WD01", b"Trailer: X", b"Te: x", b"Proxy-Connection: close", b"Fly-Replay-Cache: /x",
    ]  # fmt: skip
    with attack("A19", "answers of a machine: fields that end here", node) as run:
        run.case()
        answering(node, head(*fields, b"Content-Length: 2") + b"ok")
        got = node.attempt(node.head("/x"))
        (answer,) = got.answers
        names = {name for name, _ in answer.fields}
        assert answer.status == 200 and names <= {"content-length", "server", "via", "fly-request-id", "connection"}, (
            names
        )

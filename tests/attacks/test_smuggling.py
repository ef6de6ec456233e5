"""A6: one body framed in two ways, CL.TE, TE.CL and TE.TE, in every spelling that some parser has fallen for.

Each case hides a request where another parser than ours would find it. It is a 400 and the end of the connection, or
exactly one request at the origin, framed by us and with the hidden one as a part of its body at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode, rewritten_once

pytestmark = pytest.mark.slow
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: web.apps.localhost\r\n\r\n"

VALUES = [  # of Transfer-Encoding; a parser that knows the grammar half takes one for `chunked` and another does not
    b"chunked", b"CHUNKED", b"Chunked", b"cHuNkEd", b"xchunked", b"chunkedx", b"chunke", b"chunk", b"chunked, identity",
    b"identity, chunked", b"chunked,identity", b"identity", b"identity,identity", b"chunked, chunked",
    b"chunked,chunked", b"gzip, chunked", b"chunked, gzip", b"deflate", b"x-gzip, chunked", b"trailers, chunked",
    b"cow",
    b"chunked,", b",chunked", b", chunked", b"chunked, ,", b"chunked;q=1", b"chunked; x=y", b'"chunked"', b"'chunked'",
    b'"chunked', b"chunked chunked", b"chunked identity", b"chunked/1", b"chunked:", b":chunked", b"=chunked",
    b"\tchunked", b"chunked\t", b"chunked ", b" chunked", b"\x0bchunked", b"chunked\x0b", b"\x0cchunked",
    b"chunked\x0c",
    b"\x00chunked", b"chunked\x00", b"chunked\x00, identity", b"\x01chunked", b"\x7fchunked", b"\xa0chunked",
    b"chunked\xa0", b"\x85chunked", b"\xffchunked", b"chun\x00ked", b"chun ked", b"chun\tked", b"ch\xc5\xabnked",
    b"\xef\xbb\xbfchunked", b"\rchunked", b"chunked\r", b"\nchunked", b"chunked\n", b"\r\n chunked", b"\r\n\tchunked",
    b"chunked\r\n ", b"chunked\r\n , identity", b"\r\n\r\n chunked", b"\n chunked", b"chunked\n X: y", b"%63hunked",
    b"chunked%20", b"", b" ", b"\t", b",", b"0", b"1", b"null", b"chunked\x1f", b"chunked\x08", b"\x1bchunked",
]  # fmt: skip
NAMES = [  # of the field; the value is `chunked`
    b"Transfer-Encoding", b"transfer-encoding", b"TRANSFER-ENCODING", b"tRANSFER-eNCODING", b"Transfer-Encoding ",
    b"Transfer-Encoding\t", b"Transfer-Encoding\x00", b"Transfer-Encoding\x0b", b"Transfer-Encoding\r",
    b"Transfer-Encoding\n", b" Transfer-Encoding", b"\tTransfer-Encoding", b"\x0bTransfer-Encoding",
    b"\x00Transfer-Encoding", b"\xa0Transfer-Encoding", b"\rTransfer-Encoding", b"Transfer_Encoding",
    b"transfer_encoding", b"Transfer-Encoding\xad", b"Transfer\xadEncoding", b"Transfer Encoding",
    b"Transfer\tEncoding",
    b"Transfer-Encoding:", b":Transfer-Encoding", b'"Transfer-Encoding"', b"Transfer-Encoding,",
    b"Transfer-Encoding;", b"Transfer-Encoding=", b"Transfer-Encoding()", b"Transfer-Encod\xc4\xb1ng",
    b"X: y\nTransfer-Encoding", b"X: y\rTransfer-Encoding", b"X: y\r\r\nTransfer-Encoding", b"X\nTransfer-Encoding",
    b"X: y\r\n\x00\r\nTransfer-Encoding", b"X: y\r\n\x01Transfer-Encoding", b"[Transfer-Encoding]",
    b"Transfer-Encoding\xff",
]  # fmt: skip
OTHER_NAMES = [  # tokens of RFC 9110 §5.6.2 that are no framing field, however near: they pass, and frame nothing
    b"'Transfer-Encoding'", b"X-Transfer-Encoding", b"Transfer-Encoding.", b"Transfer-Encodin", b"Transfer-Encodingg",
    b"`Transfer-Encoding`", b"*Transfer-Encoding", b"Transfer--Encoding", b"TransferEncoding", b"Transfer.Encoding",
    b"!Transfer-Encoding", b"Transfer-Encoding-Over", b"Content-Encoding", b"TE", b"Transfer-Coding",
    b"^Transfer-Encoding",
]  # fmt: skip
LENGTHS = [  # spellings of a Content-Length of N, as other parsers have read them
    b"+%d", b"-%d", b"0x%x", b"%d,%d", b"%d, %d", b"%d,", b",%d", b"%d %d", b"%d;", b"%d.0", b"%de0", b"%d_0", b"0_%d",
    b"%d\x0b", b"\x0b%d", b"%d\x0c", b"%d\x00", b"\x00%d", b"%d\xa0", b"\xa0%d", b"%d\x85", b"%d\r", b"\r%d", b"%d\n",
    b"\n%d", b"\r\n %d", b"\r\n\t%d", b'"%d"', b"'%d'", b"%dL", b"%d\x01", b"", b" ", b"\t", b"0b1", b"0o7", b"five",
    b"--%d", b"+-%d", b"(%d)", b"1%d\r\nContent-Length: %d", b"%d\r\nContent-Length: 0", b"0\r\nContent-Length: %d",
    b"%d\r\ncontent-length: %d", b"%d\r\nContent-Length:", b"%d\r\nContent-Length : 0", b"%d\r\nContent_Length: 0",
    b"%d\r\n Content-Length: 0", b"%d\r\nContent-Length\t: 0", b"%d\r\nContent-Length\x00: 0", b"18446744073709551616",
    b"18446744073709551620", b"99999999999999999999999999", b"-1", b"0%d", b"00000000000000000000%d",
]  # fmt: skip


def spelled(spelling: bytes, number: int) -> bytes:
    """`spelling` with every %d and %x replaced."""
    count = spelling.count(b"%d") + spelling.count(b"%x")
    return spelling % ((number,) * count)


def cl_te(line: bytes) -> Iterator[tuple[str, bytes]]:
    """A length over all of the body, in which chunks would end before the hidden request."""
    body = b"0\r\n\r\n" + HIDDEN
    length = b"Content-Length: %d" % len(body)
    for name, fields in (("CL.TE", (length, line)), ("TE.CL", (line, length))):
        yield name, b"\r\n".join(fields) + b"\r\n\r\n" + body


def te_cl(line: bytes) -> Iterator[tuple[str, bytes]]:
    """One chunk holds the hidden request, a length ends before it."""
    size = b"%x\r\n" % len(HIDDEN)
    body = size + HIDDEN + b"\r\n0\r\n\r\n"
    length = b"Content-Length: %d" % len(size)
    for name, fields in (("CL.TE, length short", (length, line)), ("TE.CL, length short", (line, length))):
        yield name, b"\r\n".join(fields) + b"\r\n\r\n" + body


def te_te(line: bytes) -> Iterator[tuple[str, bytes]]:
    """Two codings; who believes the other one reads to the length or to the close."""
    body = b"0\r\n\r\n" + HIDDEN
    plain = b"Transfer-Encoding: chunked"
    for name, fields in (("TE.TE", (plain, line)), ("TE.TE, other order", (line, plain))):
        yield name, b"\r\n".join(fields) + b"\r\n\r\n" + body


def alone(line: bytes) -> Iterator[tuple[str, bytes]]:
    """No length at all: who does not see chunks finds the hidden request at once."""
    yield "TE", line + b"\r\n\r\n" + b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"


def all_lines() -> list[bytes]:
    return [b"Transfer-Encoding: " + value for value in VALUES] + [name + b": chunked" for name in NAMES]


def head_with(rest: bytes) -> bytes:
    return b"POST /x HTTP/1.1\r\nHost: web.apps.localhost\r\n" + rest


def judge(node: AttackedNode, data: bytes) -> bool:
    """Whether it was taken; the pass mark of the row."""
    got = node.attempt(data)
    seen = node.origin.take()
    if not seen:
        got.assert_refused(400)
        return False
    assert rewritten_once(seen, "/x"), [one.raw for one in seen]
    assert got.statuses == [200], "what follows the body was read as a request"
    return True


def test_two_framings_of_one_body_are_refused_or_rewritten(node: AttackedNode, attack: Begin) -> None:
    kinds = (cl_te, te_cl, te_te, alone)
    refused = []
    with attack("A6", "CL.TE, TE.CL, TE.TE", node) as run:
        for kind, line in itertools.product(kinds, all_lines()):
            for name, rest in kind(line):
                run.case((name, line))
                data = head_with(rest)
                if judge(node, data):
                    assert kind is alone, "two framings, and it was taken"
                else:
                    refused.append(data)
        assert run.figures.cases >= 200
        run.note(f"{len(refused)} refused")


def test_a_length_is_plain_digits_or_refused(node: AttackedNode, attack: Begin) -> None:
    with attack("A6", "spellings of Content-Length", node) as run:
        for spelling, body in itertools.product(LENGTHS, (HIDDEN, b"0\r\n\r\n" + HIDDEN, b"")):
            run.case((spelling, len(body)))
            taken = judge(node, head_with(b"Content-Length: " + spelled(spelling, len(body)) + b"\r\n\r\n" + body))
            assert not taken or (spelling.startswith(b"0") and spelling.endswith(b"%d"))


def test_what_is_refused_ends_the_connection_of_a_client_that_waits_on(node: AttackedNode, attack: Begin) -> None:
    """The same without the client's end, and with an honest request behind."""
    honest = node.head("/honest")
    with attack("A6", "refused, then a request on the same connection", node) as run:
        for line in all_lines():
            (_, rest), _ = cl_te(line)
            run.case(line)
            node.attempt(head_with(rest) + honest, half_close=False).assert_refused(400)
        for spelling in LENGTHS:
            if not spelling.startswith(b"0"):
                run.case(spelling)
                data = head_with(b"Content-Length: " + spelled(spelling, 5) + b"\r\n\r\nabcde")
                node.attempt(data + honest, half_close=False).assert_refused(400)
        assert node.origin.take() == []


def test_a_name_that_is_only_like_the_framing_fields_frames_nothing(node: AttackedNode, attack: Begin) -> None:
    with attack("A6", "names that are none of framing", node) as run:
        for name in OTHER_NAMES:
            for kind, rest in cl_te(name + b": chunked"):
                run.case((kind, name))
                assert node.attempt(head_with(rest)).statuses == [200]
                (seen,) = node.origin.take()
                assert seen.body == b"0\r\n\r\n" + HIDDEN and seen.all("transfer-encoding") == []


@pytest.mark.parametrize("tls", [False, True])
def test_no_case_changes_with_where_the_bytes_are_cut(node: AttackedNode, attack: Begin, tls: bool) -> None:
    """The head in one record, the body in the next; each byte of the framing field apart."""
    with attack("A6", "cut in pieces", node) as run:
        for line in all_lines()[:: 4 if tls else 2]:
            for name, rest in itertools.chain(cl_te(line), te_cl(line)):
                run.case((name, line))
                data = head_with(rest)
                at = data.find(b"\r\n\r\n") + 4
                with node.peer(tls=tls, timeout=10) as peer:
                    for piece in (data[:70], data[70:80], data[80:at], data[at:]):
                        if piece:
                            try:
                                peer.send(piece)
                            except ConnectionError:
                                break
                    assert peer.read_answer().status == 400
        assert node.origin.take() == []


def test_chunked_alone_in_any_case_is_one_request(node: AttackedNode, attack: Begin) -> None:
    with attack("A6", "the control: honest framing", node) as run:
        for value in (b"chunked", b"CHUNKED", b"Chunked"):
            for name in (b"Transfer-Encoding", b"transfer-encoding", b"TRANSFER-ENCODING"):
                run.case((name, value))
                ((_, rest),) = alone(name + b": " + value)
                assert node.attempt(head_with(rest)).statuses == [200]
                (seen,) = node.origin.take()
                assert seen.body == HIDDEN and seen.all("transfer-encoding") == ["chunked"]
        run.case("length")
        assert node.attempt(head_with(b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN)).statuses == [200]
        (seen,) = node.origin.take()
        assert seen.body == HIDDEN and seen.all("content-length") == [str(len(HIDDEN))]

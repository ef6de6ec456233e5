"""The hello reader against what OpenSSL sends, and against what OpenSSL makes of altered hellos."""

from __future__ import annotations

import random
import ssl

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.wire.client_hello import (
    DECODE_ERROR,
    ILLEGAL_PARAMETER,
    MAX_RAW_BYTES,
    TLS_1_2,
    TLS_1_3,
    UNEXPECTED_MESSAGE,
    UNRECOGNIZED_NAME,
    ClientHello,
    HelloError,
    HelloReader,
)


def openssl_hello(
    name: str | None = "app.example.com",
    alpn: tuple[str, ...] = ("h2", "http/1.1"),
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # builds of Python differ in what they offer unasked
    context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = openssl_hello()


def handmade(extensions: bytes | None, *, session: bytes = b"", legacy: int = 0x0303) -> bytes:
    body = legacy.to_bytes(2, "big") + bytes(32) + bytes((len(session),)) + session + b"\x00\x02\x13\x01\x01\x00"
    if extensions is not None:
        body += len(extensions).to_bytes(2, "big") + extensions
    return records(b"\x01" + len(body).to_bytes(3, "big") + body, 16_384)


def records(message: bytes, size: int) -> bytes:
    return b"".join(
        b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece
        for piece in (message[at : at + size] for at in range(0, len(message), size))
    )


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def server_name(name: bytes, kind: int = 0) -> bytes:
    entry = bytes((kind,)) + len(name).to_bytes(2, "big") + name
    return extension(0, len(entry).to_bytes(2, "big") + entry)


def read(data: bytes) -> ClientHello | None:
    return HelloReader().feed(data)


def outcome(data: bytes) -> ClientHello | int | None:
    """The hello, None for need more, or the alert of the refusal."""
    try:
        return read(data)
    except HelloError as error:
        return error.alert


def refusal(data: bytes) -> int:
    with pytest.raises(HelloError) as caught:
        read(data)
    return caught.value.alert


def test_name_protocols_and_versions_are_what_openssl_was_told() -> None:
    assert read(HELLO) == ClientHello("app.example.com", (b"h2", b"http/1.1"), (TLS_1_3, TLS_1_2))
    assert read(openssl_hello(None, ())) == ClientHello(None, (), (TLS_1_3, TLS_1_2))
    assert read(openssl_hello(version=ssl.TLSVersion.TLSv1_2)) == ClientHello(
        "app.example.com", (b"h2", b"http/1.1"), (TLS_1_2,)
    )


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"App.Example.COM", "app.example.com"),
        (b"app.example.com.", "app.example.com"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"_acme.example", "_acme.example"),
        (b"localhost", "localhost"),
        (b"a" * 63 + b".com", "a" * 63 + ".com"),
    ],
)
def test_names_are_lowered_and_lose_the_trailing_dot(sent: bytes, expected: str) -> None:
    hello = read(handmade(server_name(sent)))
    assert hello is not None and hello.server_name == expected


@pytest.mark.parametrize(
    "name",
    [b"a\x00b.com", b"a b", b"b\xc3\xbccher.example", b"-a.com", b"a-.com", b"a..com", b".a.com", b".", b"a.com..",
     b"a" * 64 + b".com", b"a." * 127 + b"aa", b"../etc", b"a/b", b"*.example.com", b"a:443"],
)  # fmt: skip
def test_names_that_are_no_host_names_are_refused(name: bytes) -> None:
    assert refusal(handmade(server_name(name))) == UNRECOGNIZED_NAME


@pytest.mark.parametrize(
    "content",
    [
        handmade(extension(0, b"")),
        handmade(server_name(b"")),
        handmade(server_name(b"a.com", kind=1)),
        handmade(extension(0, b"\x00\x10\x00\x00\x05a.com")),  # list longer than the extension
        handmade(extension(0, b"\x00\x10\x00\x00\x05a.com\x00\x00\x05b.com")),  # two names
        handmade(extension(0, b"\x00\x08\x00\x00\x06a.com")),  # name longer than the list
        handmade(extension(16, b"\x00\x00")),
        handmade(extension(16, b"\x00\x03\x02h")),
        handmade(extension(16, b"\x00\x02\x00\x00")),
        handmade(extension(43, b"\x03\x03\x04\x03")),
        handmade(extension(43, b"\x00")),
        handmade(b"\x00\x05\x00\x09abc"),  # an extension that passes the end
        handmade(b"\x00"),
        handmade(extension(1, b""))[:-1] + b"",
    ],
)
def test_fields_that_do_not_fit_their_frames_are_decode_errors_or_unfinished(content: bytes) -> None:
    assert outcome(content) in (DECODE_ERROR, None)


def test_every_body_cut_short_is_a_decode_error() -> None:
    """The record and message say less than the fields in them."""
    body = HELLO[9:]
    for length in range(len(body)):
        cut = records(b"\x01" + length.to_bytes(3, "big") + body[:length], 16_384)
        # exactly before the extensions it is a hello without any
        assert outcome(cut) in (DECODE_ERROR, ClientHello(None, (), (TLS_1_2,)))


def test_an_extension_that_decides_something_may_not_come_twice() -> None:
    assert refusal(handmade(server_name(b"a.com") + server_name(b"b.com"))) == ILLEGAL_PARAMETER


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\x15\x03\x01", b"\x80\x2e\x01", b"\x16\x02", b"\x16\x03\x01\x00\x05\x02"]
)
def test_other_things_than_a_hello_are_unexpected_from_the_first_byte_that_tells(data: bytes) -> None:
    assert refusal(data) == UNEXPECTED_MESSAGE


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x00\x00", b"\x16\x03\x01\x40\x01", b"\x16\x03\x01\x00\x04\x01\x01\x00\x01"]
)
def test_records_and_hellos_of_impossible_sizes_are_refused_at_once(data: bytes) -> None:
    assert refusal(data) == DECODE_ERROR


def test_bytes_behind_the_hello_in_its_record_are_refused_and_those_behind_the_record_are_not() -> None:
    message = HELLO[5:]
    assert refusal(records(message + b"\x14", 16_384)) == UNEXPECTED_MESSAGE
    assert read(HELLO + b"\x14\x03\x03\x00\x01\x01") == read(HELLO)


def test_a_hello_of_64_kib_is_read_from_several_records_and_a_larger_one_is_not() -> None:
    name = server_name(b"a.com")
    padding = 65_535 - len(name) - 4
    hello = handmade(name + extension(21, bytes(padding)))
    # 65,535 bytes of extensions and the fields before them are just over what one hello may have
    assert refusal(hello) == DECODE_ERROR
    hello = handmade(name + extension(21, bytes(padding - 100)))
    found = read(hello)
    assert found is not None and found.server_name == "a.com"


def test_a_hello_in_records_of_one_byte_is_bounded_in_bytes() -> None:
    reader = HelloReader()
    endless = records(b"\x01\x00\xff\xff" + bytes(65_535), 1)

    def feed_all() -> None:
        for at in range(0, len(endless), 1000):
            reader.feed(endless[at : at + 1000])

    with pytest.raises(HelloError):
        feed_all()
    assert len(reader.raw) < MAX_RAW_BYTES + 1001


def test_every_cut_gives_the_same_and_need_more_until_the_last_byte() -> None:
    expected = read(HELLO)
    for cut in range(1, len(HELLO)):
        reader = HelloReader()
        assert reader.feed(HELLO[:cut]) is None
        assert reader.feed(HELLO[cut:]) == expected
        assert bytes(reader.raw) == HELLO
    reader = HelloReader()
    assert [reader.feed(HELLO[at : at + 1]) for at in range(len(HELLO))] == [None] * (len(HELLO) - 1) + [expected]


@given(size=st.integers(1, 600), seed=st.integers(0, 2**32))
@settings(max_examples=200)
def test_fragments_and_chunks_of_any_size_give_the_same(size: int, seed: int) -> None:
    stream = records(HELLO[5:], size)
    rng = random.Random(seed)
    reader = HelloReader()
    at = 0
    hello = None
    while at < len(stream):
        assert hello is None
        step = rng.randint(1, 200)
        hello = reader.feed(stream[at : at + step])
        at += step
    assert hello == read(HELLO)
    assert bytes(reader.raw) == stream


def what_openssl_reads(data: bytes) -> tuple[bool, str | None]:
    """Whether OpenSSL gets as far as choosing a certificate, and for which name."""
    seen: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def note(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> int:
        seen.append(name)
        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR

    context.sni_callback = note
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(data)
    try:
        context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    except ssl.SSLError:
        pass
    except (UnicodeError, ValueError):
        return True, "not ascii"
    return (True, seen[0]) if seen else (False, None)


@given(
    changes=st.lists(st.tuples(st.integers(0, len(HELLO) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.none() | st.tuples(st.integers(9, len(HELLO) - 1), st.integers(1, 40)),
)
@example(changes=[(9 + 34, 0)], cut=None)
@settings(max_examples=500, deadline=None)
def test_what_we_read_from_an_altered_hello_openssl_reads_too(
    changes: list[tuple[int, int]], cut: tuple[int, int] | None
) -> None:
    """Never a name for us and another for OpenSSL. We may refuse more than it does."""
    data = bytearray(HELLO)
    for place, value in changes:
        data[place] = value
    if cut is not None:
        del data[cut[0] : cut[0] + cut[1]]
    reader = HelloReader()
    try:
        ours = reader.feed(bytes(data))
    except HelloError:
        return
    accepted, theirs = what_openssl_reads(bytes(data))
    if accepted and ours is not None:
        assert ours.server_name == (None if theirs is None else theirs.lower().removesuffix("."))
    if ours is None:
        assert not accepted


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_give_a_hello_need_more_or_the_documented_error(data: bytes) -> None:
    for start in (b"", b"\x16\x03\x01", HELLO[:80]):
        found = outcome(start + data)
        assert found is None or isinstance(found, ClientHello) or 0 < found < 256


def test_a_broken_hello_is_refused_alike_whatever_comes_behind_its_record() -> None:
    """The bytes of a next record are not read for those that it lacks."""
    name = b"\x00\x00\x00\x0b\x00\t\x00\x00\x06a.test"
    body = handmade(name + b"\x00\x10\x00\x03")[9:]  # ALPN, of which the value is missing
    hello = b"\x16\x03\x01" + (len(body) + 4).to_bytes(2, "big") + b"\x01" + len(body).to_bytes(3, "big") + body
    for behind in (b"", b"\x00" * 40, name * 3, HELLO):
        for pieces in ([hello + behind], [hello[:7], hello[7:] + behind]):
            with pytest.raises(HelloError) as refused:
                feed_all(pieces)
            assert refused.value.alert == DECODE_ERROR


def feed_all(pieces: list[bytes]) -> None:
    reader = HelloReader()
    for piece in pieces:
        reader.feed(piece)

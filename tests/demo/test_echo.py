"""The WebSocket echo program against a raw client: RFC 6455, byte by byte."""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.demo.programs import running

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
KEY = base64.b64encode(b"0123456789abcdef")
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running("echo") as (_, port):
        yield port


class Client:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.file = self.socket.makefile("rb")

    def head(self) -> bytes:
        lines = []
        while (line := self.file.readline()).strip():
            lines.append(line)
        return b"".join(lines)

    def send(self, opcode: int, payload: bytes, *, final: bool = True, masked: bool = True) -> None:
        first = (0x80 if final else 0) | opcode
        size, bit = len(payload), 0x80 if masked else 0
        if size < 126:
            head = struct.pack("!BB", first, bit | size)
        elif size < 65536:
            head = struct.pack("!BBH", first, bit | 126, size)
        else:
            head = struct.pack("!BBQ", first, bit | 127, size)
        mask = b"\x12\x34\x56\x78"
        body = mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) if masked else payload
        self.socket.sendall(head + body)

    def receive(self) -> tuple[int, bytes]:
        first, size = self.file.read(2)
        assert first & 0x80 and not size & 0x80, "a server's frames are whole here, and never masked"
        if size == 126:
            (size,) = struct.unpack("!H", self.file.read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self.file.read(8))
        return first & 0x0F, self.file.read(size)

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def handshake(key: bytes = KEY, version: bytes = b"13") -> bytes:
    return (
        b"GET / HTTP/1.1\r\nHost: echo\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
        b"Sec-WebSocket-Key: " + key + b"\r\nSec-WebSocket-Version: " + version + b"\r\n\r\n"
    )


@contextmanager
def connected(port: int) -> Iterator[Client]:
    client = Client(port)
    try:
        client.socket.sendall(handshake())
        head = client.head()
        accept = base64.b64encode(hashlib.sha1(KEY + GUID).digest())
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"Sec-WebSocket-Accept: " + accept in head
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 1 << 20])
def test_a_message_of_any_size_comes_back_as_it_was(port: int, size: int) -> None:
    message = bytes(index % 251 for index in range(size))
    with connected(port) as client:
        client.send(BINARY, message)
        assert client.receive() == (BINARY, message)


def test_text_comes_back_as_text(port: int) -> None:
    with connected(port) as client:
        client.send(TEXT, "grüß dich".encode())
        assert client.receive() == (TEXT, "grüß dich".encode())


def test_fragments_are_joined_and_a_ping_between_them_is_answered_at_once(port: int) -> None:
    with connected(port) as client:
        client.send(TEXT, b"one ", final=False)
        client.send(PING, b"there?")
        assert client.receive() == (PONG, b"there?")
        client.send(0x0, b"two ", final=False)
        client.send(0x0, b"three")
        assert client.receive() == (TEXT, b"one two three")


def test_a_frame_that_arrives_with_the_handshake_is_not_lost(port: int) -> None:
    client = Client(port)
    mask = b"\0\0\0\0"
    client.socket.sendall(handshake() + b"\x81\x85" + mask + b"hello")
    assert client.head().startswith(b"HTTP/1.1 101 ")
    assert client.receive() == (TEXT, b"hello")
    client.close()


def test_a_close_frame_is_answered_with_its_code_and_the_connection_ends(port: int) -> None:
    with connected(port) as client:
        client.send(CLOSE, struct.pack("!H", 1000) + b"bye")
        assert client.receive() == (CLOSE, struct.pack("!H", 1000))
        assert client.file.read() == b""


@pytest.mark.parametrize(
    ("name", "opcode", "payload", "options", "code"),
    [
        ("not masked", TEXT, b"x", {"masked": False}, 1002),
        ("unknown opcode", 0x3, b"", {}, 1002),
        ("continuation of nothing", 0x0, b"x", {}, 1002),
        ("long ping", PING, b"x" * 126, {}, 1002),
        ("ping in pieces", PING, b"x", {"final": False}, 1002),
        ("text that is not UTF-8", TEXT, b"\xff", {}, 1007),
        ("close with half a code", CLOSE, b"\x03", {}, 1002),
        ("close with a reserved code", CLOSE, struct.pack("!H", 1005), {}, 1002),
    ],
)
def test_a_broken_frame_is_told_in_the_close_code(
    port: int, name: str, opcode: int, payload: bytes, options: dict[str, bool], code: int
) -> None:
    with connected(port) as client:
        client.send(opcode, payload, **options)
        kind, body = client.receive()
        assert (kind, struct.unpack("!H", body[:2])[0]) == (CLOSE, code)


def test_a_frame_above_the_limit_is_refused_by_its_head_alone(port: int) -> None:
    with connected(port) as client:
        client.socket.sendall(struct.pack("!BBQ", 0x80 | BINARY, 0x80 | 127, (1 << 20) + 1))
        kind, body = client.receive()
        assert (kind, struct.unpack("!H", body[:2])[0]) == (CLOSE, 1009)


def test_fragments_that_together_exceed_the_limit_are_refused(port: int) -> None:
    with connected(port) as client:
        client.send(BINARY, b"x" * (1 << 20), final=False)
        client.send(0x0, b"x")
        kind, body = client.receive()
        assert (kind, struct.unpack("!H", body[:2])[0]) == (CLOSE, 1009)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (handshake(key=b"dG9vIHNob3J0"), b"400"),
        (handshake(key=b"!not base64!"), b"400"),
        (handshake(version=b"8"), b"426"),
        (b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n", b"200"),
    ],
)
def test_what_is_no_handshake_gets_a_plain_answer(port: int, request_bytes: bytes, status: bytes) -> None:
    client = Client(port)
    client.socket.sendall(request_bytes)
    assert client.head().split()[1] == status
    client.close()


def test_two_plain_requests_share_a_connection(port: int) -> None:
    client = Client(port)
    for _ in range(2):
        client.socket.sendall(b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n")
        assert client.head().startswith(b"HTTP/1.1 200 OK")
        assert client.file.readline() == b"connect with a WebSocket and say something\n"
    client.close()

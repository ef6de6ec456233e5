"""A WebSocket echo server in the standard library (RFC 6455): sends back each text or binary message it gets.

Pings are answered, fragments joined, the closing handshake done; a client that breaks the protocol is told so
with a close frame (1002, or 1007 for text that is not UTF-8, or 1009 for a message above the limit) and left.
"""

import base64
import hashlib
import os
import signal
import socketserver
import struct
import sys

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
MAX_MESSAGE_BYTES = 1 << 20
MAX_HEAD_BYTES = 16_384
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
CLOSE_CODES = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}  # §7.4: what a peer may send


class Failure(Exception):
    """The client broke the protocol: close with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        try:
            while self.upgrade():
                pass
        except (ConnectionError, EOFError):
            return  # the client left

    def upgrade(self) -> bool:
        """Answer one HTTP request; a WebSocket handshake turns the connection into one. True: another may follow."""
        head = self.read_head()
        if head is None:
            return False
        request, headers = head
        key = headers.get(b"sec-websocket-key", b"")
        if b"websocket" not in headers.get(b"upgrade", b"").lower():
            return self.answer(b"200 OK", b"connect with a WebSocket and say something\n")
        if not request.startswith(b"GET ") or not self.is_nonce(key):
            return self.answer(b"400 Bad Request", b"not a WebSocket handshake\n")
        if headers.get(b"sec-websocket-version") != b"13":
            return self.answer(b"426 Upgrade Required", b"version 13 only\n", b"Sec-WebSocket-Version: 13\r\n")
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        self.wfile.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        try:
            self.echo()
        except Failure as failure:
            self.send(CLOSE, struct.pack("!H", failure.code) + str(failure).encode())
        return False

    def is_nonce(self, key: bytes) -> bool:
        try:
            return len(base64.b64decode(key, validate=True)) == 16  # §4.1
        except ValueError:
            return False

    def read_head(self) -> tuple[bytes, dict[bytes, bytes]] | None:
        request = self.rfile.readline(MAX_HEAD_BYTES).rstrip(b"\r\n")
        headers: dict[bytes, bytes] = {}
        size = len(request)
        while line := self.rfile.readline(MAX_HEAD_BYTES).rstrip(b"\r\n"):
            size += len(line)
            if size > MAX_HEAD_BYTES:
                return None
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        return (request, headers) if request else None

    def answer(self, status: bytes, body: bytes, extra: bytes = b"") -> bool:
        length = b"Content-Length: %d\r\n" % len(body)
        self.wfile.write(b"HTTP/1.1 " + status + b"\r\nContent-Type: text/plain\r\n" + extra + length + b"\r\n" + body)
        return status.startswith(b"200")

    def echo(self) -> None:
        kind, parts, size = 0, [], 0
        while True:
            final, opcode, payload = self.read_frame()
            if opcode == CLOSE:
                self.send(CLOSE, self.closing(payload))
                return
            if opcode == PING:
                self.send(PONG, payload)
            if opcode in (PING, PONG):
                continue
            if (opcode == CONTINUATION) != bool(kind):
                raise Failure(1002, "a fragment where none may be")
            kind = kind or opcode
            parts.append(payload)
            size += len(payload)
            if size > MAX_MESSAGE_BYTES:
                raise Failure(1009, "message too big")
            if final:
                message = b"".join(parts)
                if kind == TEXT:
                    self.check_text(message)
                self.send(kind, message)
                kind, parts, size = 0, [], 0

    def closing(self, payload: bytes) -> bytes:
        """What to answer a close frame: its own code, if that is one a peer may send (§5.5.1, §7.4)."""
        if not payload:
            return b""
        if len(payload) < 2 or struct.unpack("!H", payload[:2])[0] not in CLOSE_CODES:
            raise Failure(1002, "not a close code")
        self.check_text(payload[2:])
        return payload[:2]

    def check_text(self, text: bytes) -> None:
        try:
            text.decode()
        except UnicodeDecodeError:
            raise Failure(1007, "text is not UTF-8") from None

    def read_frame(self) -> tuple[bool, int, bytes]:
        first, second = self.read(2)
        final, opcode, size = bool(first & 0x80), first & 0x0F, second & 0x7F
        if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise Failure(1002, "reserved bits or opcode")
        if not second & 0x80:
            raise Failure(1002, "a client must mask its frames")  # §5.1
        if opcode >= CLOSE and (size > 125 or not final):
            raise Failure(1002, "a control frame is short and whole")  # §5.5
        if size == 126:
            (size,) = struct.unpack("!H", self.read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self.read(8))
        if size > MAX_MESSAGE_BYTES:
            raise Failure(1009, "frame too big")
        mask = self.read(4)
        return final, opcode, self.unmask(self.read(size), mask)

    def unmask(self, payload: bytes, mask: bytes) -> bytes:
        # as one big integer: a thousand times faster than byte by byte in Python
        size = len(payload)
        repeated = (mask * (size // 4 + 1))[:size]
        return (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")

    def read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def send(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 0x80 | opcode, size)
        elif size < 65536:
            head = struct.pack("!BBH", 0x80 | opcode, 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 127, size)
        self.wfile.write(head + payload)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256


def leave(signum: int, _frame: object) -> None:
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    Server(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler).serve_forever()

"""A WebSocket client in the standard library: sends each line of its input, prints each message it gets.

    python3 demo/ws.py --cacert ca.pem wss://echo.apps.localhost:8443/

Ends with the input, after what is still on the way has come. It exits with 1 if the other side ends first.
"""

import argparse
import base64
import hashlib
import os
import socket
import ssl
import struct
import sys
import threading
from urllib.parse import urlsplit

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


class WebSocket:
    def __init__(self, url: str, ca_file: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise SystemExit(f"{url!r} is not ws://HOST or wss://HOST")
        secure, host = parts.scheme == "wss", parts.hostname
        # names below localhost are this host (RFC 6761 §6.3), which not every resolver knows
        address = "127.0.0.1" if host.endswith(".localhost") else host
        self.socket = socket.create_connection((address, parts.port or (443 if secure else 80)), timeout=60)
        if secure:
            self.socket = ssl.create_default_context(cafile=ca_file).wrap_socket(self.socket, server_hostname=host)
        self.file = self.socket.makefile("rb")
        self.handshake(parts.netloc, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        self.socket.settimeout(None)
        self.lock = threading.Lock()
        self.closing = False

    def handshake(self, authority: str, target: str) -> None:
        key = base64.b64encode(os.urandom(16))
        self.socket.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {authority}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n\r\n".encode()
        )
        status = self.file.readline().decode("latin-1").strip()
        headers = {}
        while line := self.file.readline().strip():
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if " 101 " not in status + " ":
            raise SystemExit(f"no WebSocket: {status}")
        if headers.get(b"sec-websocket-accept") != base64.b64encode(hashlib.sha1(key + GUID).digest()):
            raise SystemExit("no WebSocket: the answer does not fit the question")

    def send(self, opcode: int, payload: bytes) -> None:
        size, mask = len(payload), os.urandom(4)
        if size < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
        elif size < 65536:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
        with self.lock:
            self.socket.sendall(head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)))

    def send_lines(self) -> None:
        for line in sys.stdin:
            self.send(TEXT, line.rstrip("\n").encode())
        self.closing = True
        self.send(CLOSE, struct.pack("!H", 1000))

    def print_messages(self) -> None:
        message = b""
        while True:
            first, size = self.read(2)
            if size == 126:
                (size,) = struct.unpack("!H", self.read(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self.read(8))
            payload, opcode = self.read(size), first & 0x0F
            if opcode == CLOSE:
                return
            if opcode == PING:
                self.send(PONG, payload)
            elif opcode in (CONTINUATION, TEXT, BINARY):
                message += payload
                if first & 0x80:
                    print(message.decode("utf-8", "replace"), flush=True)
                    message = b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            raise ConnectionError("the connection ended")
        return data


def main() -> int:
    parser = argparse.ArgumentParser(description="Send lines over a WebSocket, print what comes back.")
    parser.add_argument("url", help="ws://HOST[:PORT]/PATH or wss://...")
    parser.add_argument("--cacert", metavar="FILE", help="believe the authority in this PEM file")
    options = parser.parse_args()
    try:
        connection = WebSocket(options.url, options.cacert)
        threading.Thread(target=connection.send_lines, daemon=True).start()
        connection.print_messages()
    except (OSError, ssl.SSLError) as error:
        print(f"ws.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not connection.closing:
        print("ws.py: the other side closed the connection", file=sys.stderr)
    return 0 if connection.closing else 1


if __name__ == "__main__":
    sys.exit(main())

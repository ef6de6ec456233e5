"""The client side of bench/memory.py, a process of its own: opens connections, uses each as told, keeps them idle.

Reads commands from standard input, one a line: `open N` (each with one GET answered), `large N` (10 MB down and up on
the first N), `ask N` (one more GET on the first N: they are still there), `close`. Answers each with a line of JSON.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys

from bench.peers import HOST

BODY_10M = 10485760
GET = f"GET %s HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: idle\r\nAccept: */*\r\n\r\n"
POST = f"POST /upload HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: idle\r\nContent-Length: {BODY_10M}\r\n\r\n"


def exchange(connection: socket.socket, request: bytes) -> int:
    """Send one request, read the whole answer; returns its body's length."""
    connection.sendall(request)
    held = b""
    while b"\r\n\r\n" not in held:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError(f"closed after {held!r}")
        held += more
    head, _, body = held.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    if not lines[0].startswith(b"http/1.1 200"):
        raise ConnectionError(f"answered {lines[0]!r}")
    length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
    got = len(body)
    while got < length:
        more = connection.recv(262144)
        if not more:
            raise ConnectionError(f"closed after {got} of {length} bytes")
        got += len(more)
    return length


def main(port: int, tls: bool) -> None:
    context = ssl._create_unverified_context(ssl.PROTOCOL_TLS_CLIENT) if tls else None
    upload = POST.encode() + b"u" * BODY_10M
    connections: list[socket.socket] = []
    for line in sys.stdin:
        verb, _, number = line.strip().partition(" ")
        if verb == "open":
            for _ in range(int(number)):
                connection = socket.create_connection(("127.0.0.1", port), 60)
                if context is not None:
                    connection = context.wrap_socket(connection, server_hostname=HOST)
                exchange(connection, (GET % "/small").encode())
                connections.append(connection)
        elif verb == "large":
            for connection in connections[: int(number)]:
                if exchange(connection, (GET % "/10m").encode()) != BODY_10M:
                    raise ConnectionError("a short 10 MB answer")
                exchange(connection, upload)
        elif verb == "ask":
            for connection in connections[: int(number)]:
                exchange(connection, (GET % "/small").encode())
        elif verb == "close":
            for connection in connections:
                connection.close()
            connections.clear()
        print(json.dumps({"done": verb, "open": len(connections)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "tls")

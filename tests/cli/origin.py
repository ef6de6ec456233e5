"""A server in a thread that speaks TLS (or not) and answers each connection as scripted."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import trustme

Script = Callable[[socket.socket], None]


class Authority:
    """A CA made for the test, and a certificate of it."""

    def __init__(self, *names: str) -> None:
        self.ca = trustme.CA()
        self.pem = self.ca.cert_pem.bytes().decode()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*names).configure_cert(self.context)


@contextmanager
def origin(script: Script, authority: Authority | None = None) -> Iterator[tuple[str, int]]:
    """Run `script` on each connection, one after the other; yields the address."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return  # closed: the test is over
            with connection, suppress(OSError):
                connection.settimeout(10)
                if authority is None:
                    script(connection)
                else:
                    with authority.context.wrap_socket(connection, server_side=True) as tls:
                        script(tls)

    thread = threading.Thread(target=serve, name="origin")
    thread.start()
    try:
        yield server.getsockname()[:2]
    finally:
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes accept
        server.close()
        thread.join(15)


def read_head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        piece = connection.recv(4096)
        if not piece:
            break
        head += piece
    return head

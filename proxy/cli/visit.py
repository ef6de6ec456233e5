"""One request to an app as a client outside makes it, with the time of every phase.

Used by `bench coldstart` and by the demo: both want to know when the ClientHello left and when the first byte came,
which http.client does not tell. TLS runs over memory BIOs so that each step is seen. Times are monotonic seconds; the
beginning is known in Unix time too, by which the node's record of a wake is set beside them.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

_READ_BYTES = 65_536


@dataclass(slots=True)
class Times:
    """When each phase ended, in monotonic seconds. TLS phases are None without TLS."""

    began: float = 0.0
    began_unix: float = 0.0
    connected: float | None = None
    hello_sent: float | None = None
    handshake_done: float | None = None
    request_sent: float | None = None
    first_byte: float | None = None
    ended: float | None = None

    def ms(self) -> dict[str, float]:
        """Milliseconds since the beginning of the connect, of the phases that were reached."""
        names = ("connected", "hello_sent", "handshake_done", "request_sent", "first_byte", "ended")
        reached = ((name, getattr(self, name)) for name in names)
        return {name: round((at - self.began) * 1e3, 3) for name, at in reached if at is not None}


class Wire(io.RawIOBase):
    """A client's connection, plain or TLS. Reads like a file; every wait ends after `timeout_s`."""

    def __init__(
        self, address: tuple[str, int], server_name: str, tls: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        self.times = Times(time.monotonic(), time.time())
        self._socket = socket.create_connection(address, timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.times.connected = time.monotonic()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            try:
                self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
                self._handshake(self._tls)
            except BaseException:
                self._socket.close()
                raise

    def _handshake(self, tls: ssl.SSLObject) -> None:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                if self.times.hello_sent is None:
                    self.times.hello_sent = time.monotonic()
                self._receive()
        self._flush()
        self.times.handshake_done = time.monotonic()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._socket.sendall(data)

    def _receive(self) -> None:
        if data := self._socket.recv(_READ_BYTES):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def send(self, data: bytes) -> None:
        if self._tls is None:
            self._socket.sendall(data)
            return
        self._tls.write(data)
        self._flush()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:  # Any: a writable buffer, which 3.11 cannot name
        size = self._read_some(memoryview(buffer))
        if size and self.times.first_byte is None:
            self.times.first_byte = time.monotonic()
        return size

    def _read_some(self, buffer: memoryview) -> int:
        if self._tls is None:
            return self._socket.recv_into(buffer)
        while True:
            try:
                data = self._tls.read(len(buffer))
                buffer[: len(data)] = data
                return len(data)
            except ssl.SSLWantReadError:
                self._flush()
                self._receive()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    def close(self) -> None:
        if not self.closed:
            self._socket.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case; the last line of a repeated one
    body: bytes
    times: Times
    arrivals: tuple[float, ...] = field(default=())  # when each piece of the body came, monotonic


class _Reader:
    """What http.client needs of a socket: a file to read from."""

    def __init__(self, wire: Wire) -> None:
        self._file = io.BufferedReader(wire, _READ_BYTES)

    def makefile(self, mode: str) -> IO[bytes]:
        return self._file


def read_answer(wire: Wire, method: str) -> Answer:
    """Read one response to its end. Raises OSError or http.client.HTTPException if it is none."""
    response = http.client.HTTPResponse(cast(socket.socket, _Reader(wire)), method=method)  # only makefile is used
    response.begin()
    pieces: list[bytes] = []
    arrivals: list[float] = []
    for piece in _pieces(response):
        pieces.append(piece)
        arrivals.append(time.monotonic())
    wire.times.ended = time.monotonic()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, b"".join(pieces), wire.times, tuple(arrivals))


def _pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while piece := response.read1(_READ_BYTES):
        yield piece


def visit(
    address: tuple[str, int], host: str, tls: ssl.SSLContext | None, *, path: str = "/", method: str = "GET",
    port: int | None = None, timeout_s: float = 30.0,
) -> Answer:  # fmt: skip
    """Connect anew, make one request, read the answer. `port` goes into Host where it is not the default one."""
    authority = host if port in (None, 443 if tls else 80) else f"{host}:{port}"
    with Wire(address, host, tls, timeout_s) as wire:
        wire.send(
            f"{method} {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: wakefront\r\nAccept: */*\r\n"
            "Connection: close\r\n\r\n".encode("ascii")
        )
        wire.times.request_sent = time.monotonic()
        return read_answer(wire, method)


def trusting(ca_pem: str) -> ssl.SSLContext:
    """A context that believes the given authority alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca_pem)
    context.set_alpn_protocols(["http/1.1"])
    return context


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile: a value that was really measured."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -(-len(ordered) * round(share * 1000) // 1000) - 1))]

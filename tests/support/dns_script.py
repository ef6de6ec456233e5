"""A name server that says what the test wants, on UDP and TCP: for answers that no honest server gives.

The test's function gets the query and "udp" or "tcp". It returns messages or raw bytes, any number of them: packets, or
parts of one TCP stream, sent `pause_s` apart; () is silence. Over TCP the length goes before a message, not before raw
bytes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import dns.flags
import dns.message
import dns.rrset

Said = dns.message.Message | bytes


class ScriptedDns:
    """`asked` has each question as "NAME TYPE transport"."""

    def __init__(
        self, answer: Callable[[dns.message.Message, str], Iterable[Said]], *, address: str = "127.0.0.1",
        port: int = 0, pause_s: float = 0.0,
    ) -> None:  # fmt: skip
        self._answer = answer
        self._pause_s = pause_s
        self.asked: list[str] = []
        self._end = threading.Event()
        for _ in range(50):
            self._tcp = socket.create_server((address, port))
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.port = self._tcp.getsockname()[1]
            try:
                self._udp.bind((address, self.port))
                break
            except OSError:
                self._tcp.close()
                self._udp.close()
        self.at = f"{address}:{self.port}"
        self._udp.settimeout(0.05)
        self._tcp.settimeout(0.05)
        self._threads = [threading.Thread(target=self._serve_udp), threading.Thread(target=self._serve_tcp)]

    def _said(self, wire: bytes, transport: str) -> Iterable[Said]:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.asked.append(f"{question.name.to_text(True)} {question.rdtype.name} {transport}")
        return self._answer(query, transport)

    def _serve_udp(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(TimeoutError):
                wire, peer = self._udp.recvfrom(65_535)
                for said in self._said(wire, "udp"):
                    data = said if isinstance(said, bytes) else said.to_wire(max_size=65_535)
                    with contextlib.suppress(OSError):
                        self._udp.sendto(data, peer)
                    time.sleep(self._pause_s)

    def _serve_tcp(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._tcp.accept()
                thread = threading.Thread(target=self._serve_stream, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve_stream(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            stream = connection.makefile("rb")
            (length,) = struct.unpack("!H", stream.read(2))
            for said in self._said(stream.read(length), "tcp"):
                data = said if isinstance(said, bytes) else said.to_wire(max_size=65_535, prepend_length=True)
                connection.sendall(data)
                if self._end.wait(self._pause_s):
                    return

    def __enter__(self) -> ScriptedDns:
        for thread in list(self._threads):
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(10)
        self._udp.close()
        self._tcp.close()


def reply(
    query: dns.message.Message, *records: str, authority: Iterable[str] = (), is_authoritative: bool = True
) -> dns.message.Message:
    """An answer with records as in a zone file: "name ttl IN type data"."""
    message = dns.message.make_response(query)
    if is_authoritative:
        message.flags |= dns.flags.AA
    for section, texts in ((message.answer, records), (message.authority, authority)):
        for text in texts:
            name, ttl, rdclass, rdtype, data = text.split(" ", 4)
            section.append(dns.rrset.from_text(name, int(ttl), rdclass, rdtype, data))
    return message

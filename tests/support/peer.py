"""A client that writes raw bytes and reads answers one at a time, over a plain or a TLS socket.

It frames by the rules of RFC 9112 §6 on its own, so that what it finds is no parser of the edge's.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Any


@dataclass
class Answer:
    """One response. `raw` is its head as received; field names are in lower case."""

    status: int
    raw: bytes
    fields: list[tuple[str, str]]
    body: bytes = b""
    trailers: bytes = b""
    interim: tuple[bytes, ...] = ()

    def __getitem__(self, name: str) -> str:
        found = self.all(name)
        assert len(found) == 1, f"{name}: {found} in {self.raw!r}"
        return found[0]

    def all(self, name: str) -> list[str]:
        return [value for one, value in self.fields if one == name]

    def __contains__(self, name: str) -> bool:
        return bool(self.all(name))

    @property
    def told(self) -> Any:
        """What the scripted origin says it received."""
        assert self.status == 200, (self.raw, self.body)
        return json.loads(self.body)


class Closed(Exception):
    """The connection ended before what was read for was whole; `had` is what came of it."""

    def __init__(self, had: bytes) -> None:
        super().__init__(f"closed after {had[-200:]!r}")
        self.had = had


class Peer:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._held = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes | str) -> None:
        self.socket.sendall(data.encode("latin-1") if isinstance(data, str) else data)

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _more(self) -> bytes:
        return self.socket.recv(1 << 18)

    def read_until(self, end: bytes) -> bytes:
        """Up to and with `end`."""
        while end not in self._held:
            more = self._more()
            if not more:
                raise Closed(self._held)
            self._held += more
        data, _, self._held = self._held.partition(end)
        return data + end

    def read_exactly(self, size: int) -> bytes:
        parts = [self._held]
        have = len(self._held)
        while have < size:
            more = self._more()
            if not more:
                raise Closed(b"".join(parts))
            parts.append(more)
            have += len(more)
        data = b"".join(parts)
        self._held = data[size:]
        return data[:size]

    def read_to_end(self) -> bytes:
        parts = [self._held]
        while more := self._more():
            parts.append(more)
        self._held = b""
        return b"".join(parts)

    def is_closed(self) -> bool:
        """Whether the other side closes, having sent nothing more. Waits for it."""
        try:
            return not self._held and not self._more()
        except ConnectionResetError:
            return True

    def has_nothing(self, seconds: float) -> bool:
        """Whether nothing, not even an end, comes for this long."""
        if self._held:
            return False
        before = self.socket.gettimeout()
        self.socket.settimeout(seconds)
        try:
            self._held = self._more()
            return False
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(before)

    def read_head(self) -> Answer:
        raw = self.read_until(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return Answer(int(first.split(" ", 2)[1]), raw, fields)

    def read_chunk(self) -> bytes:
        """One chunk; empty for the last."""
        size = int(self.read_until(b"\r\n"), 16)
        if not size:
            return b""
        data = self.read_exactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    def read_answer(self, method: str = "GET") -> Answer:
        """The next final answer, with the interim ones before it."""
        interim: list[bytes] = []
        while (answer := self.read_head()).status < 200 and answer.status != 101:
            interim.append(answer.raw)
        answer.interim = tuple(interim)
        if method == "HEAD" or answer.status in (101, 204, 304):
            return answer
        if "transfer-encoding" in answer:
            assert answer["transfer-encoding"] == "chunked" and "content-length" not in answer
            while chunk := self.read_chunk():
                answer.body += chunk
            while (line := self.read_until(b"\r\n")) != b"\r\n":
                answer.trailers += line
        elif "content-length" in answer:
            answer.body = self.read_exactly(int(answer["content-length"]))
        else:
            answer.body = self.read_to_end()
        return answer

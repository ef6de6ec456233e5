"""The one record each request ends in, and the buffer that takes them to a file.

A request appends an encoded line and goes on. A thread writes what has gathered, by time or size; while it is held up
(full disk, a pipe nobody reads) lines wait up to a bound and are then dropped and counted, so that a log never
holds up a request.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime

import msgspec

from proxy.edge.timers import Wheel

FLUSH_S = 0.2
FLUSH_BYTES = 64 * 1024
MAX_HELD_BYTES = 8 * 1024 * 1024


class Record(msgspec.Struct, omit_defaults=True):
    """One request. Times are milliseconds from the head's arrival; bytes are bodies without framing."""

    time: float  # unix seconds when the head had arrived
    app: str
    client: str
    method: str
    host: str
    target: str
    status: int
    duration_ms: float
    bytes_in: int
    bytes_out: int
    request_id: str
    port: int
    tls: bool = False
    machine: str = ""
    first_byte_ms: float = 0.0
    wake_ms: float = 0.0
    attempts: int = 0
    code: str = ""
    detail: str = ""
    upgrade: bool = False


_encode = msgspec.json.Encoder().encode


def json_line(record: Record) -> bytes:
    return _encode(record) + b"\n"


def _printable(text: str) -> str:
    """As it can stand within quotes on one line; `-` for nothing."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return text or "-"
    return text.encode("unicode_escape").decode("ascii").replace('"', '\\"')


def text_line(record: Record) -> bytes:
    """Combined-log-like: client, time, request line, status, bytes, duration, app and machine, request id, code."""
    when = datetime.fromtimestamp(record.time, UTC).strftime("%d/%b/%Y:%H:%M:%S +0000")
    return (
        f'{record.client or "-"} [{when}] "{record.method or "-"} {_printable(record.target)}" {record.host or "-"}'
        f" {record.status} {record.bytes_out} {record.duration_ms:.3f}ms {record.app or '-'}/{record.machine or '-'}"
        f" {record.request_id or '-'} {record.code or '-'}\n"
    ).encode()


class AccessLog:
    """Appends lines to `path` (`-`: standard output; empty: nowhere)."""

    def __init__(self, path: str, log_format: str, wheel: Wheel, on_dropped: Callable[[int], None]) -> None:
        self._path = path
        self._wheel = wheel
        self._on_dropped = on_dropped
        self._lines: list[bytes] = []
        self._held = 0
        self._waiting = False
        self._fd = -1
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[int] | None = None
        self.is_on = bool(path)
        self.format_line = text_line if log_format == "text" else json_line
        if self.is_on:
            self._fd = self._open()
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="access-log")

    def _open(self) -> int:
        if self._path == "-":
            return os.dup(sys.stdout.fileno())
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def write(self, record: Record) -> None:
        line = self.format_line(record)
        if self._held > MAX_HELD_BYTES:
            self._on_dropped(1)
            return
        self._lines.append(line)
        self._held += len(line)
        if not self._waiting:
            self._waiting = True
            self._wheel.call_later(FLUSH_S, self._flush)
        elif self._held > FLUSH_BYTES:
            self._flush_now()

    def _flush(self) -> None:
        self._waiting = False
        if not self._flush_now() and self._lines:
            self._waiting = True
            self._wheel.call_later(FLUSH_S, self._flush)

    def _flush_now(self) -> bool:
        """Hand what has gathered to the writer; False while the writer still has the last batch."""
        if self._writing is not None:
            if not self._writing.done():
                return False
            self._account(self._writing)
            self._writing = None
        if self._lines and self._writer is not None:
            lines, self._lines = self._lines, []
            self._held = 0
            self._writing = self._writer.submit(self._write, lines)
        return True

    def _account(self, written: Future[int]) -> None:
        if lost := written.result():
            self._on_dropped(lost)

    def _write(self, lines: list[bytes]) -> int:
        """In the thread: write all of it. Returns how many lines were lost."""
        data = b"".join(lines)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            return data.count(b"\n")
        return 0

    def reopen(self) -> None:
        """After a rotation: go on in a new file of the same name."""
        if not self.is_on or self._path == "-":
            return
        fresh = self._open()
        old, self._fd = self._fd, fresh
        if self._writer is not None:
            self._writer.submit(os.close, old)

    def close(self) -> None:
        """Write the rest and stop. Blocks until it is written: call when no request is served any more."""
        if self._writer is not None:
            if self._writing is not None:
                self._account(self._writing)
                self._writing = None
            self._flush_now()
            self._writer.shutdown(wait=True)
            self._writer = None
            os.close(self._fd)
        self.is_on = False

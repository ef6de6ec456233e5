"""The one record each request ends in, and the buffer that takes them to a file.

A request appends an encoded line and goes on. A thread writes what has gathered, by time or size; while it is held up
(full disk, a pipe nobody reads) lines wait up to a bound and are then dropped and counted, so that a log never
holds up a request.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from proxy.edge.access_record import Record, json_line, text_line
from proxy.edge.timers import Wheel

FLUSH_S: Final = 0.2
FLUSH_BYTES: Final = 64 * 1024
CLOSE_S: Final = 0.5
MAX_HELD_BYTES = 8 * 1024 * 1024


_log = logging.getLogger(__name__)


class AccessLog:
    """Appends lines to `path` (`-`: standard output; empty: nowhere)."""

    def __init__(self, path: str, log_format: str, wheel: Wheel, on_dropped: Callable[[int], None]) -> None:
        self._path = path
        self._wheel = wheel
        self._on_dropped = on_dropped
        self._lines: list[bytes] = []
        self._held = 0
        self._waiting = False
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._writing: _Batch | None = None
        self._writer: threading.Thread | None = None
        self._is_followed = True  # the file that is open bears the name
        self.is_on = bool(path)
        self.format_line = text_line if log_format == "text" else json_line
        if self.is_on:
            # a daemon: a write that never returns must not keep the process
            self._writer = threading.Thread(
                target=self._write_all, args=(self._open(),), name="access-log", daemon=True
            )
            self._writer.start()

    def _open(self) -> int:
        if self._path == "-":
            return os.dup(sys.stdout.fileno())
        os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self._path, flags | os.O_NONBLOCK, 0o640)  # a pipe without a reader is an error, not a wait
        os.set_blocking(fd, True)
        return fd

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
            if not self._writing.done:
                return False
            self._account()
        if self._lines and self._writer is not None:
            self._writing = _Batch(self._lines)
            self._lines, self._held = [], 0
            self._batches.put(self._writing)
        return True

    def _account(self) -> None:
        """Count what the batch that is over lost; all of one that is not."""
        batch, self._writing = self._writing, None
        if batch is not None and (lost := batch.lost if batch.done else len(batch.lines)):
            self._on_dropped(lost)

    def _write_all(self, fd: int) -> None:
        """The thread: write each batch as it comes."""
        while (batch := self._batches.get()) is not None:
            fd = self._followed(fd)
            data = b"".join(batch.lines)
            try:
                while data:
                    data = data[os.write(fd, data) :]
            except OSError:
                batch.lost = data.count(b"\n")
            batch.done = True
        os.close(fd)

    def _followed(self, fd: int) -> int:
        """The file that bears the name now: whoever rotates logs renames the one that is open, and need tell nobody."""
        if self._path == "-":
            return fd
        try:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(fd)):
                    return fd
            new = self._open()
        except OSError as error:  # what there is goes on being written where it was
            if self._is_followed:
                _log.error("the access log %s was renamed, and no new one can be opened: %s", self._path, error)
            self._is_followed = False
            return fd
        self._is_followed = True
        os.close(fd)
        return new

    def close(self) -> None:
        """Write the rest and stop. What a file does not take within CLOSE_S is lost, and counted."""
        self.is_on = False
        thread, self._writer = self._writer, None
        if thread is None:
            return
        rest = _Batch(self._lines)
        self._lines, self._held = [], 0
        self._batches.put(rest)
        self._batches.put(None)
        thread.join(CLOSE_S)
        self._account()
        self._writing = rest
        self._account()


class _Batch:
    """Lines on their way to the file. `done` is set last, by the thread."""

    __slots__ = ("done", "lines", "lost")

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines
        self.lost = 0
        self.done = False

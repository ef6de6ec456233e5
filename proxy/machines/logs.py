"""A machine's output: written by the machine itself to one file, bounded, read back by whoever asks.

The machine holds the file open in append mode, so no other process's end costs a line. The bound is kept by punching a
hole over the oldest part (`trim`): offsets and the machine's descriptor stay as they are, no line is copied or missed,
and only the disk space of what is beyond the bound is given back. The file's length therefore grows on (`ls -l` shows
more than `du`); a start after it passed `_RENEW_BYTES` begins a new file and keeps the last one as `.1`.
Lines of ours in it say when the machine started and how it ended.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

LIMIT_BYTES = 16 << 20  # kept per machine
MAX_LINE_BYTES = 64 << 10  # longer lines are shown in pieces of this size

_RENEW_BYTES = 1 << 30
_CHUNK = 64 << 10
_PUNCH_KEEP_SIZE = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_BLOCK = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of one machine, without its end. Not decoded: machines write what they like."""

    machine: str
    text: bytes


def log_path(data_dir: str, app: str, machine: str) -> str:
    return os.path.join(data_dir, "logs", app, f"{machine}.log")


def log_files(data_dir: str, app: str) -> dict[str, str]:
    """Machine id -> file, of every machine of the app that ever wrote; the one written last comes last."""
    folder = os.path.join(data_dir, "logs", app)
    try:
        found = [(entry.stat().st_mtime_ns, entry.name, entry.path) for entry in os.scandir(folder)]
    except FileNotFoundError:
        return {}
    return {name.removesuffix(".log"): path for _, name, path in sorted(found) if name.endswith(".log")}


def open_log(path: str) -> int:
    """A descriptor for a machine's output; the caller closes its own. Call before a start, when nobody writes."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.fstat(fd).st_size <= _RENEW_BYTES:
        return fd
    os.close(fd)
    os.replace(path, path + ".1")
    return open_log(path)


def mark(fd: int, now: float, machine: str, event: str) -> None:
    """Append a line of our own, on a line of its own even if the machine's last one has no end."""
    size = os.fstat(fd).st_size
    start = b"" if size == 0 or os.pread(fd, 1, size - 1) == b"\n" else b"\n"
    moment = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    os.write(fd, start + f"--- {moment} {machine} {event} ---\n".encode())


def trim(path: str, limit_bytes: int = LIMIT_BYTES) -> int:
    """Give back the disk space of all but the last `limit_bytes`; waits until a quarter more is in use, so that it is
    rare. Returns the bytes freed. Where the file system can't punch holes the file is emptied, and a line says so.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return 0
    if status.st_blocks * 512 <= limit_bytes + limit_bytes // 4:
        return 0
    end = (status.st_size - limit_bytes) // _BLOCK * _BLOCK
    if end <= 0:
        return 0
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        if _libc.fallocate(fd, _PUNCH_KEEP_SIZE, 0, end) == 0:
            return max(0, status.st_blocks - os.fstat(fd).st_blocks) * 512
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, f"cannot punch a hole: {os.strerror(number)}", path)
        os.ftruncate(fd, 0)
        os.write(fd, b"--- older output dropped: this file system cannot free part of a file ---\n")
        return status.st_size
    finally:
        os.close(fd)


def tail(files: dict[str, str], lines: int) -> list[LogLine]:
    """The last lines of several machines, in the order of `files`; at most `lines`, of each and of all."""
    found: deque[LogLine] = deque(maxlen=lines)
    for machine, path in files.items():
        found.extend(LogLine(machine, text) for text in _last_lines(path, lines))
    return list(found)


def _last_lines(path: str, lines: int) -> list[bytes]:
    """Read backwards, never into a hole, at most what the bound keeps."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        end = position = os.fstat(fd).st_size
        start = first_data(fd, 0)
        floor = max(start, end - 2 * LIMIT_BYTES)
        chunks: list[bytes] = []
        ends = 0
        while position > floor and ends <= lines:
            step = min(_CHUNK, position - floor)
            position -= step
            chunks.append(os.pread(fd, step, position))
            ends += chunks[-1].count(b"\n")
        whole = b"".join(reversed(chunks)).split(b"\n")
        if position > 0 and len(whole) > 1:
            del whole[0]  # its beginning is not here
        if whole[-1] == b"":
            del whole[-1]
        pieces = [piece for line in whole for piece in _pieces(line)]
        return pieces[-lines:] if lines > 0 else []
    finally:
        os.close(fd)


def first_data(fd: int, offset: int) -> int:
    """The first offset from here on that is not in a hole; the file's end if there is nothing more."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(fd).st_size


def _pieces(line: bytes) -> Iterator[bytes]:
    line = line.removesuffix(b"\r")
    if not line:
        yield line
    for start in range(0, len(line), MAX_LINE_BYTES):
        yield line[start : start + MAX_LINE_BYTES]


@dataclass(slots=True)
class _Position:
    offset: int
    inode: int
    partial: bytes = b""
    skipping: bool = False  # at the tail end of a hole: drop what is left of a line that began in it


@dataclass(slots=True)
class Follower:
    """Reads what machines append, from the files' ends onward; call `read` as often as news are wanted (every 100 ms).

    New machines of the app are found by giving `read` the files of the moment. What was trimmed away before it was
    read is skipped and told by a line. Bounded: one call reads at most `budget_bytes` over all files.
    """

    files: dict[str, str]
    budget_bytes: int = 1 << 20
    _positions: dict[str, _Position] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for machine, path in self.files.items():
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            self._positions[machine] = _Position(status.st_size, status.st_ino)

    def read(self, files: dict[str, str] | None = None) -> list[LogLine]:
        if files is not None:
            self.files = files
        share = max(_CHUNK, self.budget_bytes // max(1, len(self.files)))
        return [line for machine, path in self.files.items() for line in self._news(machine, path, share)]

    def _news(self, machine: str, path: str, share: int) -> Iterable[LogLine]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            status = os.fstat(fd)
            at = self._positions.setdefault(machine, _Position(0, status.st_ino))
            if at.inode != status.st_ino or status.st_size < at.offset:  # a new file, or an emptied one
                at.offset, at.inode, at.partial, at.skipping = 0, status.st_ino, b"", False
            if status.st_size == at.offset:
                return []
            lines: list[bytes] = []
            start = first_data(fd, at.offset)
            if start > at.offset:
                lines.append(b"--- %d bytes of older output dropped ---" % (start - at.offset))
                at.offset, at.partial, at.skipping = start, b"", True
            data = os.pread(fd, share, at.offset)
            at.offset += len(data)
            lines += self._split(at, data)
            return [LogLine(machine, line) for line in lines]
        finally:
            os.close(fd)

    def _split(self, at: _Position, data: bytes) -> list[bytes]:
        if at.skipping:
            _, found, data = data.partition(b"\n")
            at.skipping = not found
        *whole, at.partial = (at.partial + data).split(b"\n")
        lines = [piece for line in whole for piece in _pieces(line)]
        while len(at.partial) > MAX_LINE_BYTES:
            lines.append(at.partial[:MAX_LINE_BYTES])
            at.partial = at.partial[MAX_LINE_BYTES:]
        return lines

"""What /proc says of processes: which are a machine's, whether they stand still, what they use.

Every reading may be out of date when it is returned; a pid is certain only together with its start time, or while its
parent has not reaped it. Processes that end while being read are left out, never an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

MACHINE_VARIABLE = "FLY_MACHINE_ID"
APP_VARIABLE = "FLY_APP_NAME"
NODE_VARIABLE = "WAKEFRONT_NODE_DIR"  # the node's data_dir: two nodes on one host leave each other's machines alone

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_MAX_ENVIRON = 256 * 1024
_MAX_COUNTED = 256


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Fields of /proc/PID/stat (proc(5)): state letter, parent, group, session, CPU time, start."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    cpu_ticks: int
    start_ticks: int
    rss_pages: int
    threads: int

    @property
    def stands_still(self) -> bool:
        """Stopped, or ended."""
        return self.state in "TtZX"

    @property
    def has_ended(self) -> bool:
        """A first thread that left while others work on looks like a zombie too."""
        return self.state in "ZX" and self.threads <= 1


def read_stat(pid: int) -> ProcessStat | None:
    """None: there is no such process."""
    raw = _read(f"/proc/{pid}/stat", 4096)
    if not raw:
        return None
    fields = raw[raw.rindex(b")") + 2 :].split()  # the name before it may hold spaces and parentheses
    return ProcessStat(
        pid=pid,
        state=fields[0].decode(),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        start_ticks=int(fields[19]),
        rss_pages=int(fields[21]),
        threads=int(fields[17]),
    )


def environment(pid: int) -> bytes:
    """The environment a process was started with, NUL before and after each variable; empty where it can't be read.

    A program may have overwritten it (to show a title), so that a missing variable proves nothing.
    """
    return b"\0" + _read(f"/proc/{pid}/environ", _MAX_ENVIRON)


def variable(environ: bytes, name: str) -> str | None:
    start = environ.find(b"\0" + name.encode() + b"=")
    if start < 0:
        return None
    start += len(name) + 2
    end = environ.find(b"\0", start)
    return os.fsdecode(environ[start : end if end >= 0 else len(environ)])


def pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def of_node(node_dir: str) -> Iterator[tuple[int, str]]:
    """(pid, machine id) of every process that carries this node's mark. One pass over /proc, about 15 µs a process."""
    mark = f"\0{NODE_VARIABLE}={node_dir}\0".encode()
    own = os.getpid()
    for pid in pids():
        if pid == own:
            continue
        environ = environment(pid)
        if mark in environ and (machine := variable(environ, MACHINE_VARIABLE)) is not None:
            yield pid, machine


def members(leader: int, node_dir: str, machine: str) -> list[ProcessStat]:
    """Living processes of a machine: of its session or group, and those that left both but carry its mark."""
    mark = f"\0{NODE_VARIABLE}={node_dir}\0".encode()
    own = os.getpid()
    found = []
    for pid in pids():
        stat = read_stat(pid)
        if stat is None or stat.has_ended or pid == own:
            continue
        if leader in (stat.session, stat.group) or _carries(pid, mark, machine):
            found.append(stat)
    return found


def _carries(pid: int, mark: bytes, machine: str) -> bool:
    environ = environment(pid)
    return mark in environ and variable(environ, MACHINE_VARIABLE) == machine


def sessions() -> dict[int, list[ProcessStat]]:
    """Session -> its living processes: one pass over /proc, about 10 µs a process."""
    found: dict[int, list[ProcessStat]] = {}
    for pid in pids():
        stat = read_stat(pid)
        if stat is not None and not stat.has_ended:
            found.setdefault(stat.session, []).append(stat)
    return found


def usage(processes: list[ProcessStat]) -> tuple[int, float, int]:
    """(resident bytes, CPU seconds, open files) of some processes; the files of at most 256 of them."""
    files = 0
    for stat in processes[:_MAX_COUNTED]:
        try:
            files += len(os.listdir(f"/proc/{stat.pid}/fd"))
        except OSError:  # ended meanwhile, or runs as somebody whose files we may not see
            continue
    rss = sum(stat.rss_pages for stat in processes) * _PAGE
    return rss, sum(stat.cpu_ticks for stat in processes) / _TICKS, files


def writes_to(pid: int, path: str) -> bool:
    """Whether a process's standard output or error is this file."""
    for fd in (1, 2):
        try:
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), os.stat(path)):
                return True
        except OSError:
            continue
    return False


def _read(path: str, limit: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        chunks = []
        while limit > 0 and (chunk := os.read(fd, min(limit, 65536))):
            chunks.append(chunk)
            limit -= len(chunk)
        return b"".join(chunks)
    except OSError:  # it ended between open and read
        return b""
    finally:
        os.close(fd)

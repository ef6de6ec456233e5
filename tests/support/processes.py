"""Processes seen from outside: /proc, and the file in which a supervisor says who its children are."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def wait_for(what: Callable[[], T | None], seconds: float, message: str | Callable[[], str]) -> T:
    """The first true value of `what`, asked every few milliseconds, or a failed test."""
    deadline = time.monotonic() + seconds
    while True:
        if value := what():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {message if isinstance(message, str) else message()}")
        time.sleep(0.005)


def all_pids() -> Iterator[int]:
    return map(int, filter(str.isdigit, os.listdir("/proc")))


def stat_of(pid: int) -> list[str] | None:
    """/proc/PID/stat from the third field on: state, parent, group, session ... None: no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def state_of(pid: int) -> str | None:
    """R, S, D, T (stopped), Z (ended, not reaped) ... None: no such process."""
    fields = stat_of(pid)
    return fields[0] if fields else None


def started_at(pid: int) -> int | None:
    """Start time in ticks: with the pid it names a process for good."""
    fields = stat_of(pid)
    return int(fields[19]) if fields else None


def runs(pid: int) -> bool:
    return state_of(pid) not in (None, "Z", "X")


def cpu_s(pid: int) -> float:
    """User and system time used so far."""
    fields = stat_of(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def descendants(pid: int) -> set[int]:
    """All processes below one, zombies too."""
    parents: dict[int, list[int]] = {}
    for one in all_pids():
        if fields := stat_of(one):
            parents.setdefault(int(fields[1]), []).append(one)
    found: set[int] = set()
    todo = [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found.update(children)
        todo += children
    return found


def belonging_to(folder: Path, mark: str) -> set[int]:
    """Running processes that work in a folder, write to files in it, or carry a mark in their environment."""
    me = os.getpid()
    prefix = f"{folder}/"
    found = set()
    for pid in all_pids():
        if pid == me or not runs(pid):
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or not ours to look into
            links = [f"/proc/{pid}/cwd", *(f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))]
            named = any(f"{_link(link)}/".startswith(prefix) for link in links)
            if named or mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.add(pid)
    return found


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # closed meanwhile
        return ""


class Family:
    """A supervisor's children, read from run_dir/children.json."""

    def __init__(self, run_dir: Path, log: Callable[[], str]) -> None:
        self.run_dir = run_dir
        self._log = log

    def is_ready(self, pid: int) -> bool:
        """Whether this supervisor (not an earlier one in the same folder) has said so."""
        try:
            return (self.run_dir / "ready").read_text() == f"{pid}\n"
        except FileNotFoundError:
            return False

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.run_dir / "children.json").read_text())
        return status

    def child(self, role: str, slot: int = 0) -> dict[str, Any] | None:
        return next((one for one in self.status()["children"] if (one["role"], one["slot"]) == (role, slot)), None)

    def pid_of(self, role: str, slot: int = 0) -> int:
        child = self.child(role, slot)
        assert child is not None, f"no {role} {slot} at the moment\n{self._log()}"
        return int(child["pid"])

    def wait_replaced(self, role: str, slot: int, old: int, seconds: float = 10.0) -> int:
        """The pid of the successor, once it is ready."""

        def successor() -> int | None:
            child = self.child(role, slot)
            return int(child["pid"]) if child and child["ready"] and child["pid"] != old else None

        return wait_for(successor, seconds, lambda: f"a ready successor of {role} {slot}, pid {old}\n{self._log()}")

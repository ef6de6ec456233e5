"""Machines whose control has died: their ends are kept as zombies until a control has them on record.

The supervisor is the subreaper, so whatever a dead control had started becomes its child, and so does what a machine
leaves behind. An end is only looked at (WNOWAIT), reported, and reaped when control says so. Standard library only.

Bounds. Machines lead a process group (they are stopped by group), stray processes mostly do not: of strays at most
`STRAYS_TOLD` are under report at a time and at most `STRAYS_KEPT` are kept; more of them are reaped at once. A zombie
of a group leader is never reaped unasked. A scan's cost grows with the number of children, so `pause_s` after it
grows with what it took.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass

STRAYS_TOLD = 64
STRAYS_KEPT = 1024
_LEAST_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class End:
    """How an orphan ended: exit code or signal."""

    pid: int
    code: int | None
    signal: int | None
    leads_group: bool


class Orphans:
    """Ended children that the supervisor did not fork, between their end and their reap."""

    def __init__(self) -> None:
        self._ended: dict[int, End] = {}
        self._leaders: deque[int] = deque()  # ended, not yet told to this control
        self._strays: deque[int] = deque()
        self._strays_kept = 0
        self._strays_told = 0
        self.pause_s = _LEAST_PAUSE_S  # how long to wait before the next scan
        self.reaped_unasked = 0

    def __len__(self) -> int:
        return len(self._ended)

    def scan(self, own: Container[int]) -> None:
        """Find children that have ended since, other than `own`."""
        begun = time.monotonic()
        for pid in _children():
            if pid not in self._ended and pid not in own and (end := _peek(pid)) is not None:
                self._keep(end)
        self.pause_s = max(_LEAST_PAUSE_S, 10 * (time.monotonic() - begun))

    def _keep(self, end: End) -> None:
        if end.leads_group:
            self._leaders.append(end.pid)
        elif self._strays_kept < STRAYS_KEPT:
            self._strays_kept += 1
            self._strays.append(end.pid)
        else:
            _reap(end.pid)
            self.reaped_unasked += 1
            return
        self._ended[end.pid] = end

    def tell_again(self) -> None:
        """A new control knows of nothing: all that still waits is due again."""
        self._leaders = deque(pid for pid, end in self._ended.items() if end.leads_group)
        self._strays = deque(pid for pid, end in self._ended.items() if not end.leads_group)
        self._strays_told = 0

    def next_to_tell(self) -> End | None:
        """The end to report next, or None while nothing is due. It stays due until `told`."""
        if self._leaders:
            return self._ended[self._leaders[0]]
        if self._strays and self._strays_told < STRAYS_TOLD:
            return self._ended[self._strays[0]]
        return None

    def told(self, end: End) -> None:
        if end.leads_group:
            self._leaders.popleft()
        else:
            self._strays.popleft()
            self._strays_told += 1

    def reap(self, pid: int) -> bool:
        """Control has recorded this end. False if no ended orphan has that pid."""
        end = self._ended.pop(pid, None)
        if end is None:
            return False
        _reap(pid)
        queue = self._leaders if end.leads_group else self._strays
        if pid in queue:  # answered before it was told: an earlier control's answer
            queue.remove(pid)
        elif not end.leads_group:
            self._strays_told -= 1
        if not end.leads_group:
            self._strays_kept -= 1
        return True


def _children() -> Iterator[int]:
    """Our children, living and ended."""
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children") as file:
            yield from map(int, file.read().split())
        return
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        pass
    for name in filter(str.isdigit, os.listdir("/proc")):
        fields = _stat(int(name))
        if fields is not None and int(fields[1]) == me:
            yield int(name)


def _peek(pid: int) -> End | None:
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # reaped meanwhile
        return None
    if result is None:
        return None
    fields = _stat(pid)
    leads = fields is None or int(fields[2]) == pid  # when in doubt, it may be a machine
    if result.si_code == os.CLD_EXITED:
        return End(pid, result.si_status, None, leads)
    return End(pid, None, result.si_status, leads)


def _reap(pid: int) -> None:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # a ptracer may have taken it
        pass


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat after the name: state, parent, process group, session ..."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return None

"""The supervisor's children: the places they fill, how one is forked, and the talk with it.

Standard library only. A place is control or a worker slot; a child is the process in it. When to start, kill or give
up is the supervisor's; here is how.

Over the channel go JSON objects, one a datagram; unknown ones are ignored:

    child -> supervisor     {"op": "ready"}                     it serves
    control -> supervisor   {"op": "reap", "pid": P}            this orphan's end is on record
    control -> supervisor   {"op": "turn", "id": N, "plan": {...}}    have workers of this plan take over (turnover.py)
                            {"op": "plan", "plan": {...}}       a plan that asks for no new workers
    supervisor -> control   {"op": "bound", "id": N}            what the plan listens on is bound, new workers start
                            {"op": "turned", "id": N, "faults": [...]}    they serve; or why nothing has changed
                            {"op": "workers", "rows": [...], "retiring": [...]}    who there is
                            {"op": "leave"}                     end, and leave the machines to the next control
    supervisor -> child     {"op": "drain", "timeout_s": S}     finish and end (workers get SIGTERM too)
    supervisor -> worker    {"op": "retire", "timeout_s": S}    others accept now: keep what there is until it ends
    supervisor -> control   {"op": "reload"}                    SIGHUP came
                            {"op": "exited", "pid": P, "code": C, "signal": S}    an orphan has ended; one is null
    supervisor -> worker    {"op": "cover", "slot": S, "public_ports": [...]}     with copies of the listening sockets
                            of a slot that can't start, in that order: accept there too
                            {"op": "uncover", "slot": S}        close them again
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

QUICK_DEATH_S = 5.0  # a life shorter than this counts as a failed start, and so does one that never was ready
LONG_LIFE_S = 30.0  # and one this long forgives them
BACKOFF_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
BACKOFF_AFTER_READY = 3  # a child that had served comes back within 0.4 s however often it dies
COVER_FAILURES = 3  # failed starts in a row after which another worker accepts for a slot
EXIT_FAILED = 70  # it ended by an exception; the traceback is on stderr
_DATAGRAM_BYTES = 65_536
_DATAGRAMS_A_TURN = 256
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36

Role = Literal["control", "worker"]


@dataclass(slots=True)
class Child:
    """A running process, our end of its channel, and what is known of its health."""

    pid: int
    pidfd: int
    channel: socket.socket  # SEQPACKET: one JSON message a datagram
    started_at: float = 0.0
    beat: int = 0  # the value last seen in its heartbeat cell
    beat_at: float = 0.0  # when it was seen to change; judged by our clock alone
    ready: bool = False
    killed: bool = False
    gone_quiet: bool = False  # it closed its end of the channel
    wants_room: bool = False  # the kernel held as much as it takes
    _outbox: deque[bytes] = field(default_factory=deque)

    def to_state(self) -> dict[str, Any]:
        """For the program that the supervisor becomes by exec; it names descriptors by number."""
        return {
            "pid": self.pid,
            "pidfd": self.pidfd,
            "channel": self.channel.fileno(),
            "started_at": self.started_at,
            "ready": self.ready,
            "killed": self.killed,
            "gone_quiet": self.gone_quiet,
            "outbox": [one.decode() for one in self._outbox],
        }

    @classmethod
    def from_state(cls, raw: dict[str, Any], now: float) -> Child:
        child = cls(raw["pid"], raw["pidfd"], socket.socket(fileno=raw["channel"]), raw["started_at"], 0, now)
        child.ready, child.killed, child.gone_quiet = raw["ready"], raw["killed"], raw["gone_quiet"]
        child._outbox.extend(one.encode() for one in raw["outbox"])
        return child

    def send(self, message: dict[str, Any]) -> None:
        """Send, or queue until there is room. The queue stays short: equal messages that still wait are one."""
        datagram = json.dumps(message).encode()
        if datagram not in self._outbox:
            self._outbox.append(datagram)
        self.flush()

    def flush(self) -> None:
        while self._outbox and self._try_send(self._outbox[0]):
            self._outbox.popleft()

    def send_now(self, message: dict[str, Any]) -> bool:
        """Send without queueing. False: not now, or (if there is no `wants_room`) never again."""
        return not self._outbox and self._try_send(json.dumps(message).encode())

    def send_sockets(self, message: dict[str, Any], sockets: Sequence[socket.socket]) -> bool:
        """Like `send_now`, with copies of the sockets."""
        return not self._outbox and self._try_send(json.dumps(message).encode(), [one.fileno() for one in sockets])

    def _try_send(self, datagram: bytes, fds: Sequence[int] = ()) -> bool:
        if self.gone_quiet:
            return False
        try:
            socket.send_fds(self.channel, [datagram], fds)
        except BlockingIOError:
            self.wants_room = True
            return False
        except OSError:  # it has closed its end: dying, which the pidfd tells
            return False
        self.wants_room = False
        return True

    def receive(self) -> Iterator[bytes]:
        """The datagrams that wait, but not so many that other children have no turn."""
        for _ in range(0 if self.gone_quiet else _DATAGRAMS_A_TURN):
            try:
                datagram = self.channel.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError:
                datagram = b""
            if not datagram:
                self.gone_quiet = True
                return
            yield datagram

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself; the pidfd tells
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        self.killed = True
        self.signal(signal.SIGKILL)

    def reap(self) -> str | None:
        """Once it has ended: how, as `exited with status 0` or `was killed by SIGKILL`."""
        try:
            result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return "ended in a way that is not known"
        if result is None:
            return None
        if result.si_code == os.CLD_EXITED:
            return f"exited with status {result.si_status}"
        try:
            return f"was killed by {signal.Signals(result.si_status).name}"
        except ValueError:
            return f"was killed by signal {result.si_status}"

    def end(self) -> None:
        """Kill it and wait for that: for one that has only just been forked, and holds nothing."""
        self.kill()
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        self.close()

    def close(self) -> None:
        os.close(self.pidfd)
        self.channel.close()


ENDED_WELL = "exited with status 0"


@dataclass(slots=True)
class Place:
    """Control, or one worker of a plan. Its row in shared memory is its alone as long as the worker lives."""

    role: Role
    slot: int  # the row
    index: int  # of its heartbeat cell
    number: int = 0  # of this worker among the `workers` that share the listening sockets
    workers: int = 1
    retire_by: float | None = None  # others have taken over; it has until then for the connections it has
    incarnation: int = 0
    child: Child | None = None
    failures: int = 0  # failed starts in a row
    start_at: float | None = None  # when to fill it again
    covered_by: Child | None = None  # the worker that accepts for this slot while it can't start

    @property
    def name(self) -> str:
        return "control" if self.role == "control" else f"worker {self.slot}"

    @property
    def process_name(self) -> str:
        """As `ps` and `top` show it."""
        return "wf-control" if self.role == "control" else f"wf-worker-{self.slot}"

    @property
    def cannot_start(self) -> bool:
        """It has failed so often that clients who wait at its sockets would wait long."""
        return self.failures >= COVER_FAILURES and (self.child is None or not self.child.ready)

    def to_state(self) -> dict[str, Any]:
        names = ("role", "slot", "index", "number", "workers", "retire_by", "incarnation", "failures", "start_at")
        return {name: getattr(self, name) for name in names} | {"child": self.child and self.child.to_state()}

    @classmethod
    def from_state(cls, raw: dict[str, Any], now: float) -> Place:
        child = raw.pop("child")
        place = cls(**raw)
        if child is not None:
            place.child = Child.from_state(child, now)
        return place

    def after_death(self, lived_s: float, was_ready: bool) -> float:
        """Count a death; the seconds to wait before the next start. Who never served has failed, however late."""
        if lived_s < QUICK_DEATH_S or not was_ready:
            self.failures += 1
        elif lived_s >= LONG_LIFE_S:
            self.failures = 0
        most = BACKOFF_AFTER_READY if was_ready else len(BACKOFF_S) - 1
        return BACKOFF_S[min(max(self.failures - 1, 0), most)]


def fork(place: Place, run: Callable[[socket.socket], int]) -> Child:
    """A new process for a place. In it `run` is called with its end of the channel, and the result is its exit status.

    Raises OSError if the system refuses; then there is no process.
    """
    parent = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    sys.stdout.flush()
    sys.stderr.flush()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _live(place, run, parent, ours, theirs)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    try:
        return Child(pid, os.pidfd_open(pid), ours)
    except OSError:  # out of descriptors: a child that can't be watched must not live
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
        raise


def _live(
    place: Place, run: Callable[[socket.socket], int], parent: int, ours: socket.socket, theirs: socket.socket
) -> NoReturn:
    """The whole life of a child. It never returns into the supervisor's stack."""
    status = EXIT_FAILED
    try:
        ours.close()
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above took effect
            os._exit(EXIT_FAILED)
        set_process_name(place.process_name)
        _reset_signals(place.role)
        status = run(theirs)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):  # stdio closed or full: there is nobody left to tell
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _reset_signals(role: Role) -> None:
    """SIGINT and SIGHUP of a terminal reach the whole group, but the supervisor alone answers them.

    Handlers rather than SIG_IGN, which machines would inherit through exec.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    unheard = [signal.SIGINT, signal.SIGHUP]
    if role == "control":
        unheard.append(signal.SIGTERM)  # its order to drain comes over the channel, after the workers have ended
    for number in unheard:
        signal.signal(number, _unheard)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _unheard(number: int, frame: object) -> None:
    """Replaced by a child that does want to hear it."""


_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """prctl(2), which the standard library lacks."""
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def become_subreaper() -> None:
    """From now on the descendants of an ended child become our children, not those of init."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_process_name(name: str) -> None:
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)

"""What a supervisor needs to become one of another version: the request, the trial, what is handed on, the exec.

    wakefront upgrade      writes run_dir/upgrade.json (a Request) and sends SIGUSR2
    supervisor             has the new program tried: can it be loaded, does it read what it will be handed?
                           then becomes it, with the same pid, children, sockets and shared memory (`become`)
    new program            takes over, or goes back (upgrade.py)
    run_dir/upgrade-result.json    how far it has come, for who asked

What is handed on is one JSON object in a memfd; descriptors stay open across the exec and are named by number. Both
programs read the same form of it (FORMAT). Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from proxy import state

FORMAT = 1  # of what is handed on
TRIAL_S = 20.0
REQUEST_FILE = "upgrade.json"
RESULT_FILE = "upgrade-result.json"
_MOST_BYTES = 1024 * 1024
_SAID_BYTES = 8192  # of what a trial says, kept for the message


class SuccessionError(Exception):
    """It can't be done; the message says why, and that nothing has changed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `wakefront upgrade` asks for."""

    id: str  # the result carries it
    python: str  # interpreter of the environment that the new program is installed in
    version: str
    plan: str  # ServePlan as JSON, made by the new program from config.toml

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_request(path: str) -> Request:
    """Raises SuccessionError for a file that is not there, not ours to trust, or no request."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if (owner := os.fstat(fd).st_uid) not in (os.geteuid(), 0):
                raise SuccessionError(f"{path} belongs to user {owner}, who may not choose the program")
            raw = json.loads(file.read(_MOST_BYTES))
        request = Request(**{key: raw[key] for key in ("id", "python", "version", "plan")})
        if not all(isinstance(value, str) for value in asdict(request).values()):
            raise ValueError("a value is no text")
        return request
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SuccessionError(f"{path} can't be read: {error!r}") from error


# --- the trial


class Trial:
    """The new program in a process of its own: it loads everything, says what it can read, and ends."""

    def __init__(self, request: Request) -> None:
        """Raises SuccessionError where the program can't even be started."""
        plan_fd = memory_file("wakefront-plan", request.plan)
        self.output, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        argv = [request.python, "-P", "-m", "proxy.supervisor", "--trial", "--plan-fd", "3"]
        actions = [
            (os.POSIX_SPAWN_DUP2, plan_fd, 3),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_DUP2, writer, 2),
        ]
        try:
            self.pid = os.posix_spawn(
                request.python, argv, os.environ, file_actions=actions, setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT],
            )  # fmt: skip
            self.pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            os.close(self.output)
            raise SuccessionError(f"{request.python} can't be run: {error}") from error
        finally:
            os.close(plan_fd)
            os.close(writer)
        self.deadline = time.monotonic() + TRIAL_S
        self.is_killed = False
        self._said = b""

    def read(self) -> bool:
        """Take what it says; the end of it matters most. True: it says no more."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.output, 65_536):
                self._said = (self._said + data)[-_SAID_BYTES:]
            return True
        return False

    def kill(self) -> None:
        self.is_killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def judge(self) -> None:
        """Once it has ended: raises SuccessionError unless it said that it can take over."""
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        self.read()
        self.close()
        text = self._said.decode("utf-8", "replace").strip()
        last = text.rpartition("\n")[2]
        if result is None or result.si_code != os.CLD_EXITED or result.si_status != 0:
            how = "ended by itself" if result is None or result.si_code == os.CLD_EXITED else "was killed"
            raise SuccessionError(f"the new program {how} when it was tried: {text[-2000:] or 'it said nothing'}")
        try:
            facts = json.loads(last)
            formats, layout = facts["formats"], facts["layout"]
        except (ValueError, KeyError, TypeError) as error:
            raise SuccessionError(f"the new program said {last[:200]!r} when it was tried") from error
        if FORMAT not in formats or layout != state.LAYOUT:
            raise SuccessionError(
                "the new program can't take over from this version while it runs (it reads other forms of what is "
                f"handed on: {formats}, layout {layout}; here {FORMAT}, {state.LAYOUT}): stop this one and start it"
            )

    def close(self) -> None:
        os.close(self.output)
        os.close(self.pidfd)


def trial_facts() -> str:
    """What a program under trial says when all is well."""
    return json.dumps({"formats": [FORMAT], "layout": state.LAYOUT})


# --- exec


def memory_file(name: str, text: str) -> int:
    """A descriptor to a text that a process started with it reads from the beginning."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def become(
    python: str,
    environ: Mapping[str, str],
    handed: Mapping[str, Any],
    descriptors: Iterable[int],
    signals: Iterable[int],
) -> NoReturn:
    """Go on as the program of another environment, with the same pid. Raises OSError if that can't be run.

    Signals that come in between wait: they are blocked here, and taken once the new program has handlers.
    """
    fd = memory_file("wakefront-succession", json.dumps({"format": FORMAT, **handed}))
    kept = [fd, *descriptors]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for one in kept:
            os.set_inheritable(one, True)
        os.execve(python, [python, "-P", "-m", "proxy.supervisor", "--resume-fd", str(fd)], environ)
    except OSError:
        for one in kept:
            os.set_inheritable(one, False)
        os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise


def descriptors_of(handed: Mapping[str, Any]) -> list[int]:
    """Those that what is handed on names."""
    found: list[int] = [handed["shared_fd"], handed["control_listener"], handed["lock_fd"]]
    found += [fd for bound in handed["bindings"]["bound"] for slot in bound["slots"] for fd in slot]
    for place in [handed["control"], *handed["workers"], *handed["retired"]]:
        if place["child"] is not None:
            found += [place["child"]["pidfd"], place["child"]["channel"]]
    return found


def take_over(fd: int) -> dict[str, Any]:
    """What the program before has handed on. Raises ValueError for a form that this one does not read."""
    with open(fd, "rb") as file:
        handed: dict[str, Any] = json.loads(file.read())
    if handed.get("format") != FORMAT:
        raise ValueError(f"what was handed on has the form {handed.get('format')}, this program reads {FORMAT}")
    return handed

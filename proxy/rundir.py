"""The supervisor's folder, data_dir/run: the lock on data_dir, control's Unix listener, and what others may read.

    supervisor.pid   locked by the supervisor while it lives; holds its pid, and is emptied at a clean end
    upgrade.json, upgrade-result.json    what `wakefront upgrade` asked for, and how far it has come (succession.py)
    upgrade.lock     held by that command while it waits (cli/upgrade.py)
    control.sock     where workers and nobody else reach control (0600)
    children.json    who is who: for `wakefront status`, and for tests
    ready            there once control and all workers have served; holds the supervisor's pid

Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket

from proxy.process import ServePlan, unix_address


class RunDirError(Exception):
    """The folder can't be had. The message says why and what to do."""


class RunDir:
    """Holds the lock from construction to the end of the process."""

    def __init__(self, plan: ServePlan, held_lock: int | None = None) -> None:
        """`held_lock`: the descriptor of a supervisor whose process goes on as this one."""
        self.path = plan.run_dir
        self.was_left_behind = False  # the last supervisor was killed: its children may still be ending
        if held_lock is not None:
            self._lock_fd = held_lock
            os.set_inheritable(held_lock, False)
            return
        try:
            os.makedirs(plan.data_dir, mode=0o700, exist_ok=True)
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            os.chmod(self.path, 0o700)
            self._lock_fd = os.open(self._in("supervisor.pid"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take(plan.data_dir)
            self._remove("ready", "children.json")
        except OSError as error:
            raise RunDirError(f"data_dir {plan.data_dir} can't be used: {error}") from error

    def _take(self, data_dir: str) -> None:
        """flock, not the pid, is the truth: it ends with its holder."""
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            raise RunDirError(
                f"another wakefront (pid {holder or 'unknown'}) already serves data_dir {data_dir}; "
                f"stop it first (kill {holder or 'PID'}) or give this node its own [node] data_dir"
            ) from None
        self.was_left_behind = bool(self._holder())
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _holder(self) -> str:
        return os.pread(self._lock_fd, 32, 0).decode("ascii", "replace").strip()

    @property
    def lock_fd(self) -> int:
        return self._lock_fd

    def path_of(self, name: str) -> str:
        return self._in(name)

    def _in(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _remove(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._in(name))

    def listen(self) -> socket.socket:
        """Control's Unix listener, for the owner only. It stays while controls come and go."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            self._remove("control.sock")
            listener.bind(unix_address(self.path, "control.sock"))
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise RunDirError(f"{self._in('control.sock')} can't be made: {error}") from error
        finally:
            os.umask(before)
        return listener

    def write(self, name: str, text: str) -> None:
        """Replace a file in one step, so that no reader sees half of it."""
        path = self._in(name)
        with open(path + ".new", "w") as file:
            file.write(text)
        os.replace(path + ".new", path)

    def clear(self) -> None:
        """Nothing runs any more, and the next supervisor need not look for leftovers."""
        self._remove("ready", "children.json", "control.sock")
        os.ftruncate(self._lock_fd, 0)

    def leave(self) -> None:
        """In a child: the lock must not outlive the supervisor."""
        os.close(self._lock_fd)

"""Runs the real supervisor with the small roles of tests/support/roles, and watches it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from proxy.process import ListenAddress, ServePlan, unix_address

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


def wait_for(what: Callable[[], T | None], seconds: float, message: str) -> T:
    """The first true value of `what`, asked every few milliseconds, or a failed test."""
    deadline = time.monotonic() + seconds
    while True:
        if value := what():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {message}")
        time.sleep(0.005)


def state_of(pid: int) -> str | None:
    """The letter of /proc/PID/stat (Z is a zombie), None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def descendants(pid: int) -> set[int]:
    """All processes below one, zombies too."""
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found


class Supervised:
    """One supervisor and its children. As a context manager it leaves no process behind."""

    def __init__(self, data_dir: Path, workers: int = 2, drain_timeout_s: float = 5.0, **more: Any) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        listen = more.pop("listen", (ListenAddress(80, "127.0.0.1", 0),))
        self.plan = ServePlan(str(data_dir / "config.toml"), str(data_dir), workers, listen, drain_timeout_s)
        self.data_dir = data_dir
        self.env = more.pop("env", {})
        self._stderr: int | None = more.pop("stderr", None)
        self.seen: set[int] = set()
        self._log_path = data_dir / "stderr"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = os.environ | {"WAKEFRONT_ROLES": "tests.support.roles", "PYTHONPATH": str(ROOT)} | self.env
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "proxy.supervisor", "--plan", self.plan.to_json()],
                stderr=log if self._stderr is None else self._stderr,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )

    def __enter__(self) -> Supervised:
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        assert self.process is not None
        self.seen |= descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for pid in self.seen:  # programs outlive a killed supervisor by design; they are ours, and in no other session
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if failure[0] is not None:
            print(f"--- supervisor's log\n{self.log()}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self._log_path.read_text()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_ready(self, seconds: float = 15.0) -> None:
        ready = self.data_dir / "run" / "ready"  # of an earlier supervisor, perhaps: so look at the pid in it
        wait_for(lambda: ready.exists() and ready.read_text() == f"{self.pid}\n", seconds, f"ready\n{self.log()}")
        self.seen |= descendants(self.pid)

    def wait_ended(self, seconds: float = 15.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.data_dir / "run" / "children.json").read_text())
        return status

    def child(self, role: str, slot: int = 0) -> dict[str, Any] | None:
        return next((one for one in self.status()["children"] if (one["role"], one["slot"]) == (role, slot)), None)

    def pid_of(self, role: str, slot: int = 0) -> int:
        child = self.child(role, slot)
        assert child is not None, f"no {role} {slot}"
        return int(child["pid"])

    def wait_replaced(self, role: str, slot: int, old: int, seconds: float = 10.0) -> int:
        """The pid of the ready successor."""

        def successor() -> int | None:
            child = self.child(role, slot)
            return int(child["pid"]) if child and child["ready"] and child["pid"] != old else None

        return wait_for(successor, seconds, f"a successor of {role} {slot}, pid {old}\n{self.log()}")

    def events(self, event: str, **match: Any) -> list[dict[str, Any]]:
        try:
            lines = (self.data_dir / "events").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in lines]
        return [one for one in found if one["event"] == event and all(one.get(k) == v for k, v in match.items())]

    def messages(self, role: str, op: str) -> list[dict[str, Any]]:
        return [one for one in self.events("message", role=role) if one["message"]["op"] == op]

    def tell(self, name: str, yes: bool = True) -> None:
        """Make the roles misbehave, or stop them from it."""
        if yes:
            (self.data_dir / name).touch()
        else:
            (self.data_dir / name).unlink()

    @property
    def port(self) -> int:
        return int(self.status()["listen"][0]["port"])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask_worker(self, line: str = "who") -> dict[str, Any]:
        with self.connect() as connection:
            return ask(connection, line)

    def ask_control(self, **command: Any) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(unix_address(self.plan.run_dir, "control.sock"))
            connection.sendall(json.dumps(command).encode() + b"\n")
            return connection.makefile("r").readline().strip()

    def spawn(self, *argv: str) -> int:
        """Have control start a program of its own session."""
        pid = int(self.ask_control(do="spawn", argv=argv))
        self.seen.add(pid)
        return pid


def ask(connection: socket.socket, line: str = "who") -> dict[str, Any]:
    connection.sendall(line.encode() + b"\n")
    answer: dict[str, Any] = json.loads(connection.makefile("r").readline())
    return answer


def log_times(log: str, pattern: str) -> Iterator[float]:
    """Seconds of day of each log line that matches."""
    for line in log.splitlines():
        if re.search(pattern, line):
            hours, minutes, seconds = line.split("T", 1)[1].split("Z", 1)[0].split(":")
            yield int(hours) * 3600 + int(minutes) * 60 + float(seconds)

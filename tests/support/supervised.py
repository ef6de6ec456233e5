"""Runs the real supervisor with the small roles of tests/support/roles, and watches it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from proxy.process import ListenAddress, ServePlan, unix_address
from tests.support.processes import Family, descendants, wait_for

ROOT = Path(__file__).resolve().parents[2]
ONE_PORT = (ListenAddress(80, "127.0.0.1", 0),)


class Supervised:
    """One supervisor and its children. As a context manager it leaves no process behind."""

    def __init__(
        self,
        data_dir: Path,
        workers: int = 2,
        drain_timeout_s: float = 5.0,
        listen: tuple[ListenAddress, ...] = ONE_PORT,
        env: dict[str, str] | None = None,
        stderr: int | None = None,
    ) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self.plan = ServePlan(str(data_dir / "config.toml"), str(data_dir), workers, listen, drain_timeout_s)
        self.data_dir = data_dir
        self.process: subprocess.Popen[bytes] | None = None
        self._env = env or {}
        self._stderr = stderr
        self._log_path = data_dir / "stderr"
        self._seen: set[int] = set()
        family = Family(data_dir / "run", self.log)
        self.status, self.child, self.pid_of = family.status, family.child, family.pid_of
        self.wait_replaced, self._is_ready = family.wait_replaced, family.is_ready

    def __enter__(self) -> Supervised:
        env = os.environ | {"WAKEFRONT_ROLES": "tests.support.roles", "PYTHONPATH": str(ROOT)} | self._env
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "proxy.supervisor", "--plan", self.plan.to_json()],
                stderr=log if self._stderr is None else self._stderr,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        return self

    def __exit__(self, *failure: object) -> None:
        assert self.process is not None
        self._seen |= descendants(self.pid)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for pid in self._seen:  # what control had started outlives a killed supervisor by design
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if failure[0] is not None:
            print(f"--- supervisor's log\n{self.log()}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self._log_path.read_text() if self._log_path.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_ready(self, seconds: float = 15.0) -> None:
        wait_for(lambda: self._is_ready(self.pid), seconds, lambda: f"ready\n{self.log()}")
        self._seen |= descendants(self.pid)

    def wait_ended(self, seconds: float = 15.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def events(self, event: str, **match: Any) -> list[dict[str, Any]]:
        """What the roles met, in order."""
        path = self.data_dir / "events"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
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
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

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
        """Have control start a program in a session of its own."""
        pid = int(self.ask_control(do="spawn", argv=argv))
        self._seen.add(pid)
        return pid


def ask(connection: socket.socket, line: str = "who") -> dict[str, Any]:
    connection.sendall(line.encode() + b"\n")
    answer: dict[str, Any] = json.loads(connection.makefile("r").readline())
    return answer

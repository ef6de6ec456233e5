"""Runs the installed `wakefront serve` in a folder of its own: what the system tests stand on.

    with ServedNode(tmp_path, apps=APPS, workers=2) as node:      # ready, or the test fails with the logs
        status, headers, body = node.get("demo")
        os.kill(node.pid_of("control"), signal.SIGKILL)

At the end the node is drained and its exit status asserted, then that no process of it is left over. A test that has
ended the node itself, or killed it, says so by `node.expect_status` or by `abandon()`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from tests.support.processes import Family, belonging_to, descendants, runs, wait_for

READY_S = 30.0
STOP_S = 40.0
SHOWN_CHARACTERS = 40_000  # of the log of a failed test


class ServedNode:
    """One node: its config.toml, its processes, and clients for its public ports, its admin API and its CLI.

    `apps` is the part of config.toml after [node] and [listen]; paths in it count from `folder`, where the caller has
    put its fly.toml files. `node` and `listen` are more lines for those two tables.
    `prefix` is a command that runs the node's.
    """

    def __init__(
        self,
        folder: Path,
        apps: str = "",
        *,
        workers: int = 2,
        node: str = "",
        listen: str = "",
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        name: str = "test-node",
        region: str = "tst",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data_dir = folder / "data"
        self.config = folder / "config.toml"
        self.workers = workers
        self.http_port, self.https_port, self.admin_port = free_ports(3)
        self.expect_status: int | None = 0  # None: any
        self.process: subprocess.Popen[bytes] | None = None
        self._head = f"""[node]
name = "{name}"
region = "{region}"
domain = "apps.localhost"
data_dir = "{self.data_dir}"
workers = {workers}
{node}
[listen]
80 = ["127.0.0.1:{self.http_port}"]
443 = ["127.0.0.1:{self.https_port}"]
admin = "127.0.0.1:{self.admin_port}"
{listen}
"""
        self._prefix = prefix
        self._mark = f"WAKEFRONT_TEST_NODE={uuid.uuid4()}"
        self._env = os.environ | dict([self._mark.split("=")]) | {"WAKEFRONT_CONFIG": str(self.config)} | (env or {})
        self._log_path = folder / "serve.log"
        self._client_context: ssl.SSLContext | None = None
        self.write_config(apps)
        family = Family(self.data_dir / "run", self.log)
        self.status, self.child, self.pid_of = family.status, family.child, family.pid_of
        self.wait_replaced, self._is_ready = family.wait_replaced, family.is_ready

    def __enter__(self) -> ServedNode:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self._print_logs()
            self.abandon()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is not None:
            self._print_logs()
            self.abandon()
            return
        try:
            self.stop()
        except BaseException:
            self._print_logs()
            raise
        finally:
            self.abandon()

    # --- life

    def write_config(self, apps: str) -> None:
        """Replace what stands after [node] and [listen]; `reload()` makes it count."""
        self.config.write_text(self._head + apps)

    def start(self) -> None:
        """Run `wakefront serve` without waiting. May be called again after an end."""
        with open(self._log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, wakefront(), "serve", "--config", str(self.config)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )

    def wait_ready(self, seconds: float = READY_S) -> None:
        """Until control and all workers serve; a node that ends instead fails the test at once."""

        def ready_or_ended() -> bool:
            return self._is_ready(self.pid) or not self._is_running()

        wait_for(ready_or_ended, seconds, "ready")  # the logs are printed on the way out
        if not self._is_running():
            raise AssertionError(f"`wakefront serve` ended instead of getting ready\n{self.log()}")

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = STOP_S) -> None:
        """Drain if it runs, then assert its exit status and that nothing of it is left."""
        assert self.process is not None
        family = descendants(self.pid) if self._is_running() else set()
        if self._is_running():
            self.process.send_signal(number)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"`wakefront serve` did not end within {seconds:g} s\n{self.log()}") from None
        assert self.expect_status in (None, status), f"exit status {status}\n{self.log()}"
        left = belonging_to(self.folder, self._mark) | {pid for pid in family if runs(pid)}
        assert not left, f"processes left over: {[_describe(pid) for pid in left]}"

    def abandon(self) -> None:
        """Kill whatever of it still runs, machines included; asserts nothing."""
        left = descendants(self.pid) if self.process is not None and self._is_running() else set()
        if self.process is not None and self._is_running():
            self.process.kill()
        for pid in left | belonging_to(self.folder, self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(10)

    def _is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # --- what it is made of

    @property
    def pid(self) -> int:
        """The supervisor."""
        assert self.process is not None
        return self.process.pid

    @property
    def worker_pids(self) -> list[int]:
        return [self.pid_of("worker", slot) for slot in range(self.workers)]

    @property
    def admin_token(self) -> str:
        return (self.data_dir / "admin.token").read_text().strip()

    def log(self) -> str:
        """Standard output and error of all its processes."""
        return self._log_path.read_text("utf-8", "replace") if self._log_path.exists() else ""

    def _print_logs(self) -> None:
        log = self.log()
        shown = log if len(log) < SHOWN_CHARACTERS else f"[...]{log[-SHOWN_CHARACTERS:]}"
        print(f"--- config.toml\n{self.config.read_text()}\n--- serve.log\n{shown}")
        for path in sorted(self.data_dir.glob("logs/**/*")):
            if path.is_file():
                print(f"--- {path.relative_to(self.data_dir)}\n{path.read_text('utf-8', 'replace')[-4000:]}")

    # --- clients

    def get(self, app: str, path: str = "/", *, tls: bool = False, **more: Any) -> tuple[int, dict[str, str], bytes]:
        return self.request("GET", app, path, tls=tls, **more)

    def request(
        self,
        method: str,
        app: str,
        path: str = "/",
        *,
        tls: bool = False,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        timeout: float = 30.0,
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, header fields (names in lower case), body."""
        connection = self.client(app, tls=tls, timeout=timeout)
        try:
            connection.request(method, path, body, {"Host": self.host(app)} | (headers or {}))
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return response.status, fields, response.read()
        finally:
            connection.close()

    def client(self, app: str, *, tls: bool = False, timeout: float = 30.0) -> http.client.HTTPConnection:
        """A connection to the edge for an app (`demo` means demo.apps.localhost). The caller closes it."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.https_port if tls else self.http_port, timeout=timeout
        )
        connection.sock = self.connect(app, tls=tls, timeout=timeout)
        return connection

    def connect(
        self, app: str, *, tls: bool = False, timeout: float = 30.0, source: str | None = None
    ) -> socket.socket:
        """A raw connection to the edge, through TLS for the app's name if asked. `source`: our address."""
        port = self.https_port if tls else self.http_port
        raw = socket.create_connection(("127.0.0.1", port), timeout, None if source is None else (source, 0))
        if not tls:
            return raw
        try:
            return self.client_context().wrap_socket(raw, server_hostname=self.host(app))
        except BaseException:
            raw.close()
            raise

    def host(self, app: str) -> str:
        return app if "." in app else f"{app}.apps.localhost"

    def client_context(self) -> ssl.SSLContext:
        """Trusts the node's own CA, as `wakefront certs ca` prints it."""
        if self._client_context is None:
            self._client_context = ssl.create_default_context(cadata=self.cli("certs", "ca"))
        return self._client_context

    def api(self, method: str, path: str, body: Any = None, *, timeout: float = 60.0) -> tuple[int, Any]:
        """One call of the admin API with the node's token: status and decoded JSON (text, if it is none)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def machines(self, app: str) -> list[dict[str, Any]]:
        """The app's machines as the admin API shows them."""
        status, found = self.api("GET", f"/v1/apps/{app}/machines")
        assert status == 200, (status, found)
        machines: list[dict[str, Any]] = found
        return machines

    def wait_machine_state(self, app: str, state: str, seconds: float = 20.0) -> dict[str, Any]:
        """The first machine of the app that is in this state."""

        def found() -> dict[str, Any] | None:
            return next((one for one in self.machines(app) if one["state"] == state), None)

        return wait_for(found, seconds, lambda: f"a machine of {app} {state}: {self.machines(app)}\n{self.log()}")

    def cli(self, *arguments: str, status: int = 0, timeout: float = 60.0) -> str:
        """Standard output of `wakefront ARGUMENTS`, which finds this node by WAKEFRONT_CONFIG.

        Where a test gives the node another clock (libfaketime), the command keeps the real one: libfaketime refuses
        Python's sleep until a moment of the monotonic clock with EINVAL.
        """
        done = subprocess.run(
            [wakefront(), *arguments],
            cwd=self.folder,
            env={name: value for name, value in self._env.items() if name != "LD_PRELOAD"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == status, f"{arguments}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


def wakefront() -> str:
    """The installed command beside this Python."""
    path = Path(sys.executable).with_name("wakefront")
    assert path.exists(), f"{path} is missing: ./run sets the environment up"
    return str(path)


def free_ports(count: int) -> list[int]:
    """TCP ports free now, below those given to machines and to clients of the kernel: none is taken meanwhile."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        command = "?"
    return f"{pid} {command.strip()}"

"""The control process as it is, with real machines. The test plays supervisor and worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from proxy import ipc
from proxy.clock import monotonic_ns
from proxy.model import AppName, Machine, MachineId, MachineState
from proxy.state import SharedMemory
from tests.control.test_link import Worker

pytestmark = pytest.mark.slow

SERVER = """
    import http.server, os, signal, sys
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(os.environ["FLY_MACHINE_ID"].encode())
        def log_message(self, *_): pass
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
FLY_TOML = """
    app = "{name}"
    kill_signal = "SIGTERM"
    [http_service]
    internal_port = 8080
    auto_stop_machines = "stop"
"""
CONFIG = """
    [node]
    name = "node"
    region = "ams"
    data_dir = "data"
    workers = 1
    [listen]
    80 = ["127.0.0.1:0"]
    admin = "127.0.0.1:0"
"""


class Setting:
    """Files, shared memory and sockets that outlive a control, and the control of the moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "data" / "run"
        self.run_dir.mkdir(parents=True, mode=0o700)
        (folder / "server.py").write_text(textwrap.dedent(SERVER))
        self.shared, self.memory = SharedMemory.create(1)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.listener.bind(str(self.run_dir / "control.sock"))
        self.listener.listen(16)
        self.incarnation = 0
        self.process: asyncio.subprocess.Process | None = None
        self.channel: socket.socket | None = None
        self.worker: Worker | None = None
        self.apps: dict[str, str] = {}

    def app(self, name: str, command: list[str], more: str = "") -> None:
        (self.folder / f"{name}.toml").write_text(textwrap.dedent(FLY_TOML.format(name=name)))
        self.apps[name] = f'[[apps]]\nfly_toml = "{name}.toml"\ncommand = {json.dumps(command)}\n{more}\n'

    def serving(self, name: str = "web", more: str = "") -> None:
        self.app(name, [sys.executable, "server.py", "{port}"], more)

    def write(self, extra: str = "") -> None:
        text = textwrap.dedent(CONFIG) + "\n".join(self.apps.values()) + extra
        (self.folder / "config.toml").write_text(text)

    async def start(self) -> None:
        """A control, up to its `ready`."""
        self.incarnation += 1
        await self.leave()
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setblocking(False)
        fds = (self.shared, self.listener.fileno(), theirs.fileno())
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.control.control_process", str(self.folder / "config.toml"),
            str(self.incarnation), *map(str, fds), pass_fds=fds, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        theirs.close()
        self.channel = mine
        assert await self.hear() == {"op": "ready"}

    async def connect(self) -> list[ipc.ToWorker]:
        self.memory.beat(1, monotonic_ns())
        self.worker = await Worker.connect(str(self.run_dir / "control.sock"))
        return await self.worker.hello()

    async def hear(self) -> dict[str, Any]:
        assert self.channel is not None
        async with asyncio.timeout(20):
            message = json.loads(await asyncio.get_running_loop().sock_recv(self.channel, 65536))
        assert isinstance(message, dict)
        return message

    def tell(self, **message: Any) -> None:
        assert self.channel is not None
        self.channel.send(json.dumps(message).encode())

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()
        await self.leave()

    async def leave(self) -> None:
        """Close our ends to a control that has gone."""
        if self.channel is not None:
            self.channel.close()
        if self.worker is not None:
            await self.worker.close()
        self.channel = self.worker = None

    async def wake(self, machine: Machine, app: str = "web") -> ipc.WakeDone:
        assert self.worker is not None
        self.worker.send(ipc.Wake(AppName(app), machine.id))
        done = (await self.worker.until(ipc.WakeDone))[-1]
        assert isinstance(done, ipc.WakeDone)
        return done

    async def ask(self, method: str, path: str) -> tuple[int, Any]:
        address = (self.run_dir / "admin").read_text().strip()
        token = (self.folder / "data" / "admin.token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession() as session, session.request(
            method, f"http://{address}{path}", headers=headers
        ) as answer:  # fmt: skip
            return answer.status, await answer.json()

    async def close(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(OSError):
                self.tell(op="drain")
            try:
                async with asyncio.timeout(20):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        await self.leave()
        self.listener.close()
        os.close(self.shared)


@pytest_asyncio.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    one = Setting(tmp_path)
    yield one
    await one.close()


def machine_of(messages: list[ipc.ToWorker], app: str = "web") -> Machine:
    return next(one.app.machines[0] for one in messages if isinstance(one, ipc.AppSet) and one.app.name == app)


async def fetch(machine: Machine) -> str:
    endpoint = machine.endpoints[0]
    url = f"http://{endpoint.host}:{endpoint.port}/"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


async def pid_of(setting: Setting, machine: MachineId, app: str = "web") -> int:
    _, shown = await setting.ask("GET", f"/v1/apps/{app}/machines/{machine}")
    assert isinstance(shown["pid"], int)
    return int(shown["pid"])


async def test_control_raises_its_limit_on_open_files_and_leaves_that_of_machines(setting: Setting) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    setting.serving()
    setting.write()
    low = len(os.listdir("/proc/self/fd")) + 128  # what this process has open already is not control's
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        await setting.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    machine = machine_of(await setting.connect())
    assert (await setting.wake(machine)).code is None
    assert setting.process is not None
    assert resource.prlimit(setting.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    assert resource.prlimit(await pid_of(setting, machine.id), resource.RLIMIT_NOFILE) == (low, hard)


async def test_a_wake_of_a_worker_starts_the_program_and_a_drain_ends_it(setting: Setting) -> None:
    setting.serving()
    setting.write()
    await setting.start()
    machine = machine_of(await setting.connect())
    assert machine.state is MachineState.CREATED
    done = await setting.wake(machine)
    assert done.code is None and done.version > machine.version
    assert await fetch(machine) == machine.id
    pid = await pid_of(setting, machine.id)
    assert setting.memory.last_beat(0) > 0
    setting.tell(op="drain")
    assert setting.process is not None
    assert await setting.process.wait() == 0
    assert not is_alive(pid)


async def test_programs_that_crash_or_cannot_run_fail_their_wakes_with_the_reason(setting: Setting) -> None:
    setting.app("crash", [sys.executable, "-c", "raise SystemExit(3)"])
    setting.app("absent", ["/no/such/program"])
    setting.app("deaf", [sys.executable, "-c", "import time; time.sleep(60)"], 'wake_timeout = "1s"')
    setting.write()
    await setting.start()
    table = await setting.connect()
    expected = {"crash": ("PM07", "exit code 3"), "absent": ("PM07", "/no/such/program"), "deaf": ("PM03", "listened")}
    for app, (code, text) in expected.items():
        done = await setting.wake(machine_of(table, app), app)
        assert done.code == code and text in done.detail, done
        held = await setting.wake(machine_of(table, app), app)
        assert held.code == "WM01" and held.retry_after_s == 1
    _, status = await setting.ask("GET", "/v1/status")
    reasons = {app["name"]: app["machines"][0]["hold_reason"] for app in status["apps"]}
    assert "exit code 3" in reasons["crash"]


async def test_a_killed_control_loses_neither_the_machine_nor_its_exit_status(setting: Setting) -> None:
    setting.serving(more="")
    setting.write()
    await setting.start()
    machine = machine_of(await setting.connect())
    await setting.wake(machine)
    pid = await pid_of(setting, machine.id)
    await setting.kill()
    assert is_alive(pid)
    await setting.start()
    again = machine_of(await setting.connect())
    assert again.state is MachineState.STARTED and again.version > machine.version
    assert await fetch(again) == machine.id and await pid_of(setting, machine.id) == pid
    os.kill(pid, signal.SIGKILL)
    # the supervisor, parent of what a dead control leaves, would see the end and tell; we play it
    setting.tell(op="exited", pid=pid, code=None, signal=9)
    assert await setting.hear() == {"op": "reap", "pid": pid}
    _, events = await setting.ask("GET", f"/v1/apps/web/machines/{machine.id}/events")
    exits = [one["request"]["exit_event"]["signal"] for one in events if one["type"] == "exit"]
    assert exits == [9]


async def test_a_pid_that_is_nobodys_is_given_back_to_be_reaped(setting: Setting) -> None:
    setting.write()
    await setting.start()
    setting.tell(op="exited", pid=4_000_000, code=0, signal=None)
    assert await setting.hear() == {"op": "reap", "pid": 4_000_000}


async def test_certificates_are_there_before_anybody_asks_and_refused_for_other_names(setting: Setting) -> None:
    setting.serving()
    setting.write()
    await setting.start()
    await setting.connect()
    assert setting.worker is not None
    for name, is_ours in (("web.apps.localhost", True), ("evil.example", False)):
        setting.worker.send(ipc.NeedCertificate(name))
        while True:
            ready = (await setting.worker.until(ipc.CertificateReady))[-1]
            assert isinstance(ready, ipc.CertificateReady)
            if ready.name == name:
                break
        assert (ready.error is None) == is_ours
    assert (setting.folder / "data" / "certs" / "ca.pem").exists()
    assert b"web.apps.localhost" in (setting.run_dir / "certificates").read_bytes()


async def test_a_reload_adds_an_app_and_a_bad_file_changes_nothing(setting: Setting) -> None:
    setting.serving()
    setting.write()
    await setting.start()
    await setting.connect()
    setting.serving("second")
    setting.write()
    assert (await setting.ask("POST", "/v1/reload"))[1]["added"] == ["second"]
    assert setting.worker is not None
    added = (await setting.worker.until(ipc.AppSet))[-1]
    assert isinstance(added, ipc.AppSet) and added.app.name == "second"
    setting.write("[nodes]\n")
    status, answer = await setting.ask("POST", "/v1/reload")
    assert status == 422 and any("nodes" in fault["text"] for fault in answer["faults"])
    _, apps = await setting.ask("GET", "/v1/apps")
    assert apps["total_apps"] == 2


async def test_a_control_that_starts_with_a_bad_file_goes_on_with_the_last_good_one(setting: Setting) -> None:
    setting.serving()
    setting.write()
    await setting.start()
    machine = machine_of(await setting.connect())
    await setting.kill()
    setting.write("[nodes]\n")
    await setting.start()
    assert machine_of(await setting.connect()).id == machine.id
    assert (await setting.wake(machine)).code is None
    _, status = await setting.ask("GET", "/v1/status")
    assert any("config.toml has faults" in warning for warning in status["warnings"])


async def test_control_leaves_at_once_when_the_supervisor_is_gone_and_machines_run_on(setting: Setting) -> None:
    setting.serving()
    setting.write()
    await setting.start()
    machine = machine_of(await setting.connect())
    await setting.wake(machine)
    pid = await pid_of(setting, machine.id)
    assert setting.channel is not None and setting.process is not None
    setting.channel.close()
    async with asyncio.timeout(10):
        await setting.process.wait()
    assert is_alive(pid)
    await setting.start()  # so that the fixture's drain ends it
    await setting.connect()


async def test_on_exit_keep_leaves_machines_running(setting: Setting) -> None:
    setting.serving()
    setting.write()
    config = setting.folder / "config.toml"
    config.write_text(config.read_text().replace("workers = 1", 'workers = 1\non_exit = "keep"'))
    await setting.start()
    machine = machine_of(await setting.connect())
    await setting.wake(machine)
    pid = await pid_of(setting, machine.id)
    setting.tell(op="drain")
    assert setting.process is not None
    assert await setting.process.wait() == 0
    assert is_alive(pid)
    setting.write()
    await setting.start()
    await setting.connect()

"""What we add to a cold start: first byte at the client less the same program spawned and polled directly.

`python -m bench wake [--quick] [--only PROGRAM,...]`. A C, a Python and a Node program, from stopped and from
suspended, ours and the baseline in turn; then 1,000 first requests at once. Method and limits: README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.processes import HERE, BenchError, compile_program, free_port
from bench.report import facts, facts_text, median, quantile, result_folder, table, write_json
from bench.wakefront import CONFIG, FLY_TOML, Wakefront

BODY = b"hello\n"
POLL_S = 0.0001

PROCESS_APP = """
[[apps]]
fly_toml = "{folder}/{name}.fly.toml"
driver = "process"
command = {command}
count = 1
"""

# (what is woken, from which state, over what, most that the median of what we add may be, in ms)
GOALS_MS = {"stopped": 2.0, "suspended": 1.0}


@dataclass(slots=True)
class Series:
    """First-byte times in ms, ours and the baseline's, taken in turn."""

    program: str
    state: str  # stopped | suspended
    over: str  # http | https
    ours: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)

    @property
    def added(self) -> list[float]:
        return [ours - baseline for ours, baseline in zip(self.ours, self.baseline, strict=True)]


def programs(folder: Path) -> dict[str, list[str]]:
    """Commands of the three programs; one that cannot run here is left out, and named in the result."""
    found = {"c": [str(compile_program("hello", folder, "-lpthread"))]}
    found["python"] = [sys.executable, "-I", "-S", str(HERE / "programs" / "hello.py")]
    node = shutil.which("node")
    if node is not None:
        found["node"] = [node, str(HERE / "programs" / "hello.js")]
    return found


class Admin:
    """The Machines API of the node under test, with its token."""

    def __init__(self, port: int, data_dir: Path) -> None:
        self._base = f"http://127.0.0.1:{port}/v1/apps"
        self._token = (data_dir / "admin.token").read_text().strip()

    def call(self, method: str, path: str) -> Any:
        request = urllib.request.Request(f"{self._base}{path}", method=method, data=b"{}" if method == "POST" else None)
        request.add_header("Authorization", f"Bearer {self._token}")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def machine(self, app: str) -> str:
        return str(self.call("GET", f"/{app}/machines")[0]["id"])

    def bring_to(self, app: str, machine: str, state: str) -> None:
        """Stop or suspend, and wait until it is so."""
        verb = {"stopped": "stop", "suspended": "suspend"}[state]
        self.call("POST", f"/{app}/machines/{machine}/{verb}")
        end = time.monotonic() + 30
        while (seen := self.call("GET", f"/{app}/machines/{machine}")["state"]) != state:
            if time.monotonic() > end:
                raise BenchError(f"{app}: {verb} asked for, but the machine is {seen}")
            time.sleep(0.01)
        time.sleep(0.02)


def first_byte(port: int, host: str, tls: ssl.SSLContext | None = None) -> float:
    """Milliseconds from before connect() to the first byte of the answer, which must be a whole good one."""
    request = f"GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode()
    began = time.perf_counter_ns()
    with socket.create_connection(("127.0.0.1", port), 60) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = tls.wrap_socket(plain, server_hostname=host) if tls else plain
        connection.sendall(request)
        answer = connection.recv(1)
        took = (time.perf_counter_ns() - began) / 1e6
        _rest(connection, answer)
    return took


def _rest(connection: socket.socket, answer: bytes) -> None:
    """Read on to the end of the answer, which must be a good one."""
    while not answer.endswith((BODY, b"\r\n0\r\n\r\n")):
        more = connection.recv(65536)
        if not more:
            break
        answer += more
    if not answer.startswith(b"HTTP/1.1 200 ") or BODY not in answer:
        raise BenchError(f"expected 200 and {BODY!r}, got {answer[:300]!r}")


class Direct:
    """The baseline: the same program without us."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self.port = free_port()
        self.pid = 0

    def spawn_and_poll(self) -> float:
        """From before the spawn to the first byte; a connection is tried every 0.1 ms."""
        env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": "/",
            "PORT": str(self.port),
        }  # as bare as a machine's
        request = b"GET / HTTP/1.1\r\nHost: direct\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"
        end = time.monotonic() + 30
        began = time.perf_counter_ns()
        self.pid = os.posix_spawn(self._command[0], self._command, env)
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.socket() as connection:
                connection.connect(("127.0.0.1", self.port))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(request)
                answer = connection.recv(1)
                took = (time.perf_counter_ns() - began) / 1e6
                _rest(connection, answer)
                return took
            if time.monotonic() > end:
                raise BenchError(f"{self._command} does not listen on port {self.port}")
            time.sleep(POLL_S)

    def resume_and_ask(self) -> float:
        """From before SIGCONT to the first byte of a direct request."""
        began = time.perf_counter_ns()
        os.kill(self.pid, signal.SIGCONT)
        signalled = (time.perf_counter_ns() - began) / 1e6
        return signalled + first_byte(self.port, "direct")

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise BenchError(f"{self._command} did not stop on SIGSTOP: status {status}")

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


def baseline(direct: Direct, state: str) -> float:
    if state == "stopped":
        direct.end()
        took = direct.spawn_and_poll()
        direct.end()
        return took
    if not direct.pid:
        direct.spawn_and_poll()
    direct.freeze()
    return direct.resume_and_ask()


def crowd(port: int, host: str, count: int) -> list[float]:
    """`count` connections opened first, then one request on each at once; ms to the first byte of each answer."""
    selector = selectors.DefaultSelector()
    began: dict[int, int] = {}
    times: list[float] = []
    connections = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(count)]
    request = f"GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\n\r\n".encode()
    try:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        for connection in connections:
            began[connection.fileno()] = time.perf_counter_ns()
            connection.sendall(request)
        end = time.monotonic() + 60
        while len(times) < count and time.monotonic() < end:
            for key, _ in selector.select(1):
                now = time.perf_counter_ns()
                answer = connections_recv(key.fileobj)
                if not answer.startswith(b"HTTP/1.1 200 "):
                    raise BenchError(f"one of {count} first requests was answered {answer[:200]!r}")
                times.append((now - began[key.fd]) / 1e6)
                selector.unregister(key.fileobj)
    finally:
        selector.close()
        for connection in connections:
            connection.close()
    return times


def connections_recv(connection: object) -> bytes:
    assert isinstance(connection, socket.socket)
    return connection.recv(65536)


def trust_of(node: Wakefront) -> ssl.SSLContext:
    """A client that trusts the node's own CA."""
    return ssl.create_default_context(cadata=node.cli("certs", "ca"))


def run(arguments: argparse.Namespace) -> int:
    runs = arguments.runs or (5 if arguments.quick else 40)
    known = facts(["python", "-m", "bench", "wake", *arguments.given])
    out = result_folder("wake", arguments.quick)
    with tempfile.TemporaryDirectory(prefix="wakefront-bench-") as temporary:
        folder = Path(temporary)
        commands = programs(folder)
        absent = {"c", "python", "node"} - set(commands)
        wanted = [name for name in commands if not arguments.only or name in arguments.only.split(",")]
        starts = folder / "starts"
        crowd_command = ["/bin/sh", "-c", f"echo started >> {starts}; exec {commands['c'][0]}"]
        config, plain, tls, admin_port = _configuration(folder, {**commands, "crowd": crowd_command})
        with Wakefront(folder, config, None, (plain, tls, admin_port)) as node:
            shutil.copy(node.config, out / "config.toml")
            shutil.copy(folder / "c.fly.toml", out / "c.fly.toml")
            admin = Admin(admin_port, folder / "data")
            trust = trust_of(node)
            series: list[Series] = []
            for name in wanted:
                series += _measure(admin, name, commands[name], plain, tls, trust, runs)
            crowds = [_crowd(admin, starts, plain, arguments.crowd) for _ in range(1 if arguments.quick else 5)]
    write_json(
        out / "results.json", {**known, "runs": runs, "series": [asdict(one) for one in series], "crowd": crowds}
    )
    text = "# Wake\n\n" + facts_text(known) + _text(series, crowds, runs, sorted(absent))
    (out / "results.md").write_text(text)
    print(text)
    print(f"written to {out}")
    good = all(one["starts"] == 1 and len(one["ms"]) == one["asked"] for one in crowds)
    return 0 if good else 1


def _configuration(folder: Path, commands: dict[str, list[str]]) -> tuple[str, int, int, int]:
    plain, tls, admin = free_port(), free_port(), free_port()
    text = CONFIG.format(
        folder=folder,
        workers=1,
        plain_port=plain,
        tls_port=tls,
        admin_port=admin,
        access_log=folder / "access.log",
    )
    for name, command in commands.items():
        (folder / f"{name}.fly.toml").write_text(FLY_TOML.format(name=name, autostop="off"))
        text += PROCESS_APP.format(folder=folder, name=name, command=json.dumps(command))
    return text, plain, tls, admin


def _measure(
    admin: Admin, name: str, command: list[str], plain: int, tls: int, trust: ssl.SSLContext, runs: int
) -> list[Series]:
    host, machine, direct = f"{name}.apps.localhost", admin.machine(name), Direct(command)
    asks: dict[str, Callable[[], float]] = {
        "http": lambda: first_byte(plain, host),
        "https": lambda: first_byte(tls, host, trust),
    }
    asks["http"](), asks["https"]()  # the certificate exists, files are in the page cache
    found = []
    try:
        for state in ("stopped", "suspended"):
            for over, ask in asks.items():
                series = Series(name, state, over)
                for _ in range(runs):
                    admin.bring_to(name, machine, state)
                    series.ours.append(ask())
                    series.baseline.append(baseline(direct, state))
                found.append(series)
                print(
                    f"{name:7} {state:10} {over:6} ours {median(series.ours):8.2f}  baseline "
                    f"{median(series.baseline):8.2f}  added {median(series.added):6.2f} ms",
                    flush=True,
                )
            direct.end()
    finally:
        direct.end()
    return found


def _crowd(admin: Admin, starts: Path, plain: int, count: int) -> dict[str, Any]:
    first_byte(plain, "crowd.apps.localhost")
    admin.bring_to("crowd", admin.machine("crowd"), "stopped")
    before = len(starts.read_text().splitlines())
    times = crowd(plain, "crowd.apps.localhost", count)
    return {"asked": count, "starts": len(starts.read_text().splitlines()) - before, "ms": times}


def _text(series: list[Series], crowds: list[dict[str, Any]], runs: int, absent: list[str]) -> str:
    rows = []
    for one in series:
        added, goal = one.added, GOALS_MS[one.state]
        met = "" if one.over == "https" else ("yes" if median(added) <= goal else "**no**")
        rows.append(
            [
                one.program,
                one.state,
                one.over,
                *(_three(values) for values in (one.ours, one.baseline, added)),
                f"≤ {goal:.0f}" if one.over == "http" else "told",
                met,
            ]
        )
    head = ["program", "from", "over", "ours ms", "baseline ms", "added by us ms", "goal p50", "met"]
    lines = [f"\n{runs} runs each, ours and the baseline in turn; p50 / p90 / p99 in ms.\n\n", table(head, rows)]
    lines += [f"\n**{name} is missing**: not installed (apt-get install nodejs)\n" for name in absent]
    lines.append("\n## First requests at once\n\n")
    lines.append(
        table(
            ["asked", "answered", "starts", "p50 ms", "p99 ms", "last ms"],
            [
                [
                    str(one["asked"]),
                    str(len(one["ms"])),
                    str(one["starts"]),
                    *(f"{quantile(one['ms'], q):.1f}" for q in (0.5, 0.99, 1.0)),
                ]
                for one in crowds
            ],
        )
    )
    return "".join(lines)


def _three(values: list[float]) -> str:
    return " / ".join(f"{one:.2f}" for one in (median(values), quantile(values, 0.9), quantile(values, 0.99)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="five runs: for a look, not for the record")
    parser.add_argument("--only", default="", help="programs, comma-separated: c,python,node")
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--crowd", type=int, default=1000)

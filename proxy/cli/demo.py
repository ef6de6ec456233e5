"""`wakefront demo`: a node of its own on loopback, with the programs of demo/apps, shown step by step.

Everything is done from outside, as a user would: the command `wakefront serve`, the admin API, HTTPS requests that
verify the node's certificate. Each step states what was seen, and holds only if that is what must be. Nothing is left
running: the node ends with the demo, even if the demo is killed, and what might remain of it is looked for and ended.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

from proxy.cli.client import ca_pem, wait_for_state
from proxy.cli.coldstart import wake_phases
from proxy.cli.failure import CliError
from proxy.cli.node import (
    CONFIG_VARIABLE,
    TOKEN_VARIABLE,
    Api,
    ApiError,
    FoundMachine,
    app_path,
    find_node,
    list_machines,
    machine_path,
)
from proxy.cli.output import print_json, say, waiting
from proxy.cli.pebble import Pebble, is_installed, pebble
from proxy.cli.visit import Answer, Times, Wire, trusting, visit

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
CROWD = 50
DOMAIN_S = 3.0  # from adding a domain to the first answer that a client trusts
RENEWALS = 3
LOAD_THREADS = 4
IDLE_S = 2.0  # idle_timeout of echo in demo/config.toml
_LOCALHOST = "127.0.0.1"
_PORTS_TRIED = 100
_PR_SET_PDEATHSIG = 1


class Broken(Exception):
    """A step saw something other than what must be."""


def must(held: bool, otherwise: str) -> None:
    if not held:
        raise Broken(otherwise)


@dataclass(slots=True)
class Step:
    """One thing shown: what was done, what was seen, how long it took, and how to see it oneself."""

    name: str
    ok: bool = False
    saw: str = ""
    phases_ms: dict[str, float] = field(default_factory=dict)
    try_it: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "ok": self.ok, "saw": self.saw, "phases_ms": self.phases_ms, "try_it": self.try_it}


# --- the node ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ports:
    http: int
    https: int
    admin: int


CA_STEPS_NEED = "Pebble, a CA for tests, is not installed: on Debian, apt install pebble"


def choose_ports() -> Ports:
    """The ports of demo/config.toml, each replaced by a free one where it is taken."""
    with _held(8080) as http, _held(8443) as https, _held(8081) as admin:
        return Ports(http, https, admin)


@contextmanager
def _held(wanted: int) -> Iterator[int]:
    """The first port from `wanted` on that can be bound, kept bound meanwhile so that no two of ours are the same.

    Ports next to it, not one of the kernel's choice: those are given to clients, and may be taken before we bind.
    """
    for port in range(wanted, wanted + _PORTS_TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_LOCALHOST, port))
                probe.listen(1)
            except OSError:
                continue
            yield port
            return
    raise CliError(f"No port of {_LOCALHOST} from {wanted} to {wanted + _PORTS_TRIED - 1} is free.")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"The demo cannot use {folder} ({error.strerror}): name another folder with --dir.") from error


def write_demo(folder: Path, ports: Ports, ca: Pebble | None = None) -> Path:
    """Copy demo/ into `folder`, with ports, Python and the CA put into config.toml; returns the path of that file."""
    source = Path(__file__).resolve().parents[2] / "demo"
    if not (source / "config.toml").is_file():
        raise CliError(f"The demo's programs are not installed (no {source}): run it from a source checkout.")
    make_folder(folder)
    shutil.copytree(source / "apps", folder / "apps", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for program in ("ws.py", "dns_hook.py"):
        shutil.copy(source / program, folder)
    text = (source / "config.toml").read_text()
    changes = {
        '"127.0.0.1:8080"': f'"{_LOCALHOST}:{ports.http}"',
        '"127.0.0.1:8443"': f'"{_LOCALHOST}:{ports.https}"',
        '"127.0.0.1:8081"': f'"{_LOCALHOST}:{ports.admin}"',
        '"python3"': json.dumps(sys.executable),
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    if ca is not None:
        hook = [sys.executable, "-I", "-S", str(folder / "dns_hook.py")]
        text += f"""
# A CA for tests stands in for a public one: it trusts the test DNS, and looks for this node at the ports above.
[certs]
issuer = "acme"
acme_directory = "{ca.directory_url}"
acme_ca_file = "{ca.ca_file}"
acme_email = "you@example.com"
addresses = ["{_LOCALHOST}"]
dns_servers = ["{ca.dns}"]

[certs.dns]
hook = "exec"
command = {json.dumps(hook)}
"""
    config = folder / "config.toml"
    config.write_text(text)
    return config


class DemoNode:
    """`wakefront serve` as a child, its admin API, and a client outside."""

    def __init__(self, folder: Path, ca: Pebble | None, ports: Ports) -> None:
        """`ca`: a CA for tests that looks for this node at `ports`; None where there is none."""
        self.folder = folder.resolve()
        self.ports = ports
        self.ca = ca
        self.config = write_demo(self.folder, self.ports, ca)
        self.log = self.folder / "serve.log"
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in (CONFIG_VARIABLE, TOKEN_VARIABLE)}
        if self.ca is not None:
            environment["DEMO_DNS"] = self.ca.dns_management
            (self.folder / "acme-root.pem").write_bytes(self.ca.roots())
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "proxy", "serve", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # Ctrl-C is for the demo, which then ends the node in order
                preexec_fn=_end_with_parent,
            )
        self._wait_until(self._child, self._is_healthy)
        self.api = Api(find_node(self.config, None))
        self._wait_until(self._child, self._has_workers)
        ca = ca_pem(self.api)
        (self.folder / "ca.pem").write_text(ca)
        self.tls = trusting(ca)

    def _wait_until(self, child: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if child.poll() is not None:
                raise CliError(f"The demo's node ended at once (status {child.returncode}):\n{self.log_end()}")
            if condition():
                return
            time.sleep(0.02)
        raise CliError(f"The demo's node was not ready after {READY_TIMEOUT_S:g} s:\n{self.log_end()}")

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(_LOCALHOST, self.ports.admin, timeout=2.0)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _has_workers(self) -> bool:
        return all(worker["linked"] for worker in self.api.get("/v1/status")["workers"])

    def log_end(self) -> str:
        lines = self.log.read_text("utf-8", "replace").splitlines()[-12:]
        return "\n".join(f"  {line}" for line in lines)

    def wait(self) -> int:
        """Until the node ends by itself; its exit status."""
        return self._child.wait() if self._child else 0

    def stop(self) -> str:
        """End the node in order. Returns what was wrong about its end, or nothing."""
        trouble = []
        if self._child is not None:
            self._child.terminate()
            try:
                status = self._child.wait(STOP_TIMEOUT_S)
                if status:
                    trouble.append(f"the node ended with status {status}")
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
                trouble.append(f"the node had to be killed {STOP_TIMEOUT_S:g} s after SIGTERM")
        if left := _end_what_is_left(self.folder):
            trouble.append(f"processes were left and have been ended: {', '.join(map(str, left))}")
        return "; ".join(trouble)

    # --- what a step does ---

    def host(self, app: str) -> str:
        return f"{app}.apps.localhost"

    def get(self, app: str, path: str = "/") -> Answer:
        address = (_LOCALHOST, self.ports.https)
        return visit(address, self.host(app), self.tls, path=path, port=self.ports.https)

    def get_plain(self, app: str, path: str = "/") -> Answer:
        return visit((_LOCALHOST, self.ports.http), self.host(app), None, path=path, port=self.ports.http)

    def get_domain(self, host: str) -> Answer:
        """Of a domain of its own, trusting the CA alone."""
        trusted = trusting((self.folder / "acme-root.pem").read_text())
        return visit((_LOCALHOST, self.ports.https), host, trusted, port=self.ports.https)

    def shown_serial(self, host: str, trusted: ssl.SSLContext) -> int:
        """The serial number of the certificate that a handshake is shown, and trusts."""
        raw = socket.create_connection((_LOCALHOST, self.ports.https), timeout=10)
        with raw, trusted.wrap_socket(raw, server_hostname=host) as sock:
            shown = sock.getpeercert()
            return int(str((shown or {})["serialNumber"]), 16)

    def add_domain(self, host: str, challenge: str) -> None:
        path = f"{app_path('counter')}/certificates/acme"
        self.api.post(path, {"hostname": host, "challenge": challenge}, timeout_s=30.0)

    def certificate(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"{app_path('counter')}/certificates/{quote(host, safe='')}")
        return found

    def curl_domain(self, host: str) -> str:
        place = f"--resolve {host}:{self.ports.https}:{_LOCALHOST}"
        return f"curl --cacert {self.folder}/acme-root.pem {place} https://{host}:{self.ports.https}/"

    def open(self, app: str) -> Wire:
        return Wire((_LOCALHOST, self.ports.https), self.host(app), self.tls, timeout_s=30.0)

    def machine(self, app: str) -> FoundMachine:
        (raw,) = list_machines(self.api, app)
        return FoundMachine(app, str(raw["id"]), str(raw["state"]), raw)

    def bring_to(self, app: str, state: str) -> None:
        """Stop or suspend through the admin API and wait until it is so."""
        machine = self.machine(app)
        if machine.state == state or (state == "stopped" and machine.state == "created"):
            return
        verb = {"stopped": "stop", "suspended": "suspend"}[state]
        self.api.post(f"{machine_path(app, machine.id)}/{verb}")
        wait_for_state(self.api, machine, state, 30.0)

    def wait_for(self, app: str, state: str) -> None:
        wait_for_state(self.api, self.machine(app), state, 30.0)

    def events(self, app: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.get(f"{machine_path(app, self.machine(app).id)}/events", {"limit": 50})
        return found

    def starts(self, app: str) -> set[str]:
        """The ids of the times its machine was told to start, as the node has them on record (the last few)."""
        return {one["id"] for one in self.events(app) if (one["type"], one["status"]) == ("start", "starting")}

    def phases(self, app: str, times: Times) -> dict[str, float]:
        """The client's phases, and between them the node's of the wake, in ms since the connect began."""
        merged = {**times.ms(), **wake_phases(self.api, app, self.machine(app).id, times)}
        return dict(sorted(merged.items(), key=lambda one: one[1]))

    def curl(self, app: str, path: str = "/", more: str = "") -> str:
        url = f"https://{self.host(app)}:{self.ports.https}{path}"
        return f"curl {more}--cacert {self.folder}/ca.pem {url}"

    def command(self, words: str) -> str:
        return f"wakefront {words} --config {self.config}"


def _end_with_parent() -> None:
    """In the child, before exec: should the demo be killed, the node gets SIGTERM and ends in order."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_what_is_left(folder: Path) -> list[int]:
    """Processes whose working directory is in the demo's folder: machines that outlived their node. Kills them."""
    inside = os.path.join(str(folder), "apps") + os.sep
    left = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        with suppress(OSError):
            if os.readlink(f"/proc/{entry}/cwd").startswith(inside):
                os.kill(int(entry), signal.SIGKILL)
                left.append(int(entry))
    return left


# --- the steps --------------------------------------------------------------------------------------------------


def _facts(answer: Answer) -> dict[str, Any]:
    """What `counter` says of itself."""
    must(answer.status == 200, f"status {answer.status}, not 200 ({answer.headers.get('wakefront-error', '')})")
    facts = json.loads(answer.body)
    must(isinstance(facts, dict), f"the answer is not the program's: {answer.body[:80]!r}")
    return dict(facts)


def cold_request(node: DemoNode, step: Step) -> None:
    before = node.machine("counter").state
    must(before in ("created", "stopped"), f"the machine was {before} before the first request")
    step.try_it = node.curl("counter")
    answer = node.get("counter")
    facts = _facts(answer)
    must(facts["count"] == 1, f"the program counts {facts['count']}, not 1: it did not just start")
    after = node.machine("counter").state
    must(after == "started", f"the machine is {after} after its answer")
    step.phases_ms = node.phases("counter", answer.times)
    step.saw = f"machine {before}, then 200 over verified TLS: count 1, pid {facts['pid']}"


def warm_request(node: DemoNode, step: Step) -> None:
    step.try_it = node.curl("counter")
    before = _facts(node.get("counter"))
    answer = node.get("counter")
    facts = _facts(answer)
    must(facts["pid"] == before["pid"], "another process answered")
    must(facts["count"] == before["count"] + 1, f"count {facts['count']} after {before['count']}")
    step.phases_ms = answer.times.ms()
    step.saw = f"200 from the same process, pid {facts['pid']}, count {facts['count']}"


def streamed_answer(node: DemoNode, step: Step) -> None:
    step.try_it = node.curl("counter", "/stream", "-N ")
    answer = node.get("counter", "/stream")
    must(answer.body == b"".join(b"line %d\n" % n for n in range(1, 6)), f"the body is {answer.body!r}")
    spread = (answer.arrivals[-1] - answer.arrivals[0]) * 1e3
    must(spread > 200, f"all lines came within {spread:.0f} ms: the answer was held back")
    step.phases_ms = answer.times.ms()
    step.saw = f"five lines, the last {spread:.0f} ms after the first, as the program wrote them"


def suspend_and_resume(node: DemoNode, step: Step) -> None:
    step.try_it = f"{node.command('machine suspend counter')} && {node.curl('counter')}"
    before = _facts(node.get("counter"))
    node.bring_to("counter", "suspended")
    answer = node.get("counter")
    facts = _facts(answer)
    must(facts["pid"] == before["pid"], f"pid {facts['pid']} after {before['pid']}: it was started anew, not resumed")
    must(facts["count"] == before["count"] + 1, f"count {facts['count']} after {before['count']}: memory was lost")
    step.phases_ms = node.phases("counter", answer.times)
    step.saw = f"frozen, then resumed by the request: the count went on from {before['count']} to {facts['count']}"


def stop_and_start(node: DemoNode, step: Step) -> None:
    step.try_it = f"{node.command('machine stop counter')} && {node.curl('counter')}"
    before = _facts(node.get("counter"))
    node.bring_to("counter", "stopped")
    must(not _is_alive(before["pid"]), f"pid {before['pid']} still runs after the stop")
    answer = node.get("counter")
    facts = _facts(answer)
    must(facts["pid"] != before["pid"], "the same process answered: it was not stopped")
    must(facts["count"] == 1, f"count {facts['count']} after a cold start")
    step.phases_ms = node.phases("counter", answer.times)
    step.saw = f"pid {before['pid']} ended, pid {facts['pid']} started by the request: count {before['count']} → 1"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def https_redirect(node: DemoNode, step: Step) -> None:
    step.try_it = f"curl -i http://{node.host('counter')}:{node.ports.http}/path?query"
    node.bring_to("counter", "stopped")
    answer = node.get_plain("counter", "/path?query")
    location = answer.headers.get("location", "")
    must(answer.status in (301, 308), f"status {answer.status}, not a redirect")
    must(location == f"https://{node.host('counter')}:{node.ports.https}/path?query", f"redirected to {location!r}")
    state = node.machine("counter").state
    must(state == "stopped", f"the redirect left the machine {state}: it should wake nothing")
    step.phases_ms = answer.times.ms()
    step.saw = f"{answer.status} to {location}; the machine sleeps on"


def crowd(node: DemoNode, step: Step) -> None:
    step.try_it = f"{node.command('machine stop counter')}; for i in $(seq {CROWD}); do {node.curl('counter')} & done"
    node.bring_to("counter", "stopped")
    starts_before = node.starts("counter")
    together = threading.Barrier(CROWD)

    def one(_: int) -> Answer:
        together.wait(10)
        return node.get("counter")

    with ThreadPoolExecutor(CROWD) as pool:
        answers = list(pool.map(one, range(CROWD)))
    facts = [_facts(answer) for answer in answers]
    pids = {fact["pid"] for fact in facts}
    must(len(pids) == 1, f"{len(pids)} processes answered")
    counts = sorted(fact["count"] for fact in facts)
    must(counts == list(range(1, CROWD + 1)), f"the program counted {counts[0]} to {counts[-1]}, not 1 to {CROWD}")
    started = node.starts("counter") - starts_before
    must(len(started) == 1, f"the node has {len(started)} starts on record, not 1")
    times = sorted(answer.times.ms()["first_byte"] for answer in answers)
    step.phases_ms = {"fastest": times[0], "median": times[len(times) // 2], "slowest": times[-1]}
    step.saw = f"{CROWD} cold requests at once: {CROWD} answers from one process, started once"


def websocket_echo(node: DemoNode, step: Step) -> None:
    state = node.machine("echo").state
    must(state in ("created", "stopped"), f"the echo machine was {state} before")
    folder = node.folder
    step.try_it = f"python3 {folder}/ws.py --cacert {folder}/ca.pem wss://{node.host('echo')}:{node.ports.https}/"
    key = base64.b64encode(os.urandom(16))
    with node.open("echo") as wire:
        wire.send(
            f"GET / HTTP/1.1\r\nHost: {node.host('echo')}:{node.ports.https}\r\nConnection: Upgrade\r\n"
            f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n\r\n".encode()
        )
        wire.times.request_sent = time.monotonic()
        head = _read_head(wire)
        must(head[0].startswith("HTTP/1.1 101"), f"the answer to the handshake was {head[0]!r}")
        expected = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()
        must(f"sec-websocket-accept: {expected}".lower() in [line.lower() for line in head], "wrong accept key")
        for text in (b"hello", b"and again"):
            wire.send(_masked_text(text))
            got = _read_exactly(wire, 2 + len(text))
            must(got == bytes((0x81, len(text))) + text, f"sent {text!r}, got back {got!r}")
        wire.times.ended = time.monotonic()
    step.phases_ms = node.phases("echo", wire.times)
    step.saw = "machine started, 101 Switching Protocols, two messages came back as they were sent"


def _read_head(wire: Wire) -> list[str]:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += _read_exactly(wire, 1)
    return head.decode("latin-1").split("\r\n")


def _read_exactly(wire: Wire, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = wire.read(size - len(data))
        must(bool(piece), f"the connection ended after {data!r}")
        data += piece or b""
    return data


def _masked_text(text: bytes) -> bytes:
    mask = os.urandom(4)
    return bytes((0x81, 0x80 | len(text))) + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))


def idle_stop(node: DemoNode, step: Step) -> None:
    step.try_it = f"{node.curl('echo')}; sleep 4; {node.command('machine list echo')}"
    answer = node.get("echo")
    must(answer.status == 200, f"status {answer.status}")
    must(node.machine("echo").state == "started", "the machine does not run after its answer")
    node.wait_for("echo", "stopped")
    slept = time.monotonic() - (answer.times.ended or 0.0)
    must(slept > IDLE_S, f"it was stopped after {slept:.1f} s, before its {IDLE_S:g} s were over")
    by = [one.get("source") for one in node.events("echo") if one.get("type") == "stop"]
    must("user" not in by[:1], "somebody asked for the stop")
    step.saw = f"stopped by the node {slept:.1f} s after its last request (idle_timeout is {IDLE_S:g} s)"


def crash_and_recovery(node: DemoNode, step: Step) -> None:
    step.try_it = f"{node.curl('crashy', '/crash', '-i ')}; {node.curl('crashy')}"
    before = node.get("crashy")
    must(before.status == 200, f"status {before.status} before the crash")
    crash = node.get("crashy", "/crash")
    reason = crash.headers.get("wakefront-error", "")
    must(crash.status in (502, 503), f"status {crash.status} for a request whose machine died")
    must(bool(reason), "the answer names no reason")
    node.wait_for("crashy", "stopped")
    codes = [((one.get("request") or {}).get("exit_event") or {}).get("exit_code") for one in node.events("crashy")]
    must(3 in codes, f"the exit code 3 is not on record: {codes}")
    after = node.get("crashy")
    must(after.status == 200, f"status {after.status} after the crash")
    must(after.body != before.body, "the crashed process answered")
    step.phases_ms = node.phases("crashy", after.times)
    step.saw = f"{crash.status} with {reason}; exit code 3 on record; the next request started it again: 200"


def broken_app(node: DemoNode, step: Step) -> None:
    step.try_it = f"{node.curl('broken', '/', '-i ')}; {node.command('logs broken')}"
    answer = node.get("broken")
    reason = answer.headers.get("wakefront-error", "")
    must(answer.status in (502, 503, 504), f"status {answer.status} from a program that cannot start")
    must(bool(reason), "the answer names no reason")
    must("retry-after" in answer.headers, "the answer has no Retry-After")
    logged = list(node.api.stream(f"{app_path('broken')}/logs", {"follow": 0, "lines": 50}, timeout_s=10.0))
    must(any("DATABASE_URL is not set" in line for line in logged), f"what it printed is not in its log: {logged}")
    others = node.get("crashy")
    must(others.status == 200, f"another app answered {others.status} meanwhile")
    step.phases_ms = answer.times.ms()
    step.saw = f"{answer.status} with {reason}, Retry-After {answer.headers['retry-after']} s; its log says why"


def _custom_domain(node: DemoNode, step: Step, host: str, challenge: str) -> None:
    step.try_it = f"{node.command(f'certs show {host}')}; {node.curl_domain(host)}"
    node.bring_to("counter", "stopped")
    began = time.monotonic()
    node.add_domain(host, challenge)
    answer = node.get_domain(host)  # the handshake waits for the certificate
    took = time.monotonic() - began
    facts = _facts(answer)
    must(facts["count"] == 1, f"count {facts['count']}: the app was awake, so the CA or something else had woken it")
    must(took < DOMAIN_S, f"the first trusted answer came {took:.1f} s after `certs add`")
    detail = node.certificate(host)
    must(detail["status"] == "active", f"its status is {detail['status']}")
    (certificate,) = detail["certificates"]
    step.phases_ms = {"added_to_answer": took * 1e3}
    step.saw = f"{host} added, proven by {challenge}, answered 200 under a certificate of {_common_name(certificate)}"


def _common_name(certificate: dict[str, Any]) -> str:
    return str(certificate["issuer"]).removeprefix("CN=")


def domain_by_tls_alpn(node: DemoNode, step: Step) -> None:
    _custom_domain(node, step, "shop.example.com", "tls-alpn-01")


def domain_by_http(node: DemoNode, step: Step) -> None:
    _custom_domain(node, step, "blog.example.org", "http-01")


def wildcard_by_dns(node: DemoNode, step: Step) -> None:
    shown = node.command("certs show '*.tenants.example.net'")
    step.try_it = f"{shown}; {node.curl_domain('acme.tenants.example.net')}"
    began = time.monotonic()
    node.add_domain("*.tenants.example.net", "dns-01")
    first = node.get_domain("acme.tenants.example.net")
    took = time.monotonic() - began
    second = node.get_domain("other.tenants.example.net")
    _facts(first)
    _facts(second)
    must(took < DOMAIN_S, f"the first trusted answer came {took:.1f} s after `certs add`")
    step.phases_ms = {"added_to_answer": took * 1e3}
    step.saw = (
        "one certificate for *.tenants.example.net, proven by a TXT record that dns_hook.py set; two tenants: 200"
    )


def renewal_under_load(node: DemoNode, step: Step) -> None:
    host = "shop.example.com"
    step.try_it = f"{node.command(f'certs renew {host}')}; {node.command('certs forecast')}"
    trusted = trusting((node.folder / "acme-root.pem").read_text())
    serials: list[int] = []
    failures: list[str] = []
    over = threading.Event()

    def shake_hands() -> None:
        while not over.is_set():
            try:
                serials.append(node.shown_serial(host, trusted))
            except (OSError, ValueError) as error:
                failures.append(f"{type(error).__name__}: {error}")

    path = f"{app_path('counter')}/certificates/{host}"
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        for _ in range(LOAD_THREADS):
            pool.submit(shake_hands)
        try:
            for _ in range(RENEWALS):
                before = node.certificate(host)["certificates"][0]["serial"]
                node.api.post(f"{path}/renew")
                deadline = time.monotonic() + 20.0
                while node.certificate(host)["certificates"][0]["serial"] == before:
                    must(time.monotonic() < deadline, f"not renewed after 20 s: {node.certificate(host)}")
                    time.sleep(0.05)
            time.sleep(0.2)
        finally:
            over.set()
    must(not failures, f"{len(failures)} of {len(failures) + len(serials)} handshakes failed: {failures[:1]}")
    must(len(set(serials)) == RENEWALS + 1, f"{len(set(serials))} certificates were seen, not {RENEWALS + 1}")
    step.saw = (
        f"renewed {RENEWALS} times under {len(serials)} handshakes: none failed, {RENEWALS + 1} certificates seen"
    )


STEPS: tuple[tuple[str, Callable[[DemoNode, Step], None]], ...] = (
    ("A first request starts a sleeping app", cold_request),
    ("A second request finds it running", warm_request),
    ("An answer is passed on as it is written", streamed_answer),
    ("Suspended and resumed, it keeps its memory", suspend_and_resume),
    ("Stopped and started, it begins anew", stop_and_start),
    ("force_https redirects, and wakes nothing", https_redirect),
    (f"{CROWD} requests at once start it once", crowd),
    ("A WebSocket to a sleeping app", websocket_echo),
    ("Left alone, an app goes back to sleep", idle_stop),
    ("A crash is told, and the next request recovers", crash_and_recovery),
    ("A program that cannot start says why", broken_app),
)
CA_STEPS: tuple[tuple[str, Callable[[DemoNode, Step], None]], ...] = (
    ("A domain of its own, proven by TLS-ALPN-01", domain_by_tls_alpn),
    ("A domain of its own, proven by HTTP-01", domain_by_http),
    ("A wildcard, proven by DNS-01", wildcard_by_dns),
    ("Renewed under load, and no handshake fails", renewal_under_load),
)


# --- the show ---------------------------------------------------------------------------------------------------


def demo(once: bool, keep: Path | None, as_json: bool) -> int:
    """Run the demo; the exit code says whether every step held."""
    steps: list[Step] = []
    with _folder(keep) as folder, _interruptible(), ExitStack() as stack:
        make_folder(folder)
        ports = choose_ports()
        shown = STEPS + CA_STEPS if is_installed() else STEPS
        ca = None
        if is_installed():
            try:
                ca = stack.enter_context(pebble(folder.resolve() / "ca", ports.http, ports.https))
            except (RuntimeError, OSError) as error:
                raise CliError(f"Pebble, the demo's CA, does not start: {error}") from error
        node = DemoNode(folder, ca, ports)
        ending = Step("The node ends and leaves nothing running")
        try:
            with waiting("starting a node", quiet=as_json):
                node.start()
            _tell(as_json, f"A node with two workers runs in {node.folder}; its log is serve.log there.\n")
            for number, (name, run) in enumerate(shown, 1):
                steps.append(_run_step(number, name, run, node, as_json))
            if ca is None:
                _tell(as_json, f"Left out, {len(CA_STEPS)} steps with domains of their own. {CA_STEPS_NEED}\n")
            if not once:
                _play(node, as_json, steps)
        except KeyboardInterrupt:
            _tell(as_json, "\nEnding the node …")
        finally:
            _be_patient()
            ending.saw = node.stop()
            ending.ok = not ending.saw
    steps.append(ending)
    complete = len(steps) == len(shown) + 1
    held = complete and all(step.ok for step in steps)
    if as_json:
        left_out = [name for name, _ in CA_STEPS if ca is None]
        print_json({"ok": held, "steps": [step.as_json() for step in steps], "left_out": left_out})
    elif not ending.ok:
        say(f"✗ {ending.name}: {ending.saw}")
    else:
        say(f"{sum(step.ok for step in steps)} of {len(shown) + 1} steps held; nothing is left running.")
    return 0 if held or (not once and complete) else 1


def _run_step(number: int, name: str, run: Callable[[DemoNode, Step], None], node: DemoNode, as_json: bool) -> Step:
    step = Step(name)
    try:
        with waiting(name, quiet=as_json):
            run(node, step)
        step.ok = True
    except Broken as error:
        step.saw = str(error)
    except (CliError, ApiError) as error:
        step.saw = f"the node: {error}"
    except (OSError, http.client.HTTPException, ssl.SSLError, ValueError, KeyError) as error:
        step.saw = f"{type(error).__name__}: {error}"
    _tell(as_json, _shown(number, step))
    return step


def _shown(number: int, step: Step) -> str:
    green, red, faint, end = ("\033[32m", "\033[31m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("",) * 4
    mark = f"{green}✓{end}" if step.ok else f"{red}✗{end}"
    lines = [f"{mark} {number:2}. {step.name}", f"      {step.saw}"]
    if step.phases_ms:
        shown = " · ".join(f"{name.replace('_', ' ')} {ms:.1f}" for name, ms in step.phases_ms.items())
        lines.append(f"      {faint}ms: {shown}{end}")
    if step.try_it:
        lines.append(f"      {faint}$ {step.try_it}{end}")
    return "\n".join(lines) + "\n"


def _tell(as_json: bool, text: str) -> None:
    if not as_json:
        say(text)


def _play(node: DemoNode, as_json: bool, steps: list[Step]) -> None:
    if as_json:
        print_json({"config": str(node.config), "steps": [step.as_json() for step in steps]})
    _tell(as_json, _invitation(node))
    status = node.wait()
    raise CliError(f"The demo's node ended by itself (status {status}):\n{node.log_end()}")


def _invitation(node: DemoNode) -> str:
    return f"""The node stays up until Ctrl-C. In another terminal:
  export {CONFIG_VARIABLE}={node.config}
  wakefront status
  wakefront logs -f counter
  wakefront bench coldstart --app counter --runs 20
  {node.curl("counter")}

Your own app, in three steps:
  1. a folder with your program and its fly.toml (the one you deploy with; it is not changed)
  2. in {node.config}:
       [[apps]]
       fly_toml = "/path/to/your/fly.toml"
       command = ["your", "program"]     # it listens on $PORT
  3. wakefront check && wakefront reload
     curl --cacert {node.folder}/ca.pem https://NAME.apps.localhost:{node.ports.https}/
"""


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="wakefront-demo-") as folder:
        yield Path(folder)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: in order."""

    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _be_patient() -> None:
    """A second Ctrl-C must not keep the demo from ending what it has started; the wait for it has a bound."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

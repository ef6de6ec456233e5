"""Sleeping machines woken by requests and by ClientHellos, starts that fail, and idle machines that stop."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.support.apps import make_app, starts
from tests.support.load import connect_to
from tests.support.processes import runs, wait_for
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
SLEEPERS = 20
HINTS_PER_SOURCE_S = 3.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    folder = tmp_path_factory.mktemp("node")
    needs = {"NEEDS": str(folder / "needed")}
    listens = {"LISTEN_NEEDS": str(folder / "may-listen")}
    idle = 'idle_timeout = "400ms"'
    apps = [make_app(folder, f"sleeper-{number}") for number in range(SLEEPERS)]
    apps += [make_app(folder, f"hello-{version}") for version in ("13", "12")]
    apps += [make_app(folder, "on-request", keys='wake_on = "request"')]
    apps += [make_app(folder, "crowd", env={"LISTEN_AFTER_S": "0.3"})]
    apps += [make_app(folder, "crashes", env=needs)]
    apps += [make_app(folder, "deaf", env=listens, keys='wake_timeout = "1s"')]
    apps += [make_app(folder, f"restart-{policy}", restart=policy) for policy in ("never", "on-failure", "always")]
    apps += [make_app(folder, name, keys=idle) for name in ("idle", "tunnel", "poll", "handshake")]
    apps += [make_app(folder, "freezes", autostop="suspend", keys=idle)]
    apps += [make_app(folder, "sporadic", keys='idle_timeout = "100ms"')]
    limits = f"\n[limits]\nwake_hints_per_source = {HINTS_PER_SOURCE_S}\n"
    with ServedNode(folder, limits + "".join(apps)) as served:
        served.client_context()  # asks for the root once, not in the middle of a test
        yield served


class Hello:
    """A TLS client that is fed by hand, so that it can stop after any flight."""

    def __init__(self, node: ServedNode, app: str, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        context = ssl.create_default_context(cadata=node.cli("certs", "ca"))
        context.minimum_version = context.maximum_version = version
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_hostname=node.host(app))
        self.socket = socket.create_connection(("127.0.0.1", node.https_port), timeout=20)

    def send_hello(self) -> None:
        assert not self._step(self._tls.do_handshake)
        self.send()

    def read_flight(self) -> None:
        """Until our own last flight, with the Finished, is ready to be sent."""
        while not self._to_send.pending:
            self._receive()
            self._step(self._tls.do_handshake)

    def send(self) -> None:
        self.socket.sendall(self._to_send.read())

    def get(self, host: str) -> bytes:
        while not self._step(self._tls.do_handshake):
            self._receive()
        self._tls.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        self.send()
        answer: list[bytes] = []
        while not answer:
            self._receive()
            self._step(lambda: answer.append(self._tls.read(65_536)))
        return answer[0]

    def _receive(self) -> None:
        data = self.socket.recv(65_536)
        assert data, "the edge closed the connection"
        self._received.write(data)

    def _step(self, step: Callable[[], object]) -> bool:
        try:
            step()
        except ssl.SSLWantReadError:
            return False
        return True


def the_machine(node: ServedNode, app: str) -> dict[str, Any]:
    (machine,) = node.machines(app)
    return machine


def pid_behind(node: ServedNode, app: str) -> int:
    status, _, body = node.get(app)
    assert status == 200, body
    return int(json.loads(body)["pid"])


def refused(node: ServedNode, app: str) -> tuple[int, str, int]:
    """Status, code and Retry-After."""
    status, headers, _ = node.get(app)
    return status, headers["wakefront-error"], int(headers["retry-after"])


# --- by a ClientHello


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])
def test_the_machine_has_started_before_a_client_that_withholds_its_finished_sends_it(
    node: ServedNode, version: ssl.TLSVersion
) -> None:
    app = "hello-13" if version is ssl.TLSVersion.TLSv1_3 else "hello-12"
    client = Hello(node, app, version)
    with client.socket:
        client.send_hello()
        client.read_flight()
        time.sleep(0.3)  # what the test is about
        finished_at = time.monotonic_ns()
        client.send()
        assert client.get(node.host(app)).startswith(b"HTTP/1.1 200 ")
    ((_, started_at),) = starts(node.folder, app)
    assert started_at < finished_at - 100_000_000
    wakes = node.api("GET", f"/v1/apps/{app}/machines/{the_machine(node, app)['id']}/wakes")[1]
    assert wakes["listening"] > 0


def test_an_app_that_wakes_on_request_is_left_asleep_by_a_hello(node: ServedNode) -> None:
    client = Hello(node, "on-request")
    with client.socket:
        client.send_hello()
        client.read_flight()
        client.send()
        assert the_machine(node, "on-request")["state"] in ("created", "stopped")
        assert client.get(node.host("on-request")).startswith(b"HTTP/1.1 200 ")
    assert len(starts(node.folder, "on-request")) == 1


def test_a_source_that_only_sends_hellos_starts_no_more_than_its_budget(node: ServedNode) -> None:
    apps = [f"sleeper-{number}" for number in range(SLEEPERS)]
    clients = [Hello(node, app) for app in apps]
    began = time.monotonic()
    for client in clients:
        client.send_hello()
    for client in clients:
        client.read_flight()  # so the hello has been dealt with
        client.socket.close()
    budget = node.workers * HINTS_PER_SOURCE_S * (1 + time.monotonic() - began)
    awake = wait_for(lambda: [app for app in apps if starts(node.folder, app)], 5, "the first start")
    asleep = next(app for app in apps if app not in awake)
    assert node.get(asleep, tls=True)[0] == 200, "a request wakes what its hello could not"
    by_hello = [app for app in apps if starts(node.folder, app) and app != asleep]
    assert len(by_hello) <= budget < SLEEPERS


# --- by requests


def test_two_hundred_first_requests_make_one_start_and_get_two_hundred_answers(node: ServedNode) -> None:
    clients = [node.connect("crowd") for _ in range(200)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: crowd.apps.localhost\r\nConnection: close\r\n\r\n")
    answers = [_read_all(client) for client in clients]
    assert [one[:13] for one in answers] == [b"HTTP/1.1 200 "] * 200
    assert len(starts(node.folder, "crowd")) == 1


def _read_all(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as stream:
        return stream.read()


def test_a_crash_on_start_is_503_then_held_and_over_once_the_program_is_mended(node: ServedNode) -> None:
    assert refused(node, "crashes") == (503, "PM07", 1)
    first = len(starts(node.folder, "crashes"))
    status, code, retry_after = refused(node, "crashes")
    assert (status, code) == (503, "WM01") and 1 <= retry_after <= 2
    assert len(starts(node.folder, "crashes")) == first == 1, "the hold costs no start"
    assert "exit code 7" in node.cli("status")
    assert "something needed is missing" in node.cli("logs", "crashes")
    wait_for(lambda: the_machine(node, "crashes")["hold_until"] < time.time(), 5, "the hold ends")
    assert refused(node, "crashes") == (503, "PM07", 2), "the back-off grows"
    (node.folder / "needed").touch()
    wait_for(lambda: the_machine(node, "crashes")["hold_until"] < time.time(), 5, "the hold ends")
    assert node.get("crashes")[0] == 200
    machine = the_machine(node, "crashes")
    assert (machine["failures"], machine["hold_reason"], machine["hold_until"]) == (0, None, None)


def test_a_program_that_never_listens_is_504_after_wake_timeout_and_is_ended(node: ServedNode) -> None:
    began = time.monotonic()
    assert refused(node, "deaf")[:2] == (504, "PM03")
    assert 1.0 <= time.monotonic() - began < 2.5
    ((pid, _),) = starts(node.folder, "deaf")
    wait_for(lambda: not runs(pid), 10, "it is ended")
    assert "nothing listened on port" in node.cli("status")
    assert refused(node, "deaf")[:2] == (503, "WM01")
    (node.folder / "may-listen").touch()
    wait_for(lambda: the_machine(node, "deaf")["hold_until"] < time.time(), 5, "the hold ends")
    assert node.get("deaf")[0] == 200


@pytest.mark.parametrize(
    ("policy", "code", "is_restarted"),
    [("never", 1, False), ("on-failure", 1, True), ("on-failure", 0, False), ("always", 0, True)],
)
def test_the_restart_policy_is_followed(node: ServedNode, policy: str, code: int, is_restarted: bool) -> None:
    app = f"restart-{policy}"
    pid = pid_behind(node, app)
    before = len(starts(node.folder, app))
    assert node.get(app, f"/exit/{code}")[0] == 502
    if is_restarted:
        wait_for(lambda: len(starts(node.folder, app)) == before + 1, 5, "a start without a request")
        assert node.wait_machine_state(app, "started")["restart_count"] == 1
    else:
        assert node.wait_machine_state(app, "stopped")["exit_code"] == code
        assert len(starts(node.folder, app)) == before
        assert pid_behind(node, app) != pid, "the next request starts it"


# --- idle


def test_an_idle_app_stops_but_not_with_an_open_tunnel(node: ServedNode) -> None:
    with node.connect("tunnel") as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: tunnel.apps.localhost\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        stream = client.makefile("rwb")
        assert stream.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
        while stream.readline() != b"\r\n":
            pass
        for _ in range(2):  # another app of the same timeout comes and goes twice meanwhile
            pid_behind(node, "idle")
            node.wait_machine_state("idle", "stopped")
        stream.write(b"still there\n")
        stream.flush()
        assert stream.readline() == b"still there\n"
        assert len(starts(node.folder, "tunnel")) == 1
        stream.close()
    node.wait_machine_state("tunnel", "stopped")


def test_a_long_poll_keeps_its_machine(node: ServedNode) -> None:
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(node.get, "poll", "/wait/2.5")
        pid_behind(node, "idle")
        node.wait_machine_state("idle", "stopped")
        assert poll.result()[0] == 200
    assert len(starts(node.folder, "poll")) == 1
    node.wait_machine_state("poll", "stopped")


def test_an_idle_app_is_suspended_where_asked_and_resumes_as_the_same_process(node: ServedNode) -> None:
    pid = pid_behind(node, "freezes")
    for _ in range(3):
        node.wait_machine_state("freezes", "suspended")
        assert pid_behind(node, "freezes") == pid
    assert len(starts(node.folder, "freezes")) == 1


def test_a_request_in_the_middle_of_the_stop_handshake_keeps_the_machine(node: ServedNode) -> None:
    """One worker has promised to send nothing more, the other stands still: a request at the first one wins."""
    quick, still = node.worker_pids
    pid = pid_behind(node, "handshake")
    client = connect_to(quick, node, lambda: node.connect("handshake"))
    os.kill(still, signal.SIGSTOP)
    try:
        (machine_id,) = [one["id"] for one in node.machines("handshake")]
        wait_for(lambda: f"machine {machine_id} of handshake: unused for" in node.log(), 5, "the handshake begins")
        client.sendall(b"GET / HTTP/1.1\r\nHost: handshake.apps.localhost\r\nConnection: close\r\n\r\n")
        answer = _read_all(client)
    finally:
        os.kill(still, signal.SIGCONT)
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"pid": %d' % pid in answer
    node.wait_machine_state("handshake", "stopped")


def test_stops_for_idleness_lose_no_request_of_sporadic_traffic(node: ServedNode) -> None:
    """Requests come about as far apart as the idle timeout, so that they meet stops at every moment of them."""
    rng = random.Random(7)
    until = time.monotonic() + 10

    def visit(seed: int) -> list[int]:
        pauses = random.Random(seed)
        kept: HTTPConnection = node.client("sporadic")
        statuses = []
        try:
            while time.monotonic() < until:
                time.sleep(pauses.uniform(0.0, 0.9))
                kept.request("GET", "/", headers={"Host": node.host("sporadic")})
                response = kept.getresponse()
                response.read()
                statuses.append(response.status)
                statuses.append(node.get("sporadic", tls=pauses.random() < 0.3)[0])
        finally:
            kept.close()
        return statuses

    with ThreadPoolExecutor(3) as pool:
        statuses = [status for seen in pool.map(visit, [rng.random() for _ in range(3)]) for status in seen]
    assert len(statuses) > 50
    assert [status for status in statuses if status != 200] == []
    assert len(starts(node.folder, "sporadic")) >= 5, "it was stopped again and again"

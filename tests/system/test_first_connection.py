"""What a machine sees of its start: one connection, the first request's, whatever is killed or frozen meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.faults import kill_worker
from tests.support.load import connect_to
from tests.support.processes import wait_for
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
PROGRAM = Path(__file__).parent / "programs" / "counting.py"
FLY_TOML = """app = "{name}"

[http_service]
  internal_port = 8080
  auto_stop_machines = "stop"
  auto_start_machines = true
  min_machines_running = 0
  {more}
[[restart]]
  policy = "never"
"""
CHECK = """
  [[http_service.checks]]
    type = "tcp"
    interval = "1h"
    timeout = "2s"
"""


def app(folder: Path, name: str, more: str = "", **env: str) -> str:
    path = folder / f"{name}.fly.toml"
    path.write_text(FLY_TOML.format(name=name, more=more))
    values = {"COUNTED": str(folder / f"{name}.counted"), "DROP": str(folder / f"{name}.drop")} | env
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    command = json.dumps([sys.executable, "-I", "-S", str(PROGRAM)])
    return f'\n[[apps]]\nfly_toml = "{path}"\ncommand = {command}\n[apps.env]\n{lines}'


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    folder = tmp_path_factory.mktemp("node")
    apps = [app(folder, name) for name in ("plain", "secure", "many", "drops")]
    apps += [app(folder, name, LISTEN_AFTER_S="0.6") for name in ("frozen", "two", "adopted")]
    apps += [app(folder, "left", LISTEN_AFTER_S="0.6", SERIAL="yes"), app(folder, "checked", CHECK, SERIAL="yes")]
    with ServedNode(folder, "".join(apps), node='autostop_interval = "1h"') as served:
        served.client_context()
        yield served


def counted(node: ServedNode, name: str) -> list[int]:
    """The pid behind each connection accepted."""
    try:
        return [int(line) for line in (node.folder / f"{name}.counted").read_text().split()]
    except FileNotFoundError:
        return []


def stop(node: ServedNode, name: str) -> None:
    (machine,) = node.machines(name)
    assert node.api("POST", f"/v1/apps/{name}/machines/{machine['id']}/stop", {})[0] == 200
    node.wait_machine_state(name, "stopped")


def ask(node: ServedNode, name: str, method: str = "GET", body: bytes | None = None, tls: bool = False) -> int:
    """The pid that answered."""
    status, headers, told = node.request(method, name, body=body, tls=tls)
    assert status == 200, (headers, told)
    pid, length = told.split()
    assert int(length) == len(body or b"")
    return int(pid)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_first_request_after_a_start_comes_over_the_only_connection(node: ServedNode, method: str) -> None:
    for _ in range(5):
        pid = ask(node, "plain", method, b"x" * 100_000 if method == "POST" else None)
        assert counted(node, "plain").count(pid) == 1
        stop(node, "plain")


def test_over_tls_there_are_no_more_than_before(node: ServedNode) -> None:
    """The start is asked for by the hello: whether a request waits already when the machine listens is chance."""
    pid = ask(node, "secure", tls=True)
    assert counted(node, "secure").count(pid) in (1, 2)


def test_requests_that_wait_in_two_workers_are_all_answered(node: ServedNode) -> None:
    one, other = node.worker_pids
    clients = [connect_to(pid, node, lambda: node.connect("two")) for pid in (one, other, one, other)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: two.apps.localhost\r\nConnection: close\r\n\r\n")
    for client in clients:
        with client, client.makefile("rb") as stream:
            assert stream.read().startswith(b"HTTP/1.1 200 ")
    (pid,) = set(counted(node, "two"))
    assert len(counted(node, "two")) <= len(clients), f"{pid} accepted none but those of requests"


def test_a_check_does_not_wait_behind_a_connection_that_is_held_for_a_request(node: ServedNode) -> None:
    began = time.monotonic()
    ask(node, "checked")
    assert time.monotonic() - began < 2.0, "less than the check's timeout"
    assert len(counted(node, "checked")) == 3  # the probe's, the check's, and the request's


def test_a_machine_that_ends_as_it_accepts_costs_one_answer(node: ServedNode) -> None:
    (node.folder / "drops.drop").touch()
    status, headers, _ = node.request("POST", "drops", body=b"once")
    assert status in (502, 503) and headers["wakefront-error"]
    assert len(counted(node, "drops")) == 1, "what may not be sent twice was not"
    (node.folder / "drops.drop").unlink()
    node.wait_machine_state("drops", "stopped")
    ask(node, "drops")


def test_a_worker_that_stands_still_as_it_should_get_the_connection_delays_nobody_else(node: ServedNode) -> None:
    still, quick = node.worker_pids
    clients = [connect_to(pid, node, lambda: node.connect("frozen")) for pid in (still, quick)]
    text = b"GET / HTTP/1.1\r\nHost: frozen.apps.localhost\r\nConnection: close\r\n\r\n"
    clients[0].sendall(text)
    wait_for(lambda: node.machines("frozen")[0]["state"] == "starting", 5, "its wake has reached control")
    os.kill(still, signal.SIGSTOP)
    try:
        clients[1].sendall(text)
        node.wait_machine_state("frozen", "started")
        with clients[1], clients[1].makefile("rb") as stream:
            assert stream.read().startswith(b"HTTP/1.1 200 ")
    finally:
        os.kill(still, signal.SIGCONT)
    with clients[0], clients[0].makefile("rb") as stream:
        assert stream.read().startswith(b"HTTP/1.1 200 ")


def test_a_control_that_is_killed_during_the_start_loses_no_request(node: ServedNode) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, node, "adopted")
        wait_for(lambda: node.machines("adopted")[0]["state"] == "starting", 5, "the start")
        old = node.pid_of("control")
        os.kill(old, signal.SIGKILL)
        pid = asked.result(30)
    node.wait_replaced("control", 0, old)
    assert counted(node, "adopted").count(pid) in (1, 2)


def test_a_worker_that_is_killed_with_the_request_leaves_no_connection_open(node: ServedNode) -> None:
    still, _ = node.worker_pids
    client = connect_to(still, node, lambda: node.connect("left"))
    with client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: left.apps.localhost\r\n\r\n")
        wait_for(lambda: node.machines("left")[0]["state"] == "starting", 5, "its wake has reached control")
        old, _ = kill_worker(node, 0)
        node.wait_replaced("worker", 0, old)
    ask(node, "left")  # one connection is served after the other: none is in the way


def test_fifty_wakes_leave_no_descriptor_behind(node: ServedNode) -> None:
    pids = [node.pid_of("control"), *node.worker_pids]

    def open_files() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

    ask(node, "many")
    ask(node, "many", tls=True)
    stop(node, "many")
    before = open_files()
    for at in range(50):
        ask(node, "many", "POST" if at % 2 else "GET", b"body" if at % 2 else None, tls=at % 5 == 0)
        stop(node, "many")
    wait_for(lambda: max(now - then for now, then in zip(open_files(), before, strict=True)) <= 1, 10,
             lambda: f"as many open files as before: {before}, now {open_files()}")  # fmt: skip

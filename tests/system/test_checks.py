"""Health checks in a real node: who gets requests, what a wake waits for, and what an operator sees."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.machines.support import needs_network
from tests.support.processes import wait_for
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
PROGRAM = Path(__file__).with_name("programs") / "ailing.py"
FLY_TOML = """app = "{name}"

[http_service]
  internal_port = 8080
  auto_stop_machines = "{autostop}"

  [[http_service.checks]]
    interval = "1s"
    timeout = "1s"
    grace_period = "1s"
    path = "/up"

[checks.inner]
  type = "tcp"
  interval = "2s"
"""


def make_checked_app(folder: Path, name: str, autostop: str, keys: str = "") -> str:
    path = folder / name / "fly.toml"
    path.parent.mkdir()
    path.write_text(FLY_TOML.format(name=name, autostop=autostop))
    return f"""
[[apps]]
fly_toml = "{path}"
command = {json.dumps([sys.executable, "-I", "-S", str(PROGRAM)])}
{keys}
[apps.env]
HEALTH = "{folder / name}.health"
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    folder = tmp_path_factory.mktemp("node")
    apps = make_checked_app(folder, "pair", "off", "count = 2")
    apps += make_checked_app(folder, "sleeper", "stop")
    apps += make_checked_app(folder, "sick", "stop", 'wake_timeout = "2s"')
    apps += make_checked_app(folder, "healed", "off", 'restart_on_failing_checks = "2s"')
    if not needs_network:
        apps += make_checked_app(folder, "spaced", "off", 'count = 2\nnetwork = "namespace"')
    with ServedNode(folder, apps, workers=2) as served:
        yield served


def set_health(node: ServedNode, app: str, status: int | None, machine: str | None = None) -> None:
    path = node.folder / (f"{app}.health" if machine is None else f"{app}.health.{machine}")
    if status is None:
        path.unlink(missing_ok=True)
        return
    new = path.with_suffix(".new")
    new.write_text(str(status))
    new.replace(path)


def status_of(node: ServedNode, app: str) -> dict[str, str]:
    """Of each machine's service check."""
    found = {}
    for machine in node.machines(app):
        checks = {check["name"]: check["status"] for check in machine["checks"]}
        found[machine["id"]] = checks["servicecheck-00-http-8080"]
    return found


class Visitors:
    """Ask on kept connections, one request after the other, and note who answered."""

    def __init__(self, node: ServedNode, app: str, count: int = 6) -> None:
        self._node, self._app = node, app
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.answered: list[str] = []
        self.failures: list[str] = []
        self._pool = ThreadPoolExecutor(count)
        self._done = [self._pool.submit(self._visit) for _ in range(count)]

    def __enter__(self) -> Visitors:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for one in self._done:
            one.result()

    def _visit(self) -> None:
        connection = self._node.client(self._app)
        try:
            while not self._ended.is_set():
                connection.request("GET", "/", headers={"Host": self._node.host(self._app)})
                answer = connection.getresponse()
                text = answer.read().decode()
                with self._lock:
                    if answer.status == 200:
                        self.answered.append(text.split()[0])
                    else:
                        self.failures.append(f"{answer.status} {text}")
                time.sleep(0.005)
        except OSError as error:
            self.failures.append(repr(error))
        finally:
            connection.close()

    def next(self, count: int) -> Counter[str]:
        """Who answers the next so many requests."""
        begin = len(self.answered)
        wait_for(lambda: len(self.answered) >= begin + count, 30, lambda: f"answers: {self.failures}")
        return Counter(self.answered[begin : begin + count])


def until_critical(node: ServedNode, app: str, machine: str, status: str = "critical") -> None:
    wait_for(lambda: status_of(node, app)[machine] == status, 10, lambda: f"{status}: {node.machines(app)}")


def test_a_machine_that_fails_gets_no_requests_until_it_passes_again_and_no_request_fails(node: ServedNode) -> None:
    wait_for(lambda: set(status_of(node, "pair").values()) == {"passing"}, 20, lambda: str(node.machines("pair")))
    ill, well = (machine["id"] for machine in node.machines("pair"))
    with Visitors(node, "pair") as visitors:
        assert set(visitors.next(200)) == {ill, well}
        set_health(node, "pair", 503, ill)
        until_critical(node, "pair", ill)
        visitors.next(20)  # what was under way when it was found out
        assert visitors.next(400) == Counter({well: 400})
        set_health(node, "pair", None, ill)
        until_critical(node, "pair", ill, "passing")
        visitors.next(20)
        assert set(visitors.next(200)) == {ill, well}
    assert visitors.failures == []
    states = {machine["id"]: machine["restart_count"] for machine in node.machines("pair")}
    assert states == {ill: 0, well: 0}


@pytest.mark.skipif(bool(needs_network), reason=needs_network)
def test_machines_with_a_network_of_their_own_are_told_apart(node: ServedNode) -> None:
    """Both listen on the same address and port, each in its own network."""
    wait_for(lambda: set(status_of(node, "spaced").values()) == {"passing"}, 20, lambda: str(node.machines("spaced")))
    ill, well = (machine["id"] for machine in node.machines("spaced"))
    set_health(node, "spaced", 503, ill)
    until_critical(node, "spaced", ill)
    assert status_of(node, "spaced") == {ill: "critical", well: "passing"}
    assert {node.get("spaced")[2].split()[0].decode() for _ in range(20)} == {well}


def test_a_machine_is_restarted_for_failing_checks_where_its_app_asks_for_that(node: ServedNode) -> None:
    wait_for(lambda: set(status_of(node, "healed").values()) == {"passing"}, 20, lambda: str(node.machines("healed")))
    (before,) = node.machines("healed")
    set_health(node, "healed", 503)
    wait_for(lambda: node.machines("healed")[0]["restart_count"] == 1, 20, node.log)
    set_health(node, "healed", None)
    until_critical(node, "healed", before["id"], "passing")
    (after,) = node.machines("healed")
    assert after["state"] == "started" and after["pid"] != before["pid"]
    assert node.get("healed")[2].split()[1] == b"1"  # a new process


def test_a_killed_control_forgets_no_failure(node: ServedNode) -> None:
    """Workers keep what they know; the next control begins with what the last one found."""
    ill, well = (machine["id"] for machine in node.machines("pair"))
    set_health(node, "pair", 500, ill)
    until_critical(node, "pair", ill)
    with Visitors(node, "pair") as visitors:
        visitors.next(20)
        control = node.pid_of("control")
        os.kill(control, signal.SIGKILL)
        node.wait_replaced("control", 0, control)
        assert set(visitors.next(600)) == {well}
        set_health(node, "pair", None, ill)
        until_critical(node, "pair", ill, "passing")
    assert visitors.failures == []


def test_a_request_that_wakes_a_machine_is_sent_to_it_once_its_checks_pass(node: ServedNode) -> None:
    set_health(node, "sleeper", 503)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(node.get, "sleeper")
        node.wait_machine_state("sleeper", "starting")
        until_checked(node, "sleeper")
        assert not answer.done()
        set_health(node, "sleeper", None)
        status, _, body = answer.result(20)
    assert status == 200 and body.split()[1] == b"1"


def until_checked(node: ServedNode, app: str) -> None:
    def output() -> str:
        (check,) = (one for one in node.machines(app)[0]["checks"] if one["name"].startswith("service"))
        return str(check["output"])

    wait_for(lambda: "503" in output(), 10, lambda: node.log())


def test_a_machine_whose_checks_never_pass_answers_503_with_the_reason_and_runs_on(node: ServedNode) -> None:
    set_health(node, "sick", 503)
    began = time.monotonic()
    status, fields, body = node.get("sick")
    assert status == 503 and b"PR01" in body + fields.get("wakefront-error", "").encode(), (fields, body)
    assert 2.0 < time.monotonic() - began < 20.0
    (machine,) = node.machines("sick")
    assert machine["state"] == "started" and machine["restart_count"] == 0
    set_health(node, "sick", None)
    until_critical(node, "sick", machine["id"], "passing")
    assert node.get("sick")[0] == 200


def test_the_operator_sees_every_check(node: ServedNode) -> None:
    node.get("pair")

    def checked() -> dict[str, Any] | None:
        return next((one for one in node.machines("pair") if all(check["updated_at"] for check in one["checks"])), None)

    machine = wait_for(checked, 20, lambda: f"each check to have been run once: {node.machines('pair')}")
    checks = {check["name"]: check for check in machine["checks"]}
    assert set(checks) == {"servicecheck-00-http-8080", "inner"}
    shown = checks["servicecheck-00-http-8080"]
    assert shown["output"] == "GET /up: 200 OK" and shown["updated_at"].endswith("Z")
    told = node.cli("machine", "status", machine["id"])
    assert "servicecheck-00-http-8080" in told and "passing" in told and "inner" in told
    wait_for(lambda: metric(node, machine["id"], "inner") == 1.0, 10, "a passing top-level check in the metrics")


def metric(node: ServedNode, machine: str, check: str) -> float | None:
    status, text = node.api("GET", "/metrics")
    assert status == 200
    line = next((one for one in str(text).splitlines() if is_of(one, machine, check)), None)
    return None if line is None else float(line.rpartition(" ")[2])


def is_of(line: str, machine: str, check: str) -> bool:
    return line.startswith("wakefront_check_passing{") and machine in line and f'check="{check}"' in line

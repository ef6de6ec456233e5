"""What outlives control and the supervisor: machines, their output and exit codes, and requests that wait for them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.apps import make_app, starts
from tests.support.faults import kill_control, no_control
from tests.support.load import Load
from tests.support.processes import runs, started_at, wait_for
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
Answer = tuple[int, dict[str, str], bytes]


def running(node: ServedNode, app: str) -> list[int]:
    """Every process of the app's program that was ever started and still runs."""
    return [pid for pid, _ in starts(node.folder, app) if runs(pid)]


def log_numbers(node: ServedNode, app: str) -> list[int]:
    (path,) = (node.data_dir / "logs" / app).glob("*.log")
    return [int(one) for one in re.findall(rb"^line (\d+) \.+$", path.read_bytes(), re.MULTILINE)]


def exit_of(node: ServedNode, app: str) -> tuple[Any, Any, Any]:
    (machine,) = node.machines(app)
    return machine["state"], machine["exit_code"], machine["exit_signal"]


def stored_states(node: ServedNode) -> list[str]:
    with contextlib.closing(sqlite3.connect(f"file:{node.data_dir}/wakefront.db?mode=ro", uri=True)) as store:
        return [json.loads(record)["state"] for (record,) in store.execute("SELECT record FROM machines")]


def end_by_itself(node: ServedNode, app: str, code: int) -> None:
    (pid,) = running(node, app)
    assert node.get(app, f"/exit/{code}")[0] == 502, "it ends without an answer"
    wait_for(lambda: not runs(pid), 5, "the program ends")


def test_a_machine_that_writes_a_megabyte_a_second_loses_no_line_and_no_exit_code(tmp_path: Path) -> None:
    with ServedNode(tmp_path, make_app(tmp_path, "loud", env={"LOUD_BYTES_S": "1000000"})) as node:
        node.get("loud")
        (pid,) = running(node, "loud")
        for _ in range(2):
            before = len(log_numbers(node, "loud"))
            kill_control(node)
            wait_for(lambda n=before: len(log_numbers(node, "loud")) > n + 5_000, 15, "half a megabyte more")  # type: ignore[misc]
        with no_control(node):
            before = len(log_numbers(node, "loud"))
            wait_for(lambda: len(log_numbers(node, "loud")) > before + 5_000, 15, "it writes on without control")
        (machine,) = node.machines("loud")
        assert (machine["pid"], machine["state"]) == (pid, "started")
        shown = node.cli("logs", "-n", "50", "loud")
        assert len(re.findall(r"line \d+ \.+", shown)) == 50
        end_by_itself(node, "loud", 5)
        wait_for(lambda: exit_of(node, "loud") == ("stopped", 5, None), 5, "code 5 is on record")
        numbers = log_numbers(node, "loud")
        assert numbers == list(range(len(numbers))), "every line, once, in order"
        assert len(numbers) > 20_000


def test_an_exit_that_happened_while_no_control_lived_is_recorded_by_the_next(tmp_path: Path) -> None:
    apps = make_app(tmp_path, "ends") + make_app(tmp_path, "killed") + make_app(tmp_path, "again", restart="always")
    with ServedNode(tmp_path, apps) as node:
        for app in ("ends", "killed", "again"):
            assert node.get(app)[0] == 200
        wait_for(
            lambda: stored_states(node) == ["started"] * 3, 5, "the starts are stored, a moment after they are told"
        )
        with no_control(node):
            end_by_itself(node, "ends", 9)
            end_by_itself(node, "again", 1)
            os.kill(running(node, "killed")[0], signal.SIGKILL)
        wait_for(lambda: exit_of(node, "ends") == ("stopped", 9, None), 5, lambda: str(exit_of(node, "ends")))
        wait_for(lambda: exit_of(node, "killed") == ("stopped", None, 9), 5, lambda: str(exit_of(node, "killed")))
        wait_for(lambda: len(running(node, "again")) == 1, 5, "the restart policy is followed")
        assert "exit code 9" in node.cli("machine", "status", "ends")


def test_a_killed_supervisor_takes_its_children_along_and_the_next_adopts_the_machine(tmp_path: Path) -> None:
    with ServedNode(tmp_path, make_app(tmp_path, "web")) as node:
        node.get("web")
        (pid,) = running(node, "web")
        ticks = started_at(pid)
        children = [node.pid_of("control"), *node.worker_pids]
        os.kill(node.pid, signal.SIGKILL)
        assert node.process is not None
        node.process.wait(5)
        wait_for(lambda: not any(map(runs, children)), 5, "control and workers end")
        assert runs(pid), "the machine does not"
        node.start()
        node.wait_ready()
        (machine,) = node.machines("web")
        assert (machine["pid"], machine["state"], started_at(pid)) == (pid, "started", ticks)
        assert node.get("web")[0] == 200
        assert running(node, "web") == [pid]
        node.cli("machine", "stop", "web")
        assert not runs(pid), "it is stopped like any other"
        node.get("web")
        node.stop()
        assert running(node, "web") == [], "on_exit is stop"


def test_with_on_exit_keep_the_machine_outlives_a_clean_stop_and_is_adopted(tmp_path: Path) -> None:
    with ServedNode(tmp_path, make_app(tmp_path, "web"), node='on_exit = "keep"') as node:
        node.get("web")
        (pid,) = running(node, "web")
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(20) == 0
        assert runs(pid)
        node.start()
        node.wait_ready()
        assert node.machines("web")[0]["pid"] == pid
        node.cli("machine", "stop", "web")


def test_requests_that_wait_for_a_wake_are_answered_although_control_is_killed(tmp_path: Path) -> None:
    apps = make_app(tmp_path, "web", env={"LISTEN_AFTER_S": "1.5"})
    with ServedNode(tmp_path, apps) as node, ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(node.get, "web") for _ in range(20)]
        wait_for(lambda: starts(tmp_path, "web"), 5, "the start")
        kill_control(node)
        assert [one.result()[0] for one in answers] == [200] * 20
        assert len(starts(tmp_path, "web")) == 1
        assert len(running(node, "web")) == 1


def test_control_killed_at_any_moment_of_a_wake_leaves_one_machine_and_an_answer(tmp_path: Path) -> None:
    with ServedNode(tmp_path, make_app(tmp_path, "web")) as node, ThreadPoolExecutor(1) as pool:
        for delay_ms in (0, 1, 2, 4, 8, 30):
            answer: Future[Answer] = pool.submit(node.get, "web")
            time.sleep(delay_ms / 1000)  # the moment is the parameter of this test
            kill_control(node)
            status, headers, body = answer.result(20)
            assert status == 200, (delay_ms, headers, body)
            assert len(running(node, "web")) == 1, delay_ms
            node.cli("machine", "stop", "web")
            assert running(node, "web") == [], delay_ms


def test_a_supervisor_killed_in_the_middle_of_a_wake_leaks_nothing(tmp_path: Path) -> None:
    apps = make_app(tmp_path, "web", env={"LISTEN_AFTER_S": "1"})
    with ServedNode(tmp_path, apps) as node:
        waiting = subprocess.Popen(
            ["curl", "-s", "-H", "Host: web.apps.localhost", f"http://127.0.0.1:{node.http_port}/"],
            stdout=subprocess.DEVNULL,
        )
        wait_for(lambda: starts(tmp_path, "web"), 5, "the start")
        os.kill(node.pid, signal.SIGKILL)
        assert node.process is not None
        node.process.wait(5)
        waiting.wait(5)
        node.start()
        node.wait_ready()
        assert node.get("web")[0] == 200
        assert len(starts(tmp_path, "web")) == 1, "it was adopted, not started again"


def test_control_killed_at_any_moment_of_a_suspend_leaves_a_machine_that_answers(tmp_path: Path) -> None:
    """A frozen process still accepts connections: it must never be taken for one that runs."""
    with ServedNode(tmp_path, make_app(tmp_path, "web")) as node, ThreadPoolExecutor(1) as pool:
        node.get("web")
        (machine,) = node.machines("web")
        for delay_ms in (0, 1, 2, 4, 8, 30):
            asked = pool.submit(_suspend, node, machine["id"])
            time.sleep(delay_ms / 1000)  # the moment is the parameter of this test
            kill_control(node)
            asked.result(10)
            assert node.get("web", timeout=10)[0] == 200, delay_ms
        assert running(node, "web") == [machine["pid"]]


def _suspend(node: ServedNode, machine: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):  # control may go before it has answered
        node.api("POST", f"/v1/apps/web/machines/{machine}/suspend")


@pytest.mark.parametrize("killed", ["nobody", "control", "supervisor"])
def test_a_machine_that_crashes_under_load_is_started_again_and_no_request_is_refused(
    tmp_path: Path, killed: str
) -> None:
    with ServedNode(tmp_path, make_app(tmp_path, "web", keys='idle_timeout = "1h"\n')) as node:
        node.get("web")
        up_s = node.api("GET", "/v1/status")[1]["uptime_s"]
        if killed == "control":
            kill_control(node)
            told = node.api("GET", "/v1/status")[1]
            assert told["uptime_s"] >= up_s + told["control"]["uptime_s"], "the node has been up for longer"
        elif killed == "supervisor":
            assert node.process is not None
            node.process.kill()
            node.process.wait(10)
            node.start()
            node.wait_ready()
        (pid,) = running(node, "web")
        with Load(node, "web", kept=4, tls=0, kept_per_s=300.0, fresh_per_s=0.0) as load:
            load.run_for(0.3)
            os.kill(pid, signal.SIGKILL)
            load.run_for(1.5)
        lost = [one.cause for one in load.failures]
        assert len(lost) <= 4 and all(re.search(r"502 .*(PC03|PU02)", one) for one in lost), (
            "what it had in hand is lost"
        )
        assert len(starts(node.folder, "web")) == 2

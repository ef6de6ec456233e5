"""Killing and freezing the real thing under load: who may notice, and who may not.

A failed request is allowed on a connection of a killed worker, and nowhere else.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.apps import make_app, starts
from tests.support.faults import kill_worker, no_control
from tests.support.load import Load
from tests.support.processes import state_of, wait_for
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
LEAST_PER_S = 500.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    folder = tmp_path_factory.mktemp("node")
    with ServedNode(folder, make_app(folder, "web") + make_app(folder, "late"), node='autostop_interval = "1h"') as one:
        yield one


def assert_only(load: Load, ports: set[int]) -> None:
    others = [str(one) for one in load.failures if one.port not in ports]
    assert others == [], load.told()


def test_killing_control_fails_no_request(node: ServedNode) -> None:
    with Load(node, "web") as load:
        load.run_for(0.5)
        old = node.pid_of("control")
        began = time.monotonic()
        os.kill(old, signal.SIGKILL)
        node.wait_replaced("control", 0, old)
        took = time.monotonic() - began
        load.run_for(1.0)
    assert load.failures == [], load.told()
    assert load.per_s >= LEAST_PER_S * 0.9
    assert took < 5.0


def test_killing_a_worker_fails_only_what_was_on_its_own_connections(node: ServedNode) -> None:
    with Load(node, "web") as load:
        load.run_for(0.5)
        old, ports = kill_worker(node, 0)
        assert ports, "it had connections"
        successor = node.wait_replaced("worker", 0, old)
        load.run_for(1.0)
        wait_for(lambda: load.ports_of(successor), 10, "the successor serves connections")
    assert_only(load, ports)
    kept = [one for one in load.failures if one.kept]
    assert len(kept) <= len(ports), "each kept connection breaks once"
    assert load.failures, "connections of a killed worker do break"


def test_a_worker_killed_while_control_cannot_start_has_a_successor_that_serves(node: ServedNode) -> None:
    node.get("web")
    with Load(node, "web") as load:
        load.run_for(0.3)
        with no_control(node):
            old, ports = kill_worker(node, 1)
            successor = node.wait_replaced("worker", 1, old)
            wait_for(lambda: load.ports_of(successor), 10, "the successor serves connections")
            load.run_for(1.0)
            control = node.child("control")
            assert control is None or not control["ready"]
            status, headers, _ = node.get("late", timeout=30.0)
            assert (status, headers["wakefront-error"]) == (503, "WM03"), "nothing can be woken meanwhile"
        load.run_for(0.5)
    assert_only(load, ports)
    assert node.get("late")[0] == 200


def test_a_frozen_control_is_replaced_within_five_seconds_and_fails_no_request(node: ServedNode) -> None:
    with Load(node, "web") as load:
        load.run_for(0.3)
        old = node.pid_of("control")
        began = time.monotonic()
        os.kill(old, signal.SIGSTOP)
        node.wait_replaced("control", 0, old)
        took = time.monotonic() - began
        load.run_for(0.5)
    assert took < 5.0
    assert load.failures == [], load.told()


def test_a_frozen_worker_is_replaced_within_five_seconds_and_fails_only_its_own_requests(node: ServedNode) -> None:
    with Load(node, "web") as load:
        load.run_for(0.3)
        old = node.pid_of("worker", 0)
        began = time.monotonic()
        os.kill(old, signal.SIGSTOP)
        wait_for(lambda: state_of(old) == "T", 5, "the worker stands still")
        ports = load.ports_of(old)
        node.wait_replaced("worker", 0, old)
        took = time.monotonic() - began
        load.run_for(0.5)
    assert took < 5.0
    assert_only(load, ports)


def test_after_all_that_one_machine_runs_that_was_started_once(node: ServedNode) -> None:
    pids = {one["pid"] for one in node.machines("web")}
    assert len(pids) == 1
    assert [pid for pid, _ in starts(node.folder, "web")] == list(pids)

"""`wakefront serve` as a process: it becomes the supervisor, refuses what can't work, and leaves nothing behind.

Control and workers are the small roles here; what the real ones do is tested beside this file.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import runs, wait_for
from tests.support.serve import ServedNode
from tests.support.supervised import ROOT

pytestmark = pytest.mark.slow
ROLES = {"WAKEFRONT_ROLES": "tests.support.roles", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ServedNode]:
    with ServedNode(tmp_path, env=ROLES) as served:
        yield served


def test_serve_becomes_the_supervisor_and_drains_to_status_0(node: ServedNode) -> None:
    assert node.status()["supervisor"] == node.pid
    bound = {(one["public_port"], one["port"]) for one in node.status()["listen"]}
    assert bound == {(80, node.http_port), (443, node.https_port)}
    assert len({node.pid, node.pid_of("control"), *node.worker_pids}) == 4
    node.stop()


def test_serve_drains_on_ctrl_c(node: ServedNode) -> None:
    node.stop(signal.SIGINT)


def test_a_second_serve_ends_with_status_2_and_names_the_first(node: ServedNode) -> None:
    assert node.process is not None
    first = node.process
    node.start()
    try:
        assert node.process.wait(20) == 2
    finally:
        node.process = first
    assert f"pid {node.pid}" in node.log()


def test_serve_with_a_taken_port_ends_with_status_2_and_names_the_holder(node: ServedNode, tmp_path: Path) -> None:
    other = ServedNode(tmp_path / "other", env=ROLES)
    other.config.write_text(other.config.read_text().replace(str(other.http_port), str(node.http_port)))
    other.start()
    assert other.process is not None
    assert other.process.wait(20) == 2
    assert f"127.0.0.1:{node.http_port} (public port 80): something else listens there" in other.log()


def test_a_node_whose_admin_port_is_taken_does_not_come_up_deaf(node: ServedNode, tmp_path: Path) -> None:
    other = ServedNode(tmp_path / "other", env=ROLES)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other.config.write_text(other.config.read_text().replace(str(other.admin_port), str(port)))
        other.start()
        assert other.process is not None
        assert other.process.wait(20) == 2
    assert f"127.0.0.1:{port} (admin): something else listens there" in other.log()


def test_a_process_left_over_is_found_and_ended(tmp_path: Path) -> None:
    with ServedNode(tmp_path, env=ROLES) as node:
        left = subprocess.Popen(["sleep", "300"], cwd=node.data_dir, start_new_session=True)
        with pytest.raises(AssertionError, match=f"left over: .*{left.pid} sleep 300"):
            node.stop()
        node.abandon()
        left.wait(5)


def test_a_node_that_cannot_start_fails_at_once_with_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(AssertionError, match="ended instead of getting ready"),
        ServedNode(tmp_path, node="workers = 3"),
    ):
        pass
    assert "workers" in capsys.readouterr().out


def test_killing_serve_ends_its_children(node: ServedNode) -> None:
    children = [node.pid_of("control"), *node.worker_pids]
    node.expect_status = -signal.SIGKILL
    os.kill(node.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(runs, children)), 5, "children have ended")

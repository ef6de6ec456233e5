"""What the fault tests do to a node: kill exactly, and keep control from starting."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from tests.support.load import client_ports_of
from tests.support.processes import state_of, wait_for
from tests.support.serve import ServedNode


def kill_worker(node: ServedNode, slot: int) -> tuple[int, set[int]]:
    """Kill -9; its pid, and the client ports of exactly those connections that it had."""
    pid = node.pid_of("worker", slot)
    os.kill(pid, signal.SIGSTOP)  # so that it accepts nothing more between the look and the end
    wait_for(lambda: state_of(pid) == "T", 5, "the worker stands still")
    ports = client_ports_of(pid, {node.http_port, node.https_port})
    os.kill(pid, signal.SIGKILL)
    return pid, ports


def kill_control(node: ServedNode) -> int:
    """Kill -9, and wait for the successor: its pid."""
    old = node.pid_of("control")
    os.kill(old, signal.SIGKILL)
    return node.wait_replaced("control", 0, old)


@contextlib.contextmanager
def no_control(node: ServedNode) -> Iterator[None]:
    """Control is killed and cannot start: its database becomes a folder, which workers do not need. Then it is back."""
    database = node.data_dir / "wakefront.db"
    aside = database.with_name("aside.db")
    failed = node.log().count("IsADirectoryError")
    database.rename(aside)
    database.mkdir()
    try:
        os.kill(node.pid_of("control"), signal.SIGKILL)
        wait_for(lambda: node.log().count("IsADirectoryError") > failed, 10, "control fails to start")
        yield
    finally:
        database.rmdir()
        aside.rename(database)
    wait_for(lambda: (one := node.child("control")) and one["ready"], 15, "control is back")

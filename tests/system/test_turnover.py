"""A reload that changes what is listened on, or how many workers there are: new workers take over, nobody notices."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apps import make_app, starts
from tests.support.load import Load
from tests.support.processes import wait_for
from tests.support.serve import ServedNode, free_ports, wakefront
from tests.system.test_reload import Tunnel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ServedNode]:
    with ServedNode(tmp_path, make_app(tmp_path, "web")) as served:
        served.get("web")
        yield served


def change(node: ServedNode, pattern: str, text: str) -> None:
    node.config.write_text(re.sub(pattern, text, node.config.read_text(), count=1))


def workers(node: ServedNode, retiring: bool = False) -> list[int]:
    found = node.status()["children"]
    return [one["pid"] for one in found if one["role"] == "worker" and one["retiring"] is retiring]


def answers(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: web.apps.localhost\r\nConnection: close\r\n\r\n")
        return sock.makefile("rb").read()


def test_more_and_fewer_workers_take_over_under_load_and_tunnels_stay(node: ServedNode) -> None:
    machine = starts(node.folder, "web")
    control = node.pid_of("control")
    with Load(node, "web", kept=32, kept_per_s=1000) as load:
        tunnel = Tunnel(node, "web")
        for number in (3, 1, 2):
            before = workers(node)
            change(node, r"workers = \d+", f"workers = {number}")
            node.cli("reload")
            assert len(workers(node)) == number and not set(before) & set(workers(node))
            assert tunnel.echoes(b"still here")
            load.run_for(0.3)
        listed = node.api("GET", "/v1/status")[1]["workers"]
        assert [one["retiring"] for one in listed] == [False, False, True], "the tunnel's worker retires"
    assert load.failures == [], load.told()
    assert node.pid_of("control") == control and starts(node.folder, "web") == machine
    tunnel.close()
    wait_for(lambda: not workers(node, True), 20, node.log)


def test_clients_of_a_slot_that_has_no_worker_of_its_own_are_answered(node: ServedNode) -> None:
    """One socket for each of the two first workers stays: the kernel goes on sending clients to both."""
    change(node, r"workers = \d+", "workers = 1")
    node.cli("reload")
    assert all(node.get("web")[0] == 200 for _ in range(40))


def test_addresses_come_and_go_under_load(node: ServedNode) -> None:
    (port,) = free_ports(1)
    plain = f'80 = ["127.0.0.1:{node.http_port}"]'
    with Load(node, "web") as load:
        change(node, re.escape(plain), f'80 = ["127.0.0.1:{node.http_port}", "127.0.0.1:{port}"]')
        node.cli("reload")
        assert answers(port).startswith(b"HTTP/1.1 200 ")
        load.run_for(0.3)
        change(node, r"80 = .*", plain)
        node.cli("reload")
        wait_for(lambda: _is_refused(port), 10, "the address that went is closed")
        load.run_for(0.3)
    assert load.failures == [], load.told()


def test_a_public_port_may_move_to_what_is_bound_for_another(node: ServedNode) -> None:
    change(node, r"\n80 = ", "\n8080 = ")
    node.cli("reload")
    assert node.get("web")[0] == 404, "no app's fly.toml speaks of port 8080"
    change(node, r"\n8080 = ", "\n80 = ")
    node.cli("reload")
    assert node.get("web")[0] == 200


def test_an_address_that_is_taken_leaves_everything_as_it_was(node: ServedNode) -> None:
    before = workers(node)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        change(node, r"\n80 = ", f'\n81 = ["127.0.0.1:{port}"]\n80 = ')
        node.config.write_text(node.config.read_text() + make_app(node.folder, "late"))
        done = subprocess.run(
            [wakefront(), "reload", "--config", str(node.config)], capture_output=True, text=True, timeout=30
        )
    assert done.returncode == 1 and "something else listens there" in done.stderr and f"127.0.0.1:{port}" in done.stderr
    assert workers(node) == before and node.get("web")[0] == 200
    assert node.get("late")[0] == 404, "a reload is done as a whole or not at all"
    node.cli("reload")
    assert node.get("late")[0] == 200


def _is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False

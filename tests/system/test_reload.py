"""A changed config.toml is swapped in under load: good files without a failed request, bad ones without any effect."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.apps import make_app, starts
from tests.support.load import Load
from tests.support.processes import wait_for
from tests.support.serve import ServedNode, wakefront

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ServedNode]:
    with ServedNode(tmp_path, make_app(tmp_path, "web")) as served:
        served.get("web")
        yield served


class Tunnel:
    """An upgraded connection that echoes lines."""

    def __init__(self, node: ServedNode, app: str, tls: bool = False) -> None:
        self.socket = node.connect(app, tls=tls)
        head = f"GET / HTTP/1.1\r\nHost: {node.host(app)}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
        self.socket.sendall(head.encode())
        self._stream = self.socket.makefile("rb")
        assert self._stream.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
        while self._stream.readline() != b"\r\n":
            pass

    def echoes(self, text: bytes) -> bool:
        self.socket.sendall(text + b"\n")
        return self._stream.readline() == text + b"\n"

    def close(self) -> None:
        self._stream.close()
        self.socket.close()


@pytest.mark.parametrize("by", ["command", "signal"])
def test_a_good_file_is_swapped_in_under_load_and_no_tunnel_notices(node: ServedNode, by: str) -> None:
    tunnels = [Tunnel(node, "web"), Tunnel(node, "web", tls=True)]
    try:
        with Load(node, "web") as load:
            assert all(tunnel.echoes(b"before") for tunnel in tunnels)
            for number in range(3):
                name = f"new-{number}"
                node.write_config(
                    make_app(node.folder, "web", keys=f'idle_timeout = "{number + 7}m"') + make_app(node.folder, name)
                )
                if by == "command":
                    assert name in node.cli("reload")
                else:
                    os.kill(node.pid, signal.SIGHUP)
                    wait_for(lambda name=name: f'"{name}"' in node.log(), 10, "reloaded")  # type: ignore[misc]
                assert node.get(name)[0] == 200
                assert all(tunnel.echoes(b"after") for tunnel in tunnels)
            load.run_for(0.5)
        assert load.failures == [], load.told()
        assert node.get("new-0")[0] == 404, "what the file no longer names is gone"
    finally:
        for tunnel in tunnels:
            tunnel.close()
    assert len(starts(node.folder, "web")) == 1


def test_a_bad_file_changes_nothing_and_says_why_under_load(node: ServedNode) -> None:
    good = node.config.read_text()
    with Load(node, "web") as load:
        node.config.write_text(good.replace("[[apps]]\n", '[[apps]]\nidle_timout = "1m"\ncount = -1\n'))
        refused = _refused(node)
        assert all(word in refused for word in ("idle_timout", "did you mean", "idle_timeout", "count", "-1"))
        os.kill(node.pid, signal.SIGHUP)
        wait_for(lambda: node.log().count("not reloaded: ") >= 2, 10, "the log says why")
        assert "has faults" in node.cli("status")
        node.config.write_text("this is no TOML [")
        os.kill(node.pid, signal.SIGHUP)
        wait_for(lambda: "is not valid TOML" in node.log(), 10, "the log says why")
        warnings = node.api("GET", "/v1/status")[1]["warnings"]
        assert any("has faults" in one and "not valid TOML" in one for one in warnings), warnings
        load.run_for(0.5)
    assert load.failures == [], load.told()
    node.config.write_text(good)
    node.cli("reload")
    assert "has faults" not in node.cli("status")
    assert len(starts(node.folder, "web")) == 1


def _refused(node: ServedNode) -> str:
    done = subprocess.run(
        [wakefront(), "reload", "--config", str(node.config), "--admin", f"127.0.0.1:{node.admin_port}"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done
    return done.stdout + done.stderr


def test_an_app_whose_program_changes_is_started_anew_and_fails_no_request(node: ServedNode) -> None:
    """Slow requests that may not be sent twice among them: those in flight are finished by the old machine."""
    over = threading.Event()

    def post() -> list[int]:
        statuses = []
        while not over.is_set():
            statuses.append(node.request("POST", "web", "/wait/0.2", body=b"x")[0])
        return statuses

    with Load(node, "web") as load, ThreadPoolExecutor(4) as pool:
        posts = [pool.submit(post) for _ in range(4)]
        for number in range(2, 5):
            node.write_config(make_app(node.folder, "web", env={"VERSION": str(number)}))
            node.cli("reload")
            wait_for(lambda n=number: len(starts(node.folder, "web")) == n, 20, "its new environment")  # type: ignore[misc]
            load.run_for(0.5)
        over.set()
        statuses = [status for one in posts for status in one.result()]
    assert load.failures == [], load.told()
    assert len(statuses) > 20 and set(statuses) == {200}, statuses

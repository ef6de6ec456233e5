"""The README's blocks, copied and run as they stand (but for ports and home), do what it says of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import belonging_to
from tests.support.serve import free_ports, wakefront

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]


def blocks() -> dict[str, str]:
    """The shell blocks that carry a name, in order."""
    text = (ROOT / "README.md").read_text()
    return dict(re.findall(r"<!-- readme: (\w+) -->\n```sh\n(.*?)```", text, re.DOTALL))


def walk(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run blocks in one shell, with ports that are free."""
    for old, new in zip(("8080", "8443", "8081"), free_ports(3), strict=True):
        script = script.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}").replace(f"localhost:{old}", f"localhost:{new}")
    path = f"{Path(wakefront()).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(home), "PATH": path}
    environment.pop("WAKEFRONT_CONFIG", None)
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )


def test_your_first_own_app_works_when_copied(tmp_path: Path) -> None:
    script = "set -eum\n"
    for name, block in blocks().items():
        script += f"echo '=== {name}'\n{block}\n"
    try:
        done = walk(tmp_path, script)
    finally:
        left = belonging_to(tmp_path, str(tmp_path / "no such mark"))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):  # it may be on its way out by itself
                os.kill(pid, signal.SIGKILL)
    log = tmp_path / "wakefront-first" / "data" / "serve.log"
    story = done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert done.returncode == 0, story
    parts = dict(re.findall(r"^=== (\w+)\n(.*?)(?=^=== |\Z)", done.stdout, re.DOTALL | re.MULTILINE))
    assert "started" not in parts["requests"].split("hello from pid")[0], "nothing may run before the first request"
    assert len(re.findall(r"hello from pid \d+ in ams", parts["requests"])) == 2
    assert len(set(re.findall(r"hello from pid (\d+)", parts["requests"]))) == 1
    assert parts["websocket"] == "before\nafter\n"
    assert "first byte" in parts["more"]
    refused, first, second, replayed, explained = parts["replay"].split("\n", 5)[1:6]
    assert refused == "503" and parts["replay"].startswith("WM04 ")
    assert first == second and re.fullmatch(r"front, machine [0-9a-f]{14}", first)
    machine = first.split()[-1]
    assert re.fullmatch(rf"hello from pid \d+ in ams, replayed by instance={machine};.*state=from-front", replayed)
    assert explained.startswith("route") and f"=> sent to {machine}\n" in parts["replay"]
    assert not left, f"left running after the last block: {left}\n{story}"


def test_a_node_that_cannot_start_says_why_instead_of_being_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        script = "\n".join(blocks()[name] for name in ("files", "config", "serve")).replace(
            '443 = ["127.0.0.1:8443"]', f'443 = ["127.0.0.1:{port}"]'
        )
        done = walk(tmp_path, "set -um\n" + script)
    assert "something else listens there" in done.stdout, done.stdout + done.stderr
    assert "No node" in done.stderr


def test_every_block_of_the_walk_is_there() -> None:
    assert list(blocks()) == ["files", "config", "serve", "requests", "websocket", "more", "settings", "replay", "stop"]

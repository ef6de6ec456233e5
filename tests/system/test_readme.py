"""The README's blocks, copied and run as they stand (but for ports and home), do what it says of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
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


def test_your_first_own_app_works_when_copied(tmp_path: Path) -> None:
    script = "set -eum\n"
    for name, block in blocks().items():
        script += f"echo '=== {name}'\n{block}\n"
    for old, new in zip(("8080", "8443", "8081"), free_ports(3), strict=True):
        script = script.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}").replace(f"localhost:{old}", f"localhost:{new}")
    path = f"{Path(wakefront()).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": path}
    environment.pop("WAKEFRONT_CONFIG", None)
    try:
        done = subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
        )
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
    assert not left, f"left running after the last block: {left}\n{story}"


def test_every_block_of_the_walk_is_there() -> None:
    assert list(blocks()) == ["files", "config", "serve", "requests", "websocket", "more", "stop"]

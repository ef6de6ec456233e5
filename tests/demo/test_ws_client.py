"""The demo's WebSocket client against the demo's WebSocket server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.demo.programs import APPS, running

CLIENT = [sys.executable, "-S", str(APPS.parent / "ws.py")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running("echo") as (_, port):
        yield f"ws://echo.apps.localhost:{port}/"


def test_lines_come_back_and_the_client_ends_with_its_input(url: str) -> None:
    lines = "one\ntwo\n" + "x" * 70_000 + "\n"
    done = subprocess.run([*CLIENT, url], input=lines, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, lines, "")


def test_each_line_is_answered_before_the_next_is_typed(url: str) -> None:
    with subprocess.Popen([*CLIENT, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None and client.stdout is not None
        for line in ("first\n", "second\n"):
            client.stdin.write(line)
            client.stdin.flush()
            assert client.stdout.readline() == line
        client.stdin.close()
        assert client.wait(10) == 0


def test_a_server_that_goes_away_is_told() -> None:
    with running("echo") as (server, port):
        client = subprocess.Popen(
            [*CLIENT, f"ws://localhost:{port}/"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert client.stdin is not None and client.stdout is not None and client.stderr is not None
        client.stdin.write("up\n")
        client.stdin.flush()
        assert client.stdout.readline() == "up\n"
        server.kill()
        assert client.wait(10) == 1
        assert "the connection ended" in client.stderr.read()
        for pipe in (client.stdin, client.stdout, client.stderr):
            pipe.close()


def test_a_page_that_is_no_websocket_is_told() -> None:
    with running("counter") as (_, port):
        done = subprocess.run([*CLIENT, f"ws://localhost:{port}/"], input="", capture_output=True, text=True)
        assert done.returncode == 1
        assert "no WebSocket: HTTP/1.1 200 OK" in done.stderr

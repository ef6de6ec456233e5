"""The demo's HTTP programs by themselves: what the demo claims about them must be true of them."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import tomllib

import pytest

from tests.demo.programs import APPS, running

pytestmark = pytest.mark.slow


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_the_counter_counts_and_names_its_process_and_machine() -> None:
    with running("counter", FLY_MACHINE_ID="abc") as (child, port):
        answers = [json.loads(get(port, "/")[1]) for _ in range(3)]
        assert answers == [{"count": n, "pid": child.pid, "machine": "abc"} for n in (1, 2, 3)]


def test_the_counter_streams_its_lines_one_by_one() -> None:
    with running("counter") as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/stream")
        response = connection.getresponse()
        assert response.getheader("Transfer-Encoding") == "chunked"
        assert [response.read1(100) for _ in range(5)] == [b"line %d\n" % n for n in range(1, 6)]
        assert response.read() == b""
        connection.close()


@pytest.mark.parametrize("name", ["counter", "crashy", "echo"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_a_program_in_order_and_silently(name: str, number: signal.Signals) -> None:
    with running(name) as (child, _):
        child.send_signal(number)
        assert child.wait(5) == 0
        assert child.stdout is not None
        assert b"Traceback" not in child.stdout.read()


def test_crashy_ends_with_status_3_in_the_middle_of_the_request() -> None:
    with running("crashy") as (child, port):
        assert get(port, "/") == (200, b"fine, pid %d\n" % child.pid)
        with pytest.raises(http.client.RemoteDisconnected):
            get(port, "/crash")
        assert child.wait(5) == 3


def test_broken_says_what_it_lacks_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "server.py"], cwd=APPS / "broken", env={}, capture_output=True, timeout=10
    )
    assert done.returncode == 78
    assert b"DATABASE_URL is not set" in done.stderr


def test_every_app_of_the_demo_is_in_its_config_under_its_own_name() -> None:
    config = tomllib.loads((APPS.parent / "config.toml").read_text())
    named = {one["fly_toml"] for one in config["apps"]}
    assert named == {f"apps/{folder.name}/fly.toml" for folder in APPS.iterdir()}
    for folder in APPS.iterdir():
        assert tomllib.loads((folder / "fly.toml").read_text())["app"] == folder.name

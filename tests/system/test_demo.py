"""`wakefront demo` as a user runs it: every step holds on the real thing, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.demo import CA_STEPS, STEPS
from proxy.cli.pebble import is_installed
from tests.support.processes import belonging_to, runs, wait_for
from tests.support.serve import wakefront

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SHOWN = STEPS + CA_STEPS if is_installed() else STEPS


@contextmanager
def running(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`wakefront demo` with its files in `folder`; what is left of it is killed at the end."""
    child = subprocess.Popen(
        [wakefront(), "demo", "--dir", str(folder), *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdout, child.stderr):
            assert pipe is not None
            pipe.close()
        for pid in left_in(folder):
            with suppress(ProcessLookupError):  # it may be on its way out by itself
                os.kill(pid, signal.SIGKILL)


def left_in(folder: Path) -> set[int]:
    """Processes that work in the demo's folder or write there."""
    return belonging_to(folder, str(folder / "no such mark"))


def node_pid(folder: Path) -> int:
    return int(json.loads((folder / "data" / "run" / "children.json").read_text())["supervisor"])


def wait_until_it_plays(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    seen = ""
    for line in child.stdout:
        seen += line
        if line.startswith("The node stays up"):
            return seen
    raise AssertionError(f"the demo ended before it could be played with:\n{seen}")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """Exit status, result and node's log of one `wakefront demo --once --json`."""
    folder = tmp_path_factory.mktemp("demo")
    with running(folder, "--once", "--json") as child:
        out, err = child.communicate(timeout=120)
        left = left_in(folder)
    result = json.loads(out) if out else {}
    return child.returncode, {**result, "left": left}, err + (folder / "serve.log").read_text()[-3000:]


def test_once_shows_that_every_step_holds_and_leaves_nothing_running(shown: tuple[int, dict[str, Any], str]) -> None:
    status, result, log = shown
    failed = [one for one in result.get("steps", []) if not one["ok"]]
    assert not failed, json.dumps(failed, indent=2) + log
    assert (status, result.get("ok")) == (0, True), log
    assert len(result["steps"]) == len(SHOWN) + 1
    assert not result["left"]


def test_a_cold_request_reports_the_phases_of_client_and_node_in_order(shown: tuple[int, dict[str, Any], str]) -> None:
    cold = shown[1]["steps"][0]["phases_ms"]
    for order in (
        ("connected", "hello_sent", "handshake_done", "request_sent", "first_byte", "ended"),
        ("connected", "asked", "forked", "listening", "first_byte"),
    ):
        assert [name for name in cold if name in order] == list(order)
    assert cold["asked"] < cold["handshake_done"], "the ClientHello starts the machine, not the request"


def test_ctrl_c_ends_the_demo_in_order(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        shown = wait_until_it_plays(child)
        assert shown.count("✓") == len(SHOWN)
        assert "curl --cacert" in shown
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=40)
        assert child.returncode == 0, err
        assert "nothing is left running" in out
    assert not left_in(tmp_path)


def test_impatience_does_not_leave_anything_running(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        wait_until_it_plays(child)
        assert child.stdout is not None
        child.send_signal(signal.SIGINT)
        while not child.stdout.readline().startswith("Ending the node"):
            pass
        while child.poll() is None:
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.05)
    assert not left_in(tmp_path)


def test_a_demo_that_is_killed_takes_its_node_and_machines_along(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        wait_until_it_plays(child)
        node = node_pid(tmp_path)
        assert runs(node)
        child.kill()
        wait_for(lambda: not runs(node), 30, "the node ends after its demo")
        wait_for(lambda: not left_in(tmp_path), 10, "its machines end too")


def test_a_node_that_dies_under_the_demo_is_told_and_its_machines_are_ended(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        wait_until_it_plays(child)
        os.kill(node_pid(tmp_path), signal.SIGKILL)
        _, err = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "ended by itself" in err
        wait_for(lambda: not left_in(tmp_path), 20, "nothing of it is left")


def test_two_demos_run_beside_each_other(tmp_path: Path) -> None:
    with running(tmp_path / "one") as first:
        wait_until_it_plays(first)
        with running(tmp_path / "two", "--once", "--json") as second:
            out, err = second.communicate(timeout=120)
            assert second.returncode == 0, out + err
        assert first.poll() is None


def test_a_node_that_cannot_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where a folder must be")
    with running(tmp_path, "--once") as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "The demo's node ended at once" in err and "Traceback" not in err

"""The command line against a real node: what it asks for happens, and what it prints is what is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import runs, state_of
from tests.support.serve import ServedNode, wakefront

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
APPS = "".join(
    f"""
[[apps]]
fly_toml = "{ROOT}/demo/apps/{name}/fly.toml"
command = [{json.dumps(sys.executable)}, "-I", "-S", "server.py"]
"""
    for name in ("counter", "crashy", "broken")
)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    with ServedNode(tmp_path_factory.mktemp("node"), APPS) as served:
        yield served


def state(node: ServedNode, app: str) -> str:
    return str(node.machines(app)[0]["state"])


def fails(node: ServedNode, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [wakefront(), *words, "--config", str(node.config)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done


def test_serve_says_where_each_app_is(node: ServedNode) -> None:
    assert f"https://counter.apps.localhost:{node.https_port}/" in node.log()
    assert f"http://127.0.0.1:{node.admin_port}" in node.log()


def test_serve_with_faults_lists_them_and_ends_with_2(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[node]\nworkers = "two"\nreigon = "ams"\n')
    done = subprocess.run([wakefront(), "serve", "--config", str(config)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "workers" in done.stdout and "reigon" in done.stdout and "region" in done.stdout
    assert "Not started" in done.stderr


def test_apps_and_machines_are_listed_as_json(node: ServedNode) -> None:
    assert {one["name"] for one in json.loads(node.cli("apps", "--json"))} == {"counter", "crashy", "broken"}
    machines = json.loads(node.cli("machine", "list", "--json"))
    assert len(machines) == 3 and all(one["id"] and one["app"] and one["state"] for one in machines)
    for words in (("apps",), ("machine", "list"), ("status",)):
        assert "counter" in node.cli(*words)


def test_a_machine_is_started_suspended_resumed_restarted_and_stopped(node: ServedNode) -> None:
    node.cli("machine", "start", "counter")
    assert state(node, "counter") == "started"
    pid = json.loads(node.get("counter", tls=True)[2])["pid"]
    node.cli("machine", "suspend", "counter")
    assert state(node, "counter") == "suspended"
    assert state_of(pid) == "T"
    node.cli("machine", "start", "counter")
    assert json.loads(node.get("counter", tls=True)[2]) == {
        "count": 2, "pid": pid, "machine": node.machines("counter")[0]["id"]
    }  # fmt: skip
    node.cli("machine", "restart", "counter")
    assert not runs(pid)
    assert json.loads(node.get("counter", tls=True)[2])["count"] == 1
    done = json.loads(node.cli("machine", "stop", "counter", "--json"))
    assert (done["previous_state"], done["state"]) == ("started", "stopped")
    assert state(node, "counter") == "stopped"


def test_machine_status_shows_the_last_wake_and_how_it_ended(node: ServedNode) -> None:
    node.get("crashy", tls=True)
    node.get("crashy", "/crash", tls=True)
    node.wait_machine_state("crashy", "stopped")
    assert "exit code 3" in node.cli("machine", "status", "crashy")
    shown = json.loads(node.cli("machine", "status", "crashy", "--json"))
    assert shown["wakes"]["listening"] > shown["wakes"]["asked"]


def test_logs_follow_what_a_machine_prints(node: ServedNode) -> None:
    node.get("crashy", "/crash", tls=True)
    node.wait_machine_state("crashy", "stopped")
    command = [wakefront(), "logs", "-f", "-n", "1", "crashy", "--config", str(node.config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        try:
            assert "ended, exit code 3" in follower.stdout.readline(), "the line there was"
            node.get("crashy", "/crash", tls=True)
            later = [follower.stdout.readline() for _ in range(3)]
            assert any("about to hit the bug" in line for line in later), later
        finally:
            follower.terminate()


def test_a_broken_app_says_in_its_log_and_in_the_status_why(node: ServedNode) -> None:
    for _ in range(4):
        status, headers, _ = node.get("broken", tls=True)
        assert status in (502, 503, 504) and headers["wakefront-error"]
    assert "DATABASE_URL is not set" in node.cli("logs", "broken")
    assert "exit code 78" in node.cli("status")


def test_an_unknown_app_gets_did_you_mean(node: ServedNode) -> None:
    assert "did you mean counter?" in fails(node, "logs", "conter").stderr


def test_reload_takes_a_good_file_and_refuses_a_bad_one_with_its_faults(node: ServedNode) -> None:
    good = node.config.read_text()
    try:
        node.config.write_text(good + '\n[[apps]]\nfly_toml = "nowhere/fly.toml"\n')
        refused = fails(node, "reload")
        assert refused.returncode == 1 and "nowhere/fly.toml" in refused.stderr
        assert len(json.loads(node.cli("apps", "--json"))) == 3
        node.config.write_text(good.replace("demo/apps/broken", "demo/apps/echo"))
        node.cli("reload")
        assert {one["name"] for one in json.loads(node.cli("apps", "--json"))} == {"counter", "crashy", "echo"}
    finally:
        node.config.write_text(good)
        node.cli("reload")


@pytest.mark.parametrize("options", [(), ("--suspend",), ("--http",)])
def test_bench_coldstart_measures_real_wakes(node: ServedNode, options: tuple[str, ...]) -> None:
    words = ("bench", "coldstart", "--app", "crashy", "--runs", "3", "--json", *options)
    result = json.loads(node.cli(*words))
    assert [one["status"] for one in result["runs"]] == [200] * 3
    phases = {one["name"]: one for one in result["phases"]}
    assert phases["listening"]["runs"] == 3
    assert phases["asked"]["p50"] <= phases["listening"]["p50"] <= phases["first_byte"]["p50"]


def test_a_node_that_has_ended_is_told(tmp_path: Path) -> None:
    with ServedNode(tmp_path) as node:
        node.stop()
        ended = fails(node, "status")
        assert ended.returncode == 1 and "No node answers" in ended.stderr

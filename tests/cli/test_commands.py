"""The commands against a scripted node: what they ask of it, print, and end with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxy.cli import client
from tests.cli.conftest import Run
from tests.cli.scripted_admin import PEM, ScriptedAdmin, machine

ROOT = Path(__file__).resolve().parents[2]


# --- lists


@pytest.mark.parametrize("words", [("apps",), ("machine", "list")])
def test_a_list_as_json_is_an_array_of_objects_with_a_name_or_id(
    node: ScriptedAdmin, run: Run, words: tuple[str, ...]
) -> None:
    ended = run(*words, "--json")
    assert ended.code == 0
    assert ended.json and all("id" in one or "name" in one for one in ended.json)


def test_apps_shows_each_app_with_its_machines_and_names(node: ScriptedAdmin, run: Run) -> None:
    out = run("apps").out
    assert "hello" in out and "1 started" in out and "hello.apps.localhost" in out
    assert "1 started, 1 stopped" in out


def test_a_node_without_apps_says_how_to_add_one(node: ScriptedAdmin, run: Run) -> None:
    node.apps = {}
    assert "[[apps]]" in run("apps").out
    assert run("apps", "--json").json == []


def test_machine_list_names_the_app_of_each(node: ScriptedAdmin, run: Run) -> None:
    assert [(one["app"], one["id"]) for one in run("machine", "list", "--json").json] == [
        ("hello", "148e1234567890"),
        ("echo", "24abcd34567890"),
        ("echo", "24abff34567890"),
    ]
    assert len(run("machine", "list", "echo", "--json").json) == 2


def test_a_machine_held_back_shows_why(node: ScriptedAdmin, run: Run) -> None:
    node.apps["echo"] = [machine("24abcd34567890", hold_reason="exit code 78", hold_until=time.time() + 30)]
    for words in (("machine", "list"), ("machine", "status", "echo"), ("status",)):
        out = run(*words).out
        assert "held back: exit code 78" in out and "next try in" in out


def test_status_as_json_is_the_node_s_own_answer(node: ScriptedAdmin, run: Run) -> None:
    node.warnings = ["the disk is full"]
    answer = run("status", "--json").json
    assert (answer["name"], answer["workers"][0]["pid"]) == ("node-1", 12)
    out = run("status").out
    for word in (
        "node node-1",
        "up 2 h",
        "control pid 11",
        "0 (pid 12, 3 connections)",
        "2 (pid 13, 1 connections, retiring)",
        "not linked: 1",
        "disk is full",
    ):
        assert word in out


# --- no such app, no such machine


@pytest.mark.parametrize("words", [("logs", "helo"), ("machine", "list", "helo"), ("bench", "coldstart", "-a", "helo")])
def test_an_unknown_app_gets_did_you_mean(node: ScriptedAdmin, run: Run, words: tuple[str, ...]) -> None:
    ended = run(*words)
    assert ended.code == 1
    assert "did you mean hello?" in ended.err


def test_an_app_like_no_other_gets_the_list(node: ScriptedAdmin, run: Run) -> None:
    assert "there are: echo, hello" in run("logs", "zzzzzz").err


def test_a_machine_is_found_by_id_by_the_beginning_of_it_and_by_its_app(node: ScriptedAdmin, run: Run) -> None:
    for wanted in ("148e1234567890", "148e", "hello"):
        assert run("machine", "status", wanted, "--json").json["id"] == "148e1234567890"


def test_a_beginning_that_two_machines_share_is_a_usage_fault(node: ScriptedAdmin, run: Run) -> None:
    for wanted in ("24ab", "echo"):
        ended = run("machine", "stop", wanted)
        assert ended.code == 2
        assert "24abcd34567890" in ended.err and "24abff34567890" in ended.err
    assert not [one for one in node.asked if one[0] == "POST"]


def test_an_unknown_machine_gets_did_you_mean(node: ScriptedAdmin, run: Run) -> None:
    ended = run("machine", "start", "148e1234567891")
    assert ended.code == 1
    assert "did you mean 148e1234567890?" in ended.err


# --- acting on machines


@pytest.mark.parametrize(
    ("verb", "state"), [("start", "started"), ("stop", "stopped"), ("suspend", "suspended"), ("restart", "started")]
)
def test_a_verb_is_asked_and_its_state_awaited(node: ScriptedAdmin, run: Run, verb: str, state: str) -> None:
    ended = run("machine", verb, "hello", "--json")
    assert ended.code == 0
    assert ended.json == {"app": "hello", "id": "148e1234567890", "previous_state": "started", "state": state}
    prefix = "/v1/apps/hello/machines/148e1234567890"
    assert ("POST", f"{prefix}/{verb}") in node.asked
    assert any(path.startswith(f"{prefix}/wait?state={state}") for _, path in node.asked)


def test_stopping_a_machine_that_never_ran_does_not_wait_for_what_cannot_be(node: ScriptedAdmin, run: Run) -> None:
    node.apps["hello"] = [machine("148e1234567890", "created")]
    node.stuck = True
    began = time.monotonic()
    assert run("machine", "stop", "hello").code == 0
    assert time.monotonic() - began < 5


def test_a_verb_without_waiting_only_asks(node: ScriptedAdmin, run: Run) -> None:
    assert run("machine", "stop", "hello", "--wait", "0").code == 0
    assert not any("/wait" in path for _, path in node.asked)


def test_a_machine_that_does_not_come_to_its_state_in_time_is_a_failure(node: ScriptedAdmin, run: Run) -> None:
    node.stuck = True
    ended = run("machine", "stop", "hello", "--wait", "1")
    assert ended.code == 1
    assert "not stopped after 1 s" in ended.err and "wakefront logs hello" in ended.err


def test_a_refusal_is_told_with_the_node_s_reason(node: ScriptedAdmin, run: Run) -> None:
    node.refuses["start"] = (503, {"error": "held back after 3 failed starts", "status": "held"})
    ended = run("machine", "start", "hello")
    assert ended.code == 1
    assert ended.err == "wakefront: Cannot start hello/148e1234567890: held back after 3 failed starts.\n"


def test_machine_status_tells_how_it_ended(node: ScriptedAdmin, run: Run) -> None:
    node.events["148e1234567890"] = [
        {
            "id": "01J", "type": "exit", "status": "stopped", "source": "flyd", "timestamp": 1_700_000_000_000,
            "request": {"exit_event": {"exit_code": 3, "signal": 0}},
        },
        {
            "id": "01H", "type": "exit", "status": "stopped", "source": "flyd", "timestamp": 1_600_000_000_000,
            "request": {"exit_event": {"exit_code": None, "signal": 9}},
        },
    ]  # fmt: skip
    node.wakes["148e1234567890"] = {
        "asked_at": 1.7e9, "source": "proxy", "from_state": "stopped", "asked": 0.0, "forked": 1.25, "listening": 60.0,
        "answered": None, "code": None,
    }  # fmt: skip
    out = run("machine", "status", "hello").out
    assert "exit code 3" in out and "signal 9" in out
    assert "last wake: by proxy when stopped, forked 1.2 ms, listening 60.0 ms" in out
    assert run("machine", "status", "hello", "--json").json["events"][0]["id"] == "01J"


# --- logs


def test_logs_prints_the_last_lines(node: ScriptedAdmin, run: Run) -> None:
    node.log_lines["hello"] = [f"line {n}" for n in range(10)]
    assert run("logs", "hello", "-n", "3").out == "line 7\nline 8\nline 9\n"
    assert run("logs", "hello", "-n", "0").out == ""
    node.log_lines["hello"] = ["148e1234567890 out of memory"]
    line = {"name": "hello", "machine": "148e1234567890", "line": "out of memory"}
    assert json.loads(run("logs", "hello", "-n", "1", "--json").out) == line


def test_logs_follows_with_lines_that_come_later(
    node: ScriptedAdmin, run: Run, loop_of_admin: asyncio.AbstractEventLoop
) -> None:
    node.log_lines["hello"] = ["line 1"]
    loop_of_admin.call_soon_threadsafe(loop_of_admin.call_later, 0.05, node.follow_released.set)
    ended = run("logs", "-f", "hello")
    assert ended.out == "line 1\na line that came later\n"
    assert ended.code == 1 and "ended the stream" in ended.err, "whoever follows wants to know that it is over"


def command(*words: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "proxy", *words],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_control_c_ends_following_with_130_and_no_word(node: ScriptedAdmin, tmp_path: Path) -> None:
    node.log_lines["hello"] = ["line 1"]
    with command("logs", "-f", "hello", cwd=tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "line 1\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=10)
        assert (child.returncode, out, err) == (130, "", "")


@pytest.mark.slow
def test_a_reader_that_leaves_gets_no_traceback(node: ScriptedAdmin, tmp_path: Path) -> None:
    node.log_lines["hello"] = [f"line {n} " + "x" * 1000 for n in range(1000)]
    with command("logs", "hello", "-n", "1000", cwd=tmp_path) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert "Traceback" not in child.stderr.read()
        assert child.wait(10) == 1


# --- reload, certificates


def test_reload_tells_what_changed(node: ScriptedAdmin, run: Run) -> None:
    node.reload_answer = (200, {"added": ["shop"], "changed": [], "removed": ["old"], "warnings": ["slow disk"]})
    assert run("reload").out == "reloaded: added shop; removed old\nwarning: slow disk\n"
    assert node.asked == [("POST", "/v1/reload")]


def test_a_faulty_reload_lists_every_fault_and_changes_nothing(node: ScriptedAdmin, run: Run) -> None:
    faults = [{"text": "config.toml:3: workers: 'two' is not a number"}, {"text": "another one"}]
    node.reload_answer = (422, {"error": "configuration has faults", "faults": faults})
    ended = run("reload")
    assert ended.code == 1
    assert "Nothing was changed" in ended.err
    assert "config.toml:3: workers: 'two' is not a number" in ended.err and "another one" in ended.err


def test_certs_ca_prints_the_root_as_it_is(node: ScriptedAdmin, run: Run) -> None:
    assert run("certs", "ca").out == PEM
    assert run("certs", "ca", "--json").json == {"name": "internal", "pem": PEM}


def test_certs_ca_waits_for_a_root_that_is_being_made(
    node: ScriptedAdmin, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.ca_made_after = 2
    assert run("certs", "ca").out == PEM
    node.ca_made_after = 1_000_000
    monkeypatch.setattr(client, "_CA_WAIT_S", 0.0)
    ended = run("certs", "ca")
    assert ended.code == 1
    assert ended.err == "wakefront: There is no root certificate: this node has no internal CA yet.\n"


# --- the command itself


@pytest.mark.parametrize("words", [("nonsense",), ("logs",), ("machine", "start"), ("apps", "--nope"), ("demo", "x")])
def test_a_command_line_that_is_none_ends_with_2(run: Run, words: tuple[str, ...]) -> None:
    ended = run(*words)
    assert ended.code == 2
    assert ended.err and not ended.out


def test_every_command_has_help_and_those_that_answer_have_json(run: Run) -> None:
    for words in (
        ("serve",), ("check",), ("reload",), ("status",), ("apps",), ("logs",), ("demo",), ("certs", "ca"),
        ("bench", "coldstart"), ("machine", "list"), ("machine", "status"), ("machine", "start"),
        ("machine", "stop"), ("machine", "suspend"), ("machine", "restart"),
        ("certs", "add"), ("certs", "check"), ("certs", "show"), ("certs", "list"), ("certs", "setup"),
        ("certs", "import"), ("certs", "remove"), ("certs", "forecast"), ("certs", "account"),
    ):  # fmt: skip
        ended = run(*words, "--help")
        assert ended.code == 0 and "--json" in ended.out, words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.slow
def test_a_shell_gets_its_completion_script_and_the_names_of_apps(
    node: ScriptedAdmin, tmp_path: Path, shell: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = "wakefront logs h"
    environment |= {"_WAKEFRONT_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": "2"}
    environment |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-m", "proxy"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20
    )
    assert "hello" in done.stdout and "echo" not in done.stdout


@pytest.mark.slow
def test_a_command_loads_nothing_that_belongs_to_the_data_plane(node: ScriptedAdmin, tmp_path: Path) -> None:
    program = "import sys\nfrom proxy.cli.main import main\n"
    program += "try:\n main(['machine', 'list', '--json'])\nexcept SystemExit: pass\n"
    program += "heavy = {'aiohttp', 'uvloop', 'rich.table', 'cryptography', 'click'} & set(sys.modules)\n"
    program += "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

"""Commands as they are typed in a hurry: each says in a sentence what is wrong, and ends with the documented code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.scripted_admin import TOKEN, ScriptedAdmin, write_config, write_listen

ROOT = Path(__file__).resolve().parents[2]


def process(folder: Path, *words: str, **how: object) -> subprocess.Popen[str]:
    code = "from proxy.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]  # `how` is of many types
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, **how
    )


# --- names


@pytest.mark.parametrize("word", ["", "\udcff", "he\nllo"])
@pytest.mark.parametrize(
    "words",
    [("machine", "stop"), ("machine", "status"), ("machine", "list"), ("logs",), ("machine", "stop", "hello", "-a")],
)
def test_an_empty_or_broken_name_is_a_usage_fault_and_means_no_machine(
    node: ScriptedAdmin, run: Run, words: tuple[str, ...], word: str
) -> None:
    ended = run(*words, word)
    assert ended.code == 2 and ("it is empty" in ended.err or "no name or id" in ended.err)
    assert not node.asked


def test_an_empty_state_is_not_waited_for(node: ScriptedAdmin, run: Run) -> None:
    for state in ("", "started,"):
        ended = run("machine", "wait", "hello", "--state", state)
        assert ended.code == 2 and "--state is empty" in ended.err


@pytest.mark.parametrize("words", [("start", "hello", "--wait"), ("wait", "hello", "--timeout")])
def test_a_wait_without_end_is_a_usage_fault(node: ScriptedAdmin, run: Run, words: tuple[str, ...]) -> None:
    for seconds in ("inf", "nan", "-1", "1e30", "soon"):
        assert run("machine", *words, seconds).code == 2


def test_a_lease_of_another_says_how_to_go_on(node: ScriptedAdmin, run: Run) -> None:
    node.refuses["stop"] = (409, {"error": "a lease is held by bob", "status": "lease_held"})
    ended = run("machine", "stop", "hello")
    assert ended.code == 1
    assert "held by bob" in ended.err and "--nonce" in ended.err and "wait" in ended.err


# --- which node


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8081", "foo bar:80", "h\x01:80", "127.0.0.1:\u0663", "[::1:80", "a/b:80", "[h]:80"]
)
def test_an_address_that_no_socket_takes_is_a_usage_fault(node: ScriptedAdmin, run: Run, address: str) -> None:
    ended = run("apps", "--admin", address)
    assert ended.code == 2 and "HOST:PORT" in ended.err


def test_a_host_name_that_cannot_be_one_is_told(node: ScriptedAdmin, run: Run) -> None:
    ended = run("apps", "--admin", "a" * 70 + ":80")
    assert ended.code == 1 and "Cannot reach the node" in ended.err and len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("token", ["tök", "a b", "a\nb", "tokenŁ"])
def test_a_token_that_cannot_be_one_is_told_and_not_repeated(
    node: ScriptedAdmin, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    write_config(tmp_path, node.port, token=token)
    ended = run("apps")
    assert ended.code == 2 and "admin.token" in ended.err and token not in ended.err
    monkeypatch.setenv("WAKEFRONT_TOKEN", token)
    ended = run("apps")
    assert ended.code == 2 and "WAKEFRONT_TOKEN" in ended.err and token not in ended.err
    assert not node.asked


def test_a_config_that_is_no_text_is_a_configuration_fault(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe[node]")
    ended = run("apps")
    assert ended.code == 2 and "wakefront check" in ended.err and len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["apps", "serve"])
def test_a_config_whose_name_no_file_can_have_is_a_usage_fault(run: Run, command: str) -> None:
    ended = run(command, "--config", "x" * 300)
    assert ended.code == 2 and "File name too long" in ended.err


def test_another_program_s_page_is_not_printed(node: ScriptedAdmin, run: Run) -> None:
    node.reload_answer = (404, "<!DOCTYPE HTML> a page")
    ended = run("reload")
    assert ended.code == 1 and "not a Wakefront node" in ended.err and "DOCTYPE" not in ended.err


def test_a_node_that_is_asked_under_a_wrong_name_says_so_and_the_token_is_not_blamed(
    node: ScriptedAdmin, run: Run
) -> None:
    node.reload_answer = (403, {"error": "the Host header is not this node's admin address", "status": "unauthorized"})
    ended = run("reload")
    assert ended.code == 1 and "not this node's admin address" in ended.err and "token" not in ended.err


def test_a_node_s_file_given_as_a_fly_toml_is_not_called_good(node: ScriptedAdmin, run: Run) -> None:
    ended = run("check", "./config.toml")
    assert ended.code == 2 and "wakefront check --config config.toml" in ended.err


# --- explain, bench, demo


def test_explain_takes_the_port_a_client_uses_for_the_public_one(
    node: ScriptedAdmin, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_listen(tmp_path, (443, "127.0.0.1", 8443), (80, "127.0.0.1", 8080))
    for url in ("https://hello:8443/x?y#z", "hello:8443", "http://hello:8080/", "https://hello/", "https://hello:9/"):
        assert run("explain", url).code == 0
    assert [one["url"] for one in node.explained] == [
        "https://hello:443/x?y#z", "https://hello:443", "http://hello:80/", "https://hello/", "https://hello:9/"
    ]  # fmt: skip
    monkeypatch.setenv("WAKEFRONT_TOKEN", TOKEN)
    (tmp_path / "config.toml").unlink()
    assert run("explain", "https://hello:8443/", "--admin", f"127.0.0.1:{node.port}").code == 0
    assert node.explained[-1]["url"] == "https://hello:8443/", "of a node elsewhere nothing is known here"


def test_what_cannot_be_explained_is_a_usage_fault(node: ScriptedAdmin, run: Run) -> None:
    node.explain_answer = (400, {"error": "'ftp://x' is no http or https URL", "status": "invalid_argument"})
    for url in ("ftp://x", "https://[::1", "https://h:99999/", ""):
        ended = run("explain", url)
        assert ended.code == 2 and "no http or https URL" in ended.err
    ended = run("explain", "hello", "--from", "bogus")
    assert ended.code == 2 and "no IP address" in ended.err


@pytest.mark.parametrize("path", ["x", "/a b", "/ä", "/a\r\nX: y"])
def test_bench_refuses_a_path_that_cannot_be_asked_for(node: ScriptedAdmin, run: Run, path: str) -> None:
    ended = run("bench", "coldstart", "--app", "hello", "--path", path)
    assert ended.code == 2 and "--path" in ended.err and len(ended.err.splitlines()) == 1


def test_the_demo_says_when_its_folder_cannot_be(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = run("demo", "--once", "--dir", str(tmp_path / "file"))
    assert ended.code == 1 and "--dir" in ended.err and len(ended.err.splitlines()) == 1


# --- where the output goes, and Ctrl-C


def test_a_full_disk_is_told_in_one_sentence(node: ScriptedAdmin, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, process(tmp_path, "apps", stdout=full) as ended:
        assert "wakefront: [Errno 28] No space left on device." in ended.communicate(timeout=30)[1].splitlines()
    assert ended.returncode == 1


def test_a_reader_that_went_away_ends_a_command_without_a_word(node: ScriptedAdmin, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with process(tmp_path, "machine", "list", "--json", stdout=writing) as ended:
        os.close(writing)
        assert ended.communicate(timeout=30)[1] == ""
    assert ended.returncode == 1


def test_closed_outputs_are_no_fault(node: ScriptedAdmin, tmp_path: Path) -> None:
    with process(tmp_path, "apps", preexec_fn=lambda: os.close(1)) as ended:
        assert ended.communicate(timeout=30)[1] == ""
    assert ended.returncode == 0


def test_ctrl_c_ends_a_command_with_130(node: ScriptedAdmin, tmp_path: Path) -> None:
    node.log_lines["hello"] = ["148e1234567890 first"]
    with process(tmp_path, "logs", "-f", "hello", stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None and "first" in follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        assert "Traceback" not in follower.communicate(timeout=30)[1]
    assert follower.returncode == 130

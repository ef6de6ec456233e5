"""Which node a command talks to, with which token, and what it says when it cannot."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from proxy import config
from proxy.cli.node import DEFAULT_ADMIN, DEFAULT_DATA_DIR
from tests.cli.conftest import Run
from tests.cli.scripted_admin import TOKEN, ScriptedAdmin, write_config


def test_the_config_in_this_folder_names_the_node(node: ScriptedAdmin, run: Run) -> None:
    assert run("apps", "--json").code == 0
    assert node.asked == [("GET", "/v1/apps")]


def test_config_may_lie_elsewhere_and_its_data_dir_is_relative_to_it(
    node: ScriptedAdmin, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run("apps", "--config", "../config.toml").code == 0
    monkeypatch.setenv("WAKEFRONT_CONFIG", str(tmp_path / "config.toml"))
    assert run("apps").code == 0


def test_an_option_wins_over_the_environment(
    node: ScriptedAdmin, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAKEFRONT_CONFIG", "/nowhere/config.toml")
    assert run("apps", "--config", str(tmp_path / "config.toml")).code == 0


def test_admin_overrides_the_address_of_the_config_and_keeps_its_token(
    node: ScriptedAdmin, run: Run, tmp_path: Path
) -> None:
    write_config(tmp_path, 1)
    assert run("apps", "--admin", f"127.0.0.1:{node.port}").code == 0


def test_admin_with_a_token_in_the_environment_needs_no_config(
    node: ScriptedAdmin, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").unlink()
    monkeypatch.setenv("WAKEFRONT_TOKEN", TOKEN)
    assert run("apps", "--admin", f"127.0.0.1:{node.port}").code == 0


def test_no_config_is_a_usage_fault_that_names_the_ways(run: Run) -> None:
    ended = run("apps")
    assert ended.code == 2
    assert ended.out == ""
    assert "config.toml" in ended.err and "--config" in ended.err and "WAKEFRONT_CONFIG" in ended.err


def test_admin_without_any_token_says_where_one_may_come_from(run: Run) -> None:
    ended = run("apps", "--admin", "127.0.0.1:8081")
    assert ended.code == 2
    assert "WAKEFRONT_TOKEN" in ended.err


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:70000"])
def test_an_admin_address_that_is_none_is_a_usage_fault(node: ScriptedAdmin, run: Run, address: str) -> None:
    ended = run("apps", "--admin", address)
    assert ended.code == 2
    assert "HOST:PORT" in ended.err


def test_a_node_that_does_not_run_is_told_in_one_sentence(run: Run, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        write_config(tmp_path, probe.getsockname()[1])
        ended = run("status")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1
    assert "No node answers" in ended.err and "wakefront serve" in ended.err


def test_a_node_that_never_ran_has_no_token_yet(run: Run, tmp_path: Path) -> None:
    write_config(tmp_path, 8081, token=None)
    ended = run("status")
    assert ended.code == 1
    assert "wakefront serve" in ended.err and "admin.token" in ended.err


def test_a_token_file_that_may_not_be_read_is_told_with_the_system_s_reason(run: Run, tmp_path: Path) -> None:
    write_config(tmp_path, 8081)
    token = tmp_path / "data" / "admin.token"
    token.unlink()
    token.mkdir()  # unreadable for root too
    ended = run("status")
    assert ended.code == 1
    assert "Is a directory" in ended.err and "as the user the node runs as" in ended.err


def test_a_refused_token_is_told(node: ScriptedAdmin, run: Run, tmp_path: Path) -> None:
    write_config(tmp_path, node.port, token="another")
    ended = run("apps")
    assert ended.code == 1
    assert "refused the token" in ended.err and os.fspath(tmp_path / "data" / "admin.token") in ended.err


@pytest.mark.parametrize("text", ["[node", '[listen]\nadmin = 8081\n[node]\ndata_dir = "x"'])
def test_a_broken_config_is_a_configuration_fault(run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    ended = run("apps")
    assert ended.code == 2
    assert "config.toml" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"HTTP/1.1 200"]
)
def test_something_else_on_the_admin_port_is_no_node(run: Run, tmp_path: Path, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        write_config(tmp_path, server.getsockname()[1])

        def serve_once() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_once)
        thread.start()
        ended = run("apps")
        thread.join(5)
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1 and "Traceback" not in ended.err


def test_the_defaults_are_those_of_the_configuration() -> None:
    assert (DEFAULT_ADMIN, DEFAULT_DATA_DIR) == (config.DEFAULT_ADMIN, config.DEFAULT_DATA_DIR)

"""The cold start bench against a scripted node and a real TLS server in the place of its listener."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import scripted_admin
from tests.cli.conftest import Run
from tests.cli.origin import Authority, origin, read_head
from tests.cli.scripted_admin import TOKEN, ScriptedAdmin, write_listen

ID = "148e1234567890"


class Listener:
    """Wakes the scripted machine when a request comes, as a worker would."""

    def __init__(self, admin: ScriptedAdmin) -> None:
        self.admin = admin
        self.states_met: list[str] = []
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    def __call__(self, connection: socket.socket) -> None:
        (machine,) = self.admin.apps["hello"]
        self.states_met.append(machine["state"])
        asked = time.time()
        read_head(connection)
        machine["state"] = "started"
        self.admin.wakes[ID] = {"asked_at": asked, "asked": 0.0, "forked": 1.0, "listening": 2.0, "answered": None}
        connection.sendall(self.answer)


@pytest.fixture
def listener(node: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Listener]:
    authority = Authority("hello.apps.localhost")
    monkeypatch.setattr(scripted_admin, "PEM", authority.pem)
    listener = Listener(node)
    with origin(listener, authority) as (host, port), origin(listener) as (_, plain_port):
        write_listen(tmp_path, (80, "0.0.0.0", plain_port), (443, host, port))
        yield listener


@pytest.mark.parametrize(("options", "state"), [((), "stopped"), (("--suspend",), "suspended")])
def test_each_run_meets_a_sleeping_machine_and_every_phase_is_in_the_table(
    listener: Listener, run: Run, options: tuple[str, ...], state: str
) -> None:
    ended = run("bench", "coldstart", "--app", "hello", "--runs", "4", "--json", *options)
    assert ended.code == 0, ended.err
    assert listener.states_met == [state] * 4
    result = ended.json
    assert (result["name"], result["from"]) == ("hello", state)
    assert [one["id"] for one in result["runs"]] == [1, 2, 3, 4]
    names = {one["name"] for one in result["phases"]}
    assert names == {
        "connected", "hello_sent", "handshake_done", "request_sent", "asked", "forked", "listening", "first_byte"
    }  # fmt: skip
    for phase in result["phases"]:
        assert phase["runs"] == 4
        assert 0 <= phase["p50"] <= phase["p90"] <= phase["p99"] <= phase["max"]


def test_the_table_names_the_phases_and_percentiles(listener: Listener, run: Run) -> None:
    out = run("bench", "coldstart", "-a", "hello", "-n", "2").out
    for word in ("ClientHello sent", "program listens", "first byte", "p50", "p90", "p99", "max"):
        assert word in out


def test_plain_http_has_no_tls_phases(listener: Listener, run: Run) -> None:
    result = run("bench", "coldstart", "-a", "hello", "-n", "1", "--http", "--json").json
    assert not {"hello_sent", "handshake_done"} & {one["name"] for one in result["phases"]}


def test_a_wake_that_was_an_earlier_one_is_not_counted(listener: Listener, run: Run, node: ScriptedAdmin) -> None:
    old = {"asked_at": time.time() - 5, "asked": 0.0, "forked": 2.0, "listening": 3.0}
    listener.admin.wakes = _Frozen(old)
    result = run("bench", "coldstart", "-a", "hello", "-n", "1", "--json").json
    assert "asked" not in {one["name"] for one in result["phases"]}


class _Frozen(dict[str, dict[str, float]]):
    """The record of one wake that no later wake replaces."""

    def __init__(self, wake: dict[str, float]) -> None:
        super().__init__({ID: wake})

    def __setitem__(self, key: str, value: dict[str, float]) -> None:
        return


def test_an_app_that_does_not_come_up_ends_the_bench_with_its_reason(listener: Listener, run: Run) -> None:
    listener.answer = b"HTTP/1.1 503 Service Unavailable\r\nWakefront-Error: PM07\r\nContent-Length: 0\r\n\r\n"
    ended = run("bench", "coldstart", "-a", "hello", "-n", "3")
    assert ended.code == 1
    assert "503 with PM07" in ended.err and "wakefront logs hello" in ended.err
    assert len(listener.states_met) == 1


def test_a_node_that_does_not_listen_on_the_port_says_so(node: ScriptedAdmin, run: Run, tmp_path: Path) -> None:
    write_listen(tmp_path)
    ended = run("bench", "coldstart", "-a", "hello", "--http")
    assert ended.code == 2
    assert "port 80" in ended.err


def test_a_node_elsewhere_is_not_measured_from_here(
    node: ScriptedAdmin, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").unlink()
    monkeypatch.setenv("WAKEFRONT_TOKEN", TOKEN)
    ended = run("bench", "coldstart", "-a", "hello", "--http", "--admin", f"127.0.0.1:{node.port}")
    assert ended.code == 2
    assert "--config" in ended.err


def test_a_machine_that_never_ran_is_cold_already(listener: Listener, run: Run, node: ScriptedAdmin) -> None:
    node.apps["hello"][0]["state"] = "created"
    assert run("bench", "coldstart", "-a", "hello", "-n", "1", "--json").code == 0
    assert not [path for method, path in node.asked if method == "POST"]

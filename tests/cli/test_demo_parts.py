"""What of the demo needs no node: its ports, its files, its verdicts, and that it leaves nothing running."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from proxy.cli.demo import (
    IDLE_S,
    STEPS,
    Broken,
    DemoNode,
    Ports,
    Step,
    _end_what_is_left,
    _facts,
    _run_step,
    choose_ports,
    write_demo,
)
from proxy.cli.failure import CliError
from proxy.cli.visit import Answer, Times


def test_a_port_that_is_taken_is_replaced_and_all_differ() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8443))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which serves as well
        ports = choose_ports()
    assert ports.https != 8443
    assert len({ports.http, ports.https, ports.admin}) == 3


def test_the_config_written_has_the_ports_and_this_python(tmp_path: Path) -> None:
    config = tomllib.loads(write_demo(tmp_path, Ports(1001, 1002, 1003)).read_text())
    assert config["listen"] == {"80": ["127.0.0.1:1001"], "443": ["127.0.0.1:1002"], "admin": "127.0.0.1:1003"}
    assert {app["command"][0] for app in config["apps"]} == {sys.executable}
    assert config["node"]["workers"] >= 2
    assert config["apps"][1]["idle_timeout"] == f"{IDLE_S:g}s"
    for app in config["apps"]:
        assert (tmp_path / app["fly_toml"]).is_file()
        assert (tmp_path / app["fly_toml"]).parent.joinpath("server.py").is_file()


def test_a_machine_left_over_is_found_by_its_folder_and_ended(tmp_path: Path) -> None:
    inside = tmp_path / "apps" / "counter"
    inside.mkdir(parents=True)
    program = [sys.executable, "-S", "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(program, cwd=inside, **pipes) as left,  # type: ignore[call-overload]
        subprocess.Popen(program, cwd=tmp_path, **pipes) as other,  # type: ignore[call-overload]
    ):
        for child in (left, other):
            assert child.stdout.readline() == b"up\n"
        assert _end_what_is_left(tmp_path) == [left.pid]
        assert left.wait(5) == -9
        assert other.poll() is None
        other.stdin.close()


@pytest.mark.parametrize(
    ("raised", "saw"),
    [
        (Broken("count 3 after 1"), "count 3 after 1"),
        (CliError("No node answers."), "the node: No node answers."),
        (ConnectionRefusedError(111, "Connection refused"), "ConnectionRefusedError: [Errno 111] Connection refused"),
        (ValueError("Expecting value"), "ValueError: Expecting value"),
    ],
)
def test_a_step_that_does_not_hold_says_what_it_saw(
    raised: Exception, saw: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(_node: DemoNode, _step: Step) -> None:
        raise raised

    done = _run_step(1, "a step", step, None, as_json=False)  # type: ignore[arg-type]
    assert (done.ok, done.saw) == (False, saw)
    assert "✗  1. a step" in capsys.readouterr().out


def answer(status: int, body: bytes) -> Answer:
    return Answer(status, {"wakefront-error": "PM07"}, body, Times())


def test_only_the_program_s_own_answer_counts() -> None:
    assert _facts(answer(200, json.dumps({"count": 1}).encode())) == {"count": 1}
    with pytest.raises(Broken, match=r"503.*PM07"):
        _facts(answer(503, b""))
    with pytest.raises(Broken, match="not the program's"):
        _facts(answer(200, b"[]"))


def test_every_step_has_a_name_of_its_own() -> None:
    assert len({name for name, _ in STEPS}) == len(STEPS) >= 8

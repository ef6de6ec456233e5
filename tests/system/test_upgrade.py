"""`wakefront upgrade` under load: another program takes over the same sockets, or is put back; nobody notices."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import config
from proxy.succession import RESULT_FILE, Request
from tests.support.apps import make_app, starts
from tests.support.load import Load
from tests.support.processes import runs, wait_for
from tests.support.serve import ServedNode, wakefront
from tests.support.supervised import Supervised
from tests.system.test_reload import Tunnel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
ENDS = ("done", "failed", "rolled back")
ROOT = Path(__file__).resolve().parents[2]
CONTROL_DIES_LATE = """
_start = Server.start

async def _start_and_die(self):
    await _start(self)
    asyncio.get_running_loop().call_later(0.2, os._exit, 70)

Server.start = _start_and_die
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ServedNode]:
    with ServedNode(tmp_path, make_app(tmp_path, "web")) as served:
        served.get("web")
        yield served


def children(node: ServedNode, retiring: bool) -> list[int]:
    return [one["pid"] for one in node.status()["children"] if one["retiring"] is retiring]


def upgrade_to(node: ServedNode, python: Path | str) -> dict[str, str]:
    """Ask for a program by hand, as another environment's `wakefront upgrade` would; the last word on it."""
    run_dir = node.data_dir / "run"
    plan = config.plan(good_config(node), node.config)
    request = Request(secrets.token_hex(4), str(python), "9.9", plan.to_json())
    (run_dir / "upgrade.json").write_text(request.to_json())
    os.kill(node.pid, signal.SIGUSR2)

    def last() -> dict[str, str] | None:
        if not (run_dir / "upgrade-result.json").exists():
            return None
        result: dict[str, str] = json.loads((run_dir / "upgrade-result.json").read_text())
        return result if result["id"] == request.id and result["stage"] in ENDS else None

    return wait_for(last, 60, node.log)


def good_config(node: ServedNode) -> config.NodeConfig:
    found = config.load(node.config).config
    assert found is not None
    return found


def program(folder: Path, module: str, appended: str) -> Path:
    """An interpreter that finds a copy of the program in which one module ends with other lines."""
    copy = folder / "program"
    copy.mkdir()
    for package in ("proxy", "certs"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "_compiled"))
    path = copy / "proxy" / f"{module}.py"
    text, main, rest = path.read_text().partition('if __name__ == "__main__":')
    path.write_text(f"{text}\n{appended}\n\n{main}{rest}")
    wrapper = folder / "python-of-another-version"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={copy} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def test_five_upgrades_under_load_lose_no_request_and_no_tunnel_and_start_no_machine_again(node: ServedNode) -> None:
    machine = starts(node.folder, "web")
    with Load(node, "web", kept=32, kept_per_s=1000) as load:
        tunnels = []
        for _ in range(5):
            before = children(node, False)
            tunnels.append(Tunnel(node, "web"))
            answer = json.loads(node.cli("upgrade", "--json"))
            assert answer["stage"] == "done" and not set(before) & set(children(node, False))
            assert all(tunnel.echoes(b"still here") for tunnel in tunnels)
        load.run_for(0.5)
    assert load.failures == [], load.told()
    assert starts(node.folder, "web") == machine
    for tunnel in tunnels:
        tunnel.close()
    wait_for(lambda: not children(node, True), 20, "old workers end with their last connection")


@pytest.mark.parametrize(
    ("module", "appended", "stage", "why"),
    [
        ("worker", "import a_module_that_is_not_installed", "failed", "a_module_that_is_not_installed"),
        ("state", "LAYOUT = 99", "failed", "can't take over from this version while it runs"),
        (
            "server",
            "def run(ctx):\n    raise RuntimeError('broken')",
            "rolled back",
            "its control exited with status 70",
        ),
        ("worker", "def run(ctx):\n    raise RuntimeError('broken')", "rolled back", "exited with status 70"),
        ("server", CONTROL_DIES_LATE, "rolled back", "its control exited with status 70"),
        ("supervisor", "Supervisor._take_over = None", "rolled back", "could not take over"),
    ],
    ids=["cannot be loaded", "other memory", "control fails", "workers fail", "control fails late", "supervisor fails"],
)
def test_a_new_program_that_fails_is_put_back_under_load_and_nobody_notices(
    node: ServedNode, tmp_path: Path, module: str, appended: str, stage: str, why: str
) -> None:
    broken = program(tmp_path, module, appended)
    machine = starts(node.folder, "web")
    workers = [one["pid"] for one in node.status()["children"] if one["role"] == "worker"]
    with Load(node, "web") as load:
        tunnel = Tunnel(node, "web")
        result = upgrade_to(node, broken)
        assert result["stage"] == stage and why in result["detail"], result
        load.run_for(0.5)
        assert tunnel.echoes(b"still here")
        wait_for(lambda: (node.child("control") or {}).get("ready"), 20, node.log)
        serving = [one for one in node.status()["children"] if one["role"] == "worker" and not one["retiring"]]
        assert [one["pid"] for one in serving] == workers, "the workers served all the time"
    assert load.failures == [], load.told()
    assert starts(node.folder, "web") == machine
    assert json.loads(node.cli("upgrade", "--json"))["stage"] == "done", "and a good one takes over afterwards"
    tunnel.close()


def test_without_a_running_node_an_upgrade_says_so(node: ServedNode) -> None:
    node.stop()
    done = subprocess.run(
        [wakefront(), "upgrade", "--config", str(node.config)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and "No node runs with data_dir" in done.stderr


def test_an_upgrade_with_a_faulty_configuration_changes_nothing(node: ServedNode) -> None:
    before = children(node, False)
    node.write_config("[[apps]]\nnonsense = 1\n")
    done = subprocess.run(
        [wakefront(), "upgrade", "--config", str(node.config)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "nonsense" in done.stdout + done.stderr
    assert children(node, False) == before and node.get("web")[0] == 200


def test_a_request_of_another_user_is_not_heeded(node: ServedNode) -> None:
    before = children(node, False)
    path = node.data_dir / "run" / "upgrade.json"
    path.write_text(Request("1", sys.executable, "9.9", "{}").to_json())
    os.chown(path, 12345, 12345)
    os.kill(node.pid, signal.SIGUSR2)
    wait_for(lambda: "belongs to user 12345" in node.log(), 10, node.log)
    assert children(node, False) == before
    path.unlink()
    path.symlink_to("/etc/hostname")
    os.kill(node.pid, signal.SIGUSR2)
    wait_for(lambda: "upgrade.json can't be read" in node.log(), 10, node.log)


def test_frozen_control_is_no_obstacle(node: ServedNode) -> None:
    os.kill(node.pid_of("control"), signal.SIGSTOP)
    assert json.loads(node.cli("upgrade", "--json"))["stage"] == "done"
    assert node.get("web")[0] == 200


def test_of_two_commands_at_once_the_second_is_refused_and_does_not_take_the_place_of_the_first(
    node: ServedNode,
) -> None:
    """The supervisor stands still until both have asked: of two signals it would see one, and the later request."""
    command = [wakefront(), "upgrade", "--config", str(node.config)]
    os.kill(node.pid, signal.SIGSTOP)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        try:
            wait_for((node.data_dir / "run" / "upgrade.json").exists, 20, "the first has asked")
            second = subprocess.run(command, capture_output=True, text=True, timeout=20)
            os.kill(node.pid, signal.SIGCONT)
            said, _ = first.communicate(timeout=60)
        finally:
            os.kill(node.pid, signal.SIGCONT)
            first.kill()
    assert second.returncode == 1 and "Another `wakefront upgrade` of this node is under way" in second.stderr
    assert first.returncode == 0, said


def test_a_command_that_is_interrupted_says_that_the_upgrade_goes_on(node: ServedNode) -> None:
    with subprocess.Popen(
        [wakefront(), "upgrade", "--config", str(node.config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as asking:
        wait_for(lambda: "upgrade to" in node.log(), 20, node.log)
        asking.send_signal(signal.SIGINT)
        said, _ = asking.communicate(timeout=20)
        assert asking.returncode == 130 and b"goes on with the upgrade" in said
    wait_for(lambda: ": done" in node.log(), 60, node.log)


def test_sigterm_in_the_middle_of_an_upgrade_ends_the_node_in_order(node: ServedNode) -> None:
    with subprocess.Popen(
        [wakefront(), "upgrade", "--config", str(node.config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as asking:
        wait_for(lambda: "upgrade to" in node.log() and ": workers" in node.log(), 20, node.log)
        node.stop()
        asking.communicate(timeout=20)
        assert asking.returncode == 1


def ask_supervised(node: Supervised, plan: str, python: Path | str = sys.executable) -> None:
    request = Request(secrets.token_hex(4), str(python), "9.9", plan)
    (node.data_dir / "run" / "upgrade.json").write_text(request.to_json())
    node.signal(signal.SIGUSR2)


def test_machines_are_stopped_though_the_end_comes_while_a_control_makes_room(tmp_path: Path) -> None:
    """A control that leaves stops no machine: another must, or they would run on without anybody."""
    with Supervised(tmp_path) as node:
        node.wait_ready()
        node.tell("control-leaves-slowly")
        ask_supervised(node, node.plan.to_json())
        wait_for(lambda: node.messages("control", "leave"), 20, node.log)
        node.signal(signal.SIGTERM)
        wait_for(lambda: node.status()["stage"] == "stopping", 10, node.log)
        node.tell("control-leaves-slowly", False)
        assert node.wait_ended() == 0
        (drained,) = node.messages("control", "drain")
        assert drained["incarnation"] == 2


def test_a_control_that_dies_during_the_trial_is_replaced_by_one_of_the_former_plan(tmp_path: Path) -> None:
    program = tmp_path / "slow-python"
    program.write_text(
        f'#!/bin/sh\nwhile [ -e {tmp_path}/trial-waits ]; do sleep 0.05; done\nexec {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    with Supervised(tmp_path) as node:
        node.wait_ready()
        node.tell("trial-waits")
        ask_supervised(node, "no plan at all", program)
        wait_for(lambda: ": trial" in node.log(), 10, node.log)
        former = node.pid_of("control")
        os.kill(former, signal.SIGKILL)
        node.wait_replaced("control", 0, former)
        node.tell("trial-waits", False)
        wait_for(lambda: ": failed: the new program ended by itself" in node.log(), 20, node.log)


def test_a_trial_that_hangs_does_not_outlive_the_node(tmp_path: Path) -> None:
    program, said = tmp_path / "hanging-python", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {said}\nexec sleep 60\n")
    program.chmod(0o755)
    with Supervised(tmp_path) as node:
        node.wait_ready()
        ask_supervised(node, node.plan.to_json(), program)
        wait_for(lambda: said.exists() and said.read_text().strip(), 10, node.log)
        node.signal(signal.SIGTERM)
        assert node.wait_ended() == 0
        told = json.loads((node.data_dir / "run" / RESULT_FILE).read_text())
        assert (told["stage"], told["detail"]) == ("failed", "the node ends"), "not that the new program failed"
        trial = int(said.read_text())
        wait_for(lambda: not runs(trial), 5, "the trial has ended")

"""The node with the rights that packaging/wakefront.service gives: a user of its own, one capability, 1024 open files.

systemd is not run here: setpriv and prlimit of util-linux give the same. What its sandbox adds is judged in
tests/test_packaging.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serve import ServedNode, wakefront

pytestmark = pytest.mark.slow
NOBODY = 65534
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
HOSTED = Path(__file__).parent.parent / "attacks" / "hosted.py"


@pytest.fixture
def as_service() -> tuple[str, ...]:
    """What runs a command as the unit does."""
    setpriv, prlimit = shutil.which("setpriv"), shutil.which("prlimit")
    if os.geteuid() != 0 or setpriv is None or prlimit is None:
        pytest.skip("only root can give a process another user")
    one = "-all,+net_bind_service"
    who = ("--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--no-new-privs")
    prefix = (prlimit, f"--nofile=1024:{HARD}", setpriv, *who, "--inh-caps", one, "--ambient-caps", one,
              "--bounding-set", one)  # fmt: skip
    if subprocess.run([*prefix, sys.executable, "-c", "import proxy"], capture_output=True, check=False).returncode:
        pytest.skip("another user cannot read this folder")
    return prefix


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of the service's user, whom the way to it lets through."""
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    os.chown(tmp_path, NOBODY, NOBODY)
    return tmp_path


@pytest.fixture
def low_port() -> int:
    """A port that only the privileged may bind, and nobody has."""
    for port in range(700, 1024):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    pytest.skip("no low port is free")


def test_it_binds_low_ports_and_its_machines_have_no_rights(
    place: Path, as_service: tuple[str, ...], low_port: int
) -> None:
    toml = place / "hosted.toml"
    toml.write_text('app = "hosted"\n[http_service]\ninternal_port = 8080\n')
    command = json.dumps([sys.executable, "-I", "-S", str(HOSTED)])
    apps = f'[[apps]]\nfly_toml = "{toml}"\ncommand = {command}\ncwd = "/"\n'
    with ServedNode(place, apps, listen=f'8000 = ["127.0.0.1:{low_port}"]', prefix=as_service) as node:
        with socket.create_connection(("127.0.0.1", low_port), timeout=10) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: nobody\r\nConnection: close\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 404 ")
        status = shown(node, "/proc/self/status")
        for kind in ("CapPrm", "CapEff", "CapAmb"):
            assert int(status.partition(f"{kind}:")[2].split()[0], 16) == 0, f"{kind} of a machine\n{status}"
        assert "NoNewPrivs:\t1" in status
        assert open_files(shown(node, "/proc/self/limits")) == "1024", "machines have the soft limit"
        for pid in (node.pid_of("control"), *node.worker_pids):
            assert open_files(Path(f"/proc/{pid}/limits").read_text()) == str(HARD), "these have raised theirs"


def test_root_upgrades_it_and_is_not_led_to_write_where_a_link_of_the_services_user_points(
    place: Path, as_service: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    of_root = tmp_path_factory.mktemp("of-root") / "file"
    of_root.write_text("precious")
    with ServedNode(place, prefix=as_service) as node:
        (node.data_dir / "run" / "upgrade.json.new").symlink_to(of_root)
        command = [wakefront(), "upgrade", "--config", str(node.config)]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1 and "Permission denied" in refused.stderr
        assert of_root.read_text() == "precious" and os.stat(of_root).st_uid == 0
        (node.data_dir / "run" / "upgrade.json.new").unlink()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert os.stat(node.data_dir / "run" / "upgrade.json").st_uid == NOBODY


def open_files(limits: str) -> str:
    """The soft limit."""
    return limits.partition("Max open files")[2].split()[0]


def shown(node: ServedNode, path: str) -> str:
    """A file as a machine sees it."""
    status, _, body = node.get("hosted", f"/show?path={path}")
    told = json.loads(body)
    assert status == 200 and told["uid"] == NOBODY
    return str(told["result"])

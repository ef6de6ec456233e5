"""packaging/: the unit and the container file are what tools accept and what the product needs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import config
from proxy.cli.main import app as commands

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
UNIT = PACKAGING / "wakefront.service"
DROP_IN = PACKAGING / "wakefront-privileged.conf"
EXPOSURE = 25  # of 100, as systemd-analyze has it; the ports below 1024, the network and JITs of machines are its worth
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def settings(*files: Path) -> dict[str, list[str]]:
    """What [Service] says, in order."""
    found: dict[str, list[str]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                name, _, value = line.partition("=")
                found.setdefault(name, []).append(value)
    return found


def installed(folder: Path, *drop_ins: Path) -> Path:
    """The unit with a program and a user that are there, so that it can be judged here."""
    program = shlex.join([str(Path(sys.executable).with_name("wakefront"))])
    text = UNIT.read_text().replace("/opt/wakefront/current/bin/wakefront", program)
    text = text.replace("User=wakefront", "User=daemon").replace("Group=wakefront", "Group=daemon")
    more = "".join(one.read_text() for one in drop_ins)
    unit = folder / "wakefront.service"
    unit.write_text(text.replace("\n[Install]", f"\n{more.replace('[Service]', '')}\n[Install]"))
    return unit


@needs_systemd
@pytest.mark.parametrize("drop_ins", [(), (DROP_IN,)])
def test_systemd_accepts_the_unit_with_and_without_the_drop_in(tmp_path: Path, drop_ins: tuple[Path, ...]) -> None:
    unit = installed(tmp_path, *drop_ins)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    about_it = [line for line in (done.stdout + done.stderr).splitlines() if "wakefront" in line]
    assert about_it == []


@needs_systemd
def test_what_the_unit_leaves_exposed_is_bounded(tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager",
         str(installed(tmp_path))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_the_unit_speaks_as_the_supervisor_does() -> None:
    said = settings(UNIT)
    assert said["Type"] == ["notify"] and said["NotifyAccess"] == ["main"], "the supervisor alone tells READY=1"
    assert said["ExecReload"] == ["/bin/kill -HUP $MAINPID"] and said["KillSignal"] == ["SIGTERM"]
    supervisor = (ROOT / "proxy" / "supervisor.py").read_text()
    assert '"WATCHDOG=1"' in supervisor and int(said["WatchdogSec"][0]) >= 10
    stop_s = int(float(re.findall(r"^STOP_S = ([0-9.]+)", supervisor, re.MULTILINE)[0]))
    assert int(said["TimeoutStopSec"][0]) > stop_s + config.LimitsSection().drain_timeout_s, "it may end in order"
    assert said["KillMode"] == ["mixed"] and said["OOMPolicy"] == ["continue"], "machines end in order, or go on"
    words = shlex.split(said["ExecStart"][0])
    assert words[1:] == ["serve", "--config", "/etc/wakefront/config.toml"]


def test_machines_can_do_their_work_in_the_unit() -> None:
    said = settings(UNIT)
    assert "MemoryDenyWriteExecute" not in said and "ProcSubset" not in said and said["TasksMax"] == ["infinity"]
    soft, _, hard = said["LimitNOFILE"][0].partition(":")
    assert soft == "1024" and int(hard) >= 1 << 20
    both = settings(UNIT, DROP_IN)
    assert set(" ".join(both["CapabilityBoundingSet"]).split()) >= {"CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"}
    assert both["RestrictNamespaces"][-1] == "mnt net" and both["SystemCallFilter"][-1] == "@mount"


# --- the container file


def instructions() -> list[tuple[str, str]]:
    text = (PACKAGING / "Containerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def of(name: str) -> list[str]:
    return [rest for one, rest in instructions() if one == name]


def test_what_is_copied_is_there_and_is_all_that_an_install_needs() -> None:
    copied = [word for rest in of("COPY") if not rest.startswith("--from") for word in rest.split()[:-1]]
    assert all((ROOT / one).exists() for one in copied), copied
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'"(\w+)\*"', re.findall(r"^include = (.*)", project, re.MULTILINE)[0])
    assert packages and {*packages, "pyproject.toml", "README.md", "LICENSE"} <= set(copied)


def test_it_runs_as_a_user_and_ends_in_order() -> None:
    last = len(instructions()) - 1 - [name for name, _ in reversed(instructions())].index("FROM")
    final = instructions()[last:]
    assert len(of("FROM")) == 2 and not any(name == "RUN" and "gcc" in rest for name, rest in final)
    (user,) = of("USER")
    assert user.split(":")[0] not in ("0", "root")
    assert of("STOPSIGNAL") == ["SIGTERM"] and of("VOLUME") == ["/var/lib/wakefront"]
    (check,) = of("HEALTHCHECK")
    assert f"http://{config.DEFAULT_ADMIN}/healthz" in check


def test_what_it_starts_is_a_command_that_there_is() -> None:
    names = {one.name or (one.callback.__name__ if one.callback else "") for one in commands.registered_commands}
    assert eval_list(of("CMD")[0])[0] in names and eval_list(of("ENTRYPOINT")[0]) == ["/opt/wakefront/bin/wakefront"]
    assert any("bin/wakefront compile" in rest for rest in of("RUN")) and "compile" in names


def eval_list(text: str) -> list[str]:
    words = re.findall(r'"([^"]*)"', text)
    assert text == "[" + ", ".join(f'"{word}"' for word in words) + "]"
    return words


def test_the_page_names_only_files_that_are_there() -> None:
    page = ROOT / "docs" / "installing.md"
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"packaging/[\w.-]+", page.read_text()):
        assert (ROOT / name).exists(), name

"""The `run` script on machines that lack something: python is a stand-in, and nothing can be installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.supervised import ROOT

TOOLS = ("sh", "dirname", "id", "cksum", "cat", "sed", "date", "mkdir", "cp", "chmod", "rm")

# Acts as the system's python and, once it has "made" .venv, as the one in it. What it was asked goes to ./asked.
PYTHON = """#!/bin/sh
echo "$*" >>asked
case "$*" in
*version_info\\[:2\\]*) echo 3.12 ;;
*ensurepip*) [ ! -e no-ensurepip ] ;;
*"-c import pip"*) [ ! -e no-pip ] ;;
*"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*"-m pip"*) [ ! -e pip-fails ] || { echo "no matching distribution" >&2; exit 1; } ;;
*"-m pytest"*) exit "$(cat pytest-status)" ;;
*"-m ruff format"*) [ ! -e unformatted ] ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone without .venv, and a PATH in which nothing can be installed."""
    clone = tmp_path / "a clone"
    clone.mkdir()
    for name in ("run", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    (clone / "bin").mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (clone / "bin" / name).symlink_to(found)
    (clone / "pytest-status").write_text("0")
    _script(clone / "bin" / "python3", PYTHON)
    return clone


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _run(clone: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [clone / "run", *arguments],
        env={"PATH": str(clone / "bin"), "WAKEFRONT_PYTHON": "none"},
        cwd=os.sep,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _asked(clone: Path, what: str) -> int:
    path = clone / "asked"
    return sum(what in line for line in path.read_text().splitlines()) if path.exists() else 0


def test_without_python_it_says_what_to_install(clone: Path) -> None:
    (clone / "bin" / "python3").unlink()
    status, output = _run(clone, "test")
    assert status == 3
    assert "Python 3.11 or newer is needed" in output
    assert "apt install python3 python3-venv" in output


def test_with_an_old_python_only_it_says_the_same(clone: Path) -> None:
    _script(clone / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    status, output = _run(clone, "demo")
    assert (status, "Python 3.11 or newer is needed" in output) == (3, True)


def test_without_the_venv_module_it_names_the_package_of_that_very_version(clone: Path) -> None:
    (clone / "no-ensurepip").touch()
    (clone / "no-pip").touch()
    status, output = _run(clone, "test")
    assert (status, "apt install python3.12-venv" in output) == (3, True)


def test_when_pip_fails_its_message_is_shown_and_the_next_run_tries_again(clone: Path) -> None:
    (clone / "pip-fails").touch()
    status, output = _run(clone, "test")
    assert status == 3
    assert "no matching distribution" in output
    (clone / "pip-fails").unlink()
    assert _run(clone, "test")[0] == 0
    assert _asked(clone, "-m pip install") == 2


def test_it_installs_once_and_again_only_when_pyproject_changed(clone: Path) -> None:
    for _ in range(2):
        assert _run(clone, "test")[0] == 0
    assert _asked(clone, "-m pip install") == 1
    assert _asked(clone, "-m venv") == 1
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert _run(clone, "test")[0] == 0
    assert _asked(clone, "-m pip install") == 2
    assert _asked(clone, "-m venv") == 1


def test_the_environment_of_bench_serves_the_tests_too(clone: Path) -> None:
    assert _run(clone, "bench")[0] == 0
    assert _run(clone, "test")[0] == 0
    assert _asked(clone, ".[dev,bench]") == 1
    assert _asked(clone, "-m pip install") == 1


def test_exit_status_and_arguments_of_pytest_pass_through_and_the_time_is_told(clone: Path) -> None:
    (clone / "pytest-status").write_text("5")
    status, output = _run(clone, "test", "-k", "some thing")
    assert status == 5
    assert "tests took" in output
    assert _asked(clone, "-m pytest -ra -k some thing") == 1


def test_missing_system_packages_are_named_and_the_run_goes_on(clone: Path) -> None:
    status, output = _run(clone, "test")
    assert status == 0
    assert "on Debian: apt install" in output
    assert "openssl" in output


def test_check_runs_every_step_and_fails_if_one_did(clone: Path) -> None:
    assert _run(clone, "check")[0] == 0
    (clone / "unformatted").touch()
    status, output = _run(clone, "check")
    assert (status, "some checks failed" in output) == (1, True)
    assert _asked(clone, "-m pytest -q tests/test_imports.py") == 2


def test_an_unknown_command_is_refused_and_help_names_all(clone: Path) -> None:
    names = ("demo", "test", "check", "bench", "soak", "compile")
    assert _run(clone, "tset") == (2, f"run: unknown command 'tset'; there are: {', '.join(names)}\n")
    status, output = _run(clone)
    assert status == 0
    assert all(f"./run {command}" in output for command in names)


def test_the_python_asked_for_is_used(clone: Path) -> None:
    (clone / "bin" / "python3").rename(clone / "mine")
    done = subprocess.run(
        [clone / "run", "test"],
        env={"PATH": str(clone / "bin"), "WAKEFRONT_PYTHON": str(clone / "mine")},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _asked(clone, "-m venv") == 1

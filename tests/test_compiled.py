"""Which of the two forms of the hot modules is imported: what the sources say, always."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import compiled

ROOT = Path(__file__).resolve().parents[1]
SHOW = "import proxy.compiled as c, proxy.wire.http1 as m; print(m.__file__); print(c.is_in_use, c.describe())"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The package alone, without a compiled set."""
    shutil.copytree(ROOT / "proxy", tmp_path / "proxy", ignore=shutil.ignore_patterns("_compiled", "__pycache__"))
    return tmp_path


def run(tree: Path, code: str = SHOW, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, compiled.PURE: "", "PYTHONPATH": str(tree), **environment},
        cwd=tree, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return done.stdout


def put_set(tree: Path) -> Path:
    """A set for the sources of `tree`, without modules: they are then looked for as sources."""
    place = Path(run(tree, "import proxy.compiled as c; print(c.folder())").strip())
    place.mkdir(parents=True)
    return place


def test_every_module_named_exists() -> None:
    for module in compiled.MODULES:
        assert compiled.source(module).is_file(), module


def test_without_a_set_plain_python_runs_and_says_how_to_make_one(tree: Path) -> None:
    file, said = run(tree).splitlines()
    assert file == str(tree / "proxy/wire/http1.py")
    assert said == "False plain Python; `wakefront compile` makes it cheaper"


@pytest.mark.parametrize("changed", ["edge/flow.py", "model.py"], ids=["compiled", "known to what is compiled"])
def test_the_set_of_the_present_sources_is_used_until_a_source_changes(tree: Path, changed: str) -> None:
    put_set(tree)
    look = "import proxy.compiled as c; print(c.is_in_use, c.describe())"
    assert run(tree, look).startswith("True ")
    assert run(tree, look, WAKEFRONT_PURE="1") == "False plain Python, as WAKEFRONT_PURE asks\n"
    with (tree / "proxy" / changed).open("a") as file:
        file.write("# a word more\n")
    assert run(tree, look) == "False plain Python: the sources, or Python, have changed since `wakefront compile`\n"


def test_another_python_does_not_take_the_set(tree: Path) -> None:
    put_set(tree)
    other = "import importlib.machinery as m; m.EXTENSION_SUFFIXES[:] = ['.cpython-399-arch.so']; "
    assert run(tree, other + "import proxy.compiled as c; print(c.is_in_use)") == "False\n"


def test_a_set_that_is_removed_while_a_process_uses_it_gives_way_to_the_sources(tree: Path) -> None:
    place = put_set(tree)
    (place / f"proxy.wire.http1{compiled.SUFFIX}").write_bytes(b"")
    gone = (
        "import proxy, shutil; shutil.rmtree(proxy.compiled.folder()); import proxy.wire.http1 as m; print(m.__file__)"
    )
    assert run(tree, gone).strip() == str(tree / "proxy/wire/http1.py")


def test_what_is_missing_for_compiling_is_named_and_nothing_is_left_behind(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "compile"],
        env={**os.environ, "CC": "no-such-compiler -O2", "PYTHONPATH": str(tree)},
        cwd=tree, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "a C compiler (no-such-compiler; on Debian: apt install gcc)" in done.stderr
    assert not (tree / "proxy/_compiled").exists()


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(tree: Path) -> None:
    compiler = tree / "broken-cc"
    compiler.write_text("#!/bin/sh\necho broken for a reason >&2\nexit 3\n")
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "compile"],
        env={**os.environ, "CC": str(compiler), "PYTHONPATH": str(tree)},
        cwd=tree, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "broken for a reason" in done.stderr and "plain Python goes on being used" in done.stderr
    assert list((tree / "proxy/_compiled").iterdir()) == []


def test_this_run_uses_the_modules_that_it_says() -> None:
    from proxy.wire import http1

    assert (http1.__file__ or "").endswith(".so") is compiled.is_in_use

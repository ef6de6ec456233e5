"""Coverage-guided fuzzing of one target by atheris. See tests/fuzz/__init__.py."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["WAKEFRONT_PURE"] = "1"  # compiled modules tell nothing of their coverage

import atheris

with atheris.instrument_imports(include=["proxy.wire", "proxy.decide"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.corpus import FOLDER

KEPT_BYTES = 600  # larger inputs are found again soon, and are no pleasure to read
KEPT_FILES = 150


def fuzz(target: str, arguments: list[str]) -> None:
    """Does not return. Ends with 0, or with another status after the failing input was printed."""
    check = TARGETS[target]

    def run(data: bytes) -> None:
        try:
            check(data)
        except BaseException:
            print(f"\nfailing input of {target}: {data!r}", flush=True)
            raise

    folders = [one for one in arguments if not one.startswith("-")]
    if not folders:
        folders = [tempfile.mkdtemp(prefix="wakefront-fuzz-"), str(FOLDER / target)]
    options = [one for one in arguments if one.startswith("-")]
    with tempfile.TemporaryDirectory(prefix="wakefront-fuzz-") as artifacts:
        atheris.Setup(["fuzz", f"-artifact_prefix={artifacts}/", "-max_len=4096", *options, *folders], run)
        atheris.Fuzz()


def grow(target: str, seconds: str) -> None:
    """Search, then keep what adds coverage, the smallest inputs first."""
    with tempfile.TemporaryDirectory(prefix="wakefront-grow-") as scratch:
        found, merged = Path(scratch, "found"), Path(scratch, "merged")
        found.mkdir()
        merged.mkdir()
        command = [sys.executable, "-m", "tests.fuzz", target]
        subprocess.run([*command, f"-max_total_time={seconds}", str(found), str(FOLDER / target)], check=True)
        small = sorted((path for path in found.iterdir() if path.stat().st_size <= KEPT_BYTES), key=_size)
        for path in [path for path in found.iterdir() if path not in small]:
            path.unlink()
        subprocess.run([*command, "-merge=1", str(merged), str(FOLDER / target), str(found)], check=True)
        for number, path in enumerate(sorted(merged.iterdir(), key=_size)[:KEPT_FILES]):
            (FOLDER / target / f"found-{number:03}").write_bytes(path.read_bytes())


def _size(path: Path) -> tuple[int, bytes]:
    return path.stat().st_size, path.read_bytes()


if sys.argv[1] == "grow":
    grow(sys.argv[2], sys.argv[3])
else:
    fuzz(sys.argv[1], sys.argv[2:])

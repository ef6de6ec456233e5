"""Coverage-guided fuzzing of one target by atheris. See tests/fuzz/__init__.py."""

from __future__ import annotations

import hashlib
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
KEPT_FILES = 80  # of a target


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
    """Search, then keep the smallest of what added coverage."""
    with tempfile.TemporaryDirectory(prefix="wakefront-grow-") as scratch:
        command = [sys.executable, "-m", "tests.fuzz", target, f"-max_total_time={seconds}", "-reduce_inputs=1"]
        subprocess.run([*command, scratch, str(FOLDER / target)], check=True)
        kept = {path.read_bytes() for path in (FOLDER / target).iterdir()}
        found = sorted((path.read_bytes() for path in Path(scratch).iterdir()), key=len)
        new = [data for data in found if len(data) <= KEPT_BYTES and data not in kept]
        for data in new[: KEPT_FILES - len(kept)]:
            (FOLDER / target / f"found-{hashlib.sha1(data).hexdigest()[:12]}").write_bytes(data)


if sys.argv[1] == "grow":
    grow(sys.argv[2], sys.argv[3])
else:
    fuzz(sys.argv[1], sys.argv[2:])

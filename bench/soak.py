"""The longer runs: every attack with more cases, change under load, then random load while machines come and go.

`./run soak [--minutes N] [--only attacks|change|load]`. Two thirds of the time are for tests/attacks in whole rounds,
one at least, with new seeds each. Then come reloads, upgrades and killed workers (test_change_under_load.py, two
minutes); the rest is for test_soak.py. The attack table is of all rounds: cases and times added up, the highest of all
memory and latency figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.processes import ROOT
from bench.report import facts, facts_text, result_folder
from tests.support.attack_table import Ledger

MOST_CASES = 100.0  # times as many cases as ./run test, however long the run is
ROUND_MORE_S = 900  # a test may take so much longer than the time asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30.0, help="how long it all takes, about (30)")
    parser.add_argument("--only", choices=("attacks", "change", "load"), help="a part of it")
    parser.add_argument("--quick", action="store_true", help="results go to a folder that git ignores")


def run(arguments: argparse.Namespace) -> int:
    seconds = arguments.minutes * 60
    known = facts(["./run", "soak", *arguments.given])  # before there are results, which are no commit's yet
    folder = result_folder("attacks", arguments.quick)
    ledger, told, failed = Ledger(), list[str](), False
    with tempfile.TemporaryDirectory(prefix="wakefront-soak-") as scratch:
        if arguments.only in (None, "attacks"):
            share = seconds if arguments.only else seconds * 2 / 3
            for number, status in enumerate(_rounds(share, Path(scratch), ledger), 1):
                told.append(f"round {number} of the attacks: {'all held' if status == 0 else f'status {status}'}")
                failed = failed or status != 0
                _write(folder, known, ledger, told)
        if arguments.only in (None, "change"):
            status, lines = _change()
            told += lines
            told.append("reloads, upgrades and killed workers: " + ("nothing unexplained" if status == 0 else "FAILED"))
            failed = failed or status != 0
            _write(folder, known, ledger, told)
        if arguments.only in (None, "load"):
            share = seconds if arguments.only else seconds / 3
            status, lines = _load(share)
            told += lines
            told.append("load while machines come and go: " + ("nothing unexplained" if status == 0 else "FAILED"))
            failed = failed or status != 0
    _write(folder, known, ledger, told)
    print("\n".join(ledger.lines()))
    print("\n".join(told), f"results: {folder}", sep="\n")
    return 1 if failed else 0


def _rounds(seconds: float, scratch: Path, ledger: Ledger) -> Iterator[int]:
    """Runs of tests/attacks while there is time for one more; each one's status, its rows being in the ledger."""
    begun = time.monotonic()
    number = 0
    while not number or (time.monotonic() - begun) * (number + 1) / number < seconds:
        number += 1
        rows = scratch / f"round-{number}.json"
        status, _ = _pytest("tests/attacks", seconds, {"WAKEFRONT_ATTACK_TABLE": str(rows)})
        if rows.exists():
            ledger.add_json(rows.read_text())
        yield status


def _change() -> tuple[int, list[str]]:
    """Status of test_change_under_load in its long form, and its ledger."""
    status, output = _pytest("tests/system/test_change_under_load.py", 120.0, {})
    words = ("reload x", "upgrade x", "kill x")
    wrk = [line.strip() for line in output.splitlines() if " requests in " in line or line.startswith("Socket errors")]
    ledger = [line.strip(" .\n") for line in output.splitlines() if line.strip(" .").startswith(words)]
    return status, [*ledger, *(f"wrk through reloads and upgrades: {line}" for line in wrk)]


def _load(seconds: float) -> tuple[int, list[str]]:
    """Status of test_soak, and what it printed of its requests."""
    status, output = _pytest("tests/system/test_soak.py", seconds, {})
    words = ("seed ", "sent ", "deeds ")
    return status, [line.strip() for line in output.splitlines() if line.strip(" .").startswith(words)]


def _pytest(what: str, seconds: float, more: dict[str, str]) -> tuple[int, str]:
    """Run tests, shown as they go; status and output. How many cases and how long is in their environment."""
    factor = min(MOST_CASES, max(1.0, seconds / 60))
    environment = {"WAKEFRONT_CASES": f"{factor:g}", "WAKEFRONT_SOAK": f"{seconds:g}", **more}
    command = [sys.executable, "-m", "pytest", "-q", "-s", f"--timeout={seconds + ROUND_MORE_S:.0f}", what]
    print("soak:", *(f"{name}={value}" for name, value in environment.items()), *command[1:], flush=True)
    kept = []
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            kept.append(line)
            print(line, end="", flush=True)
    return tests.returncode, "".join(kept)


def _write(folder: Path, known: dict[str, Any], ledger: Ledger, told: list[str]) -> None:
    """The table so far. Any: as in bench.report.facts."""
    text = [f"# Attacks\n\n{facts_text(known)}", "\n".join(ledger.lines()), "", *(f"- {line}" for line in told), ""]
    (folder / "attacks.md").write_text("\n".join(text))
    (folder / "attacks.json").write_text(ledger.json())

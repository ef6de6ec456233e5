"""The table of docs/conformance.md with the result of each row: `python -m tests.conformance [--json]`.

Runs the tests that the table names with pytest, once each, and nothing else. A row has failed if one of its tests did,
or was not run to its end; a row that names no test is not applicable. Ends with 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "conformance.md"

_ROW = re.compile(r"^\| ([A-Z]{2}[-.\d]*\.\d+) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
_TEST = re.compile(r"`([\w/]+\.py::test_\w+)`")


@dataclass(slots=True)
class Row:
    id: str
    statement: str
    here: str
    tests: list[str]  # `file::name`, the file from tests/
    result: str = ""
    failed: list[str] = field(default_factory=list)


def read_rows(page: str) -> list[Row]:
    return [Row(name, statement, here, _TEST.findall(tests)) for name, statement, here, tests in _ROW.findall(page)]


class _Outcomes:
    """What became of each test; one with parameters is as good as its worst."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = str(report.nodeid).split("[")[0].removeprefix("tests/")
        if report.failed or report.skipped:
            self.failed.add(name)
        elif report.when == "call":
            self.passed.add(name)

    def of(self, name: str) -> bool:
        return name in self.passed and name not in self.failed


def run(rows: list[Row]) -> None:
    """Note in each row what its tests came to."""
    names = list(dict.fromkeys(test for row in rows for test in row.tests))
    outcomes = _Outcomes()
    os.chdir(ROOT)
    arguments = ["-q", "--no-header", "--tb=short", *(f"tests/{name}" for name in names)]
    status = pytest.main(arguments, plugins=[outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {status!r}")
    for row in rows:
        row.failed = [name for name in row.tests if not outcomes.of(name)]
        row.result = "failed" if row.failed else "passed" if row.tests else "not applicable"


def _printed(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        lines.append(f"{row.id:10} {row.result:15} {row.statement}")
        lines += (f"{'':27}failed: {name}" if name in row.failed else f"{'':27}{name}" for name in row.tests)
        if not row.tests:
            lines.append(f"{'':27}{row.here}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--json", action="store_true", help="rows and totals as JSON; what pytest says goes to stderr")
    as_json = parser.parse_args().json
    rows = read_rows(PAGE.read_text())
    stdout = os.dup(1)
    if as_json:
        os.dup2(2, 1)
    run(rows)
    sys.stdout.flush()
    os.dup2(stdout, 1)
    totals = Counter(row.result for row in rows)
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "totals": totals}, indent=1))
    else:
        print(_printed(rows))
        print(
            ", ".join(f"{totals[one]} {one}" for one in ("passed", "failed", "not applicable")), f"of {len(rows)} rows"
        )
    return 1 if totals["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""docs/: the tests that the pages name are there, so that a row without its proof is noticed."""

from __future__ import annotations

import re
from pathlib import Path

from tests import conformance
from tests.attacks.test_testssl import EXPLAINED

ROOT = Path(__file__).parent.parent
THREATS = ROOT / "docs" / "threat-model.md"
PAGES = [ROOT / "docs" / "compatibility.md", *sorted((ROOT / "docs" / "decisions").glob("*.md")), THREATS]


def test_every_test_that_a_page_names_exists() -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    there = set(re.findall(r"def (test_\w+)\(", sources))
    for page in PAGES:
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert named, f"{page.name} names no test"
        assert named <= there, f"{page.name}: {sorted(named - there)}"


def test_rows_of_the_compatibility_table_have_ids_of_their_own() -> None:
    ids = re.findall(r"^\| ([A-Z]{2}-\d+) \|", PAGES[0].read_text(), re.MULTILINE)
    assert len(ids) > 50 and len(set(ids)) == len(ids)


def test_every_test_of_the_conformance_table_exists_where_it_says() -> None:
    page = conformance.PAGE.read_text()
    rows = conformance.read_rows(page)
    lines = [line for line in page.splitlines() if re.match(r"\| [A-Z]{2}[-.\d]", line)]
    assert len(rows) == len(lines) == len({row.id for row in rows}) > 100
    for row in rows:
        for name in row.tests:
            path, _, test = name.partition("::")
            assert re.search(rf"def {test}\(", (ROOT / "tests" / path).read_text()), name
        assert row.tests or re.search("not applicable|comes with several regions", row.here), row.id
        assert set(re.findall(r"\b[A-Z]{2}-\d+\b(?!\.)", row.here)) <= _ids(), row.id


def test_the_attack_table_has_every_row_that_is_attacked_and_files_that_are_there() -> None:
    page = THREATS.read_text()
    rows = set(re.findall(r"^\| (A\d+|TLS|limits) \|", page, re.MULTILINE))
    sources = [
        path.read_text() for path in (ROOT / "tests" / "attacks").glob("test_*.py") if "harness" not in path.name
    ]
    attacked = {row for source in sources for row in re.findall(r'attack\(\s*"(\w+)"', source)}
    assert len(attacked) > 5 and attacked <= rows, attacked - rows
    for name in re.findall(r"`((?:attacks|system|edge|decide|wire|control)/test_\w+\.py)`", page):
        assert (ROOT / "tests" / name).exists(), name


def test_every_promise_of_the_threat_model_names_its_tests() -> None:
    promised = THREATS.read_text().partition("## What is promised")[2].partition("## What is not promised")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ") and "| promise |" not in line]
    assert len(rows) > 15 and all(re.search(r"`test_\w+`", row) for row in rows)


def test_every_finding_of_testssl_that_is_let_pass_is_explained() -> None:
    told = THREATS.read_text().partition("## What testssl.sh says")[2].partition("\n## ")[0]
    assert all(f"`{one}`" in told for one in EXPLAINED)


def _ids() -> set[str]:
    return set(re.findall(r"^\| ([A-Z]{2}-\d+) \|", PAGES[0].read_text(), re.MULTILINE))

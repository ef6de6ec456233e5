"""The node that is attacked, the fixture that opens an attack, and the table at the end of the run."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from tests.support.attack_table import Ledger
from tests.support.attacks import Attack, AttackedNode
from tests.support.edge import EdgeHarness

_ledger = pytest.StashKey[Ledger]()


class Begin(Protocol):
    """What the fixture `attack` is."""

    def __call__(self, row: str, name: str, node: AttackedNode | None = None, **marks: Any) -> Attack: ...


@pytest.fixture(scope="session")
def session_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedNode]:
    with AttackedNode(tmp_path_factory.mktemp("attacked")) as one:
        yield one


@pytest.fixture
def node(session_node: AttackedNode) -> AttackedNode:
    session_node.origin.reset()
    return session_node


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[EdgeHarness]:
    async with EdgeHarness() as harness:
        yield harness


@pytest.fixture
def attack(pytestconfig: pytest.Config) -> Begin:
    ledger = pytestconfig.stash.setdefault(_ledger, Ledger())

    def begin(row: str, name: str, node: AttackedNode | None = None, **marks: Any) -> Attack:
        return Attack(ledger, row, name, node, **marks)

    return begin


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ledger = config.stash.get(_ledger, None)
    if ledger is None or not ledger.rows:
        return
    terminalreporter.section("attacks")
    for line in ledger.lines():
        terminalreporter.write_line(line)
    if path := os.environ.get("WAKEFRONT_ATTACK_TABLE"):
        Path(path).write_text(ledger.json())
        terminalreporter.write_line(f"rows are in {path}")

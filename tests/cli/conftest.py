"""What CLI tests share: a scripted admin API with two apps, and the command line run in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.main import main
from tests.cli.scripted_admin import ScriptedAdmin, machine, serving, write_config


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WAKEFRONT_CONFIG", raising=False)
    monkeypatch.delenv("WAKEFRONT_TOKEN", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        out, err = capfd.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return run


@pytest.fixture
def admin() -> ScriptedAdmin:
    admin = ScriptedAdmin()
    admin.apps = {
        "hello": [machine("148e1234567890", "started")],
        "echo": [machine("24abcd34567890"), machine("24abff34567890", "started")],
    }
    return admin


@pytest.fixture
def loop_of_admin(admin: ScriptedAdmin, tmp_path: Path) -> Iterator[asyncio.AbstractEventLoop]:
    """The scripted node runs, and ./config.toml names it."""
    with serving(admin) as loop:
        write_config(tmp_path, admin.port)
        yield loop


@pytest.fixture
def node(loop_of_admin: asyncio.AbstractEventLoop, admin: ScriptedAdmin) -> ScriptedAdmin:
    return admin

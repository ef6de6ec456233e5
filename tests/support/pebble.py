"""A real ACME CA for tests: the one of the demo. Tests that need it are left out where it is not installed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import pebble as of_demo
from proxy.cli.pebble import Pebble, is_installed

__all__ = ["Pebble", "is_installed", "pebble"]


def pebble(folder: Path, http_port: int, tls_port: int, **more: Any) -> AbstractContextManager[Pebble]:
    """As proxy.cli.pebble has it."""
    if not is_installed():
        pytest.skip("Pebble is not installed: apt install pebble")
    return of_demo.pebble(folder, http_port, tls_port, **more)

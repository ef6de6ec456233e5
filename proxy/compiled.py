"""The hot modules as C, where `wakefront compile` has made it: which they are, and where the import finds them.

A compiled set lies in a folder whose name is the digest of the sources it was made from: of those compiled, and of all
whose types they may know. A source that has changed since has no set, and everything runs as plain Python until it is
compiled again: what runs is always what the sources say. WAKEFRONT_PURE=1 has the plain modules run anyway. Whether
compiled or not, tests and behaviour are the same.

Every process runs this first, the supervisor too: the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from pathlib import Path
from types import ModuleType

PURE = "WAKEFRONT_PURE"

# What a request passes through. All are compiled as one: calls and attributes from one to the other are C's.
MODULES = (
    "proxy.decide.headers",
    "proxy.decide.ulid",
    "proxy.edge.access_log",
    "proxy.edge.backhaul",
    "proxy.edge.certificates",
    "proxy.edge.choice",
    "proxy.edge.context",
    "proxy.edge.downstream",
    "proxy.edge.exchange",
    "proxy.edge.flow",
    "proxy.edge.listener",
    "proxy.edge.peer_tls",
    "proxy.edge.sites",
    "proxy.edge.sources",
    "proxy.edge.table",
    "proxy.edge.timers",
    "proxy.edge.tls",
    "proxy.edge.turnstile",
    "proxy.edge.upstream",
    "proxy.state",
    "proxy.wire.client_hello",
    "proxy.wire.http1",
)

_KNOWN = (".", "decide", "edge", "wire")  # folders of all that these modules may import (tests/test_imports.py)
_ROOT = Path(__file__).resolve().parent.parent
SETS = _ROOT / "proxy" / "_compiled"
SUFFIX = ".so"


def source(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")).with_suffix(".py")


def folder() -> Path:
    """Where the set of the present sources is, for this Python, once it has been made.

    Raises OSError where there are no sources.
    """
    digest = hashlib.sha256(f"{EXTENSION_SUFFIXES[0]} {MODULES}".encode())
    for place in _KNOWN:
        for path in sorted((_ROOT / "proxy" / place).glob("*.py")):
            digest.update(f"{place}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return SETS / digest.hexdigest()[:24]


class _Finder:
    """Answers imports of the modules of one set, before Python looks for their sources."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(name)
        if file is None or not os.path.exists(file):
            return None
        return importlib.util.spec_from_file_location(name, file)


_state = "not looked for"
is_in_use = False


def install() -> None:
    """Have the compiled set imported, if there is one for the present sources."""
    global _state, is_in_use
    if os.environ.get(PURE, "") not in ("", "0"):
        _state = f"plain Python, as {PURE} asks"
        return
    try:
        place = folder()
        names = [name for name in os.listdir(place) if name.endswith(SUFFIX)]
    except OSError:
        _state = "plain Python; `wakefront compile` makes it cheaper"
        if SETS.is_dir():
            _state = "plain Python: the sources, or Python, have changed since `wakefront compile`"
        return
    sys.meta_path.insert(0, _Finder({name.removesuffix(SUFFIX): str(place / name) for name in names}))
    _state = f"{len(MODULES)} modules compiled"
    is_in_use = True


def describe() -> str:
    """What the hot path of this process is, in words."""
    return _state

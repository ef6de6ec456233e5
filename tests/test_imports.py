"""The import rule: who may import whom, read from the import statements of every module, none of which is run.

    foundations  <  wire, decide, config  <  state, ipc, clock, metrics  <  edge, machines  <  control  <  the processes

Each may import what stands to its left, and in its own column what is not forbidden below. Imports inside functions
and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Names are those right below proxy/: a module or a folder.
COLUMNS: tuple[frozenset[str], ...] = (
    frozenset({"model", "errors", "process", "tickets", "compiled"}),
    frozenset({"wire", "decide", "config"}),
    frozenset(
        {
            "state",
            "ipc",
            "clock",
            "metrics",
            "namespace",
            "descriptors",
            "binding",
            "orphans",
            "children",
            "rundir",
            "succession",
            "turnover",
            "upgrade",
        }
    ),
    frozenset({"edge", "machines"}),
    frozenset({"control"}),
    frozenset({"worker", "server", "supervisor", "cli", "__main__"}),
)
COLUMN = {name: column for column, names in enumerate(COLUMNS) for name in names}

# Within a column.
NEIGHBOURS_FORBIDDEN = {
    "edge": {"machines"},
    "machines": {"edge"},
    "wire": {"decide", "config"},
    "decide": {"config"},  # it may name the events of wire, of which it decides
}
# Further to the left, yet forbidden.
FORBIDDEN = {"control": {"edge"}}

# What the supervisor runs must have no reason to fail or to wait: the standard library, no loop, no third party.
SUPERVISOR_PARTS = {"supervisor", "compiled", "process", "state", "tickets", "binding", "orphans", "children", "rundir",
    "succession", "turnover", "upgrade"}  # fmt: skip
LOOPS_AND_THREADS = {"asyncio", "threading", "concurrent", "multiprocessing", "subprocess", "sqlite3", "http"}

# Pure code takes time and chance as arguments and touches nothing outside.
PURE = ("wire", "decide")
IMPURE = {
    "asyncio", "socket", "ssl", "os", "time", "logging", "pathlib", "io", "select", "selectors", "secrets", "uuid",
    "subprocess", "threading", "tempfile", "shutil", "sqlite3", "urllib.request", "http", "uvloop", "aiohttp",
}  # fmt: skip

USES_CERTS = {
    "proxy.server", "proxy.worker", "proxy.control.domains", "proxy.control.domain_json", "proxy.control.presenter",
    "proxy.control.joining", "proxy.control.membership", "proxy.control.peers",
}  # fmt: skip


def _modules(folder: str) -> list[str]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(), str(_path(module)))


def _imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported; `from a import b` may mean the module a.b, so it gives `a.b`."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if _path(module).name == "__init__.py" else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _part(name: str) -> str | None:
    """What stands right below proxy/ in a dotted name; None if it is not ours, or proxy itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "proxy" and len(parts) > 1 else None


PROXY = _modules("proxy")


def test_every_module_has_its_column() -> None:
    assert {part for module in PROXY if (part := _part(module)) is not None} <= set(COLUMN)


@pytest.mark.parametrize("module", PROXY)
def test_module_imports_only_what_stands_to_its_left(module: str) -> None:
    mine = _part(module)
    for line, name in _imports(module):
        theirs = _part(name)
        where = f"{module}:{line} imports {name}"
        if theirs is None or theirs == mine:
            continue
        if mine is None:
            assert theirs == "compiled", f"{where}: proxy/__init__.py stays empty of other imports"
            continue
        assert theirs in COLUMN, f"{where}: there is no such part"
        assert COLUMN[theirs] <= COLUMN[mine], f"{where}: {theirs} stands to the right of {mine}"
        forbidden = NEIGHBOURS_FORBIDDEN.get(mine, set()) | FORBIDDEN.get(mine, set())
        assert theirs not in forbidden, f"{where}: {mine} may not know {theirs}"


@pytest.mark.parametrize("module", [module for module in PROXY if _part(module) in PURE])
def test_pure_code_touches_no_clock_chance_or_outside(module: str) -> None:
    for line, name in _imports(module):
        banned = {name, name.split(".")[0], name.rpartition(".")[0]} & IMPURE
        assert not banned, f"{module}:{line} imports {name}"
        assert not name.startswith("random.") or name == "random.Random", f"{module}:{line} imports {name}"
        assert name != "datetime.datetime", f"{module}:{line}: datetime reads the clock"
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{module}:{node.lineno}: random.{node.attr} draws from a shared source"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input"}, f"{module}:{node.lineno}: {node.func.id}()"


@pytest.mark.parametrize("part", sorted(SUPERVISOR_PARTS))
def test_the_supervisor_rests_on_the_standard_library_alone(part: str) -> None:
    module = f"proxy.{part}"
    for line, name in _imports(module):
        top = name.split(".")[0]
        if top == "proxy":
            assert _part(name) in SUPERVISOR_PARTS, f"{module}:{line} imports {name}"
            continue
        assert top in sys.stdlib_module_names, f"{module}:{line} imports {name}"
        allowed = {"threading"} if part == "state" else set()  # for the fence in Load.admit; no thread is started
        assert top not in LOOPS_AND_THREADS - allowed, f"{module}:{line} imports {name}"


@pytest.mark.parametrize("module", _modules("certs"))
def test_certs_knows_nothing_of_proxy(module: str) -> None:
    for line, name in _imports(module):
        assert name.split(".")[0] not in {"proxy", "demo", "tests"}, f"{module}:{line} imports {name}"


@pytest.mark.parametrize("module", PROXY)
def test_only_the_composition_roots_and_domains_use_certs(module: str) -> None:
    for line, name in _imports(module):
        assert name.split(".")[0] != "certs" or module in USES_CERTS, f"{module}:{line} imports {name}"


@pytest.mark.parametrize("module", [*PROXY, *_modules("certs")])
def test_product_code_imports_neither_tests_nor_bench(module: str) -> None:
    for line, name in _imports(module):
        assert name.split(".")[0] not in {"tests", "bench"}, f"{module}:{line} imports {name}"

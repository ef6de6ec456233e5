"""What commands print: JSON for programs, tables for people. rich is loaded only where a table is drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def say(text: str = "") -> None:
    """One line for the user, at once: a child may write to the same terminal next."""
    print(text, flush=True)


def print_json(value: Any) -> None:  # Any: whatever the node answered
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def print_error(message: str) -> None:
    print(f"wakefront: {message}", file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table as wide as the terminal; piped into another program it keeps its full width, for grep and awk."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        numbers = bool(rows) and all(_is_number(row[index]) for row in rows)
        drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_cell(value), style=_STYLES.get(str(value), "")) for value in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(drawn)


_STYLES = {
    "started": "green", "suspended": "cyan", "stopped": "dim", "created": "dim", "failed": "bold red",
    "starting": "yellow", "stopping": "yellow", "suspending": "yellow",
}  # fmt: skip


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | None) and not isinstance(value, bool)


@contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def age(seconds: float) -> str:
    """How long, in the two units that matter: 3 s, 12 min, 5 h, 9 d."""
    for limit, unit, size in ((60, "s", 1), (3600, "min", 60), (86_400, "h", 3600)):
        if seconds < limit:
            return f"{int(seconds / size)} {unit}"
    return f"{int(seconds / 86_400)} d"

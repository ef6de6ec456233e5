"""The attack table: a row for each attack, what it cost and whether it held, as Markdown and JSON, of several runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Figures:
    """One row of the table. Memory is of the workers together, the highest sample less that before the attack."""

    row: str
    name: str
    cases: int = 0
    seconds: float = 0.0
    growth_mib: float | None = None
    cpu_s: float | None = None
    quiet_p99_ms: float | None = None
    bystander_p99_ms: float | None = None
    fresh_p99_ms: float | None = None
    direct_p99_ms: float | None = None
    waited_ms: float | None = None
    bystander_answers: int = 0
    outcome: str = "held"
    notes: list[str] = field(default_factory=list)


class Ledger:
    """All rows of a run. Attacks of the same row and name become one."""

    def __init__(self) -> None:
        self.rows: list[Figures] = []

    def add(self, figures: Figures) -> None:
        for one in self.rows:
            if (one.row, one.name) == (figures.row, figures.name):
                _join(one, figures)
                return
        self.rows.append(figures)

    def add_json(self, text: str) -> None:
        """The rows of another run, as `json` has written them."""
        for one in json.loads(text):
            self.add(Figures(**one))

    def ordered(self) -> list[Figures]:
        return sorted(self.rows, key=lambda one: (int("0" + "".join(filter(str.isdigit, one.row))), one.name))

    def json(self) -> str:
        return json.dumps([dataclasses.asdict(one) for one in self.ordered()], indent=1) + "\n"

    def lines(self) -> list[str]:
        """A Markdown table."""
        head = "| row | attack | cases | s | grew, MiB | CPU, s | others' p99, ms | new's | past it | host | held |"
        return [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|", *map(_line, self.ordered())]


def _join(into: Figures, more: Figures) -> None:
    into.cases += more.cases
    into.seconds += more.seconds
    into.bystander_answers += more.bystander_answers
    into.cpu_s = _or_none(lambda a, b: a + b, into.cpu_s, more.cpu_s)
    for name in ("growth_mib", "quiet_p99_ms", "bystander_p99_ms", "fresh_p99_ms", "direct_p99_ms", "waited_ms"):
        setattr(into, name, _or_none(max, getattr(into, name), getattr(more, name)))
    if into.outcome == "held":
        into.outcome = more.outcome
    into.notes += [one for one in more.notes if one not in into.notes]


def _or_none(join: Callable[[float, float], float], one: float | None, two: float | None) -> float | None:
    if one is None or two is None:
        return two if one is None else one
    return join(one, two)


def _line(one: Figures) -> str:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    p99 = number(one.bystander_p99_ms, 1)
    if one.quiet_p99_ms is not None:
        p99 = f"{one.quiet_p99_ms:.1f} → {p99}"
    notes = f"{one.outcome}; {'; '.join(one.notes)}" if one.notes else one.outcome
    cells = (one.row, one.name, f"{one.cases:,}", number(one.seconds, 1), number(one.growth_mib, 1),
             number(one.cpu_s, 2), p99, number(one.fresh_p99_ms, 1), number(one.direct_p99_ms, 1),
             number(one.waited_ms, 0), notes.replace("|", "/"))  # fmt: skip
    return f"| {' | '.join(cells)} |"

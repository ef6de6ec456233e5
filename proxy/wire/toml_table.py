"""Reading a parsed TOML document by typed getters that collect every fault instead of stopping at the first.

`Table` is a cursor over one table: it knows its key path, converts and checks each value, and on anything wrong writes
a `Fault` and hands back the default, so that reading goes on. `locate_keys` finds the lines of key paths in the source
text and is only needed when there are faults. What keys there are and what they mean is left to fly_toml and config.
"""

from __future__ import annotations

import datetime
import difflib
import enum
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]


class Severity(enum.StrEnum):
    ERROR = "error"  # the file is refused
    WARNING = "warning"  # the file is taken; this part of it does something other than it seems to say


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong, said so that it can be mended: where, what was seen, what was expected."""

    path: KeyPath
    value: str  # as TOML would write it, shortened; "" where the key is missing
    expectation: str
    severity: Severity = Severity.ERROR
    did_you_mean: str | None = None
    file: str | None = None
    line: int | None = None
    source_line: str | None = None

    @property
    def key(self) -> str:
        return render_path(self.path)

    def __str__(self) -> str:
        where = "".join(f"{one}:" for one in (self.file, self.line) if one)
        where += " " if where else ""
        seen = f": {self.value}" if self.value else ""
        hint = f" (did you mean {self.did_you_mean!r}?)" if self.did_you_mean else ""
        what = f"{self.key}{seen}: " if self.path else ""
        return f"{where}{what}{self.expectation}{hint}"


def render_path(path: KeyPath) -> str:
    """`("services", 0, "ports", 1, "port")` as `services[0].ports[1].port`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _BARE_KEY.fullmatch(part) else _quoted(part)
            text += f".{name}" if text else name
    return text


def render_value(value: object) -> str:
    """A value as TOML would write it, cut to one short line; of tables and arrays only the kind."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "(a table)"
    if isinstance(value, list):
        if len(value) <= 8 and all(isinstance(one, str | int | float) for one in value):
            return _shorten("[" + ", ".join(render_value(one) for one in value) + "]")
        return "(an array)"
    if isinstance(value, str):
        return _shorten(_quoted(value))
    return _shorten(str(value))


def suggest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a misspelt one, or None when none is close."""
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.7)
    longer = [one for one in names if len(name) > 3 and one.startswith(name.lower())]
    return near[0] if near else longer[0] if longer else None


class Reader:
    """Where the cursors of one document leave their faults."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def error(self, path: KeyPath, value: object, expectation: str, did_you_mean: str | None = None) -> None:
        self.faults.append(Fault(path, _render_or_empty(value), expectation, Severity.ERROR, did_you_mean))

    def warn(self, path: KeyPath, value: object, expectation: str, did_you_mean: str | None = None) -> None:
        self.faults.append(Fault(path, _render_or_empty(value), expectation, Severity.WARNING, did_you_mean))


class Missing(enum.Enum):
    """The value of a key that is not there, in faults."""

    MISSING = 0


MISSING = Missing.MISSING


class Table:
    """A cursor over one table of the document."""

    def __init__(self, reader: Reader, values: Mapping[str, object], path: KeyPath = ()) -> None:
        self.reader = reader
        self.values = values
        self.path = path

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def raw(self, key: str) -> object:
        return self.values.get(key, MISSING)

    def at(self, key: str) -> KeyPath:
        return (*self.path, key)

    def error(self, key: str, expectation: str, did_you_mean: str | None = None) -> None:
        self.reader.error(self.at(key), self.raw(key), expectation, did_you_mean)

    def warn(self, key: str, expectation: str, did_you_mean: str | None = None) -> None:
        self.reader.warn(self.at(key), self.raw(key), expectation, did_you_mean)

    def text(self, key: str, *, choices: Sequence[str] = ()) -> str | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.error(key, "expected a string")
            return None
        if choices and value not in choices:
            self.error(key, f"expected {_either(choices)}", suggest(value, choices))
            return None
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        self.error(key, "expected true or false")
        return default

    def integer(self, key: str, low: int, high: int, *, numeric_string: bool = False) -> int | None:
        """An integer within bounds; with `numeric_string` also one in quotes, as old files have ports."""
        value = self.values.get(key)
        if value is None:
            return None
        if numeric_string and isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.error(key, f"expected an integer in {low}-{high}")
            return None
        if not low <= value <= high:
            self.error(key, f"not in {low}-{high}")
            return None
        return value

    def number(self, key: str, low: float, high: float) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.error(key, f"expected a number in {low:g}-{high:g}")
            return None
        return float(value)

    def duration_s(self, key: str, *, bare_unit_s: float | None, high_s: float = 366 * 86400.0) -> float | None:
        """A Go duration string, or a bare number where `bare_unit_s` says what it counts. "" is as if absent."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        seconds = parse_duration_s(value, bare_unit_s)
        if seconds is None:
            bare = "" if bare_unit_s is None else f", or a number of {'milliseconds' if bare_unit_s < 1 else 'seconds'}"
            self.error(key, f'expected a duration such as "1m30s" or "500ms"{bare}')
            return None
        if not 0 <= seconds <= high_s:
            self.error(key, f"expected a duration from 0 to {high_s:g} s")
            return None
        return seconds

    def size_bytes(self, key: str, *, bare_unit_bytes: int) -> int | None:
        """A size such as "512mb" or "20gb" (any case, b optional); a bare number counts `bare_unit_bytes`."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        size = parse_size_bytes(value, bare_unit_bytes)
        if size is None:
            self.error(key, 'expected a size such as "512mb" or "20gb"')
        return size

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of strings; a lone string counts as one."""
        value = self.values.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        self.error(key, "expected an array of strings")
        return ()

    def scalars(self) -> Iterator[tuple[str, str]]:
        """Each key with its value as text: strings, numbers, booleans and times; anything else is a fault."""
        for key, value in self.values.items():
            text = scalar_text(value)
            if text is None:
                self.reader.error(self.at(key), value, "expected a string, number or boolean")
            else:
                yield key, text

    def table(self, key: str) -> Table | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.error(key, f"expected a table [{render_path(self.at(key))}]")
            return None
        return Table(self.reader, value, self.at(key))

    def tables(self, key: str) -> list[Table]:
        """An array of tables; one table counts as an array of one."""
        value = self.values.get(key)
        if value is None:
            return []
        if isinstance(value, Mapping):
            return [Table(self.reader, value, self.at(key))]
        if isinstance(value, list):
            found = []
            for index, one in enumerate(value):
                if isinstance(one, Mapping):
                    found.append(Table(self.reader, one, (*self.at(key), index)))
                else:
                    self.reader.error((*self.at(key), index), one, "expected a table")
            return found
        self.error(key, "expected a table or an array of tables")
        return []

    def entries(self, key: str) -> list[tuple[str, Table]]:
        """The named tables below a table, as in `[checks.NAME]`."""
        below = self.table(key)
        if below is None:
            return []
        named = ((name, below.table(name)) for name in below.values)
        return [(name, table) for name, table in named if table is not None]


def scalar_text(value: object) -> str | None:
    """A scalar as text, booleans as `true` and `false`; None for tables and arrays."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return None


def parse_duration_s(value: object, bare_unit_s: float | None = None) -> float | None:
    """Seconds of a Go duration ("1h2m3.5s"; time.ParseDuration), or of a bare number in `bare_unit_s`."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        if bare_unit_s is None:
            return 0.0 if value == 0 else None
        if not math.isfinite(value) or abs(value) > 1e15:
            return None
        return value * bare_unit_s
    if not isinstance(value, str) or len(value) > 64:
        return None
    text = value.strip()
    if bare_unit_s is not None and re.fullmatch(r"[0-9]{1,15}", text):
        return int(text) * bare_unit_s
    if text == "0":
        return 0.0
    if not _DURATION.fullmatch(text):
        return None
    seconds = sum(float(number) * _DURATION_UNIT_S[unit] for number, unit in _DURATION_PART.findall(text))
    return -seconds if text.startswith("-") else seconds


def parse_size_bytes(value: object, bare_unit_bytes: int) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value * bare_unit_bytes if value >= 0 else None
    if isinstance(value, float):
        return int(value * bare_unit_bytes) if math.isfinite(value) and value >= 0 else None
    if not isinstance(value, str):
        return None
    found = _SIZE.fullmatch(value.strip().lower())
    if found is None:
        return None
    number, unit = found.groups()
    return int(float(number) * (_SIZE_UNIT_BYTES[unit] if unit else bare_unit_bytes))


def locate_keys(text: str) -> dict[KeyPath, int]:
    """The line (from 1) on which each key and table of a valid TOML text begins.

    Keys inside inline tables and arrays are not listed: take the nearest key above, as `line_of` does.
    """
    lines: dict[KeyPath, int] = {}
    arrays: dict[KeyPath, int] = {}
    here: KeyPath = ()
    at, line = 0, 1
    while at < len(text):
        end = _end_of_statement(text, at)
        statement = text[at:end].strip()
        if statement.startswith("[["):
            name = (*_resolve(_dotted(statement[2:]), arrays, whole=False),)
            arrays[name] = arrays.get(name, 0) + 1
            here = (*name, arrays[name] - 1)
            lines.setdefault(name, line)
            lines.setdefault(here, line)
        elif statement.startswith("["):
            here = _resolve(_dotted(statement[1:]), arrays, whole=True)
            _note(lines, here, line)
        elif statement and not statement.startswith("#"):
            _note(lines, here + tuple(_dotted(statement)), line)
        line += text.count("\n", at, end)
        at = max(end, at + 1)
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int | None:
    """The line of a key path, or of the nearest key that holds it."""
    for length in range(len(path), 0, -1):
        if (line := lines.get(path[:length])) is not None:
            return line
    return None


_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_DURATION_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h))+")
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*(b|k|m|g|t|kb|mb|gb|tb|kib|mib|gib|tib)?")
_SIZE_UNIT_BYTES = {"b": 1} | {
    f"{letter}{rest}": 1024**power for power, letter in enumerate("kmgt", 1) for rest in ("", "b", "ib")
}
_HEADER = re.compile(r"[ \t]*\[")
_KEY_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*(\.?)""")


def _render_or_empty(value: object) -> str:
    return "" if value is MISSING else render_value(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in escaped) + '"'


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _either(choices: Sequence[str]) -> str:
    quoted = [f'"{one}"' for one in choices]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]


def _dotted(text: str) -> list[str]:
    """The parts of the dotted key at the start of `text`."""
    parts = []
    at = 0
    while found := _KEY_PART.match(text, at):
        parts.append(next(one for one in found.groups()[:3] if one is not None))
        at = found.end()
        if not found.group(4):
            break
    return parts


def _resolve(parts: list[str], arrays: Mapping[KeyPath, int], whole: bool) -> KeyPath:
    """A header's key path, with the index of the latest element after each array of tables it goes through."""
    path: KeyPath = ()
    for number, part in enumerate(parts, 1):
        path = (*path, part)
        if path in arrays and (whole or number < len(parts)):
            path = (*path, arrays[path] - 1)
    return path


def _note(lines: dict[KeyPath, int], path: KeyPath, line: int) -> None:
    for length in range(1, len(path) + 1):
        lines.setdefault(path[:length], line)


def _end_of_statement(text: str, at: int) -> int:
    """Just past the newline that ends the statement begun at `at`: not one in a string, array or inline table."""
    depth = 0
    header = _HEADER.match(text, at) is not None
    while at < len(text):
        one = text[at]
        if one == "\n" and (depth == 0 or header):
            return at + 1
        if one == "#":
            newline = text.find("\n", at)
            at = len(text) if newline < 0 else newline
            continue
        if one in "\"'":
            at = _end_of_string(text, at)
            continue
        if one in "[{":
            depth += 1
        elif one in "]}":
            depth -= 1
        at += 1
    return at


def _end_of_string(text: str, at: int) -> int:
    quote = text[at]
    fence = quote * 3 if text.startswith(quote * 3, at) else quote
    at += len(fence)
    while at < len(text) and not text.startswith(fence, at):
        if fence == quote and text[at] == "\n":
            return at
        at += 2 if quote == '"' and text[at] == "\\" else 1
    at += len(fence)
    # up to two quotes may stand before the closing three
    while len(fence) == 3 and at < len(text) and text[at] == quote:
        at += 1
    return at

from __future__ import annotations

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.wire.toml_table import (
    KeyPath,
    Reader,
    Table,
    line_of,
    locate_keys,
    parse_duration_s,
    parse_size_bytes,
    render_path,
    render_value,
    suggest,
)  # fmt: skip

TEXT = '''\
# a comment with [brackets] and = signs
app = "a"

[deep.er]
"quoted.key" = 1
many = [
  "one", # ] a bracket in a comment
  """two
  lines = 3
  """,
]
after = 'x = [y'

[[services]]
port = 1
  [services.concurrency]
  soft = 1
  [[services.ports]]
  port = 2
  [[services.ports]]
  port = 3
  [services.ports.tls]
  on = true

[[services]]
inline = { a = 1, b = [
  2 ] }
dotted.below.it = 5
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("app",), 2),
        (("deep",), 4),
        (("deep", "er", "quoted.key"), 5),
        (("deep", "er", "many"), 6),
        (("deep", "er", "after"), 12),
        (("services", 0), 14),
        (("services", 0, "port"), 15),
        (("services", 0, "concurrency", "soft"), 17),
        (("services", 0, "ports", 0, "port"), 19),
        (("services", 0, "ports", 1, "port"), 21),
        (("services", 0, "ports", 1, "tls", "on"), 23),
        (("services", 1), 25),
        (("services", 1, "inline"), 26),
        (("services", 1, "dotted", "below", "it"), 28),
    ],
)
def test_each_key_is_found_on_its_line(path: KeyPath, line: int) -> None:
    tomli.loads(TEXT)
    assert locate_keys(TEXT)[path] == line


def test_a_key_that_is_not_there_has_the_line_of_what_would_hold_it() -> None:
    lines = locate_keys(TEXT)
    assert line_of(lines, ("services", 1, "inline", "a")) == 26
    assert line_of(lines, ("services", 0, "missing")) == 14
    assert line_of(lines, ("nowhere",)) is None


def test_lines_are_the_same_with_crlf() -> None:
    assert locate_keys(TEXT.replace("\n", "\r\n")) == locate_keys(TEXT)


_keys = st.text("abc-_ .=[]#\"'\\é", min_size=1, max_size=5)
_values = st.sampled_from(
    ["1", '"a # b"', "'[x]'", '"""\nx = 1\n[y]\n"""', "'''\n]\n'''", "[1,\n 2, # ]\n]", "{ a = 1 }", '"\\""']
)


def _basic(key: str) -> str:
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.lists(st.tuples(_keys, _values), max_size=8, unique_by=lambda pair: pair[0]))
@settings(max_examples=200, deadline=None)
def test_every_key_is_found_whatever_stands_before_it(pairs: list[tuple[str, str]]) -> None:
    text, expected = "[top]\n", {}
    for key, value in pairs:
        expected[key] = text.count("\n") + 1
        text += f"{_basic(key)} = {value}\n"
    tomli.loads(text)
    lines = locate_keys(text)
    for key, line in expected.items():
        if "\\" not in key and '"' not in key:  # escapes in keys are not undone: the section's line is given
            assert lines[("top", key)] == line


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_text_keeps_the_locator_from_ending(text: str) -> None:
    locate_keys(text)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1m21s", 81.0), ("500ms", 0.5), ("1.5h", 5400.0), (".5s", 0.5), ("0", 0.0), ("-1s", -1.0), ("2us", 2e-6),
        ("1h0m3s", 3603.0), ("1d", None), ("s", None), ("1", None), ("", None), ("1m 1s", None), (True, None),
        (3, None),
    ],
)  # fmt: skip
def test_durations_are_read_as_go_does(written: object, seconds: float | None) -> None:
    found = parse_duration_s(written)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_bare_number_counts_the_unit_of_its_key() -> None:
    assert parse_duration_s(1500, 1e-3) == 1.5
    assert parse_duration_s("15", 1.0) == 15.0
    assert parse_duration_s(float("nan"), 1.0) is None
    assert parse_duration_s(float("inf"), 1.0) is None


@pytest.mark.parametrize(
    ("written", "megabytes"),
    [
        ("8g", 8192),
        ("4G", 4096),
        ("1GB", 1024),
        ("15Mb", 15),
        ("512", 512),
        (200, 200),
        ("1.5gb", 1536),
        ("2 GiB", 2048),
    ],
)
def test_sizes_are_read_in_any_case_with_or_without_b(written: object, megabytes: int) -> None:
    assert parse_size_bytes(written, 1024**2) == megabytes * 1024**2


@pytest.mark.parametrize("written", ["unparseable", "", "-1gb", "1e3", -5, True, float("inf"), "1 1", None])
def test_what_is_no_size_is_none(written: object) -> None:
    assert parse_size_bytes(written, 1) is None


def test_paths_are_written_as_toml_would() -> None:
    assert render_path(("services", 0, "ports", 1, "port")) == "services[0].ports[1].port"
    assert render_path(("env", "a b")) == 'env."a b"'


def test_values_are_shortened_and_never_control_a_terminal() -> None:
    assert len(render_value("x" * 500)) <= 80
    assert render_value("\x1b[31m") == '"\\u001b[31m"'
    assert render_value({"a": 1}) == "(a table)"


def test_suggestions_are_close_names_or_longer_ones() -> None:
    assert suggest("nmae", ("name", "port")) == "name"
    assert suggest("http", ("http_service", "app")) == "http_service"
    assert suggest("entirely", ("name", "port")) is None


def test_reading_goes_on_after_a_fault() -> None:
    reader = Reader()
    table = Table(reader, {"a": "x", "b": True, "c": 70000, "d": [1], "e": 5})
    assert (table.integer("a", 1, 9), table.text("b"), table.integer("c", 1, 65535), table.texts("d")) == (
        None, None, None, (),
    )  # fmt: skip
    assert table.integer("e", 1, 9) == 5
    assert [fault.key for fault in reader.faults] == ["a", "b", "c", "d"]
    assert str(reader.faults[2]) == "c: 70000: not in 1-65535"

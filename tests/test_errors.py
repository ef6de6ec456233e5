"""errors.py: every code is unique and has the status that the documentation gives it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxy.errors import Code, ProxyError, Retry, Source, http_status

DOCUMENT = Path(__file__).parent.parent / "docs" / "compatibility.md"
ROW = re.compile(r"^\| `([A-Z]{2}\d\d)` \| (\d{3}|—) \|", re.MULTILINE)


@pytest.mark.parametrize("code", list(Code))
def test_every_code_has_a_status_of_an_error(code: Code) -> None:
    assert 400 <= http_status(code) <= 505


def test_codes_are_four_characters_and_ours_begin_with_w() -> None:
    assert all(re.fullmatch(r"(P[ACELMPRTU]|W[ABDEMOQRU])\d\d", code) for code in Code)


def test_the_documented_table_of_codes_is_the_one_in_force() -> None:
    """Codes of TLS and of connections are only recorded: the table shows a dash for them."""
    documented = dict(ROW.findall(DOCUMENT.read_text()))
    assert set(documented) == {code.value for code in Code}
    for code in Code:
        status = documented[code.value]
        assert (
            status == "—"
            if code.value.startswith("PT") or code in (Code.CLIENT_GONE, Code.TLS_OVERLOADED)
            else status == str(http_status(code))
        )


def test_an_error_names_its_code_and_keeps_its_facts() -> None:
    error = ProxyError(Code.WAKE_HELD, Source.MACHINE, Retry.NOTHING_SENT, "it crashed", retry_after_s=7)
    assert str(error) == "WM01 wake_held: it crashed" and str(ProxyError(Code.INTERNAL)) == "WE01 internal"
    assert (error.source, error.retry, error.retry_after_s) == (Source.MACHINE, Retry.NOTHING_SENT, 7)

"""Which requests are a browser's navigation, whose answer a person reads, and what an Accept-like list says."""

from __future__ import annotations


def wants_page(
    method: bytes, accept: bytes, fetch_mode: bytes = b"", fetch_dest: bytes = b"", requested_with: bytes = b""
) -> bool:
    """Whether a request is a browser's navigation: a person will read the answer, and a refresh asks again.

    Browsers say so in Sec-Fetch-Mode and -Dest on secure origins; elsewhere only Accept tells, which must name HTML:
    `*/*` alone is a program's.
    """
    if method != b"GET" or requested_with:
        return False
    if fetch_mode and fetch_mode != b"navigate":
        return False
    if fetch_dest and fetch_dest not in (b"document", b"iframe", b"frame"):
        return False
    return any(name in (b"text/html", b"application/xhtml+xml") and weight > 0 for name, weight in weighed(accept))


def weighed(value: bytes) -> list[tuple[bytes, float]]:
    """The members of an Accept-like list, in lower case, each with its weight (RFC 9110 §12.4.2)."""
    members: list[tuple[bytes, float]] = []
    for member in value.lower().split(b","):
        name, *parameters = (part.strip(b" \t") for part in member.split(b";"))
        weight = next((_weight(one[2:]) for one in parameters if one[:2] == b"q="), 1.0)
        members.append((name, weight))
    return members


def _weight(text: bytes) -> float:
    """A weight of 0 to 1; what is none counts as 0, so that it chooses nothing."""
    digits = text.replace(b".", b"", 1)
    return min(float(text), 1.0) if digits.isdigit() and len(text) <= 5 else 0.0

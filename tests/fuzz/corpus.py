"""The inputs that are kept, and ways to alter one without a fuzzer."""

from __future__ import annotations

import random
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
_WORDS = [
    b"\r\n",
    b"\n",
    b"\0",
    b" ",
    b":",
    b";",
    b",",
    b"=",
    b'"',
    b"/",
    b"%",
    b"\xff",
    b"0",
    b"9",
    b"[",
    b"]",
    b"{",
    b"}",
]


def inputs(target: str) -> list[bytes]:
    """What is kept for a target, in the order of names."""
    return [path.read_bytes() for path in sorted((FOLDER / target).iterdir())]


def altered(rng: random.Random, kept: list[bytes]) -> bytes:
    """One of them, changed in a few places, or two of them joined."""
    data = rng.choice(kept)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:at] + rng.choice(_WORDS) + data[at:]
        elif kind == 1:
            data = data[:at] + data[at + rng.choice((1, 2, 8)) :]
        elif kind == 2:
            data = data[:at] + bytes((rng.randrange(256),)) + data[at + 1 :]
        elif kind == 3:
            other = rng.choice(kept)
            data = data[:at] + other[rng.randrange(len(other) + 1) :]
        else:
            data = data[:at] + data[max(0, at - 16) :]
    return data[:8192]

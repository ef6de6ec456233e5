"""What tests say to the scripted origin (tests/system/programs/origin.py): a request's target is its script."""

from __future__ import annotations

import base64
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "system" / "programs" / "origin.py"
BLOCK = bytes(value % 251 for value in range(251 * 256))  # the pattern that `spray` repeats


def script(*steps: str, path: str = "/do") -> str:
    """The target of a request that makes the origin take these steps."""
    return f"{path}?" + "&".join(f"do={step}" for step in steps)


def send(data: bytes | str) -> str:
    raw = data.encode("latin-1") if isinstance(data, str) else data
    return f"send:{base64.urlsafe_b64encode(raw).decode()}"


def answer(body: bytes = b"", status: str = "200 OK", *fields: str) -> str:
    """The step that sends a whole answer of known length."""
    lines = "".join(f"{field}\r\n" for field in fields)
    return send(f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)


def pattern(size: int) -> bytes:
    return (BLOCK * (size // len(BLOCK) + 1))[:size]

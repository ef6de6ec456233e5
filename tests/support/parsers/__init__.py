"""Parsers of other servers, as origins: given the bytes of a connection, which requests does each of them find?

`Parser.read` is one connection, from its first byte to its end. In this process: httptools as uvicorn uses it, h11,
gunicorn, waitress. As servers of their own, asked over loopback: Node, nginx (before a backend of ours), aiohttp.
A request is told by `digest_of` its method, target and body.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

DIGEST_FIELD = "x-digest"


@dataclass(frozen=True)
class Reading:
    """What a parser made of a connection: digests of the requests found, in order, and whether it refused the next."""

    found: list[str]
    refused: bool
    detail: str = ""


class Parser(Protocol):
    """One kind of origin."""

    name: str
    drops: bool  # a request that it refuses takes those before it along, if they came in the same read

    async def read(self, data: bytes, expected: int, may_have_more: bool) -> Reading:
        """`expected`: a server is waited for until it has answered so many. `may_have_more`: and a moment longer."""
        ...


def digest_of(method: bytes, target: bytes, body: bytes) -> str:
    return hashlib.sha1(b"%b %b\n%b" % (method, target, body)).hexdigest()

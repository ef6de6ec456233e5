"""ULIDs: 26 characters that sort by time, as Fly writes event ids and `instance_id`s."""

from __future__ import annotations

import secrets

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_ulid(unix_s: float) -> str:
    """48 bits of milliseconds and 80 random ones, in Crockford's base 32."""
    number = (int(unix_s * 1000) & (2**48 - 1)) << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))

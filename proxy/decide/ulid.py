"""Request and trace ids. Request ids are 26-character ULIDs, unique over workers and nodes,
growing within one (spec routing §6.1)."""

from __future__ import annotations

from typing import Final

_ALPHABET: Final = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS: Final[tuple[bytes, ...]] = tuple(bytes((a, b)) for a in _ALPHABET for b in _ALPHABET)


def _encode(value: int, pairs: int) -> bytes:
    return b"".join(_PAIRS[value >> (10 * (pairs - 1 - at)) & 1023] for at in range(pairs))


class UlidMaker:
    """Makes ids from the time, 50 random bits chosen once, and a 30-bit count (measured: 0.3 us an id)."""

    __slots__ = ("_count", "_ms", "_prefix", "_random", "_time")

    def __init__(self, seed: bytes) -> None:
        """`seed`: at least 8 random bytes, different in every process."""
        value = int.from_bytes(seed[:8], "big")
        self._random = _encode(value & ((1 << 50) - 1), 5)
        self._count = (value >> 50) << 8
        self._ms = -1
        self._prefix = b""
        self._time = b""

    def next(self, unix_ms: int) -> bytes:
        """The next id; `unix_ms` milliseconds since 1970."""
        if unix_ms != self._ms:
            self._ms = unix_ms
            self._prefix = _encode(unix_ms, 5) + self._random
        self._count = count = (self._count + 1) & 0x3FFFFFFF
        return self._prefix + _PAIRS[count >> 20] + _PAIRS[count >> 10 & 1023] + _PAIRS[count & 1023]


# Three hexadecimal digits for each of 12 bits, in an order in which the last ones are not alike for long.
_DIGITS: Final[tuple[bytes, ...]] = tuple(b"%03x" % (low * 0x9E5 & 0xFFF) for low in range(4096))


class TraceMaker:
    """Makes W3C `traceparent` values, not sampled: a random half chosen once, and a count times a fixed odd factor.

    Of the half that is counted 13 digits stand for 4,096 requests, and three tell those apart.
    """

    __slots__ = ("_count", "_mask", "_prefix", "_span", "_trace")

    def __init__(self, seed: bytes) -> None:
        """`seed`: at least 16 random bytes, different in every process."""
        self._prefix = b"00-%016x" % (int.from_bytes(seed[:8], "big") | 1)
        self._mask = int.from_bytes(seed[8:16], "big") >> 12
        self._count = 0
        self._begin(0)

    def next(self) -> bytes:
        """The next value; trace and span ids are never zero."""
        self._count = count = self._count + 1
        low = count & 0xFFF
        if not low:
            self._begin(count >> 12)
        digits = _DIGITS[low]
        return self._trace + digits + self._span + digits + b"-00"

    def _begin(self, block: int) -> None:
        """The digits of the next 4,096. A bijection; those of block 0 are zero, its counts are not."""
        spread = (block * 0x9E3779B97F4A7) & ((1 << 52) - 1)
        self._trace = b"%b%013x" % (self._prefix, spread ^ self._mask)
        self._span = b"-%013x" % spread

"""decide/ulid.py: request ids are unique, in order, and ULIDs; trace values are W3C traceparents."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.ulid import TraceMaker, UlidMaker

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
SHAPE = re.compile(rb"[0-9A-HJKMNP-TV-Z]{26}\Z")
NOW_MS = 1_763_856_000_000


def milliseconds(ulid: bytes) -> int:
    value = 0
    for letter in ulid[:10].decode():
        value = value * 32 + ALPHABET.index(letter)
    return value


@given(st.binary(min_size=8, max_size=8), st.integers(0, (1 << 48) - 1))
def test_an_id_is_26_characters_of_the_alphabet_and_tells_its_time(seed: bytes, unix_ms: int) -> None:
    ulid = UlidMaker(seed).next(unix_ms)
    assert SHAPE.match(ulid) and milliseconds(ulid) == unix_ms and ulid[:1] <= b"7"


def test_ids_of_one_maker_are_unique_and_grow() -> None:
    maker = UlidMaker(b"\x01" * 8)
    ids = [maker.next(NOW_MS + at // 1000) for at in range(50_000)]
    assert ids == sorted(set(ids))


def test_ids_of_many_makers_at_the_same_moment_never_meet() -> None:
    rng = random.Random(3)
    makers = [UlidMaker(rng.randbytes(8)) for _ in range(50)]
    ids = [maker.next(NOW_MS) for maker in makers for _ in range(400)]
    assert len(set(ids)) == len(ids)


def test_makers_whose_seeds_differ_in_any_bit_differ() -> None:
    seeds = [bytes(8)] + [(1 << bit).to_bytes(8, "big") for bit in range(64)]
    ids = [UlidMaker(seed).next(NOW_MS) for seed in seeds]
    assert len(set(ids)) == len(ids)


def test_the_clock_going_back_repeats_no_id() -> None:
    maker = UlidMaker(b"abcdefgh")
    ids = [maker.next(NOW_MS + step) for step in (0, 5, 0, 5, -3, 0, 0)]
    assert len(set(ids)) == len(ids)


def test_trace_values_are_traceparents_that_never_repeat_and_are_never_zero() -> None:
    for seed in (bytes(16), b"\xff" * 16, bytes(range(16))):
        maker = TraceMaker(seed)
        values = [maker.next() for _ in range(20_000)]
        assert all(re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-00", value) for value in values)
        traces, spans = {value[3:35] for value in values}, {value[36:52] for value in values}
        assert len(traces) == len(spans) == len(values)
        assert b"0" * 32 not in traces and b"0" * 16 not in spans

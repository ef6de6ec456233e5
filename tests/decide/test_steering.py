"""decide/steering.py: what a client's own fields ask for, whatever stands in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.decide.steering import MAX_REGIONS, NOT_STEERED, STEERING_FIELDS, Steering, parse_steering
from proxy.model import MachineId
from tests.wire.http1_support import read_requests


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (b"fly-prefer-region", b"iad,ord,us,na", Steering(prefer_regions=("iad", "ord", "us", "na"))),
        (b"fly-prefer-region", b" IAD ,, ord ", Steering(prefer_regions=("iad", "ord"))),
        (b"fly-prefer-region", b"???", Steering()),
        (b"fly-force-region", b"ams", Steering(force_regions=("ams",))),
        (b"fly-force-region", b"???, ams", Steering(force_regions=("ams",))),
        (b"fly-force-region", b"???", Steering(force_regions=(), is_impossible=True)),
        (b"fly-force-region", b"", Steering(force_regions=(), is_impossible=True)),
        (b"fly-prefer-instance-id", b"90801679a10038", Steering(prefer_instance=MachineId("90801679a10038"))),
        (b"fly-prefer-instance-id", b"../etc", Steering()),
        (b"fly-force-instance-id", b"90801679a10038", Steering(force_instance=MachineId("90801679a10038"))),
        (b"fly-force-instance-id", b"a b", Steering(is_impossible=True)),
        (b"fly-force-instance-id", b"", Steering(is_impossible=True)),
        (b"fly-replay-cache-control", b"skip", Steering(skips_cache=True)),
        (b"fly-replay-cache-control", b"Skip", Steering(skips_cache=True)),
        (b"fly-replay-cache-control", b"no-store", Steering()),
        (b"x-other", b"ams", Steering()),
    ],
)
def test_a_field_is_read_or_left_out_but_what_is_forced_is_never_forgotten(
    name: bytes, value: bytes, expected: Steering
) -> None:
    assert parse_steering([(name, value)]) == expected


def test_of_a_field_that_comes_twice_the_first_counts() -> None:
    fields = [(b"fly-force-instance-id", b"m1"), (b"fly-force-instance-id", b"m2")]
    assert parse_steering(fields).force_instance == "m1"


def test_a_list_without_end_is_cut_off() -> None:
    assert len(parse_steering([(b"fly-prefer-region", b"ams," * 10_000)]).prefer_regions) == MAX_REGIONS


def test_the_reader_notes_exactly_these_fields() -> None:
    raw = b"".join(name + b": x\r\n" for name in sorted(STEERING_FIELDS))
    seen = read_requests(b"GET / HTTP/1.1\r\nhost: a.test\r\nfly-region: y\r\n" + raw + b"\r\n")
    assert {name for name, _ in seen.heads[0].noted} == STEERING_FIELDS


@given(st.lists(st.tuples(st.sampled_from(sorted(STEERING_FIELDS)), st.binary(max_size=40)), max_size=6))
def test_no_value_raises_and_what_comes_out_is_plain_text(fields: list[tuple[bytes, bytes]]) -> None:
    steering = parse_steering(fields)
    names = (*steering.prefer_regions, *(steering.force_regions or ()))
    assert all(name.isascii() and name.replace("-", "").isalnum() for name in names)
    for machine in (steering.prefer_instance, steering.force_instance):
        assert machine is None or machine.isascii()
    if not fields:
        assert steering is NOT_STEERED

"""wire/backhaul.py: what one edge writes another reads as it was meant, and nothing that is wrong passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import MachineId
from proxy.wire.backhaul import Hop, HopError, Refusal, hop_line, parse_hop, parse_refused, refused_value

names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
machines = st.from_regex(r"[0-9A-Za-z][0-9A-Za-z_-]{0,62}", fullmatch=True).map(MachineId)
hops = st.builds(
    Hop,
    app=names,
    port=st.integers(0, 65_535),
    request_id=st.from_regex(rb"[0-9A-Za-z-]{1,96}", fullmatch=True),
    client_ip=st.ip_addresses().map(str),
    is_tls=st.booleans(),
    hops=st.integers(0, 99),
    may_wake=st.booleans(),
    may_wait=st.booleans(),
    wants_go=st.booleans(),
    force=st.none() | machines,
    prefer=st.none() | machines,
    exclude=st.lists(machines, max_size=20).map(tuple),
    via=st.just("") | names,
)


@given(hops)
def test_a_hop_arrives_as_it_was_sent(hop: Hop) -> None:
    name, _, value = hop_line(hop).partition(b": ")
    assert name == b"wakefront-hop" and value.endswith(b"\r\n")
    assert b"\r" not in value[:-2] and b"\n" not in value[:-2]
    assert parse_hop(value[:-2]) == hop


@given(hops)
def test_a_newer_edge_may_say_more(hop: Hop) -> None:
    value = hop_line(hop).partition(b": ")[2][:-2]
    assert parse_hop(value + b";colour=blue") == hop


@given(st.binary(max_size=300) | hops.map(lambda hop: hop_line(hop)[15:-2]), st.binary(max_size=4), st.integers(0, 200))
def test_only_the_documented_error_comes_of_what_is_wrong(value: bytes, noise: bytes, at: int) -> None:
    for reads in (parse_hop, parse_refused):
        try:
            reads(value[:at] + noise + value[at + len(noise) :])
        except HopError:
            pass


@pytest.mark.parametrize(
    "value",
    [
        b"", b"v=1", b"v=2;app=a;port=1;id=a;ip=1;tls=0;hops=1", b"v=1;app=A;port=1;id=a;ip=1;tls=0;hops=1",
        b"v=1;app=a;port=-1;id=a;ip=1;tls=0;hops=1", b"v=1;app=a;port=1;id=a\r\nx: y;ip=1;tls=0;hops=1",
        b"v=1;app=a;port=1;id=a;ip=evil.example;tls=0;hops=1", b"v=1;app=a;port=1;id=a;ip=1;tls=0;hops=1000",
        b"v=1;app=a;port=1;id=a;ip=1;tls=0;hops=1;force=../x", b"v=1;app=a;port=1;id=a;ip=1;tls=0;hops=1;not=,",
        b"v=1;app=a;port=1;id=a;ip=1;tls=0;hops=1;via=A.B", b"v=1;v=1;app=a;port=1;id=a;ip=1;tls=0;hops=1",
        b"v=1;app=a;port=1;id=a;ip=1;tls=0;hops=1;" + b"x" * 5000 + b"=1",
    ],
)  # fmt: skip
def test_what_no_edge_says_is_an_error(value: bytes) -> None:
    with pytest.raises(HopError):
        parse_hop(value)


@given(
    st.builds(
        Refusal,
        code=st.from_regex(r"[A-Z]{2}[0-9]{2}", fullmatch=True),
        is_unsent=st.booleans(),
        retry_after_s=st.none() | st.integers(0, 86_400),
        detail=st.text(max_size=300),
    )
)
def test_a_refusal_arrives_with_its_reason(refusal: Refusal) -> None:
    value = refused_value(refusal)
    assert value.isascii() and b"\n" not in value and b"\r" not in value
    read = parse_refused(value)
    assert (read.code, read.is_unsent, read.retry_after_s) == (refusal.code, refusal.is_unsent, refusal.retry_after_s)
    assert read.detail == refusal.detail or len(read.detail) <= 200


def test_a_refusal_that_does_not_say_so_may_have_reached_a_machine() -> None:
    assert not parse_refused(b"code=WB01").is_unsent
    assert not parse_refused(b"code=WB01;sent=x").is_unsent

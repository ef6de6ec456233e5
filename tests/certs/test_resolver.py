"""What a look at DNS tells, of BIND's zones set up well and badly and of servers that do what none should."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certs.diagnosis import Wanted, diagnose
from certs.dns_message import HOPS_MOST
from certs.dns_question import parse_server
from certs.errors import LookupFailedError, NameRefusedError
from certs.look import Look, Outcome
from certs.resolver import Resolver
from tests.support import pebble
from tests.support.bind import Bind, needs_bind
from tests.support.dns_script import Said, ScriptedDns, reply
from tests.support.dns_world import ELSEWHERE, NODE_V4, NODE_V6, NS1, ROOT, SILENT, resolver_of, world


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bind]:
    with world(tmp_path_factory.mktemp("dns")) as bind:
        yield bind


@pytest.fixture
def look(net: Bind) -> Callable[[str], Look]:
    return resolver_of(net).look


# --- down from the root


@needs_bind
def test_addresses_come_from_the_zones_own_servers(look: Callable[[str], Look]) -> None:
    seen = look("good.test")
    assert (seen.a.outcome, seen.a.values, seen.aaaa.values) == (Outcome.ANSWERS, (NODE_V4,), (NODE_V6,))
    assert (seen.zone, seen.cname, seen.is_authoritative) == ("good.test", "", True)
    assert [(one.name, one.outcome, one.serial) for one in seen.name_servers] == [
        ("n1.good.test", Outcome.ANSWERS, 1),
        ("n2.good.test", Outcome.ANSWERS, 1),
    ]
    assert seen.ownership.outcome is seen.challenge.outcome is Outcome.NXDOMAIN
    assert seen.soa.startswith("n1.good.test. admin.good.test. 1 ")


@needs_bind
def test_a_cname_is_followed_into_another_zone(look: Callable[[str], Look]) -> None:
    seen = look("www.good.test")
    assert (seen.cname, seen.addresses) == ("shop-app.edge.test", (NODE_V4, NODE_V6))
    assert (seen.zone, seen.a.zone) == ("good.test", "edge.test")


@needs_bind
def test_name_servers_of_another_zone_are_found_without_glue(look: Callable[[str], Look]) -> None:
    seen = look("glueless.test")
    assert seen.a.values == (NODE_V4,)
    assert [one.name for one in seen.name_servers] == ["ns1.hoster.test", "ns2.hoster.test"]


@needs_bind
def test_a_zone_below_another_on_the_same_server_is_told_apart(look: Callable[[str], Look]) -> None:
    assert (look("www.sub.deep.test").zone, look("deep.test").zone) == ("sub.deep.test", "deep.test")


@needs_bind
def test_a_wildcard_is_looked_at_as_such_and_its_txt_names_at_the_base(look: Callable[[str], Look]) -> None:
    seen = look("*.wild.good.test")
    assert (seen.a.values, seen.challenge.name, seen.base) == (
        (NODE_V4,),
        "_acme-challenge.wild.good.test",
        "wild.good.test",
    )


@needs_bind
@pytest.mark.parametrize(
    ("name", "outcome", "above"),
    [("nope.test", Outcome.NXDOMAIN, "test"), ("a.b.nope.invalidtld", Outcome.NXDOMAIN, ""),
     ("nope.good.test", Outcome.NXDOMAIN, "good.test"), ("parked.wrong.test", Outcome.NO_DATA, None)],
)  # fmt: skip
def test_what_does_not_exist_is_told_with_the_zone_that_says_so(
    look: Callable[[str], Look], name: str, outcome: Outcome, above: str | None
) -> None:
    seen = look(name)
    assert (seen.a.outcome, seen.nxdomain_above) == (outcome, above)


@needs_bind
@pytest.mark.parametrize(
    ("name", "outcome"),
    [("lame.test", Outcome.LAME), ("unloaded.test", Outcome.SERVFAIL), ("silent.test", Outcome.UNREACHABLE),
     ("knot.test", Outcome.UNREACHABLE)],
)  # fmt: skip
def test_a_zone_that_cannot_be_asked_says_why_and_which(
    look: Callable[[str], Look], name: str, outcome: Outcome
) -> None:
    seen = look(name)
    assert (seen.a.outcome, seen.aaaa.outcome, seen.caa.outcome, seen.zone) == (outcome, outcome, outcome, name)
    assert name in seen.a.detail


@needs_bind
def test_one_lame_or_dead_server_of_two_does_not_hide_the_answer(look: Callable[[str], Look]) -> None:
    lame, dead = look("halflame.test"), look("halfdead.test")
    assert lame.a.values == dead.a.values == (NODE_V4,)
    assert [one.outcome for one in lame.name_servers] == [Outcome.ANSWERS, Outcome.LAME]
    assert [one.outcome for one in dead.name_servers] == [Outcome.ANSWERS, Outcome.UNREACHABLE]


@needs_bind
def test_servers_that_differ_are_shown_side_by_side(look: Callable[[str], Look]) -> None:
    seen = look("stale.test")
    assert [one.values for one in seen.a_views] == [(NODE_V4,), (ELSEWHERE,)]
    assert [one.serial for one in seen.name_servers] == [5, 3]


@needs_bind
@pytest.mark.parametrize("name", ["loop1.wrong.test", "hop0.wrong.test"])
def test_cnames_that_do_not_end_are_a_loop(look: Callable[[str], Look], name: str) -> None:
    seen = look(name)
    assert seen.a.outcome is Outcome.LOOP
    assert 2 <= len(seen.a.chain) <= HOPS_MOST + 1
    assert "met again" in seen.a.detail or "more than 8" in seen.a.detail


@needs_bind
@pytest.mark.parametrize(
    ("name", "found_at", "tags"),
    [
        ("inherits.caa.test", "caa.test", [("issue", "other-ca.example")]),
        ("allowed.caa.test", "allowed.caa.test", [("issue", "letsencrypt.org")]),
        ("*.wild.caa.test", "wild.caa.test", [("issue", "letsencrypt.org"), ("issuewild", ";")]),
        ("alias.caa.test", "alias.caa.test", [("issue", "other-ca.example")]),
        ("method.caa.test", "method.caa.test", [("issue", "letsencrypt.org; validationmethods=dns-01")]),
        ("good.test", "", []),
    ],
)
def test_caa_is_that_of_the_nearest_name_above_cnames_followed(
    look: Callable[[str], Look], name: str, found_at: str, tags: list[tuple[str, str]]
) -> None:
    caa = look(name).caa
    assert (caa.found_at, [(one.tag, one.value) for one in caa.records]) == (found_at, tags)


@needs_bind
def test_ownership_and_delegated_challenge_are_seen(look: Callable[[str], Look]) -> None:
    assert look("owned.wrong.test").ownership.values == ("org-1; app-42",)
    assert look("acme.wrong.test").challenge.chain == ("acme.elsewhere.good.test",)


@needs_bind
def test_a_value_is_visible_when_all_servers_that_answer_have_it(net: Bind) -> None:
    resolver = resolver_of(net)
    assert resolver.txt("_acme-challenge.leftover.wrong.test") == ("left-from-last-year-aaaaaaaaaaaaaaaaaaaaaaa",)
    assert resolver.is_visible("_fly-ownership.owned.wrong.test", "org-1; app-42")
    assert not resolver.is_visible("_fly-ownership.owned.wrong.test", "org-1")
    assert not resolver.is_visible("nope.good.test", "x")
    assert resolver.txt("nope.good.test") == ()


@needs_bind
def test_zone_and_end_of_cnames(net: Bind) -> None:
    resolver = resolver_of(net)
    assert resolver.zone("_acme-challenge.www.good.test") == "good.test"
    assert resolver.cname_end("_acme-challenge.acme.wrong.test") == "acme.elsewhere.good.test"
    assert resolver.cname_end("_acme-challenge.good.test") == "_acme-challenge.good.test"
    with pytest.raises(LookupFailedError, match=r"loop1\.wrong\.test is met again"):
        resolver.cname_end("loop1.wrong.test")
    with pytest.raises(LookupFailedError, match="REFUSED"):
        resolver.txt("lame.test")


@needs_bind
def test_a_name_server_at_a_private_address_is_not_asked(net: Bind) -> None:
    resolver = Resolver((), 1.0, roots=(ROOT,), port=net.port)
    seen = resolver.look("good.test")
    assert (seen.a.outcome, seen.a.values) == (Outcome.UNREACHABLE, ())
    assert seen.a.detail == "no name server of test has an address to ask"


@pytest.mark.slow
@needs_bind
def test_a_silent_server_costs_its_time_out_and_no_more(net: Bind) -> None:
    with ScriptedDns(lambda query, transport: (), address=SILENT, port=net.port) as silent:
        began = time.monotonic()
        seen = resolver_of(net, timeout_s=0.3).look("silent.test")
        took_s = time.monotonic() - began
    assert (seen.a.outcome, seen.zone) == (Outcome.TIMEOUT, "silent.test")
    assert "did not answer within 0.3 s" in seen.a.detail
    assert silent.asked and took_s < 3


@needs_bind
@pytest.mark.slow
def test_many_threads_look_at_once_and_leave_nothing_open(net: Bind) -> None:
    resolver = resolver_of(net, timeout_s=5.0, total_s=20.0)
    names = ["good.test", "www.good.test", "nope.test", "loop1.wrong.test", "halflame.test", "signed.test"] * 5
    alone = [resolver.look(name) for name in names[:6]]
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(resolver.look, names))
    assert len(os.listdir("/proc/self/fd")) == before
    for number, seen in enumerate(together):
        assert (seen.a, seen.caa, seen.zone) == (alone[number % 6].a, alone[number % 6].caa, alone[number % 6].zone)


# --- resolvers that were given


@needs_bind
def test_given_servers_are_asked_for_everything(net: Bind) -> None:
    seen = Resolver((net.at(NS1),), 1.0).look("www.good.test")
    assert (seen.cname, seen.a.values, seen.zone) == ("shop-app.edge.test", (NODE_V4,), "good.test")
    assert (seen.is_authoritative, seen.asked) == (False, (net.at(NS1),))


def test_a_second_server_is_asked_when_the_first_is_dead() -> None:
    with ScriptedDns(lambda query, transport: [reply(query, "x.test. 1 IN TXT here")]) as alive:
        assert Resolver(("127.0.0.1:1", alive.at), 1.0).txt("x.test") == ("here",)


def test_a_resolver_that_fails_only_when_it_validates_found_dnssec_broken() -> None:
    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        if query.flags & dns.flags.CD:
            return [reply(query, f"x.test. 1 IN A {NODE_V4}")]
        failed = dns.message.make_response(query)
        failed.set_rcode(dns.rcode.SERVFAIL)
        return [failed]

    with ScriptedDns(answer) as server:
        assert Resolver((server.at,), 1.0).look("x.test").a.outcome is Outcome.BOGUS


# --- hostile servers


Answer = Callable[[dns.message.Message, str], Iterable[Said]]


def _wrong_id(query: dns.message.Message, transport: str) -> Iterable[Said]:
    wire = bytearray(reply(query, "x.test. 1 IN TXT stolen").to_wire())
    wire[0] ^= 0xFF
    return [bytes(wire)]


def _wrong_question(query: dns.message.Message, transport: str) -> Iterable[Said]:
    other = dns.message.make_query("other.test", "TXT", id=query.id)
    return [reply(other, "x.test. 1 IN TXT stolen", "other.test. 1 IN TXT stolen")]


def _garbage(query: dns.message.Message, transport: str) -> Iterable[Said]:
    return [query.id.to_bytes(2, "big") + b"\x80\x00\xff\xff\xff\xff\xff\xff\xff\xff" + b"\xc0\x0c" * 200]


def _cut_short_for_ever(query: dns.message.Message, transport: str) -> Iterable[Said]:
    message = reply(query)
    message.flags |= dns.flags.TC
    return [message]


def _flood(query: dns.message.Message, transport: str) -> Iterable[Said]:
    if transport == "udp":
        return _cut_short_for_ever(query, transport)
    records = [f"x.test. 1 IN TXT {'f' * 250}{n}" for n in range(200)]
    return [reply(query, *records)]


def _many(query: dns.message.Message, transport: str) -> Iterable[Said]:
    """1200 records of 13 bytes, each with a name that is read in 120 steps."""
    if transport == "udp":
        return _cut_short_for_ever(query, transport)
    question = query.to_wire()[12 : 12 + len("x.test") + 2 + 4]
    owner = b"".join(b"\x01" + bytes([97 + n % 26]) for n in range(120)) + b"\x00"
    record = b"\x00\x10\x00\x01\x00\x00\x00\x01\x00\x01\x00"
    pointer = (0xC000 | 12 + len(question)).to_bytes(2, "big")
    counts = b"\x00\x01" + (1201).to_bytes(2, "big") + bytes(4)
    wire = query.id.to_bytes(2, "big") + b"\x84\x00" + counts + question + owner + record + (pointer + record) * 1200
    return [len(wire).to_bytes(2, "big") + wire]


def _drip(query: dns.message.Message, transport: str) -> Iterable[Said]:
    if transport == "udp":
        return _cut_short_for_ever(query, transport)
    wire = reply(query, "x.test. 1 IN TXT slow").to_wire(prepend_length=True)
    return [wire[i : i + 1] for i in range(len(wire))]


def _promised_more(query: dns.message.Message, transport: str) -> Iterable[Said]:
    if transport == "udp":
        return _cut_short_for_ever(query, transport)
    return [b"\x10\x00" + b"x" * 10]


def _loop(query: dns.message.Message, transport: str) -> Iterable[Said]:
    return [reply(query, "x.test. 1 IN CNAME y.test.", "y.test. 1 IN CNAME x.test.")]


def _endless(query: dns.message.Message, transport: str) -> Iterable[Said]:
    name = query.question[0].name.to_text()
    head = name.partition(".")[0]
    number = int(head[1:]) + 1 if head[:1] == "n" and head[1:].isdigit() else 0
    return [reply(query, f"{name} 1 IN CNAME n{number}.test.")]


def _strays(query: dns.message.Message, transport: str) -> Iterable[Said]:
    return [b"nonsense"] * 50


def _other_records(query: dns.message.Message, transport: str) -> Iterable[Said]:
    return [reply(query, "unasked.test. 1 IN TXT stolen")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (_wrong_id, Outcome.MALFORMED),
        (_wrong_question, Outcome.MALFORMED),
        (_garbage, Outcome.MALFORMED),
        (_cut_short_for_ever, Outcome.NO_DATA),
        (_flood, Outcome.MALFORMED),
        (_many, Outcome.MALFORMED),
        (_drip, Outcome.TIMEOUT),
        (_promised_more, Outcome.MALFORMED),
        (_loop, Outcome.LOOP),
        (_endless, Outcome.LOOP),
        (_strays, Outcome.MALFORMED),
        (_other_records, Outcome.NO_DATA),
    ],
)
def test_a_hostile_answer_ends_in_time_and_is_not_believed(answer: Answer, outcome: Outcome) -> None:
    with ScriptedDns(answer, pause_s=0.05 if answer is _drip else 0.0) as server:
        began = time.monotonic()
        seen = Resolver((server.at,), 0.4, total_s=2.0).look("x.test")
        took_s = time.monotonic() - began
    assert seen.a.outcome is outcome, seen.a
    assert "stolen" not in repr(seen)
    assert took_s < 3.0


@pytest.mark.slow
def test_a_look_has_a_bound_in_questions_and_time() -> None:
    with ScriptedDns(_endless) as server:
        deep = ".".join("abcdefghijklmnopqrstuvwxyz" * 3) + ".test"
        seen = Resolver((server.at,), 0.4, total_s=2.0, questions_most=40).look(deep)
    assert len(server.asked) <= 40
    assert Outcome.GAVE_UP in {seen.a.outcome, seen.caa.outcome, seen.challenge.outcome, seen.ownership.outcome}


def test_text_from_the_net_is_printable() -> None:
    with ScriptedDns(lambda query, transport: [reply(query, r'x.test. 1 IN TXT "\027[2Jhi\233"')]) as server:
        assert Resolver((server.at,), 1.0).txt("x.test") == (r"\x1b[2Jhi\xe9",)


@pytest.mark.parametrize("text", ["ns.example.net", "192.0.2.1:x", "192.0.2.1:0", "[2001:db8::1]:99999", ""])
def test_what_is_no_server_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        Resolver((text,))


def test_servers_are_read_with_and_without_port() -> None:
    read = [parse_server(one) for one in ("192.0.2.1", "192.0.2.1:5353", "2001:db8::1", "[2001:db8::1]:54")]
    assert [(one.address, one.port) for one in read] == [
        ("192.0.2.1", 53), ("192.0.2.1", 5353), ("2001:db8::1", 53), ("2001:db8::1", 54)
    ]  # fmt: skip


def test_a_name_that_cannot_be_in_dns_is_refused() -> None:
    with pytest.raises(NameRefusedError):
        Resolver(("127.0.0.1:1",)).look("a" * 64 + ".test")


# --- what only a scripted server, or another resolver, will do


def test_a_cname_at_the_apex_is_seen_with_what_it_hides() -> None:
    """BIND loads no such zone; some providers serve it all the same."""

    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        question = query.question[0]
        name, rdtype = question.name.to_text(True), question.rdtype.name
        if name == "apex.test" and rdtype not in ("SOA", "NS"):
            return [reply(query, "apex.test. 60 IN CNAME shop.edge.test.")]
        if name == "apex.test":
            return [reply(query, "apex.test. 60 IN SOA ns.apex.test. a.apex.test. 1 1 1 1 1")]
        if (name, rdtype) == ("shop.edge.test", "A"):
            return [reply(query, f"shop.edge.test. 60 IN A {NODE_V4}")]
        return [reply(query)]

    with ScriptedDns(answer) as server:
        seen = Resolver((server.at,), 1.0).look("apex.test")
    assert (seen.zone, seen.cname, seen.a.values) == ("apex.test", "shop.edge.test", (NODE_V4,))
    assert seen.cname_neighbours == ("SOA", "NS")


def test_records_beside_a_cname_are_seen() -> None:
    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        match query.question[0].rdtype.name:
            case "MX":
                return [reply(query, "x.both.test. 60 IN MX 10 mail.both.test.")]
            case "SOA":
                return [reply(query, authority=["both.test. 60 IN SOA ns.both.test. a.both.test. 1 1 1 1 1"])]
            case _:
                return [reply(query, "x.both.test. 60 IN CNAME shop.edge.test.", f"shop.edge.test. 60 IN A {NODE_V4}")]

    with ScriptedDns(answer) as server:
        assert Resolver((server.at,), 1.0).look("x.both.test").cname_neighbours == ("MX",)


def test_an_old_server_without_edns_is_asked_again_plainly() -> None:
    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        if query.edns >= 0:
            refused = dns.message.Message(query.id)
            refused.flags |= dns.flags.QR
            refused.set_rcode(dns.rcode.FORMERR)
            return [refused]
        return [reply(query, "x.test. 1 IN TXT old")]

    with ScriptedDns(answer) as server:
        assert Resolver((server.at,), 1.0).txt("x.test") == ("old",)


@pytest.mark.slow
def test_a_packet_that_is_lost_is_sent_again() -> None:
    asked = 0

    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        nonlocal asked
        asked += 1
        return [reply(query, "x.test. 1 IN TXT late")] if asked > 1 else []

    with ScriptedDns(answer) as server:
        assert Resolver((server.at,), 3.0).txt("x.test") == ("late",)


def test_why_a_resolver_fails_is_told_as_it_says_it() -> None:
    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        failed = dns.message.make_response(query)
        failed.set_rcode(dns.rcode.SERVFAIL)
        failed.use_edns(0, options=[dns.edns.EDEOption(9, "no \x1b[31mDNSKEY")])
        return [failed]

    with ScriptedDns(answer) as server:
        seen = Resolver((server.at,), 1.0).look("x.test")
    assert seen.a.outcome is Outcome.BOGUS
    assert r"answered SERVFAIL (dnskey missing: no \x1b[31mDNSKEY)" in seen.a.detail


@needs_bind
def test_records_of_a_zone_are_taken_from_its_own_servers_only(net: Bind) -> None:
    """A server that leads a CNAME into another's zone may not tell what is there."""

    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        return [reply(query, "silent.test. 1 IN CNAME good.test.", "good.test. 1 IN A 198.51.100.66")]

    with ScriptedDns(answer, address=SILENT, port=net.port):
        seen = resolver_of(net).look("silent.test")
    assert (seen.a.chain, seen.a.values, seen.a.zone) == (("good.test",), (NODE_V4,), "good.test")


@needs_bind
def test_a_referral_that_leads_up_or_sideways_is_lame(net: Bind) -> None:
    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        return [reply(query, authority=["test. 1 IN NS ns.nic.test.", ". 1 IN NS ns.root."], is_authoritative=False)]

    with ScriptedDns(answer, address=SILENT, port=net.port) as server:
        seen = resolver_of(net).look("silent.test")
    assert seen.a.outcome is Outcome.LAME
    assert len(server.asked) < 15


@needs_bind
def test_referrals_without_end_are_given_up(net: Bind) -> None:
    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        labels = query.question[0].name.to_text(True).split(".")
        ns = [f"{'.'.join(labels[-3:])}. 1 IN NS n{n}.nowhere{n}{query.id}.test." for n in range(8)]
        return [reply(query, authority=ns, is_authoritative=False)]

    with ScriptedDns(answer, address=SILENT, port=net.port):
        began = time.monotonic()
        seen = resolver_of(net, total_s=3.0).look("a.b.c.silent.test")
    assert seen.a.outcome in (Outcome.UNREACHABLE, Outcome.GAVE_UP)
    assert seen.questions <= 170 and time.monotonic() - began < 5


@pytest.mark.slow
@pytest.mark.skipif(not pebble.is_installed(), reason="needs Pebble (Debian: pebble)")
def test_the_challenge_test_server_of_pebble_is_understood(tmp_path: Path) -> None:
    """It knows A, AAAA, CNAME, TXT and CAA, and no zones."""
    with pebble.pebble(tmp_path, 1, 1) as ca:
        ca.set_cname("_acme-challenge.shop.test", "x1.acme.test")
        ca.set_txt("x1.acme.test", "proof")
        ca.set_servfail("failing.test")
        resolver = Resolver((ca.dns,), 1.0)
        seen = resolver.look("shop.test")
        assert (seen.a.values, seen.zone, seen.caa.outcome) == (("127.0.0.1",), None, Outcome.NO_DATA)
        assert (seen.challenge.values, seen.challenge.chain) == (("proof",), ("x1.acme.test",))
        assert resolver.is_visible("_acme-challenge.shop.test", "proof")
        assert resolver.cname_end("_acme-challenge.shop.test") == "x1.acme.test"
        assert resolver.look("failing.test").a.outcome is Outcome.SERVFAIL


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bytes_from_a_server_bring_a_look_down(data: st.DataObject) -> None:
    flips = data.draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=12))

    def answer(query: dns.message.Message, transport: str) -> Iterable[Said]:
        good = reply(query, f"x.test. 1 IN A {NODE_V4}", "x.test. 1 IN CAA 0 issue ca.example", "x.test. 1 IN TXT t",
                     authority=["test. 1 IN NS ns.test.", "test. 1 IN SOA ns.test. a.test. 1 1 1 1 1"])  # fmt: skip
        wire = bytearray(good.to_wire())
        for at, byte in flips:
            wire[2 + at % (len(wire) - 2)] = byte
        return [len(wire).to_bytes(2, "big") + bytes(wire) if transport == "tcp" else bytes(wire)]

    with ScriptedDns(answer) as server:
        seen = Resolver((server.at,), 0.02, total_s=0.1).look("x.test")
    assert repr(seen).isprintable()
    diagnose(seen, Wanted("x.test", (NODE_V4,), (NODE_V6,), "y.test", caa_identities=("ca.example",)), 0.0)

"""What is said of domains: on zones that BIND serves, set up badly in many ways, and on looks made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from certs.caa import Verdict, judge
from certs.cdn import cdn_of
from certs.diagnosis import Code, Diagnosis, Finding, Problem, Record, Severity, Wanted, diagnose
from certs.look import Answer, CaaRecord, CaaSet, Look, NameServer, Outcome, View
from tests.support.bind import Bind, needs_bind
from tests.support.dns_script import ScriptedDns
from tests.support.dns_world import ELSEWHERE, NODE_V4, NODE_V6, SILENT, resolver_of, world

NOW = 1_800_000_000.0
TARGET = "shop-app.edge.test"


def wanted(hostname: str, **changes: object) -> Wanted:
    base = Wanted(
        hostname,
        addresses_v4=(NODE_V4,),
        addresses_v6=(NODE_V6,),
        cname_target=TARGET,
        target_addresses=(NODE_V4, NODE_V6),
        ownership_value="app-42",
        caa_identities=("letsencrypt.org",),
    )
    return replace(base, **changes)  # type: ignore[arg-type]  # fields of Wanted, each test's own


def seen(
    hostname: str = "shop.example.com", a: tuple[str, ...] = (NODE_V4,), aaaa: tuple[str, ...] = (), **changes: object
) -> Look:
    base = hostname.removeprefix("*.")

    def answer(name: str, rdtype: str, values: tuple[str, ...]) -> Answer:
        return Answer(name, rdtype, Outcome.ANSWERS if values else Outcome.NO_DATA, values, zone="example.com")

    made = Look(
        hostname,
        a=answer(hostname, "A", a),
        aaaa=answer(hostname, "AAAA", aaaa),
        ownership=answer(f"_fly-ownership.{base}", "TXT", ()),
        challenge=answer(f"_acme-challenge.{base}", "TXT", ()),
        caa=CaaSet(),
        zone="example.com",
    )
    return replace(made, **changes)  # type: ignore[arg-type]  # fields of Look


def judged(look: Look, **changes: object) -> Diagnosis:
    return diagnose(look, wanted(look.hostname, **changes), NOW)


def found(diagnosis: Diagnosis, code: Code) -> Finding:
    return next(one for one in diagnosis.findings if one.code is code)


def codes(diagnosis: Diagnosis) -> list[str]:
    return [one.code.value for one in diagnosis.findings]


# --- BIND, set up badly


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bind]:
    with world(tmp_path_factory.mktemp("dns")) as bind:
        yield bind


@pytest.fixture
def check(net: Bind) -> Callable[..., Diagnosis]:
    """Look at a name and judge what is seen."""
    return lambda name, **changes: diagnose(resolver_of(net).look(name), wanted(name, **changes), NOW)


def here(name: str) -> tuple[Record, ...]:
    return (Record("A", name, NODE_V4), Record("AAAA", name, NODE_V6))


@needs_bind
@pytest.mark.parametrize(
    ("name", "code", "message", "add", "remove"),
    [
        (
            "nope.good.test", Code.HOST_MISSING,
            "There is no nope.good.test in DNS (its zone good.test has no such name).", here("nope.good.test"), (),
        ),
        (
            "www.nope.test", Code.ZONE_MISSING,
            "The name servers of test know no nope.test: it is not registered, has lapsed, has no name servers, or is"
            " spelt wrongly.", (), (),
        ),
        (
            "www.nope.tset", Code.ZONE_MISSING,
            'There is no top-level domain "tset": it is not registered, has lapsed, has no name servers, or is spelt'
            " wrongly.", (), (),
        ),
        (
            "elsewhere.wrong.test", Code.POINTS_ELSEWHERE,
            "elsewhere.wrong.test points to 198.51.100.7, which is not this node.", here("elsewhere.wrong.test"),
            (Record("A", "elsewhere.wrong.test", ELSEWHERE),),
        ),
        (
            "two.wrong.test", Code.SOME_ELSEWHERE,
            "two.wrong.test points here and also to 198.51.100.7: a CA or client that picks that one does not reach"
            " this node.", (), (Record("A", "two.wrong.test", ELSEWHERE),),
        ),
        (
            "v6.wrong.test", Code.AAAA_ELSEWHERE,
            "Over IPv4 v6.wrong.test points here, but its AAAA record 2001:db8:bad::1 leads elsewhere; a CA tries IPv6"
            " first.", (Record("AAAA", "v6.wrong.test", NODE_V6),),
            (Record("AAAA", "v6.wrong.test", "2001:db8:bad::1"),),
        ),
        (
            "cname.wrong.test", Code.CNAME_WRONG,
            "cname.wrong.test is a CNAME of other-app.edge.test, which leads to 198.51.100.7 and not to this node.",
            (Record("CNAME", "cname.wrong.test", TARGET),),
            (Record("CNAME", "cname.wrong.test", "other-app.edge.test"),),
        ),
        (
            "dangling.wrong.test", Code.CNAME_DANGLES,
            "dangling.wrong.test is a CNAME of gone.edge.test, which does not exist.",
            (Record("CNAME", "dangling.wrong.test", TARGET),),
            (Record("CNAME", "dangling.wrong.test", "gone.edge.test"),),
        ),
        (
            "private.wrong.test", Code.ADDRESS_PRIVATE,
            "private.wrong.test points to 192.168.1.10, an address of a private network that a CA cannot reach.",
            here("private.wrong.test"), (Record("A", "private.wrong.test", "192.168.1.10"),),
        ),
        (
            "parked.wrong.test", Code.ADDRESS_MISSING,
            "parked.wrong.test is in DNS, but has no address (neither A nor AAAA).", here("parked.wrong.test"), (),
        ),
        (
            "inherits.caa.test", Code.CAA_FORBIDS,
            'CAA of caa.test (it holds for inherits.caa.test) forbids letsencrypt.org to issue (issue'
            ' "other-ca.example").', (Record("CAA", "caa.test", '0 issue "letsencrypt.org"'),), (),
        ),
        (
            "method.caa.test", Code.CAA_METHOD,
            "CAA of method.caa.test lets letsencrypt.org issue only by challenges that this node does not use (issue"
            ' "letsencrypt.org; validationmethods=dns-01").',
            (Record("CAA", "method.caa.test", '0 issue "letsencrypt.org; validationmethods=tls-alpn-01,http-01"'),), (),
        ),
        (
            "critical.caa.test", Code.CAA_CRITICAL,
            "A CAA record of critical.caa.test is marked critical and of a kind that CAs do not know (tbs"
            ' "unknown"): none may issue.', (), (Record("CAA", "critical.caa.test", '128 tbs "unknown"'),),
        ),
        (
            "stale.test", Code.SERVERS_DISAGREE,
            "The name servers of stale.test do not agree on A of stale.test: n1.stale.test (127.77.0.3:PORT) says"
            " 203.0.113.10; n2.stale.test (127.77.0.4:PORT) says 198.51.100.7 (serials 3, 5).", (), (),
        ),
        (
            "lame.test", Code.NAME_SERVERS_LAME,
            "The name servers that lame.test is delegated to (n1.lame.test) know nothing of the zone. n1.lame.test"
            " (127.77.0.5:PORT) answered REFUSED.", (), (),
        ),
        (
            "unloaded.test", Code.SERVFAIL,
            "The name servers of unloaded.test fail when asked for unloaded.test (SERVFAIL). n1.unloaded.test"
            " (127.77.0.3:PORT) answered SERVFAIL.", (), (),
        ),
        (
            "expired.test", Code.DNSSEC_BROKEN,
            "DNSSEC of expired.test does not hold: resolvers that check signatures, as a CA's do, get no answer. Its"
            " keys"
            " are not signed rightly: the signature ran out 2023-11-14 22:13 UTC.", (), (),
        ),
        (
            "rolled.test", Code.DNSSEC_BROKEN,
            "DNSSEC of rolled.test does not hold: resolvers that check signatures, as a CA's do, get no answer. Its"
            " parent's DS records (key tag TAG) fit none of its keys.", (), (),
        ),
        (
            "unsigned.test", Code.DNSSEC_BROKEN,
            "DNSSEC of unsigned.test does not hold: resolvers that check signatures, as a CA's do, get no answer. Its"
            " parent has DS records for it, but it has no DNSKEY.", (), (),
        ),
        (
            "silent.test", Code.NAME_SERVERS_SILENT,
            "None of the name servers of silent.test answers (n1.silent.test). n1.silent.test (127.77.0.9:PORT):"
            " Connection refused.", (), (),
        ),
        (
            "loop1.wrong.test", Code.CNAME_LOOP,
            "The CNAMEs of loop1.wrong.test lead in a circle or do not end: loop1.wrong.test -> loop2.wrong.test ->"
            " loop3.wrong.test (loop1.wrong.test is met again).",
            (Record("CNAME", "loop1.wrong.test", TARGET),), (Record("CNAME", "loop1.wrong.test", "loop2.wrong.test"),),
        ),
    ],
)  # fmt: skip
def test_the_first_finding_is_the_cause_with_the_exact_records(
    net: Bind, check: Callable[..., Diagnosis], name: str, code: Code, message: str, add: tuple[Record, ...],
    remove: tuple[Record, ...],
) -> None:  # fmt: skip
    diagnosis = check(name)
    first = diagnosis.findings[0]
    assert (first.code, first.severity) == (code, Severity.ERROR)
    text = first.message.replace(str(net.port), "PORT")
    assert re.sub(r"tag \d+", "tag TAG", text) == message
    assert (first.records, first.remove) == (add, remove)
    assert first.remedy
    assert not diagnosis.is_ready


@needs_bind
@pytest.mark.parametrize("name", ["good.test", "www.good.test", "signed.test", "allowed.caa.test", "iodef.caa.test"])
def test_a_domain_that_is_set_up_well_has_no_errors(check: Callable[..., Diagnosis], name: str) -> None:
    diagnosis = check(name)
    assert diagnosis.dns_points_here and diagnosis.is_ready
    assert diagnosis.ownership_proven_by == (
        "cname" if name == "www.good.test" else "aaaa" if name == "good.test" else "a"
    )


@needs_bind
def test_a_cdn_is_recognised_and_leaves_http_01(check: Callable[..., Diagnosis]) -> None:
    diagnosis = check("cdn.test")
    assert (diagnosis.is_proxied_by, diagnosis.dns_points_here, diagnosis.is_ready) == ("Cloudflare", False, True)
    finding = found(diagnosis, Code.PROXIED)
    assert "points to Cloudflare (104.16.1.1, 2606:4700::6810:101)" in finding.message
    assert "http://cdn.test/.well-known/acme-challenge/" in finding.remedy
    assert finding.records == (Record("TXT", "_fly-ownership.cdn.test", "app-42"),)
    assert not check("cdn.test", challenge_types=("tls-alpn-01",)).is_ready


@needs_bind
def test_a_wildcard_wants_dns_01_and_its_cname(check: Callable[..., Diagnosis]) -> None:
    assert codes(check("*.wild.good.test"))[0] == "wildcard_needs_dns_01"
    target = "x1.acme.edge.test"
    missing = check("*.wild.good.test", has_dns_01=True, challenge_target=target).findings[0]
    assert missing.code is Code.CHALLENGE_CNAME_MISSING
    assert missing.message == (
        "_acme-challenge.wild.good.test is not a CNAME of x1.acme.edge.test, so this node cannot prove"
        " *.wild.good.test."
    )
    assert missing.records == (Record("CNAME", "_acme-challenge.wild.good.test", target),)
    assert check("*.wild.good.test", has_dns_01=True).is_ready


@needs_bind
def test_issuewild_alone_decides_for_wildcards(check: Callable[..., Diagnosis]) -> None:
    first = check("*.wild.caa.test", has_dns_01=True).findings[0]
    assert (first.code, first.records) == (
        Code.CAA_FORBIDS,
        (Record("CAA", "wild.caa.test", '0 issuewild "letsencrypt.org"'),),
    )
    assert check("wild.caa.test", has_dns_01=True).is_ready


@needs_bind
def test_caa_may_name_another_account(check: Callable[..., Diagnosis]) -> None:
    first = check("account.caa.test", account_uri="https://ca.example/acct/2").findings[0]
    assert (first.code, first.records[0].value) == (
        Code.CAA_ACCOUNT,
        '0 issue "letsencrypt.org; accounturi=https://ca.example/acct/2"',
    )
    assert check("account.caa.test", account_uri="https://ca.example/acct/1").is_ready


@needs_bind
def test_a_challenge_cname_to_the_wrong_place_is_replaced(check: Callable[..., Diagnosis]) -> None:
    diagnosis = check("acme.wrong.test", has_dns_01=True, challenge_target="x1.acme.edge.test")
    finding = found(diagnosis, Code.CHALLENGE_CNAME_WRONG)
    assert finding.records == (Record("CNAME", "_acme-challenge.acme.wrong.test", "x1.acme.edge.test"),)
    assert finding.remove == (Record("CNAME", "_acme-challenge.acme.wrong.test", "acme.elsewhere.good.test"),)
    assert finding.severity is Severity.WARNING  # other challenges are to be had
    right = check("acme.wrong.test", has_dns_01=True, challenge_target="acme.elsewhere.good.test")
    assert right.ownership_proven_by == "acme_challenge"


@needs_bind
def test_an_old_challenge_record_is_named_for_deletion_but_ours_is_not(check: Callable[..., Diagnosis]) -> None:
    value = "left-from-last-year-aaaaaaaaaaaaaaaaaaaaaaa"
    finding = found(check("leftover.wrong.test"), Code.CHALLENGE_LEFTOVER)
    assert finding.remove == (Record("TXT", "_acme-challenge.leftover.wrong.test", value),)
    assert "challenge_leftover" not in codes(check("leftover.wrong.test", challenge_values=(value,)))


@needs_bind
def test_ownership_is_read_from_joined_values(check: Callable[..., Diagnosis]) -> None:
    diagnosis = check("owned.wrong.test")
    assert (diagnosis.ownership_proven_by, diagnosis.findings[0].code) == ("txt", Code.ADDRESS_MISSING)
    other = check("owned.wrong.test", ownership_value="app-7")
    assert found(other, Code.OWNERSHIP_OTHER).message == (
        "_fly-ownership.owned.wrong.test names another owner (org-1, app-42), not app-7."
    )


@needs_bind
def test_missing_ipv6_is_for_information(check: Callable[..., Diagnosis]) -> None:
    diagnosis = check("v4only.wrong.test")
    assert diagnosis.is_ready
    assert found(diagnosis, Code.AAAA_MISSING).records == (Record("AAAA", "v4only.wrong.test", NODE_V6),)


@needs_bind
@pytest.mark.parametrize(
    ("name", "server"), [("halflame.test", "n2.halflame.test: lame"), ("halfdead.test", "n2.halfdead.test: timeout")]
)
def test_one_failing_server_is_a_warning(net: Bind, check: Callable[..., Diagnosis], name: str, server: str) -> None:
    with ScriptedDns(lambda query, transport: (), address=SILENT, port=net.port):
        diagnosis = check(name)
    assert diagnosis.is_ready
    assert server in found(diagnosis, Code.NAME_SERVER_FAILS).message


# --- by hand


def test_what_leads_elsewhere_costs_no_certificate_where_dns_01_works() -> None:
    look = seen(a=(ELSEWHERE,))
    assert not judged(look).is_ready
    with_dns = judged(look, has_dns_01=True)
    assert with_dns.is_ready and found(with_dns, Code.POINTS_ELSEWHERE).severity is Severity.WARNING
    assert not judged(look, has_dns_01=True, challenge_target="x.acme.edge.test").is_ready


def test_addresses_are_compared_as_such_not_as_text() -> None:
    look = seen(a=(), aaaa=("2001:0db8:0:0::10",))
    assert judged(look).dns_points_here


def test_without_addresses_of_its_own_the_node_says_so() -> None:
    diagnosis = judged(seen(), addresses_v4=(), addresses_v6=(), target_addresses=())
    assert (diagnosis.dns_points_here, diagnosis.is_ready, codes(diagnosis)[0]) == (False, True, "addresses_unknown")


def test_a_rate_limit_is_told_with_its_end() -> None:
    diagnosis = judged(seen(), rate_limited_until=NOW + 3600)
    assert "before 2027-01-15 09:00:00 UTC" in found(diagnosis, Code.RATE_LIMITED).message
    assert "rate_limited" not in codes(judged(seen(), rate_limited_until=NOW - 1))


def test_the_cas_last_words_are_told() -> None:
    problem = Problem("connection", "203.0.113.10: Fetching http://...: Timeout during connect")
    finding = found(judged(seen(), last_problem=problem), Code.CA_FAILED)
    assert problem.detail in finding.message and "firewall" in finding.remedy


def test_no_port_for_any_challenge_is_an_error() -> None:
    first = judged(seen(), listens_http=False, challenge_types=("http-01",)).findings[0]
    assert first.code is Code.NO_CHALLENGE
    assert first.message == (
        "No challenge can be answered for shop.example.com: HTTP-01 needs port 80, which this node does not listen on;"
        " TLS-ALPN-01 is switched off; DNS-01 is not set up."
    )
    assert judged(seen(), listens_http=False).is_ready


def test_a_cname_at_the_apex_is_told_with_addresses_instead() -> None:
    look = seen("example.com", a=(NODE_V4,))
    look = replace(look, a=replace(look.a, chain=(TARGET,)), cname_neighbours=("SOA", "NS"))
    finding = found(judged(look), Code.CNAME_AT_APEX)
    assert finding.records == here("example.com")
    assert finding.remove == (Record("CNAME", "example.com", TARGET),)
    assert judged(look).requirements.cname == ""


def test_a_cname_beside_other_records_is_told() -> None:
    look = seen()
    look = replace(look, a=replace(look.a, chain=(TARGET,)), cname_neighbours=("MX",))
    assert "beside other records (MX)" in found(judged(look), Code.CNAME_WITH_OTHERS).message


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome.BOGUS, Code.DNSSEC_BROKEN),
        (Outcome.SERVFAIL, Code.SERVFAIL),
        (Outcome.MALFORMED, Code.ANSWERS_BROKEN),
        (Outcome.GAVE_UP, Code.TOO_MUCH),
        (Outcome.REFUSED, Code.NAME_SERVERS_LAME),
        (Outcome.LAME, Code.NAME_SERVERS_LAME),
        (Outcome.LOOP, Code.CNAME_LOOP),
        (Outcome.TIMEOUT, Code.NAME_SERVERS_SILENT),
        (Outcome.UNREACHABLE, Code.NAME_SERVERS_SILENT),
    ],
)
def test_each_failure_of_a_lookup_has_its_cause(outcome: Outcome, code: Code) -> None:
    look = seen()
    failed = replace(look.a, outcome=outcome, values=(), detail="a server said so")
    diagnosis = judged(replace(look, a=failed, aaaa=replace(failed, type="AAAA")))
    assert codes(diagnosis)[0] == code
    # what this node alone gave up on is no reason not to ask a CA
    assert diagnosis.is_ready is (outcome is Outcome.GAVE_UP) and not diagnosis.dns_points_here


def test_a_node_that_cannot_ask_says_that_it_is_its_own_fault() -> None:
    look = seen()
    failed = replace(look.a, outcome=Outcome.TIMEOUT, values=(), zone="")
    look = replace(look, a=failed, aaaa=failed, zone=None)
    assert "This node cannot ask the name servers of the root" in judged(look).findings[0].message
    assert judged(look).is_ready  # a CA may see more
    look = replace(look, is_authoritative=False, asked=("10.0.0.53:53",))
    assert "set to ask (10.0.0.53:53) do not answer" in judged(look).findings[0].message


def test_servers_that_fail_for_aaaa_alone_are_a_warning() -> None:
    look = seen()
    look = replace(look, aaaa=replace(look.aaaa, outcome=Outcome.TIMEOUT))
    diagnosis = judged(look)
    assert diagnosis.is_ready and "lookup_partial" in codes(diagnosis)


def test_caa_that_cannot_be_looked_up_is_an_error() -> None:
    first = judged(seen(caa=CaaSet(Outcome.SERVFAIL, "example.com", detail="ns answered SERVFAIL"))).findings[0]
    assert first.code is Code.CAA_UNKNOWN
    assert "CAA of example.com cannot be looked up" in first.message


def test_servers_that_differ_without_leading_elsewhere_are_for_information() -> None:
    views = (View("n1", Outcome.ANSWERS, (NODE_V4,)), View("n2", Outcome.ANSWERS, (NODE_V4, "203.0.113.11")))
    look = seen(a_views=views, name_servers=(NameServer("n1", "192.0.2.1", Outcome.ANSWERS, 1),))
    diagnosis = judged(look, addresses_v4=(NODE_V4, "203.0.113.11"))
    assert diagnosis.is_ready and found(diagnosis, Code.SERVERS_DISAGREE).severity is Severity.INFO


def test_errors_come_before_warnings_before_information() -> None:
    diagnosis = judged(
        seen(a=(ELSEWHERE,), caa=CaaSet(Outcome.ANSWERS, "example.com", (), (CaaRecord(0, "issue", ";"),))),
        rate_limited_until=NOW + 60,
    )
    assert codes(diagnosis) == ["caa_forbids", "points_elsewhere", "rate_limited", "ownership_missing"]


def test_every_cause_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "custom-domains.md").read_text()
    assert [code.value for code in Code if f"`{code}`" not in text] == []


def test_the_requirements_are_the_records_to_show() -> None:
    needs = judged(seen(), has_dns_01=True, challenge_target="x.acme.edge.test").requirements
    assert (needs.a, needs.aaaa, needs.cname) == ((NODE_V4,), (NODE_V6,), TARGET)
    assert needs.challenge == Record("CNAME", "_acme-challenge.shop.example.com", "x.acme.edge.test")
    assert needs.ownership == Record("TXT", "_fly-ownership.shop.example.com", "app-42")


def test_a_wildcard_is_owned_by_txt_or_delegated_challenge_alone() -> None:
    assert judged(seen("*.example.com")).ownership_proven_by is None
    look = seen("*.example.com")
    look = replace(look, ownership=replace(look.ownership, outcome=Outcome.ANSWERS, values=("app-42",)))
    assert judged(look).ownership_proven_by == "txt"


# --- CAA and networks


def _caa(*texts: str) -> list[CaaRecord]:
    return [CaaRecord(int(flags), tag, value) for flags, tag, value in (text.split(" ", 2) for text in texts)]


@pytest.mark.parametrize(
    ("records", "is_wildcard", "verdict"),
    [
        ((), False, Verdict.PERMITTED),
        (("0 issue ;",), False, Verdict.ISSUER),
        (("0 issue ca.example",), False, Verdict.PERMITTED),
        (("0 issue CA.Example",), False, Verdict.PERMITTED),
        (("0 issue ;", "0 issue ca.example"), False, Verdict.PERMITTED),
        (("0 issuewild ;",), False, Verdict.PERMITTED),
        (("0 issuewild ;",), True, Verdict.ISSUER),
        (("0 issue ca.example", "0 issuewild other.example"), True, Verdict.ISSUER),
        (("0 issue ca.example",), True, Verdict.PERMITTED),
        (("0 iodef mailto:x@y",), False, Verdict.PERMITTED),
        (("128 iodef mailto:x@y",), False, Verdict.PERMITTED),
        (("128 future x", "0 issue ca.example"), False, Verdict.CRITICAL),
        (("0 future x",), False, Verdict.PERMITTED),
        (("0 issue ca.example; accounturi=https://ca/1",), False, Verdict.PERMITTED),
        (("0 issue ca.example; accounturi=https://ca/2",), False, Verdict.ACCOUNT),
        (("0 issue ca.example; validationmethods=dns-01",), False, Verdict.METHOD),
        (("0 issue ca.example; validationmethods=dns-01,http-01",), False, Verdict.PERMITTED),
        (("0 issue ca.example; nonsense with spaces",), False, Verdict.ISSUER),
        (("0 issue ca.example;",), False, Verdict.PERMITTED),
        (("0 issue notca.example",), False, Verdict.ISSUER),
        (("0 issue sub.ca.example",), False, Verdict.ISSUER),
    ],
)  # fmt: skip
def test_caa_rules(records: tuple[str, ...], is_wildcard: bool, verdict: Verdict) -> None:
    ruling = judge(_caa(*records), is_wildcard, ("ca.example",), "https://ca/1", ("http-01",))
    assert ruling.verdict is verdict


@pytest.mark.parametrize(
    ("addresses", "cnames", "name"),
    [
        (("104.16.1.1", "2606:4700::1"), (), "Cloudflare"),
        (("151.101.1.1",), (), "Fastly"),
        (("104.16.1.1", "198.51.100.7"), (), None),
        (("198.51.100.7",), ("d1.cloudfront.net",), "Amazon CloudFront"),
        (("198.51.100.7",), ("notcloudfront.net",), None),
        ((), (), None),
    ],
)  # fmt: skip
def test_networks_are_recognised_by_address_or_name(
    addresses: tuple[str, ...], cnames: tuple[str, ...], name: str | None
) -> None:
    assert cdn_of(addresses, cnames) == name

"""What is wrong with a domain, if anything, and which records put it right.

Pure: a Look and what is wanted in, text out. Severities go by certificates: an error keeps a CA from issuing, or is
sure to before long; a warning costs clients, or may go wrong, or hides what there is from this node alone; information
is for choosing. The first finding is the one to act on.
"""

from __future__ import annotations

import datetime
import enum
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from certs import caa
from certs.cdn import cdn_of
from certs.look import Answer, Look, NameServer, Outcome, View
from certs.names import is_public_suffix, registered_domain

_SHOWN = 4  # of a list, in a sentence
_PRIVATE = tuple(
    ipaddress.ip_network(one)
    for one in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10", "0.0.0.0/8",
        "fc00::/7", "fe80::/10", "::1/128", "::/128",
    )
)  # fmt: skip  # RFC 1918, 6598, 4193 and what is a machine's or link's own


class Severity(enum.StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Code(enum.StrEnum):
    """Stable. In the order in which they are to be acted on, among those of one severity."""

    DNS_UNREACHABLE = "dns_unreachable"  # from here
    ZONE_MISSING = "zone_missing"
    DNSSEC_BROKEN = "dnssec_broken"
    NAME_SERVERS_LAME = "name_servers_lame"
    NAME_SERVERS_SILENT = "name_servers_silent"
    SERVFAIL = "servfail"
    ANSWERS_BROKEN = "answers_broken"
    CNAME_LOOP = "cname_loop"
    TOO_MUCH = "too_much"
    WILDCARD_NEEDS_DNS_01 = "wildcard_needs_dns_01"
    CHALLENGE_CNAME_WRONG = "challenge_cname_wrong"
    CHALLENGE_CNAME_MISSING = "challenge_cname_missing"
    CHALLENGE_UNKNOWN = "challenge_unknown"
    CAA_FORBIDS = "caa_forbids"
    CAA_ACCOUNT = "caa_account"
    CAA_METHOD = "caa_method"
    CAA_CRITICAL = "caa_critical"
    CAA_UNKNOWN = "caa_unknown"
    HOST_MISSING = "host_missing"
    ADDRESS_MISSING = "address_missing"
    CNAME_DANGLES = "cname_dangles"
    CNAME_WRONG = "cname_wrong"
    ADDRESS_PRIVATE = "address_private"
    POINTS_ELSEWHERE = "points_elsewhere"
    SOME_ELSEWHERE = "some_elsewhere"
    AAAA_ELSEWHERE = "aaaa_elsewhere"
    SERVERS_DISAGREE = "servers_disagree"
    NO_CHALLENGE = "no_challenge"
    CNAME_AT_APEX = "cname_at_apex"
    CNAME_WITH_OTHERS = "cname_with_others"
    PROXIED = "proxied"
    RATE_LIMITED = "rate_limited"
    CA_FAILED = "ca_failed"
    OWNERSHIP_OTHER = "ownership_other"
    LOOKUP_PARTIAL = "lookup_partial"
    NAME_SERVER_FAILS = "name_server_fails"
    ADDRESSES_UNKNOWN = "addresses_unknown"
    OWNERSHIP_MISSING = "ownership_missing"
    AAAA_MISSING = "aaaa_missing"
    A_MISSING = "a_missing"
    CHALLENGE_LEFTOVER = "challenge_leftover"


@dataclass(frozen=True, slots=True)
class Record:
    """A record as one types it in at a DNS provider; the name is whole, without a dot at the end."""

    type: str
    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name} {self.type} {self.value}"


@dataclass(frozen=True, slots=True)
class Finding:
    code: Code
    severity: Severity
    message: str  # the cause, one sentence
    remedy: str  # what to do
    records: tuple[Record, ...] = ()  # to add
    remove: tuple[Record, ...] = ()  # to delete


@dataclass(frozen=True, slots=True)
class Problem:
    """What a CA said last. `kind`: its problem type without the prefix ("connection"), or a certs.errors.Failure."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What DNS ought to show. Names without trailing dot; times are unix seconds."""

    hostname: str
    addresses_v4: tuple[str, ...] = ()  # the node's own; () = not known or none
    addresses_v6: tuple[str, ...] = ()
    cname_target: str = ""  # "shop.example.net"; "" = there is none
    target_addresses: tuple[str, ...] = ()  # what that resolves to
    challenge_types: tuple[str, ...] = ("tls-alpn-01", "http-01")  # those that are switched on
    has_dns_01: bool = False  # a hook can set TXT records
    challenge_target: str | None = (
        None  # where _acme-challenge.<host> should be a CNAME to; None = the hook sets it there
    )
    challenge_values: tuple[str, ...] = ()  # TXT values of ours that are there by right now
    ownership_value: str = ""  # "app-1234"
    caa_identities: tuple[str, ...] = ()  # of the CA; () = not known, so not judged
    account_uri: str = ""
    rate_limited_until: float = 0.0
    last_problem: Problem | None = None
    listens_http: bool = True  # on port 80, as the CA sees it
    listens_https: bool = True


@dataclass(frozen=True, slots=True)
class Requirements:
    """The records that would be right: `a` and `aaaa`, or `cname`; the others where they are needed."""

    a: tuple[str, ...]
    aaaa: tuple[str, ...]
    cname: str  # "" where there may be none
    challenge: Record | None
    ownership: Record | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    hostname: str
    dns_points_here: bool  # every address found is ours
    is_proxied_by: str | None
    ownership_proven_by: str | None  # "txt" | "cname" | "acme_challenge" | "aaaa" | "a", the strongest
    findings: tuple[Finding, ...]
    requirements: Requirements

    @property
    def is_ready(self) -> bool:
        """Whether a CA may be asked: nothing is found that it would fail on."""
        return all(finding.severity is not Severity.ERROR for finding in self.findings)


def diagnose(look: Look, wanted: Wanted, now: float) -> Diagnosis:
    """Judge what was seen. `now`: unix seconds. Raises nothing."""
    return _Case(look, wanted, now).diagnosis()


class _Case:
    """One look at one host. Methods whose names begin with `of_` yield findings."""

    def __init__(self, look: Look, wanted: Wanted, now: float) -> None:
        self.look = look
        self.wanted = wanted
        self.now = now
        self.host = look.hostname
        self.is_wildcard = look.hostname.startswith("*.")
        self.ours = frozenset(
            ipaddress.ip_address(one) for one in (*wanted.addresses_v4, *wanted.addresses_v6, *wanted.target_addresses)
        )
        self.chain = look.a.chain or look.aaaa.chain
        self.is_at_target = bool(wanted.cname_target) and wanted.cname_target in self.chain
        self.others_v4 = tuple(one for one in look.a.values if not self.is_ours(one))
        self.others_v6 = tuple(one for one in look.aaaa.values if not self.is_ours(one))
        self.others = self.others_v4 + self.others_v6
        self.points_here = bool(look.addresses) and not self.others
        self.cdn = cdn_of(self.others, self.chain) if self.others else None
        self.challenge_name = f"_acme-challenge.{look.base}"
        self.dns_01_works = (
            wanted.has_dns_01
            and (wanted.challenge_target is None or self._is_delegated)
            and look.challenge.outcome in (Outcome.ANSWERS, Outcome.NXDOMAIN, Outcome.NO_DATA)
        )
        # DNS-01 needs no traffic here: then what leads elsewhere costs clients, but no certificate
        self.pointing = Severity.WARNING if self.dns_01_works or self.is_wildcard else Severity.ERROR

    def is_ours(self, address: str) -> bool:
        return self.is_at_target or ipaddress.ip_address(address) in self.ours

    @property
    def _is_delegated(self) -> bool:
        return self.wanted.challenge_target in self.look.challenge.chain

    def diagnosis(self) -> Diagnosis:
        findings = [*self.of_lookup(), *self.of_challenge(), *self.of_caa(), *self.of_ports(), *self.of_ca(),
                    *self.of_ownership()]  # fmt: skip
        if self.look.a.is_known or self.look.aaaa.is_known:
            findings += [*self.of_pointing(), *self.of_cname(), *self.of_servers()]
        order = list(Code)
        severities = list(Severity)
        findings.sort(key=lambda one: (severities.index(one.severity), order.index(one.code)))
        return Diagnosis(self.host, self.points_here, self.cdn, self.proof, tuple(findings), self.requirements)

    # --- what would be right

    @property
    def a_records(self) -> tuple[Record, ...]:
        return tuple(Record("A", self.host, one) for one in self.requirements.a)

    @property
    def aaaa_records(self) -> tuple[Record, ...]:
        return tuple(Record("AAAA", self.host, one) for one in self.requirements.aaaa)

    @property
    def right_records(self) -> tuple[Record, ...]:
        """What would make the host point here: addresses, or a CNAME where these are not known."""
        found = self.a_records + self.aaaa_records
        if not found and self.wanted.cname_target and self.host != self.look.zone:
            found = (Record("CNAME", self.host, self.wanted.cname_target),)
        return found

    @property
    def requirements(self) -> Requirements:
        wanted = self.wanted
        v4 = wanted.addresses_v4 or tuple(one for one in wanted.target_addresses if ":" not in one)
        v6 = wanted.addresses_v6 or tuple(one for one in wanted.target_addresses if ":" in one)
        challenge = None
        if wanted.has_dns_01 and wanted.challenge_target:
            challenge = Record("CNAME", self.challenge_name, wanted.challenge_target)
        return Requirements(
            a=v4,
            aaaa=v6,
            cname="" if self.host == self.look.zone else wanted.cname_target,
            challenge=challenge,
            ownership=self.ownership_record,
        )

    @property
    def ownership_record(self) -> Record | None:
        if not self.wanted.ownership_value:
            return None
        return Record("TXT", f"_fly-ownership.{self.look.base}", self.wanted.ownership_value)

    @property
    def proof(self) -> str | None:
        """A wildcard's addresses prove nothing of the names below it: there it is TXT, or the delegated challenge."""
        wanted, look = self.wanted, self.look
        if wanted.ownership_value and wanted.ownership_value in _owners(look.ownership):
            return "txt"
        if self.is_at_target and not self.is_wildcard:
            return "cname"
        if wanted.challenge_target and self._is_delegated:
            return "acme_challenge"
        if self.is_wildcard:
            return None
        if _any_of(look.aaaa.values, wanted.addresses_v6):
            return "aaaa"
        return "a" if _any_of(look.a.values, wanted.addresses_v4) else None

    # --- findings

    def of_lookup(self) -> Iterator[Finding]:
        """The name could not be looked up, in whole or in part."""
        a, aaaa = self.look.a, self.look.aaaa
        if self.look.dnssec_fault:
            yield self._dnssec_broken(self.look.zone or "", f" {_sentence(self.look.dnssec_fault)}")
        if a.is_known and aaaa.is_known:
            return
        if a.is_known or aaaa.is_known:
            failed = aaaa if a.is_known else a
            yield Finding(
                Code.LOOKUP_PARTIAL, Severity.WARNING,
                f"Name servers of {self._zone_of(failed)} do not answer for {failed.type} records of {failed.name}"
                f" ({failed.outcome}: {failed.detail}).",
                "A CA may take that for a failure of the domain. Have the DNS provider repair it: servers must say so"
                " when"
                " there is no such record.",
            )  # fmt: skip
            return
        yield self._lookup_failure(a)

    def _zone_of(self, answer: Answer) -> str:
        return answer.zone or self.look.zone or registered_domain(self.look.base)

    def _lookup_failure(self, failed: Answer) -> Finding:
        zone = self._zone_of(failed)
        said = f" {failed.detail}." if failed.detail else ""
        match failed.outcome:
            case Outcome.TIMEOUT | Outcome.UNREACHABLE if not self.look.is_authoritative:
                return Finding(
                    Code.DNS_UNREACHABLE, Severity.WARNING,
                    f"The DNS servers that this node is set to ask ({_some(self.look.asked)}) do not answer.{said}",
                    "See whether these run and let this node in, or change dns_servers in [certs].",
                )  # fmt: skip
            case Outcome.TIMEOUT | Outcome.UNREACHABLE if not failed.zone or "." not in failed.zone:
                return Finding(
                    Code.DNS_UNREACHABLE, Severity.WARNING,
                    f"This node cannot ask the name servers of {failed.zone or 'the root'}, so it does not know what"
                    f" DNS"
                    f" says of {self.host}.{said}",
                    "Let it send to port 53 (UDP and TCP), or set dns_servers in [certs] to a resolver that it may"
                    " ask.",
                )  # fmt: skip
            case Outcome.TIMEOUT | Outcome.UNREACHABLE:
                return Finding(
                    Code.NAME_SERVERS_SILENT, Severity.ERROR,
                    f"None of the name servers of {zone} answers ({_some(self._server_names)}).{said}",
                    f"Start them or open port 53 (UDP and TCP) to them, or have the registrar of {zone} name the"
                    f" servers"
                    " that do have the zone.",
                )  # fmt: skip
            case Outcome.LAME | Outcome.REFUSED:
                return Finding(
                    Code.NAME_SERVERS_LAME, Severity.ERROR,
                    f"The name servers that {zone} is delegated to ({_some(self._server_names)}) know nothing of the"
                    f" zone.{said}",
                    f"Set the zone {zone} up at that provider, or have the registrar name the servers of the one where"
                    " it is.",
                )  # fmt: skip
            case Outcome.BOGUS:
                return self._dnssec_broken(zone, said)
            case Outcome.SERVFAIL:
                return Finding(
                    Code.SERVFAIL, Severity.ERROR,
                    f"The name servers of {zone} fail when asked for {failed.name} (SERVFAIL).{said}",
                    "If they are resolvers, DNSSEC of the zone is likely broken: see to its signatures and to DS"
                    " records"
                    " at the registrar. If they are the zone's own, the zone did not load: see their log for the faulty"
                    " record.",
                )  # fmt: skip
            case Outcome.LOOP:
                steps = " -> ".join((failed.name, *failed.chain[:9]))
                return Finding(
                    Code.CNAME_LOOP, Severity.ERROR,
                    f"The CNAMEs of {self.host} lead in a circle or do not end: {steps} ({failed.detail}).",
                    f"Replace the CNAME of {failed.name} by one that leads straight to its end.",
                    self._right_instead_of_cname,
                    (Record("CNAME", failed.name, failed.chain[0]),) if failed.chain else (),
                )  # fmt: skip
            case Outcome.GAVE_UP:
                return Finding(
                    Code.TOO_MUCH, Severity.WARNING,
                    f"The look for {self.host} was given up {failed.detail}: it takes too many questions or too long.",
                    "Try again; if it stays so, see to slow or dead name servers on the way to the name.",
                )  # fmt: skip
            case _:
                return Finding(
                    Code.ANSWERS_BROKEN, Severity.ERROR,
                    f"What the name servers of {zone} send cannot be read.{said}",
                    "Have the DNS provider see to its servers, or to what stands before them (a firewall that alters"
                    " DNS?).",
                )  # fmt: skip

    def _dnssec_broken(self, zone: str, said: str) -> Finding:
        return Finding(
            Code.DNSSEC_BROKEN, Severity.ERROR,
            f"DNSSEC of {zone} does not hold: resolvers that check signatures, as a CA's do, get no answer.{said}",
            f"Have the zone signed anew, or have the registrar remove the DS records of {zone} (often left from a"
            " former DNS provider).",
        )  # fmt: skip

    @property
    def _server_names(self) -> tuple[str, ...]:
        return tuple(one.name or one.address for one in self.look.name_servers)

    @property
    def _right_instead_of_cname(self) -> tuple[Record, ...]:
        if self.wanted.cname_target and self.host != self.look.zone:
            return (Record("CNAME", self.host, self.wanted.cname_target),)
        return self.right_records

    def of_pointing(self) -> Iterator[Finding]:
        """Where the name leads."""
        look = self.look
        if not look.addresses:
            yield self._nothing_there()
        elif not self.ours and not self.is_at_target:
            yield Finding(
                Code.ADDRESSES_UNKNOWN, Severity.INFO,
                f"{self.host} points to {_some(look.addresses)}; whether that is this node is not known.",
                "Set addresses in [certs] to the addresses at which clients reach it.",
            )  # fmt: skip
        elif self.cdn is not None:
            yield self._proxied(self.cdn)
        elif private := [one for one in self.others if _is_private(one)]:
            yield Finding(
                Code.ADDRESS_PRIVATE, self.pointing,
                f"{self.host} points to {_some(private)}, an address of a private network that a CA cannot reach.",
                "Replace it by this node's public address.",
                self.right_records, tuple(_address_record(self._end, one) for one in private),
            )  # fmt: skip
        elif self.chain and self.others:
            yield self._cname_wrong()
        elif self.others:
            yield from self._elsewhere()
        if self.points_here and not self.chain:
            yield from self._one_family()

    @property
    def _end(self) -> str:
        """Where the address records of the host are."""
        return self.chain[-1] if self.chain else self.host

    def _nothing_there(self) -> Finding:
        look = self.look
        answer = look.a if look.a.is_known else look.aaaa
        if self.chain:
            what = "does not exist" if answer.outcome is Outcome.NXDOMAIN else "has no address"
            return Finding(
                Code.CNAME_DANGLES, self.pointing, f"{self.host} is a CNAME of {self._end}, which {what}.",
                f"Let it point to {self.wanted.cname_target or 'this node'} instead.",
                self._right_instead_of_cname, (Record("CNAME", self.host, self.chain[0]),),
            )  # fmt: skip
        if answer.outcome is Outcome.NO_DATA:
            return Finding(
                Code.ADDRESS_MISSING, self.pointing,
                f"{self.host} is in DNS, but has no address (neither A nor AAAA).",
                "Add the records.", self.right_records,
            )  # fmt: skip
        above = look.nxdomain_above
        if above is not None and (not above or is_public_suffix(above)):
            domain = look.base.split(".")[-1] if not above else registered_domain(look.base)
            told = (
                f"The name servers of {above} know no {domain}" if above else f'There is no top-level domain "{domain}"'
            )
            return Finding(
                Code.ZONE_MISSING, Severity.ERROR,
                f"{told}: it is not registered, has lapsed, has no name servers, or is spelt wrongly.",
                f"See whether {self.host} is the right name; if so, have the registrar of"
                f" {registered_domain(look.base)} name the servers of its DNS provider.",
            )  # fmt: skip
        return Finding(
            Code.HOST_MISSING, self.pointing,
            f"There is no {self.host} in DNS (its zone {look.zone or '?'} has no such name).",
            "Add the records.", self.right_records,
        )  # fmt: skip

    def _proxied(self, cdn: str) -> Finding:
        severity, more = Severity.WARNING, ""
        is_http_possible = "http-01" in self.wanted.challenge_types and self.wanted.listens_http
        if not self.dns_01_works and not self.is_wildcard and not is_http_possible:
            severity, more = (
                Severity.ERROR,
                " Neither HTTP-01 nor DNS-01 is to be had, and TLS-ALPN-01 ends at the network.",
            )
        records = tuple(filter(None, (self.requirements.challenge, None if self.proof else self.ownership_record)))
        return Finding(
            Code.PROXIED, severity,
            f"{self.host} points to {cdn} ({_some(self.others)}), which stands between clients and this node.{more}",
            f"Let {cdn} pass http://{self.host}/.well-known/acme-challenge/ on to this node unchanged (no redirect to"
            f" https,"
            " no cache), or prove the name by DNS (_acme-challenge), or point it straight here.",
            records,
        )  # fmt: skip

    def _cname_wrong(self) -> Finding:
        return Finding(
            Code.CNAME_WRONG, self.pointing,
            f"{self.host} is a CNAME of {self.chain[0]}, which leads to {_some(self.others)} and not to this node.",
            "Replace the CNAME.", self._right_instead_of_cname, (Record("CNAME", self.host, self.chain[0]),),
        )  # fmt: skip

    def _elsewhere(self) -> Iterator[Finding]:
        look = self.look
        removed_v4 = tuple(_address_record(self.host, one) for one in self.others_v4)
        removed_v6 = tuple(_address_record(self.host, one) for one in self.others_v6)
        right_v4 = tuple(one for one in self.a_records if one.value not in look.a.values)
        right_v6 = tuple(one for one in self.aaaa_records if one.value not in look.aaaa.values)
        is_v4_ours = bool(look.a.values) and not self.others_v4
        if self.others_v6 and is_v4_ours:
            yield Finding(
                Code.AAAA_ELSEWHERE, self.pointing,
                f"Over IPv4 {self.host} points here, but its AAAA record {_some(self.others_v6)} leads elsewhere; a"
                f" CA tries"
                " IPv6 first.",
                "Delete that AAAA record." if not right_v6 else "Replace that AAAA record.", right_v6, removed_v6,
            )  # fmt: skip
        elif len(self.others) < len(look.addresses):
            yield Finding(
                Code.SOME_ELSEWHERE, self.pointing,
                f"{self.host} points here and also to {_some(self.others)}: a CA or client that picks that one does not"
                " reach this node.",
                "Delete the records that lead elsewhere.", (), removed_v4 + removed_v6,
            )  # fmt: skip
        else:
            yield Finding(
                Code.POINTS_ELSEWHERE, self.pointing,
                f"{self.host} points to {_some(self.others)}, which is not this node.",
                "Replace the records.", right_v4 + right_v6 or self.right_records, removed_v4 + removed_v6,
            )  # fmt: skip

    def _one_family(self) -> Iterator[Finding]:
        look, wanted = self.look, self.wanted
        if wanted.addresses_v6 and not look.aaaa.values and look.aaaa.is_known:
            yield Finding(
                Code.AAAA_MISSING, Severity.INFO,
                f"{self.host} has no AAAA record, though this node is there over IPv6.",
                "Add it, so that clients with IPv6 alone get here.", self.aaaa_records,
            )  # fmt: skip
        if wanted.addresses_v4 and not look.a.values and look.a.is_known:
            yield Finding(
                Code.A_MISSING, Severity.INFO, f"{self.host} has no A record: clients without IPv6 do not get here.",
                "Add it.", self.a_records,
            )  # fmt: skip

    def of_cname(self) -> Iterator[Finding]:
        """A CNAME where there may be none (RFC 1034 §3.6.2, RFC 1912 §2.4)."""
        if not self.chain or not self.look.cname_neighbours:
            return
        removed = (Record("CNAME", self.host, self.chain[0]),)
        if self.host == self.look.zone:
            yield Finding(
                Code.CNAME_AT_APEX, Severity.WARNING,
                f"{self.host} is the top of its zone and has a CNAME, which hides the zone's own records (NS, MX)"
                f" from some"
                " resolvers.",
                "Replace it by A and AAAA records, or by what your DNS provider calls ALIAS, ANAME or CNAME"
                " flattening.",
                self.a_records + self.aaaa_records, removed,
            )  # fmt: skip
        else:
            yield Finding(
                Code.CNAME_WITH_OTHERS, Severity.WARNING,
                f"{self.host} has a CNAME beside other records ({', '.join(self.look.cname_neighbours)}), which is not"
                " allowed: resolvers see one or the other.",
                "Replace the CNAME by A and AAAA records, or move the others to another name.",
                self.a_records + self.aaaa_records, removed,
            )  # fmt: skip

    def of_servers(self) -> Iterator[Finding]:
        """The zone's servers do not say the same, or some do not answer."""
        look = self.look
        for rdtype, views in (("A", look.a_views), ("AAAA", look.aaaa_views)):
            if len({(one.outcome, one.values, one.cname) for one in views}) < 2:
                continue
            here = {self._view_points_here(one) for one in views if one.outcome is Outcome.ANSWERS}
            is_split = len(here) == 2 or (True in here and any(one.outcome is not Outcome.ANSWERS for one in views))
            said = "; ".join(f"{one.server} says {_said(one)}" for one in views[:_SHOWN])
            yield Finding(
                Code.SERVERS_DISAGREE, self.pointing if is_split else Severity.INFO,
                f"The name servers of {look.zone} do not agree on {rdtype} of {self.host}:"
                f" {said}{_serials(look.name_servers)}.",
                "Wait until all have the new zone; if that does not happen, see to the transfer of the zone to those"
                " that"
                " lag behind (raise its serial).",
            )  # fmt: skip
        failing = [one for one in look.name_servers if one.outcome is not Outcome.ANSWERS]
        if failing and len(failing) < len(look.name_servers):
            said = "; ".join(f"{one.name or one.address}: {one.outcome}" for one in failing[:_SHOWN])
            yield Finding(
                Code.NAME_SERVER_FAILS, Severity.WARNING,
                f"{len(failing)} of {len(look.name_servers)} name servers of {look.zone} give no answer for it"
                f" ({said}).",
                f"Repair them, or have the registrar of {look.zone} remove them: a CA that meets one may fail.",
            )  # fmt: skip

    def _view_points_here(self, view: View) -> bool:
        if view.cname:
            return view.cname == self.wanted.cname_target or (self.points_here and view.cname == self.look.cname)
        return all(map(self.is_ours, view.values))

    def of_challenge(self) -> Iterator[Finding]:
        """_acme-challenge: whether DNS-01 can be answered."""
        wanted, answer, name = self.wanted, self.look.challenge, self.challenge_name
        needed = Severity.ERROR if self.is_wildcard else Severity.WARNING
        if self.is_wildcard and not wanted.has_dns_01:
            yield Finding(
                Code.WILDCARD_NEEDS_DNS_01, Severity.ERROR,
                f"A certificate for {self.host} is given out for a DNS-01 challenge only, and this node cannot set TXT"
                " records.",
                "Set [certs.dns] in its configuration, or import a certificate, or add the names one by one.",
            )  # fmt: skip
        if not answer.is_known:
            if wanted.has_dns_01 and (self.look.a.is_known or self.look.aaaa.is_known):
                yield Finding(
                    Code.CHALLENGE_UNKNOWN, needed, f"{name} cannot be looked up ({answer.outcome}: {answer.detail}).",
                    f"Have the name servers of {self._zone_of(answer)} repaired: a CA asks them for TXT records there.",
                )  # fmt: skip
            return
        if wanted.has_dns_01 and wanted.challenge_target and not self._is_delegated:
            records = (Record("CNAME", name, wanted.challenge_target),)
            if answer.chain:
                yield Finding(
                    Code.CHALLENGE_CNAME_WRONG, needed,
                    f"{name} is a CNAME of {answer.chain[0]}, where this node cannot put the proof.",
                    "Replace it.", records, (Record("CNAME", name, answer.chain[0]),),
                )  # fmt: skip
            elif self.is_wildcard:
                yield Finding(
                    Code.CHALLENGE_CNAME_MISSING, needed,
                    f"{name} is not a CNAME of {wanted.challenge_target}, so this node cannot prove {self.host}.",
                    "Add the CNAME" + (" in place of the TXT record there." if answer.values else "."), records,
                    tuple(Record("TXT", name, one) for one in answer.values),
                )  # fmt: skip
                return
        stale = tuple(one for one in answer.values if one not in wanted.challenge_values)
        if stale:
            end = answer.chain[-1] if answer.chain else name
            yield Finding(
                Code.CHALLENGE_LEFTOVER, Severity.INFO,
                f"{end} holds {len(stale)} TXT record{'s' * (len(stale) > 1)} that no order of this node asked for.",
                "If no other program is about to use them, delete them.", (),
                tuple(Record("TXT", end, one) for one in stale),
            )  # fmt: skip

    def of_caa(self) -> Iterator[Finding]:
        """What CAA says to the CA."""
        found, wanted = self.look.caa, self.wanted
        if not wanted.caa_identities:
            return
        if found.outcome not in (Outcome.ANSWERS, Outcome.NO_DATA):
            if self.look.a.is_known or self.look.aaaa.is_known:
                yield Finding(
                    Code.CAA_UNKNOWN, Severity.ERROR,
                    f"CAA of {found.found_at} cannot be looked up ({found.outcome}: {found.detail}); a CA must not"
                    f" issue"
                    " then.",
                    "Have its name servers repaired: they must say so when there is no such record.",
                )  # fmt: skip
            return
        methods = [one for one in wanted.challenge_types if one != "dns-01"] if not self.is_wildcard else []
        if self.dns_01_works or self.is_wildcard:
            methods.append("dns-01")
        ruling = caa.judge(found.records, self.is_wildcard, wanted.caa_identities, wanted.account_uri, methods)
        at = found.chain[-1] if found.chain else found.found_at
        where = at if at == self.look.base else f"{at} (it holds for {self.host})"
        issuer = wanted.caa_identities[0]
        shown = f'{ruling.record.tag} "{ruling.record.value}"' if ruling.record else ""
        match ruling.verdict:
            case caa.Verdict.PERMITTED:
                return
            case caa.Verdict.ISSUER:
                yield Finding(
                    Code.CAA_FORBIDS, Severity.ERROR,
                    f"CAA of {where} forbids {issuer} to issue ({shown}).",
                    f"Let {issuer} issue as well.", (Record("CAA", at, f'0 {ruling.tag} "{issuer}"'),),
                )  # fmt: skip
            case caa.Verdict.ACCOUNT:
                value = f'0 {ruling.tag} "{issuer}; accounturi={wanted.account_uri}"'
                yield Finding(
                    Code.CAA_ACCOUNT, Severity.ERROR,
                    f"CAA of {where} lets {issuer} issue to another account only ({shown}).",
                    "Let it issue to this node's account as well.", (Record("CAA", at, value),),
                )  # fmt: skip
            case caa.Verdict.METHOD:
                value = f'0 {ruling.tag} "{issuer}; validationmethods={",".join(methods)}"'
                yield Finding(
                    Code.CAA_METHOD, Severity.ERROR,
                    f"CAA of {where} lets {issuer} issue only by challenges that this node does not use ({shown}).",
                    f"Allow one of {', '.join(methods) or 'its challenges'}.", (Record("CAA", at, value),),
                )  # fmt: skip
            case caa.Verdict.CRITICAL:
                record = ruling.record
                removed = (
                    () if record is None else (Record("CAA", at, f'{record.flags} {record.tag} "{record.value}"'),)
                )
                yield Finding(
                    Code.CAA_CRITICAL, Severity.ERROR,
                    f"A CAA record of {where} is marked critical and of a kind that CAs do not know ({shown}): none may"
                    " issue.",
                    "Delete it, or clear its critical flag.", (), removed,
                )  # fmt: skip

    def of_ports(self) -> Iterator[Finding]:
        """Whether any challenge that is switched on can work."""
        wanted = self.wanted
        if self.is_wildcard or self.dns_01_works:
            return
        faults = []
        for kind, port, listens in (
            ("http-01", 80, wanted.listens_http),
            ("tls-alpn-01", 443, wanted.listens_https),
        ):
            if kind in wanted.challenge_types:
                if listens:
                    return
                faults.append(f"{kind.upper()} needs port {port}, which this node does not listen on")
            else:
                faults.append(f"{kind.upper()} is switched off")
        faults.append(
            "DNS-01 is not set up" if not wanted.has_dns_01 else f"DNS-01 needs a CNAME at {self.challenge_name}"
        )
        yield Finding(
            Code.NO_CHALLENGE, Severity.ERROR, f"No challenge can be answered for {self.host}: {'; '.join(faults)}.",
            "Listen on port 80 or 443 ([listen]), or set up DNS-01 ([certs.dns]).",
            tuple(filter(None, (self.requirements.challenge,))),
        )  # fmt: skip

    def of_ca(self) -> Iterator[Finding]:
        """What the CA said."""
        wanted = self.wanted
        if self.now < wanted.rate_limited_until:
            until = datetime.datetime.fromtimestamp(wanted.rate_limited_until, datetime.UTC)
            yield Finding(
                Code.RATE_LIMITED, Severity.WARNING,
                f"No certificate is asked for {self.host} before {until:%Y-%m-%d %H:%M:%S} UTC: a rate limit is"
                f" reached.",
                "Wait; it is tried again by itself then.",
            )  # fmt: skip
        if (problem := wanted.last_problem) is not None:
            yield Finding(
                Code.CA_FAILED, Severity.WARNING, f"The last try failed ({problem.kind}): {problem.detail}",
                _HINTS.get(problem.kind, "It is tried again by itself; put right what is said above, if anything is."),
            )  # fmt: skip

    def of_ownership(self) -> Iterator[Finding]:
        """Whether the domain's owner has said that the name is this app's."""
        record = self.ownership_record
        if record is None:
            return
        others = [one for one in _owners(self.look.ownership) if one != record.value]
        if self.proof is None and others:
            yield Finding(
                Code.OWNERSHIP_OTHER, Severity.WARNING,
                f"{record.name} names another owner ({_some(others)}), not {record.value}.",
                "If this app is to have the name, let the TXT record name it too (several are joined by ;).", (record,),
            )  # fmt: skip
        elif self.proof is None:
            yield Finding(
                Code.OWNERSHIP_MISSING, Severity.INFO, f"Nothing in DNS shows that {self.host} is this app's.",
                "Point the name here, or add the TXT record: an imported certificate is served only then.", (record,),
            )  # fmt: skip


_HINTS = {
    "connection": "The CA could not connect: see whether a firewall or a provider's filter keeps it from port 80 or"
    " 443,"
    " over IPv6 too.",
    "dns": "The CA's resolver got no answer: see to the domain's name servers and to DNSSEC.",
    "unauthorized": "Something other than this node answered the CA: see where the name points, IPv6 and proxies"
    " included.",
    "incorrectResponse": "Something other than this node answered the CA: see where the name points, IPv6 and proxies"
    " included.",
    "tls": "The CA's TLS handshake failed: something before this node ends TLS itself. Use HTTP-01, or point straight"
    " here.",
    "caa": "CAA records forbid it; if they were just changed, caches have to forget the old ones first.",
    "rateLimited": "Wait; it is tried again by itself.",
    "rejectedIdentifier": "The CA does not issue for this name: use another CA, or another name.",
}


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _owners(answer: Answer) -> tuple[str, ...]:
    """Values of TXT records at _fly-ownership, which may be joined by semicolons."""
    return tuple(one.strip() for value in answer.values for one in value.split(";") if one.strip())


def _any_of(seen: Iterable[str], ours: Iterable[str]) -> bool:
    return bool({ipaddress.ip_address(one) for one in seen} & {ipaddress.ip_address(one) for one in ours})


def _address_record(name: str, address: str) -> Record:
    return Record("AAAA" if ":" in address else "A", name, address)


def _is_private(address: str) -> bool:
    one = ipaddress.ip_address(address)
    return any(one in network for network in _PRIVATE)


def _some(values: Iterable[str]) -> str:
    listed = list(values)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return (", ".join(listed[:_SHOWN]) or "none known") + more


def _said(view: View) -> str:
    if view.outcome is not Outcome.ANSWERS:
        return "there is none"
    return f"CNAME {view.cname}" if view.cname else _some(view.values)


def _serials(servers: Iterable[NameServer]) -> str:
    serials = {one.serial for one in servers if one.serial is not None}
    return f" (serials {', '.join(map(str, sorted(serials)))})" if len(serials) > 1 else ""

"""Looks at DNS as a certificate authority would: the authoritative servers are asked, not what a cache remembers.

From the root's servers down, as far as the zone of the name; then all servers of that zone, since a CA may meet any of
them. Where that way is closed, or there is a DNS of one's own, `servers` names resolvers that are asked everything.

The net's answers are hostile until shown otherwise. One look has a bound in questions, time, CNAMEs and servers;
referrals must lead downwards, extra records are taken only from who is in charge of them, and (but for `servers`) no
question goes to an address that is not public, so that nobody's NS records make us knock on doors of our own network.
Nothing is believed for being signed; but that a zone's signatures are broken is told.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.ANY.CAA
import dns.rdtypes.ANY.SOA
import dns.rdtypes.ANY.TXT
import dns.rrset
from dns.rdatatype import RdataType

from certs import dnssec
from certs.dns_message import follow, referral, signed_set, text_of, texts
from certs.dns_question import Reply, Server, parse_server
from certs.dns_walk import Walk, WalkFailed, Ways, Zone
from certs.errors import LookupFailedError, NameRefusedError
from certs.look import Answer, CaaRecord, CaaSet, Look, NameServer, Outcome, View

# The root's servers, IPv4 and IPv6. Source: IANA, "Root Servers" (named.root).
ROOTS = (
    "198.41.0.4", "170.247.170.2", "192.33.4.12", "199.7.91.13", "192.203.230.10", "192.5.5.241", "192.112.36.4",
    "198.97.190.53", "192.36.148.17", "192.58.128.30", "193.0.14.129", "199.7.83.42", "202.12.27.33",
    "2001:503:ba3e::2:30", "2801:1b8:10::b", "2001:500:2::c", "2001:500:2d::d", "2001:500:2f::f", "2001:7fe::53",
    "2001:503:c27::2:30", "2001:7fd::1", "2001:500:9f::42", "2001:dc3::35",
)  # fmt: skip

_T = TypeVar("_T")


class Resolver:
    """Asks DNS. Blocking, for threads; it may be used in several at once."""

    def __init__(
        self, servers: Sequence[str] = (), timeout_s: float = 3.0, *, total_s: float = 8.0, questions_most: int = 160,
        roots: Sequence[str] = ROOTS, port: int = 53, is_public_only: bool = True,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`servers`, each "IP:PORT", are asked everything; without them the way leads from `roots`, all at `port`.

        `timeout_s` bounds one question, `total_s` a look. `is_public_only` False lets name servers have addresses of a
        private network. `now` gives unix seconds, to judge signatures by. Raises ValueError for a server or root
        that is not an address.
        """
        self._ways = Ways(
            given=tuple(parse_server(one) for one in servers),
            roots=tuple(Server(str(ipaddress.ip_address(one)), port, "root server") for one in roots),
            timeout_s=timeout_s,
            total_s=total_s,
            questions_most=questions_most,
            port=port,
            is_public_only=is_public_only,
        )
        self._now = now

    def look(self, hostname: str) -> Look:
        """All that a certificate for the name depends on. `hostname` is as certs.names.normalise gives it.

        Raises nothing for what DNS says or fails to say: that is in the Look. Raises NameRefusedError if it cannot be a
        name in DNS.
        """
        return self._run(hostname, lambda walk, at: _look(walk, at, self._now))

    def addresses(self, name: str) -> tuple[str, ...]:
        """IPv4 and IPv6 addresses of a name, CNAMEs followed; () if there are none. Raises LookupFailedError."""

        async def both(walk: Walk, at: dns.name.Name) -> tuple[Answer, Answer]:
            a, aaaa = await asyncio.gather(walk.resolve(at, RdataType.A), walk.resolve(at, RdataType.AAAA))
            return a, aaaa

        a, aaaa = self._run(name, both)
        return _values(a) + _values(aaaa)

    def txt(self, name: str) -> tuple[str, ...]:
        """TXT values at a name, CNAMEs followed; () if there are none. Raises LookupFailedError if DNS fails."""
        return _values(self._run(name, lambda walk, at: walk.resolve(at, RdataType.TXT)))

    def cname_end(self, name: str) -> str:
        """Where the CNAMEs from this name end: the name itself if there are none. Raises LookupFailedError."""
        answer = self._run(name, lambda walk, at: walk.resolve(at, RdataType.TXT))
        if answer.outcome is Outcome.LOOP or (not answer.is_known and not answer.chain):
            raise LookupFailedError(answer.outcome, f"cannot follow the CNAMEs of {name}: {answer.detail}")
        return answer.chain[-1] if answer.chain else name

    def zone(self, name: str) -> str:
        """The apex of the zone that the name is in, or would be. Raises LookupFailedError."""
        apex, answer = self._run(name, lambda walk, at: walk.apex(at))
        if apex is None:
            detail = f"cannot find the zone of {name}: {answer.detail or answer.outcome}"
            raise LookupFailedError(answer.outcome, detail)
        return text_of(apex)

    def is_visible(self, name: str, value: str) -> bool:
        """Whether every server of the zone that answers at all has this TXT value at the name, and at least one does.

        CNAMEs are followed. A server that is dead or lame is passed over, as a CA's resolver would. Raises
        LookupFailedError if none answers.
        """
        return self._run(name, lambda walk, at: _is_visible(walk, at, value))

    def _run(self, name: str, work: Callable[[Walk, dns.name.Name], Awaitable[_T]]) -> _T:
        try:
            at = dns.name.from_text(name).canonicalize()
        except (dns.exception.DNSException, UnicodeError) as error:
            raise NameRefusedError(f"{name[:80]!r} is not a name in DNS: {error}") from error

        async def main() -> _T:
            return await work(Walk(self._ways), at)

        # a plain loop whatever the process has elsewhere: the looks of many threads want no more of it
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(main())


# --- what a look asks


async def _look(walk: Walk, host: dns.name.Name, now: Callable[[], float]) -> Look:
    base = dns.name.Name(host[1:]) if host[0] == b"*" else host
    apex, seen = await walk.apex(host)
    above = None
    if apex is not None and seen.outcome is Outcome.NXDOMAIN:
        above = apex
    zone = await walk.servers_of(apex) if apex is not None else None
    (a, aaaa, ownership, challenge, soa), caa, servers, a_views, aaaa_views, fault = await asyncio.gather(
        asyncio.gather(
            walk.resolve(host, RdataType.A),
            walk.resolve(host, RdataType.AAAA),
            _resolve_under(walk, "_fly-ownership", base),
            _resolve_under(walk, "_acme-challenge", base),
            walk.resolve(apex, RdataType.SOA) if apex is not None else _nothing(),
        ),
        _climb(walk, base),
        _name_servers(walk, zone),
        _views(walk, zone, host, RdataType.A),
        _views(walk, zone, host, RdataType.AAAA),
        _dnssec_fault(walk, zone, now),
    )
    return Look(
        hostname=text_of(host),
        a=a,
        aaaa=aaaa,
        ownership=ownership,
        challenge=challenge,
        caa=caa,
        zone=None if apex is None else text_of(apex),
        soa=soa.values[0] if soa.values else "",
        nxdomain_above=None if above is None else text_of(above),
        name_servers=servers,
        dnssec_fault=fault,
        a_views=a_views,
        aaaa_views=aaaa_views,
        cname_neighbours=await _neighbours(walk, zone, host, a, apex),
        is_authoritative=not walk.is_given,
        asked=tuple(map(str, zone.servers if zone is not None else walk.ways.given)),
        questions=walk.questions,
    )


async def _nothing() -> Answer:
    return Answer("", "SOA", Outcome.NO_DATA)


async def _resolve_under(walk: Walk, label: str, base: dns.name.Name) -> Answer:
    try:
        name = dns.name.from_text(label, None).concatenate(base)
    except dns.name.NameTooLong:
        return Answer(f"{label}.{text_of(base)}", "TXT", Outcome.NO_DATA, detail="longer than a name may be")
    return await walk.resolve(name, RdataType.TXT)


async def _climb(walk: Walk, base: dns.name.Name) -> CaaSet:
    """RFC 8659 §3: the name itself and those above it, until one has CAA records; each may be a CNAME."""
    names = []
    while base != dns.name.root:
        names.append(base)
        base = base.parent()
    answers = await asyncio.gather(*(walk.resolve(name, RdataType.CAA) for name in names))
    for answer in answers:
        if answer.outcome is Outcome.ANSWERS:
            records = tuple(filter(None, map(_caa, answer.values)))
            return CaaSet(Outcome.ANSWERS, answer.name, answer.chain, records, answer.detail)
        if not answer.is_known:
            return CaaSet(answer.outcome, answer.name, answer.chain, (), answer.detail)
    return CaaSet()


async def _name_servers(walk: Walk, zone: Zone | None) -> tuple[NameServer, ...]:
    if zone is None:
        return ()
    replies = await asyncio.gather(*(walk.ask(server, zone.apex, RdataType.SOA) for server in zone.servers))
    found = []
    for server, raw in zip(zone.servers, replies, strict=True):
        reply = walk.usable(raw, zone, zone.apex)
        serial = None
        if reply.message is not None:
            rrset, _ = follow(reply.message, zone.apex, RdataType.SOA, None)
            serial = next((one.serial for one in rrset or () if isinstance(one, dns.rdtypes.ANY.SOA.SOA)), None)
            if serial is None and not walk.is_given:
                reply = Reply(Outcome.LAME, detail="it has no SOA for the zone")
        found.append(NameServer(server.name, server.address, reply.outcome, serial, reply.detail))
    found += [NameServer(name, "", Outcome.UNREACHABLE, None, "no address to ask") for name in zone.unresolved]
    return tuple(found)


async def _views(walk: Walk, zone: Zone | None, host: dns.name.Name, rdtype: RdataType) -> tuple[View, ...]:
    if zone is None:
        return ()
    replies = await asyncio.gather(*(walk.ask(server, host, rdtype) for server in zone.servers))
    views = []
    for server, raw in zip(zone.servers, replies, strict=True):
        reply = walk.usable(raw, zone, host)
        if reply.message is None or referral(reply.message, zone.apex, host) is not None:
            continue
        rrset, steps = follow(reply.message, host, rdtype, None)
        outcome = Outcome.NXDOMAIN if reply.message.rcode() == dns.rcode.NXDOMAIN and not steps else Outcome.NO_DATA
        views.append(
            View(
                str(server),
                Outcome.ANSWERS if rrset is not None or steps else outcome,
                texts(rrset) if rrset is not None and not steps else (),
                text_of(steps[0]) if steps else "",
            )
        )
    return tuple(views)


async def _neighbours(
    walk: Walk, zone: Zone | None, host: dns.name.Name, a: Answer, apex: dns.name.Name | None
) -> tuple[str, ...]:
    """Records beside a CNAME, where there may be none (RFC 1034 §3.6.2). Most servers refuse such; a few serve them."""
    if zone is None or not a.chain:
        return ()
    if host == apex:
        return ("SOA", "NS")
    types = (RdataType.MX, RdataType.TXT)
    replies = await asyncio.gather(*(walk.ask_zone(zone, host, rdtype) for rdtype in types))
    beside = []
    for rdtype, (reply, _) in zip(types, replies, strict=True):
        if reply.message is not None and reply.message.get_rrset(reply.message.answer, host, dns.rdataclass.IN, rdtype):
            beside.append(rdtype.name)
    return tuple(beside)


async def _dnssec_fault(walk: Walk, zone: Zone | None, now: Callable[[], float]) -> str:
    """What is wrong with the zone's signatures. A resolver that was given judges that itself, and fails."""
    if zone is None or walk.is_given or zone.apex == dns.name.root:
        return ""
    try:
        _, reply, _ = await walk.descend(zone.apex, RdataType.DS)
    except WalkFailed:
        return ""
    ds = None if reply.message is None else signed_set(reply.message, zone.apex, RdataType.DS)[0]
    if ds is None:
        return ""
    (keys, _), (soa, _) = await asyncio.gather(
        walk.ask_zone(zone, zone.apex, RdataType.DNSKEY, is_signed=True),
        walk.ask_zone(zone, zone.apex, RdataType.SOA, is_signed=True),
    )
    if keys.message is None or soa.message is None:
        return ""
    signed = signed_set(soa.message, zone.apex, RdataType.SOA)
    return dnssec.fault(ds, signed_set(keys.message, zone.apex, RdataType.DNSKEY), (signed,), now())


async def _is_visible(walk: Walk, name: dns.name.Name, value: str) -> bool:
    answer = await walk.resolve(name, RdataType.TXT)
    if value not in _values(answer):
        return False
    end = dns.name.from_text(answer.chain[-1]).canonicalize() if answer.chain else name
    apex, _ = await walk.apex(end)
    if apex is None:
        return walk.is_given  # its servers were asked already, as one
    zone = await walk.servers_of(apex)
    replies = await asyncio.gather(*(walk.ask(server, end, RdataType.TXT) for server in zone.servers))
    seen = 0
    for raw in replies:
        reply = walk.usable(raw, zone, end)
        if reply.message is None:
            continue
        rrset, _ = follow(reply.message, end, RdataType.TXT, None)
        if rrset is None or value not in texts(rrset):
            return False
        seen += 1
    return seen > 0


def _caa(text: str) -> CaaRecord | None:
    """From the form in zone files: `0 issue "ca.example"`."""
    flags, tag, value = text.split(" ", 2)
    return CaaRecord(int(flags), tag.lower(), value.strip('"'))


def _values(answer: Answer) -> tuple[str, ...]:
    if not answer.is_known:
        raise LookupFailedError(answer.outcome, f"{answer.name} {answer.type}: {answer.detail or answer.outcome}")
    return answer.values

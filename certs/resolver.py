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
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
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
from certs.dns_question import Reply, Server, ask, parse_server, printable
from certs.errors import LookupFailedError, NameRefusedError
from certs.look import Answer, CaaRecord, CaaSet, Look, NameServer, Outcome, View

# The root's servers, IPv4 and IPv6. Source: IANA, "Root Servers" (named.root).
ROOTS = (
    "198.41.0.4", "170.247.170.2", "192.33.4.12", "199.7.91.13", "192.203.230.10", "192.5.5.241", "192.112.36.4",
    "198.97.190.53", "192.36.148.17", "192.58.128.30", "193.0.14.129", "199.7.83.42", "202.12.27.33",
    "2001:503:ba3e::2:30", "2801:1b8:10::b", "2001:500:2::c", "2001:500:2d::d", "2001:500:2f::f", "2001:7fe::53",
    "2001:503:c27::2:30", "2001:7fd::1", "2001:500:9f::42", "2001:dc3::35",
)  # fmt: skip

HOPS_MOST = 8  # CNAMEs; Unbound and BIND stop at 11 and 16
_DEPTH_MOST = 3  # name servers whose names need servers whose names need servers
_REFERRALS_MOST = 12
_SERVERS_MOST = 8  # name servers of one zone that are asked
_VALUES_MOST = 64  # records of one set that are kept
_TEXT_MOST = 1024  # characters of one of them
_HEDGE_S = 0.4  # after which a second server is asked as well
_AT_ONCE = 16  # questions under way
_REMEMBERED_S = 1800.0  # referrals of the root
_REMEMBERED_MOST = 256

_T = TypeVar("_T")
_FAILS = (
    Outcome.BOGUS,
    Outcome.SERVFAIL,
    Outcome.REFUSED,
    Outcome.LAME,
    Outcome.MALFORMED,
    Outcome.TIMEOUT,
    Outcome.GAVE_UP,
    Outcome.UNREACHABLE,
)  # of several servers' failures, what tells most


@dataclass(frozen=True, slots=True)
class _Zone:
    """A zone and who serves it, as its parent says."""

    apex: dns.name.Name
    servers: tuple[Server, ...]
    unresolved: tuple[str, ...] = ()  # names of servers without an address that may be asked
    unsure: tuple[dns.name.Name, ...] = ()  # names of servers whose addresses have not been looked for

    @property
    def text(self) -> str:
        return _text(self.apex)


class _Failed(Exception):
    """No server of a zone on the way gave an answer that leads on."""

    def __init__(self, outcome: Outcome, detail: str, zone: _Zone) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail
        self.zone = zone


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
        self._given = tuple(parse_server(one) for one in servers)
        self._roots = tuple(Server(str(ipaddress.ip_address(one)), port, "root server") for one in roots)
        self._timeout_s = timeout_s
        self._total_s = total_s
        self._questions_most = questions_most
        self._port = port
        self._is_public_only = is_public_only
        self.now = now
        self._remembered: dict[dns.name.Name, tuple[float, _Zone]] = {}

    def look(self, hostname: str) -> Look:
        """All that a certificate for the name depends on. `hostname` is as certs.names.normalise gives it.

        Raises nothing for what DNS says or fails to say: that is in the Look. Raises NameRefusedError if it cannot be a
        name in DNS.
        """
        return self._run(hostname, _look)

    def addresses(self, name: str) -> tuple[str, ...]:
        """IPv4 and IPv6 addresses of a name, CNAMEs followed; () if there are none. Raises LookupFailedError."""

        async def both(run: _Run, at: dns.name.Name) -> tuple[Answer, Answer]:
            a, aaaa = await asyncio.gather(run.resolve(at, RdataType.A), run.resolve(at, RdataType.AAAA))
            return a, aaaa

        a, aaaa = self._run(name, both)
        return _values(a) + _values(aaaa)

    def txt(self, name: str) -> tuple[str, ...]:
        """TXT values at a name, CNAMEs followed; () if there are none. Raises LookupFailedError if DNS fails."""
        return _values(self._run(name, lambda run, at: run.resolve(at, RdataType.TXT)))

    def cname_end(self, name: str) -> str:
        """Where the CNAMEs from this name end: the name itself if there are none. Raises LookupFailedError."""
        answer = self._run(name, lambda run, at: run.resolve(at, RdataType.TXT))
        if answer.outcome is Outcome.LOOP or (not answer.is_known and not answer.chain):
            raise LookupFailedError(answer.outcome, f"cannot follow the CNAMEs of {name}: {answer.detail}")
        return answer.chain[-1] if answer.chain else name

    def zone(self, name: str) -> str:
        """The apex of the zone that the name is in, or would be. Raises LookupFailedError."""
        apex, answer = self._run(name, lambda run, at: run.apex(at))
        if apex is None:
            detail = f"cannot find the zone of {name}: {answer.detail or answer.outcome}"
            raise LookupFailedError(answer.outcome, detail)
        return _text(apex)

    def is_visible(self, name: str, value: str) -> bool:
        """Whether every server of the zone that answers at all has this TXT value at the name, and at least one does.

        CNAMEs are followed. A server that is dead or lame is passed over, as a CA's resolver would. Raises
        LookupFailedError if none answers.
        """
        return self._run(name, lambda run, at: _is_visible(run, at, value))

    def _run(self, name: str, work: Callable[[_Run, dns.name.Name], Awaitable[_T]]) -> _T:
        try:
            at = dns.name.from_text(name).canonicalize()
        except (dns.exception.DNSException, UnicodeError) as error:
            raise NameRefusedError(f"{name[:80]!r} is not a name in DNS: {error}") from error

        async def main() -> _T:
            return await work(_Run(self), at)

        # a plain loop whatever the process has elsewhere: the looks of many threads want no more of it
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(main())

    def start(self, families: frozenset[int]) -> _Zone:
        """Where to begin: the root, or the servers that were given."""
        if self._given:
            return _Zone(dns.name.root, self._given)
        roots = [one for one in self._roots if _family(one.address) in families]
        return _Zone(dns.name.root, tuple(random.sample(roots, len(roots)))[:4])

    def remembered(self, name: dns.name.Name, now: float) -> _Zone | None:
        """A zone just below the root that the name is in, if one was met of late."""
        if len(name) < 2:
            return None
        until, zone = self._remembered.get(dns.name.Name(name[-2:]), (0.0, None))
        return zone if now < until else None

    def remember(self, zone: _Zone, now: float) -> None:
        if len(zone.apex) == 2 and zone.servers:
            if len(self._remembered) >= _REMEMBERED_MOST:
                self._remembered.clear()
            self._remembered[zone.apex] = (now + _REMEMBERED_S, zone)


@dataclass(slots=True)
class _Run:
    """One look's bounds and memory."""

    resolver: Resolver
    questions: int = 0
    until: float = 0.0
    families: frozenset[int] = frozenset()
    zones: dict[dns.name.Name, asyncio.Future[_Zone]] = field(default_factory=dict)
    replies: dict[tuple[Server, dns.name.Name, RdataType, bool], asyncio.Future[Reply]] = field(default_factory=dict)
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    def __post_init__(self) -> None:
        self.until = asyncio.get_running_loop().time() + self.resolver._total_s
        addresses = [server.address for server in self.resolver._given or self.resolver._roots]
        self.families = frozenset(family for family in map(_family, addresses) if _has_route(family, addresses))

    @property
    def is_given(self) -> bool:
        return bool(self.resolver._given)

    def left_s(self) -> float:
        return max(0.0, self.until - asyncio.get_running_loop().time())

    # --- one server

    async def ask(self, server: Server, name: dns.name.Name, rdtype: RdataType, is_signed: bool = False) -> Reply:
        """One question to one server; asked twice it is sent once."""
        key = (server, name, rdtype, is_signed)
        if (known := self.replies.get(key)) is None:
            known = self.replies[key] = asyncio.ensure_future(self._ask(server, name, rdtype, is_signed))
        return await asyncio.shield(known)

    async def _ask(self, server: Server, name: dns.name.Name, rdtype: RdataType, is_signed: bool) -> Reply:
        async with self.turns:
            if self.questions >= self.resolver._questions_most:
                return Reply(Outcome.GAVE_UP, detail=f"after {self.questions} questions")
            timeout_s = min(self.resolver._timeout_s, self.left_s())
            if timeout_s <= 0:
                return Reply(Outcome.GAVE_UP, detail=f"after {self.resolver._total_s:.0f} s")
            self.questions += 1
            reply = await ask(server, name, rdtype, timeout_s, recurse=self.is_given, is_signed=is_signed)
            if reply.outcome is Outcome.SERVFAIL and self.is_given:
                reply = await self._without_dnssec(server, name, rdtype, reply)
            return reply

    async def _without_dnssec(self, server: Server, name: dns.name.Name, rdtype: RdataType, reply: Reply) -> Reply:
        """A resolver that fails, but not if it need not validate, found DNSSEC broken (RFC 4035 §3.2.2)."""
        self.questions += 1
        timeout_s = max(0.05, min(self.resolver._timeout_s, self.left_s()))
        again = await ask(server, name, rdtype, timeout_s, recurse=True, check_dnssec=False)
        if again.message is None:
            return reply
        return replace(reply, outcome=Outcome.BOGUS, detail=f"{reply.detail}, but not with DNSSEC left unchecked")

    def usable(self, reply: Reply, zone: _Zone, name: dns.name.Name) -> Reply:
        """The reply, or what is wrong with it as one of a server of this zone."""
        message = reply.message
        if message is None:
            if reply.outcome is Outcome.REFUSED and not self.is_given and zone.apex != dns.name.root:
                return replace(reply, outcome=Outcome.LAME)
            return reply
        if self.is_given or message.flags & dns.flags.AA or _referral(message, zone.apex, name) is not None:
            return reply
        return Reply(Outcome.LAME, detail="it answers, but not as one that has the zone")

    # --- one zone

    async def ask_zone(
        self, zone: _Zone, name: dns.name.Name, rdtype: RdataType, is_signed: bool = False
    ) -> tuple[Reply, Server | None]:
        """The first usable reply of a zone's servers, each asked when the one before it is slow or failed."""
        if not zone.servers:
            of = zone.text or "the root"
            return Reply(Outcome.UNREACHABLE, detail=f"no name server of {of} has an address to ask"), None
        queue = list(zone.servers)
        running: dict[asyncio.Task[Reply], Server] = {}
        failed: list[tuple[Reply, Server]] = []
        try:
            while queue or running:
                if queue:
                    server = queue.pop(0)
                    running[asyncio.create_task(self._ask_one(server, name, rdtype, zone, is_signed))] = server
                done, _ = await asyncio.wait(
                    running, timeout=_HEDGE_S if queue else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    server = running.pop(task)
                    reply = task.result()
                    if reply.message is not None:
                        return reply, server
                    failed.append((reply, server))
        finally:
            for task in running:
                task.cancel()
        reply, server = min(failed, key=lambda one: _FAILS.index(one[0].outcome))
        return reply, server

    async def _ask_one(
        self, server: Server, name: dns.name.Name, rdtype: RdataType, zone: _Zone, is_signed: bool
    ) -> Reply:
        return self.usable(await self.ask(server, name, rdtype, is_signed), zone, name)

    # --- the way down

    async def descend(self, name: dns.name.Name, rdtype: RdataType, depth: int = 0) -> tuple[_Zone, Reply, Server]:
        """Ask for a record from the root downwards: the zone whose servers answered, and their reply.

        Raises _Failed.
        """
        # what is delegated, and by which keys it is signed, is the parent's to say (RFC 4035 §3.1.4.1)
        zone = self._nearest(name.parent() if rdtype == RdataType.DS and name != dns.name.root else name)
        for _ in range(_REFERRALS_MOST):
            if zone.unsure:
                zone = await self._settled(zone, depth)
            reply, server = await self.ask_zone(zone, name, rdtype)
            if reply.message is None or server is None:
                raise _Failed(reply.outcome, reply.detail, zone)
            below = None if self.is_given else _referral(reply.message, zone.apex, name)
            if below is None:
                return zone, reply, server
            zone = self._below(zone, below, reply.message)
        raise _Failed(Outcome.GAVE_UP, f"after {_REFERRALS_MOST} referrals", zone)

    def _nearest(self, name: dns.name.Name) -> _Zone:
        """The deepest zone around the name that is known already."""
        at = name
        while True:
            known = self.zones.get(at)
            if known is not None and known.done() and not known.cancelled() and known.exception() is None:
                return known.result()
            if at == dns.name.root:
                break
            at = at.parent()
        remembered = self.resolver.remembered(name, asyncio.get_running_loop().time())
        return remembered or self.resolver.start(self.families)

    def _below(self, zone: _Zone, referral: dns.rrset.RRset, message: dns.message.Message) -> _Zone:
        """The zone that a referral leads to, with the addresses that its parent may know."""
        servers: list[Server] = []
        unresolved: list[str] = []
        unsure: list[dns.name.Name] = []
        for target in sorted(rdata.target.canonicalize() for rdata in referral)[:_SERVERS_MOST]:
            if not target.is_subdomain(zone.apex):
                unsure.append(target)  # its addresses are not this parent's to tell
                continue
            glue = _glue(message, target)
            if not glue:
                unsure.append(target)
            elif not (fit := self._server(target, glue)):
                unresolved.append(_text(target))
            else:
                servers.append(fit)
        found = _Zone(referral.name.canonicalize(), tuple(servers), tuple(unresolved), tuple(unsure))
        if not unsure:
            self._keep(found)
        return found

    def _server(self, target: dns.name.Name, addresses: Iterable[str]) -> Server | None:
        """The server at the first address that may be asked and that there is a way to; IPv4 first."""
        for address in sorted(addresses, key=lambda one: (":" in one, one)):
            if _family(address) not in self.families:
                continue
            if self.resolver._is_public_only and not _is_public(address):
                continue
            return Server(address, self.resolver._port, _text(target))
        return None

    async def _settled(self, zone: _Zone, depth: int) -> _Zone:
        """The zone with the addresses of all its servers looked for."""
        if depth:
            # never on another's way: two zones whose servers lie in each other would wait for ever
            return await self._settle(zone, depth)
        known = self.zones.get(zone.apex)
        if known is None:
            known = self.zones[zone.apex] = asyncio.ensure_future(self._settle(zone, depth))
        return await asyncio.shield(known)

    async def _settle(self, zone: _Zone, depth: int) -> _Zone:
        servers, unresolved = list(zone.servers), list(zone.unresolved)
        if depth >= _DEPTH_MOST:
            return replace(zone, unresolved=(*unresolved, *map(_text, zone.unsure)), unsure=())
        found = await asyncio.gather(*(self._addresses_of(target, depth + 1) for target in zone.unsure))
        for target, addresses in zip(zone.unsure, found, strict=True):
            if (server := self._server(target, addresses)) is not None:
                servers.append(server)
            else:
                unresolved.append(_text(target))
        return _Zone(zone.apex, tuple(servers), tuple(unresolved))

    async def _addresses_of(self, target: dns.name.Name, depth: int) -> tuple[str, ...]:
        wanted = RdataType.A if socket.AF_INET in self.families else RdataType.AAAA
        return (await self.resolve(target, wanted, depth)).values

    def _keep(self, zone: _Zone) -> None:
        future: asyncio.Future[_Zone] = asyncio.get_running_loop().create_future()
        future.set_result(zone)
        self.zones.setdefault(zone.apex, future)
        self.resolver.remember(zone, asyncio.get_running_loop().time())

    # --- whole answers

    async def resolve(self, name: dns.name.Name, rdtype: RdataType, depth: int = 0) -> Answer:
        """The records of a type at a name or where its CNAMEs end."""
        chain = [name]
        answer = Answer(_text(name), rdtype.name, Outcome.LOOP)
        while True:
            try:
                zone, reply, server = await self.descend(name, rdtype, depth)
            except _Failed as failed:
                answer = replace(answer, outcome=failed.outcome, detail=failed.detail, zone=failed.zone.text)
                # servers that walk CNAMEs themselves fail like this on a loop
                hop = await self._hop(name, depth) if failed.outcome is Outcome.SERVFAIL else None
                found, steps, is_end = None, [hop] if hop else [], hop is None
            else:
                assert reply.message is not None  # descend gives no other
                found, steps = _follow(reply.message, name, rdtype, None if self.is_given else zone.apex)
                is_gone = reply.message.rcode() == dns.rcode.NXDOMAIN
                is_end = found is not None or not steps or (is_gone and self.is_given)
                outcome = Outcome.NXDOMAIN if is_gone else Outcome.NO_DATA
                if found is not None:
                    outcome = Outcome.ANSWERS
                zone_text = "" if self.is_given else zone.text
                answer = replace(answer, outcome=outcome, detail=str(server), zone=zone_text)
            for step in steps:
                if step in chain:
                    detail = f"{_text(step)} is met again"
                    return replace(answer, outcome=Outcome.LOOP, chain=_names(chain), detail=detail)
                chain.append(step)
                if len(chain) > HOPS_MOST + 1:
                    detail = f"more than {HOPS_MOST} CNAMEs"
                    return replace(answer, outcome=Outcome.LOOP, chain=_names(chain), detail=detail)
            if is_end:
                return replace(answer, values=_texts(found) if found is not None else (), chain=_names(chain))
            name = steps[-1]

    async def _hop(self, name: dns.name.Name, depth: int) -> dns.name.Name | None:
        """The target of the CNAME at this very name."""
        try:
            _, reply, _ = await self.descend(name, RdataType.CNAME, depth)
        except _Failed:
            return None
        assert reply.message is not None  # descend gives no other
        found = reply.message.get_rrset(reply.message.answer, name, dns.rdataclass.IN, RdataType.CNAME)
        return None if found is None else found[0].target.canonicalize()

    async def apex(self, name: dns.name.Name) -> tuple[dns.name.Name | None, Answer]:
        """The zone that the name is in, by the SOA in answers or denials; the answer tells why there is none."""
        answer = Answer(_text(name), "SOA", Outcome.NO_DATA)
        try:
            zone, reply, server = await self.descend(name, RdataType.SOA)
        except _Failed as failed:
            cut = failed.zone.apex if failed.zone.apex != dns.name.root and not self.is_given else None
            return cut, replace(answer, outcome=failed.outcome, detail=failed.detail, zone=failed.zone.text)
        assert reply.message is not None  # descend gives no other
        _, steps = _follow(reply.message, name, RdataType.SOA, None)
        if steps and name != dns.name.root:
            found, _ = await self.apex(name.parent())  # a CNAME hides the SOA
        else:
            found = _soa_owner(reply.message, name)
        if not self.is_given and zone.apex != dns.name.root and (found is None or zone.apex.is_subdomain(found)):
            found = zone.apex  # as the parent has it
        if found is None:
            return None, replace(answer, detail=f"{server} names no zone for it")
        outcome = Outcome.NXDOMAIN if reply.message.rcode() == dns.rcode.NXDOMAIN and not steps else Outcome.ANSWERS
        return found, replace(answer, outcome=outcome, zone=_text(found))

    async def servers_of(self, apex: dns.name.Name) -> _Zone:
        """Who serves a zone, as its parent says."""
        if self.is_given:
            return _Zone(apex, self.resolver._given)
        try:
            await self.descend(apex, RdataType.SOA)
        except _Failed as failed:
            if failed.zone.apex == apex:
                return failed.zone
        zone = self._nearest(apex)
        return replace(zone, apex=apex)


# --- what a look asks


async def _look(run: _Run, host: dns.name.Name) -> Look:
    loop = asyncio.get_running_loop()
    began = loop.time()
    base = dns.name.Name(host[1:]) if host[0] == b"*" else host
    apex, seen = await run.apex(host)
    above = None
    if apex is not None and seen.outcome is Outcome.NXDOMAIN:
        above = apex
    zone = await run.servers_of(apex) if apex is not None else None
    (a, aaaa, ownership, challenge, soa), caa, servers, a_views, aaaa_views, fault = await asyncio.gather(
        asyncio.gather(
            run.resolve(host, RdataType.A),
            run.resolve(host, RdataType.AAAA),
            _resolve_under(run, "_fly-ownership", base),
            _resolve_under(run, "_acme-challenge", base),
            run.resolve(apex, RdataType.SOA) if apex is not None else _nothing(),
        ),
        _climb(run, base),
        _name_servers(run, zone),
        _views(run, zone, host, RdataType.A),
        _views(run, zone, host, RdataType.AAAA),
        _dnssec_fault(run, zone),
    )
    return Look(
        hostname=_text(host),
        a=a,
        aaaa=aaaa,
        ownership=ownership,
        challenge=challenge,
        caa=caa,
        zone=None if apex is None else _text(apex),
        soa=soa.values[0] if soa.values else "",
        nxdomain_above=None if above is None else _text(above),
        name_servers=servers,
        dnssec_fault=fault,
        a_views=a_views,
        aaaa_views=aaaa_views,
        cname_neighbours=await _neighbours(run, zone, host, a, apex),
        is_authoritative=not run.is_given,
        asked=tuple(map(str, zone.servers if zone is not None else run.resolver._given)),
        questions=run.questions,
        took_s=loop.time() - began,
    )


async def _nothing() -> Answer:
    return Answer("", "SOA", Outcome.NO_DATA)


async def _resolve_under(run: _Run, label: str, base: dns.name.Name) -> Answer:
    try:
        name = dns.name.from_text(label, None).concatenate(base)
    except dns.name.NameTooLong:
        return Answer(f"{label}.{_text(base)}", "TXT", Outcome.NO_DATA, detail="longer than a name may be")
    return await run.resolve(name, RdataType.TXT)


async def _climb(run: _Run, base: dns.name.Name) -> CaaSet:
    """RFC 8659 §3: the name itself and those above it, until one has CAA records; each may be a CNAME."""
    names = []
    while base != dns.name.root:
        names.append(base)
        base = base.parent()
    answers = await asyncio.gather(*(run.resolve(name, RdataType.CAA) for name in names))
    for answer in answers:
        if answer.outcome is Outcome.ANSWERS:
            records = tuple(filter(None, map(_caa, answer.values)))
            return CaaSet(Outcome.ANSWERS, answer.name, answer.chain, records, answer.detail)
        if not answer.is_known:
            return CaaSet(answer.outcome, answer.name, answer.chain, (), answer.detail)
    return CaaSet()


async def _name_servers(run: _Run, zone: _Zone | None) -> tuple[NameServer, ...]:
    if zone is None:
        return ()
    replies = await asyncio.gather(*(run.ask(server, zone.apex, RdataType.SOA) for server in zone.servers))
    found = []
    for server, raw in zip(zone.servers, replies, strict=True):
        reply = run.usable(raw, zone, zone.apex)
        serial = None
        if reply.message is not None:
            rrset, _ = _follow(reply.message, zone.apex, RdataType.SOA, None)
            serial = next((one.serial for one in rrset or () if isinstance(one, dns.rdtypes.ANY.SOA.SOA)), None)
            if serial is None and not run.is_given:
                reply = Reply(Outcome.LAME, detail="it has no SOA for the zone")
        found.append(NameServer(server.name, server.address, reply.outcome, serial, reply.detail))
    found += [NameServer(name, "", Outcome.UNREACHABLE, None, "no address to ask") for name in zone.unresolved]
    return tuple(found)


async def _views(run: _Run, zone: _Zone | None, host: dns.name.Name, rdtype: RdataType) -> tuple[View, ...]:
    if zone is None:
        return ()
    replies = await asyncio.gather(*(run.ask(server, host, rdtype) for server in zone.servers))
    views = []
    for server, raw in zip(zone.servers, replies, strict=True):
        reply = run.usable(raw, zone, host)
        if reply.message is None or _referral(reply.message, zone.apex, host) is not None:
            continue
        rrset, steps = _follow(reply.message, host, rdtype, None)
        outcome = Outcome.NXDOMAIN if reply.message.rcode() == dns.rcode.NXDOMAIN and not steps else Outcome.NO_DATA
        views.append(
            View(
                str(server),
                Outcome.ANSWERS if rrset is not None or steps else outcome,
                _texts(rrset) if rrset is not None and not steps else (),
                _text(steps[0]) if steps else "",
            )
        )
    return tuple(views)


async def _neighbours(
    run: _Run, zone: _Zone | None, host: dns.name.Name, a: Answer, apex: dns.name.Name | None
) -> tuple[str, ...]:
    """Records beside a CNAME, where there may be none (RFC 1034 §3.6.2). Most servers refuse such; a few serve them."""
    if zone is None or not a.chain:
        return ()
    if host == apex:
        return ("SOA", "NS")
    types = (RdataType.MX, RdataType.TXT)
    replies = await asyncio.gather(*(run.ask_zone(zone, host, rdtype) for rdtype in types))
    beside = []
    for rdtype, (reply, _) in zip(types, replies, strict=True):
        if reply.message is not None and reply.message.get_rrset(reply.message.answer, host, dns.rdataclass.IN, rdtype):
            beside.append(rdtype.name)
    return tuple(beside)


async def _dnssec_fault(run: _Run, zone: _Zone | None) -> str:
    """What is wrong with the zone's signatures. A resolver that was given judges that itself, and fails."""
    if zone is None or run.is_given or zone.apex == dns.name.root:
        return ""
    try:
        _, reply, _ = await run.descend(zone.apex, RdataType.DS)
    except _Failed:
        return ""
    ds = None if reply.message is None else _signed(reply.message, zone.apex, RdataType.DS)[0]
    if ds is None:
        return ""
    (keys, _), (soa, _) = await asyncio.gather(
        run.ask_zone(zone, zone.apex, RdataType.DNSKEY, is_signed=True),
        run.ask_zone(zone, zone.apex, RdataType.SOA, is_signed=True),
    )
    if keys.message is None or soa.message is None:
        return ""
    signed = _signed(soa.message, zone.apex, RdataType.SOA)
    return dnssec.fault(ds, _signed(keys.message, zone.apex, RdataType.DNSKEY), (signed,), run.resolver.now())


async def _is_visible(run: _Run, name: dns.name.Name, value: str) -> bool:
    answer = await run.resolve(name, RdataType.TXT)
    if value not in _values(answer):
        return False
    end = dns.name.from_text(answer.chain[-1]).canonicalize() if answer.chain else name
    apex, _ = await run.apex(end)
    if apex is None:
        return run.is_given  # its servers were asked already, as one
    zone = await run.servers_of(apex)
    replies = await asyncio.gather(*(run.ask(server, end, RdataType.TXT) for server in zone.servers))
    seen = 0
    for raw in replies:
        reply = run.usable(raw, zone, end)
        if reply.message is None:
            continue
        rrset, _ = _follow(reply.message, end, RdataType.TXT, None)
        if rrset is None or value not in _texts(rrset):
            return False
        seen += 1
    return seen > 0


# --- messages read


def _referral(message: dns.message.Message, apex: dns.name.Name, name: dns.name.Name) -> dns.rrset.RRset | None:
    """The NS records that lead from the zone at `apex` down towards the name; None if the message is no referral."""
    if message.answer or message.flags & dns.flags.AA or message.rcode() != dns.rcode.NOERROR:
        return None
    for rrset in message.authority:
        is_below = rrset.name != apex and rrset.name.is_subdomain(apex) and name.is_subdomain(rrset.name)
        if rrset.rdtype == RdataType.NS and is_below:
            return rrset
    return None


def _glue(message: dns.message.Message, target: dns.name.Name) -> tuple[str, ...]:
    found: list[str] = []
    for rrset in message.additional:
        if rrset.name == target and rrset.rdtype in (RdataType.A, RdataType.AAAA):
            found += [rdata.address for rdata in rrset]
    return tuple(found[:4])


def _follow(
    message: dns.message.Message, name: dns.name.Name, rdtype: RdataType, limit: dns.name.Name | None
) -> tuple[dns.rrset.RRset | None, list[dns.name.Name]]:
    """The records of a type in an answer, and the CNAMEs that lead to them.

    Not beyond the zone at `limit`: what a server says of other zones is not its to say.
    """
    steps: list[dns.name.Name] = []
    for _ in range(HOPS_MOST + 2):
        found = message.get_rrset(message.answer, name, dns.rdataclass.IN, rdtype)
        if found is not None:
            return found, steps
        cname = message.get_rrset(message.answer, name, dns.rdataclass.IN, RdataType.CNAME)
        if cname is None:
            break
        name = cname[0].target.canonicalize()
        steps.append(name)
        if name in steps[:-1] or (limit is not None and not name.is_subdomain(limit)):
            break
    return None, steps


def _signed(message: dns.message.Message, name: dns.name.Name, rdtype: RdataType) -> dnssec.Signed:
    """The records of a type in an answer, and their signatures."""
    return (
        message.get_rrset(message.answer, name, dns.rdataclass.IN, rdtype),
        message.get_rrset(message.answer, name, dns.rdataclass.IN, RdataType.RRSIG, rdtype),
    )


def _soa_owner(message: dns.message.Message, name: dns.name.Name) -> dns.name.Name | None:
    for rrset in (*message.answer, *message.authority):
        if rrset.rdtype == RdataType.SOA and name.is_subdomain(rrset.name):
            return rrset.name.canonicalize()
    return None


def _texts(rrset: dns.rrset.RRset) -> tuple[str, ...]:
    values = []
    for rdata in list(rrset)[:_VALUES_MOST]:
        if isinstance(rdata, dns.rdtypes.ANY.TXT.TXT):
            text = b"".join(rdata.strings).decode("latin-1")
        else:
            text = rdata.to_text().rstrip(".") if rdata.rdtype in (RdataType.NS, RdataType.CNAME) else rdata.to_text()
        values.append(printable(text, _TEXT_MOST))
    return tuple(sorted(values))


def _caa(text: str) -> CaaRecord | None:
    """From the form in zone files: `0 issue "ca.example"`."""
    flags, tag, value = text.split(" ", 2)
    return CaaRecord(int(flags), tag.lower(), value.strip('"'))


def _values(answer: Answer) -> tuple[str, ...]:
    if not answer.is_known:
        raise LookupFailedError(answer.outcome, f"{answer.name} {answer.type}: {answer.detail or answer.outcome}")
    return answer.values


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower() if name != dns.name.root else ""


def _names(chain: list[dns.name.Name]) -> tuple[str, ...]:
    return tuple(map(_text, chain[1:]))


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _has_route(family: int, addresses: Iterable[str]) -> bool:
    """Whether there is a way to the first of the addresses of a family. Sends nothing."""
    address = next((one for one in addresses if _family(one) == family), None)
    if address is None:
        return False
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 53))
        except OSError:
            return False
    return True


def _is_public(address: str) -> bool:
    one = ipaddress.ip_address(address)
    if isinstance(one, ipaddress.IPv6Address) and (mapped := one.ipv4_mapped or one.sixtofour) is not None:
        one = mapped
    return one.is_global and not one.is_multicast

"""The way from the root's servers down to those that know a name, and the questions on it.

Every server on the way may be hostile: referrals must lead downwards, addresses of name servers are taken only from the
zone that they are in or below of, and there are bounds for questions, time, CNAMEs, referrals, and servers of a zone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rrset
from dns.rdatatype import RdataType

from certs.dns_message import HOPS_MOST, chain_texts, follow, glue_of, referral, soa_owner, text_of, texts
from certs.dns_question import Reply, Server, ask
from certs.look import Answer, Outcome

_DEPTH_MOST = 3  # name servers whose names need servers whose names need servers
_REFERRALS_MOST = 12
_SERVERS_MOST = 8  # name servers of one zone that are asked
_HEDGE_S = 0.4  # after which a second server is asked as well
_AT_ONCE = 16  # questions under way
_REMEMBERED_S = 1800.0  # referrals of the root
_REMEMBERED_MOST = 256

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
class Zone:
    """A zone and who serves it, as its parent says."""

    apex: dns.name.Name
    servers: tuple[Server, ...]
    unresolved: tuple[str, ...] = ()  # names of servers without an address that may be asked
    unsure: tuple[dns.name.Name, ...] = ()  # names of servers whose addresses have not been looked for

    @property
    def text(self) -> str:
        return text_of(self.apex)


class WalkFailed(Exception):
    """No server of a zone on the way gave an answer that leads on."""

    def __init__(self, outcome: Outcome, detail: str, zone: Zone) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail
        self.zone = zone


@dataclass(frozen=True, slots=True)
class Ways:
    """Where walks begin, and their bounds; and what is remembered from one to the next. Several threads may use it."""

    given: tuple[Server, ...]  # asked for everything, if there are any
    roots: tuple[Server, ...]
    timeout_s: float  # of one question
    total_s: float  # of one walk
    questions_most: int
    port: int  # of the servers that are met on the way
    is_public_only: bool
    _remembered: dict[dns.name.Name, tuple[float, Zone]] = field(default_factory=dict)

    def start(self, families: frozenset[int]) -> Zone:
        """Where to begin: the root, or the servers that were given."""
        if self.given:
            return Zone(dns.name.root, self.given)
        roots = [one for one in self.roots if _family(one.address) in families]
        return Zone(dns.name.root, tuple(random.sample(roots, len(roots)))[:4])

    def remembered(self, name: dns.name.Name, now: float) -> Zone | None:
        """A zone just below the root that the name is in, if one was met of late."""
        if len(name) < 2:
            return None
        until, zone = self._remembered.get(dns.name.Name(name[-2:]), (0.0, None))
        return zone if now < until else None

    def remember(self, zone: Zone, now: float) -> None:
        if len(zone.apex) == 2 and zone.servers:
            if len(self._remembered) >= _REMEMBERED_MOST:
                self._remembered.clear()
            self._remembered[zone.apex] = (now + _REMEMBERED_S, zone)


@dataclass(slots=True)
class Walk:
    """The questions of one look: each is asked once, and all within its bounds."""

    ways: Ways
    questions: int = 0
    until: float = 0.0
    families: frozenset[int] = frozenset()
    zones: dict[dns.name.Name, asyncio.Future[Zone]] = field(default_factory=dict)
    replies: dict[tuple[Server, dns.name.Name, RdataType, bool], asyncio.Future[Reply]] = field(default_factory=dict)
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    def __post_init__(self) -> None:
        self.until = asyncio.get_running_loop().time() + self.ways.total_s
        addresses = [server.address for server in self.ways.given or self.ways.roots]
        self.families = frozenset(family for family in map(_family, addresses) if _has_route(family, addresses))

    @property
    def is_given(self) -> bool:
        return bool(self.ways.given)

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
            if self.questions >= self.ways.questions_most:
                return Reply(Outcome.GAVE_UP, detail=f"after {self.questions} questions")
            timeout_s = min(self.ways.timeout_s, self.left_s())
            if timeout_s <= 0:
                return Reply(Outcome.GAVE_UP, detail=f"after {self.ways.total_s:.0f} s")
            self.questions += 1
            reply = await ask(server, name, rdtype, timeout_s, recurse=self.is_given, is_signed=is_signed)
            if reply.outcome is Outcome.SERVFAIL and self.is_given:
                reply = await self._without_dnssec(server, name, rdtype, reply)
            return reply

    async def _without_dnssec(self, server: Server, name: dns.name.Name, rdtype: RdataType, reply: Reply) -> Reply:
        """A resolver that fails, but not if it need not validate, found DNSSEC broken (RFC 4035 §3.2.2)."""
        self.questions += 1
        timeout_s = max(0.05, min(self.ways.timeout_s, self.left_s()))
        again = await ask(server, name, rdtype, timeout_s, recurse=True, check_dnssec=False)
        if again.message is None:
            return reply
        return replace(reply, outcome=Outcome.BOGUS, detail=f"{reply.detail}, but not with DNSSEC left unchecked")

    def usable(self, reply: Reply, zone: Zone, name: dns.name.Name) -> Reply:
        """The reply, or what is wrong with it as one of a server of this zone."""
        message = reply.message
        if message is None:
            if reply.outcome is Outcome.REFUSED and not self.is_given and zone.apex != dns.name.root:
                return replace(reply, outcome=Outcome.LAME)
            return reply
        if self.is_given or message.flags & dns.flags.AA or referral(message, zone.apex, name) is not None:
            return reply
        return Reply(Outcome.LAME, detail="it answers, but not as one that has the zone")

    # --- one zone

    async def ask_zone(
        self, zone: Zone, name: dns.name.Name, rdtype: RdataType, is_signed: bool = False
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
        self, server: Server, name: dns.name.Name, rdtype: RdataType, zone: Zone, is_signed: bool
    ) -> Reply:
        return self.usable(await self.ask(server, name, rdtype, is_signed), zone, name)

    # --- the way down

    async def descend(self, name: dns.name.Name, rdtype: RdataType, depth: int = 0) -> tuple[Zone, Reply, Server]:
        """Ask for a record from the root downwards: the zone whose servers answered, and their reply.

        Raises WalkFailed.
        """
        # what is delegated, and by which keys it is signed, is the parent's to say (RFC 4035 §3.1.4.1)
        zone = self._nearest(name.parent() if rdtype == RdataType.DS and name != dns.name.root else name)
        for _ in range(_REFERRALS_MOST):
            if zone.unsure:
                zone = await self._settled(zone, depth)
            reply, server = await self.ask_zone(zone, name, rdtype)
            if reply.message is None or server is None:
                raise WalkFailed(reply.outcome, reply.detail, zone)
            below = None if self.is_given else referral(reply.message, zone.apex, name)
            if below is None:
                return zone, reply, server
            zone = self._below(zone, below, reply.message)
        raise WalkFailed(Outcome.GAVE_UP, f"after {_REFERRALS_MOST} referrals", zone)

    def _nearest(self, name: dns.name.Name) -> Zone:
        """The deepest zone around the name that is known already."""
        at = name
        while True:
            known = self.zones.get(at)
            if known is not None and known.done() and not known.cancelled() and known.exception() is None:
                return known.result()
            if at == dns.name.root:
                break
            at = at.parent()
        remembered = self.ways.remembered(name, asyncio.get_running_loop().time())
        return remembered or self.ways.start(self.families)

    def _below(self, zone: Zone, referral: dns.rrset.RRset, message: dns.message.Message) -> Zone:
        """The zone that a referral leads to, with the addresses that its parent may know."""
        servers: list[Server] = []
        unresolved: list[str] = []
        unsure: list[dns.name.Name] = []
        for target in sorted(rdata.target.canonicalize() for rdata in referral)[:_SERVERS_MOST]:
            if not target.is_subdomain(zone.apex):
                unsure.append(target)  # its addresses are not this parent's to tell
                continue
            glue = glue_of(message, target)
            if not glue:
                unsure.append(target)
            elif not (fit := self._server(target, glue)):
                unresolved.append(text_of(target))
            else:
                servers.append(fit)
        found = Zone(referral.name.canonicalize(), tuple(servers), tuple(unresolved), tuple(unsure))
        if not unsure:
            self._keep(found)
        return found

    def _server(self, target: dns.name.Name, addresses: Iterable[str]) -> Server | None:
        """The server at the first address that may be asked and that there is a way to; IPv4 first."""
        for address in sorted(addresses, key=lambda one: (":" in one, one)):
            if _family(address) not in self.families:
                continue
            if self.ways.is_public_only and not _is_public(address):
                continue
            return Server(address, self.ways.port, text_of(target))
        return None

    async def _settled(self, zone: Zone, depth: int) -> Zone:
        """The zone with the addresses of all its servers looked for."""
        if depth:
            # never on another's way: two zones whose servers lie in each other would wait for ever
            return await self._settle(zone, depth)
        known = self.zones.get(zone.apex)
        if known is None:
            known = self.zones[zone.apex] = asyncio.ensure_future(self._settle(zone, depth))
        return await asyncio.shield(known)

    async def _settle(self, zone: Zone, depth: int) -> Zone:
        servers, unresolved = list(zone.servers), list(zone.unresolved)
        if depth >= _DEPTH_MOST:
            return replace(zone, unresolved=(*unresolved, *map(text_of, zone.unsure)), unsure=())
        found = await asyncio.gather(*(self._addresses_of(target, depth + 1) for target in zone.unsure))
        for target, addresses in zip(zone.unsure, found, strict=True):
            if (server := self._server(target, addresses)) is not None:
                servers.append(server)
            else:
                unresolved.append(text_of(target))
        return Zone(zone.apex, tuple(servers), tuple(unresolved))

    async def _addresses_of(self, target: dns.name.Name, depth: int) -> tuple[str, ...]:
        wanted = RdataType.A if socket.AF_INET in self.families else RdataType.AAAA
        return (await self.resolve(target, wanted, depth)).values

    def _keep(self, zone: Zone) -> None:
        future: asyncio.Future[Zone] = asyncio.get_running_loop().create_future()
        future.set_result(zone)
        self.zones.setdefault(zone.apex, future)
        self.ways.remember(zone, asyncio.get_running_loop().time())

    # --- whole answers

    async def resolve(self, name: dns.name.Name, rdtype: RdataType, depth: int = 0) -> Answer:
        """The records of a type at a name or where its CNAMEs end."""
        chain = [name]
        answer = Answer(text_of(name), rdtype.name, Outcome.LOOP)
        while True:
            try:
                zone, reply, server = await self.descend(name, rdtype, depth)
            except WalkFailed as failed:
                answer = replace(answer, outcome=failed.outcome, detail=failed.detail, zone=failed.zone.text)
                # servers that walk CNAMEs themselves fail like this on a loop
                hop = await self._hop(name, depth) if failed.outcome is Outcome.SERVFAIL else None
                found, steps, is_end = None, [hop] if hop else [], hop is None
            else:
                assert reply.message is not None  # descend gives no other
                found, steps = follow(reply.message, name, rdtype, None if self.is_given else zone.apex)
                is_gone = reply.message.rcode() == dns.rcode.NXDOMAIN
                is_end = found is not None or not steps or (is_gone and self.is_given)
                outcome = Outcome.NXDOMAIN if is_gone else Outcome.NO_DATA
                if found is not None:
                    outcome = Outcome.ANSWERS
                zone_text = "" if self.is_given else zone.text
                answer = replace(answer, outcome=outcome, detail=str(server), zone=zone_text)
            for step in steps:
                if step in chain:
                    detail = f"{text_of(step)} is met again"
                    return replace(answer, outcome=Outcome.LOOP, chain=chain_texts(chain), detail=detail)
                chain.append(step)
                if len(chain) > HOPS_MOST + 1:
                    detail = f"more than {HOPS_MOST} CNAMEs"
                    return replace(answer, outcome=Outcome.LOOP, chain=chain_texts(chain), detail=detail)
            if is_end:
                return replace(answer, values=texts(found) if found is not None else (), chain=chain_texts(chain))
            name = steps[-1]

    async def _hop(self, name: dns.name.Name, depth: int) -> dns.name.Name | None:
        """The target of the CNAME at this very name."""
        try:
            _, reply, _ = await self.descend(name, RdataType.CNAME, depth)
        except WalkFailed:
            return None
        assert reply.message is not None  # descend gives no other
        found = reply.message.get_rrset(reply.message.answer, name, dns.rdataclass.IN, RdataType.CNAME)
        return None if found is None else found[0].target.canonicalize()

    async def apex(self, name: dns.name.Name) -> tuple[dns.name.Name | None, Answer]:
        """The zone that the name is in, by the SOA in answers or denials; the answer tells why there is none."""
        answer = Answer(text_of(name), "SOA", Outcome.NO_DATA)
        try:
            zone, reply, server = await self.descend(name, RdataType.SOA)
        except WalkFailed as failed:
            cut = failed.zone.apex if failed.zone.apex != dns.name.root and not self.is_given else None
            return cut, replace(answer, outcome=failed.outcome, detail=failed.detail, zone=failed.zone.text)
        assert reply.message is not None  # descend gives no other
        _, steps = follow(reply.message, name, RdataType.SOA, None)
        if steps and name != dns.name.root:
            found, _ = await self.apex(name.parent())  # a CNAME hides the SOA
        else:
            found = soa_owner(reply.message, name)
        if not self.is_given and zone.apex != dns.name.root and (found is None or zone.apex.is_subdomain(found)):
            found = zone.apex  # as the parent has it
        if found is None:
            return None, replace(answer, detail=f"{server} names no zone for it")
        outcome = Outcome.NXDOMAIN if reply.message.rcode() == dns.rcode.NXDOMAIN and not steps else Outcome.ANSWERS
        return found, replace(answer, outcome=outcome, zone=text_of(found))

    async def servers_of(self, apex: dns.name.Name) -> Zone:
        """Who serves a zone, as its parent says."""
        if self.is_given:
            return Zone(apex, self.ways.given)
        try:
            await self.descend(apex, RdataType.SOA)
        except WalkFailed as failed:
            if failed.zone.apex == apex:
                return failed.zone
        zone = self._nearest(apex)
        return replace(zone, apex=apex)


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

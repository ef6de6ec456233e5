"""What DNS showed of a host name, as values. Got by resolver.py, judged by diagnosis.py.

Names are lower case without trailing dot (the root is ""), addresses as the ipaddress module writes them. All text from
the net is printable ASCII, whatever was in it, and bounded in number and length.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Outcome(enum.StrEnum):
    """What came of a question."""

    ANSWERS = "answers"
    NXDOMAIN = "nxdomain"  # the name does not exist
    NO_DATA = "no_data"  # it exists, without records of this type
    SERVFAIL = "servfail"  # the server could not say; also FORMERR, NOTIMP and what else is an error there
    BOGUS = "bogus"  # the server says that DNSSEC does not hold, or we found so
    REFUSED = "refused"
    LAME = "lame"  # a server that the zone names knows nothing of the zone
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"  # no way there from here, nothing listens, or an address that is not asked
    MALFORMED = "malformed"  # what came cannot be read, or does not answer the question
    LOOP = "loop"  # a CNAME chain that comes back to itself, or does not end in good time
    GAVE_UP = "gave_up"  # our own bounds (questions, time) were reached


_SAID = frozenset({Outcome.ANSWERS, Outcome.NXDOMAIN, Outcome.NO_DATA})


@dataclass(frozen=True, slots=True)
class Answer:
    """One question, and what came of it once CNAMEs were followed."""

    name: str
    type: str
    outcome: Outcome
    values: tuple[str, ...] = ()  # of the last name of the chain, sorted; TXT: its strings joined
    chain: tuple[str, ...] = ()  # targets of the CNAMEs met, in order
    detail: str = ""  # who said so, or what was wrong
    zone: str = ""  # the zone whose servers said it, "" if not known

    @property
    def is_known(self) -> bool:
        """Whether a server answered, be it that there is nothing."""
        return self.outcome in _SAID


@dataclass(frozen=True, slots=True)
class CaaRecord:
    flags: int
    tag: str  # lower case
    value: str

    @property
    def is_critical(self) -> bool:
        """A CA that does not know the tag must not issue (RFC 8659 §4.1)."""
        return bool(self.flags & 0x80)


@dataclass(frozen=True, slots=True)
class CaaSet:
    """The CAA records that hold for a name: those of the first name on the way up that has some (RFC 8659 §3)."""

    outcome: Outcome = Outcome.NO_DATA  # ANSWERS, NO_DATA, or why it is not known
    found_at: str = ""
    chain: tuple[str, ...] = ()  # CNAMEs followed from found_at
    records: tuple[CaaRecord, ...] = ()
    detail: str = ""


@dataclass(frozen=True, slots=True)
class NameServer:
    """A server that was asked for the zone."""

    name: str  # "" for one that the operator gave
    address: str  # "" if its name has none
    outcome: Outcome  # of asking for the zone's SOA
    serial: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """What one server says of the host name itself; CNAMEs are not followed."""

    server: str
    outcome: Outcome
    values: tuple[str, ...] = ()
    cname: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """All that was seen. For `*.x` addresses are those of `*.x` itself, ownership and challenge those of `x`."""

    hostname: str
    a: Answer
    aaaa: Answer
    ownership: Answer  # TXT at _fly-ownership.<host>
    challenge: Answer  # TXT at _acme-challenge.<host>; its chain is where that is delegated to
    caa: CaaSet
    zone: str | None = None  # the apex of the zone that the name is in; None: not found
    soa: str = ""
    nxdomain_above: str | None = None  # the zone that says that a name above the host's does not exist
    name_servers: tuple[NameServer, ...] = ()
    dnssec_fault: str = ""  # what is wrong with the zone's signatures, "" if nothing is or there are none
    a_views: tuple[View, ...] = ()  # one for each name server that answered
    aaaa_views: tuple[View, ...] = ()
    cname_neighbours: tuple[str, ...] = ()  # types of other records that were seen where there is a CNAME
    is_authoritative: bool = True  # False: a resolver of the operator's was asked
    asked: tuple[str, ...] = ()  # whom that was, or those found
    questions: int = 0

    @property
    def base(self) -> str:
        """The host name without `*.`."""
        return self.hostname.removeprefix("*.")

    @property
    def cname(self) -> str:
        """What the host name is a CNAME of, "" if it is none."""
        chain = self.a.chain or self.aaaa.chain
        return chain[0] if chain else ""

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.a.values + self.aaaa.values

"""What a DNS message says, taken no further than the server that sent it may speak."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdtypes.ANY.TXT
import dns.rrset
from dns.rdatatype import RdataType

from certs import dnssec
from certs.dns_question import printable

HOPS_MOST = 8  # CNAMEs; Unbound and BIND stop at 11 and 16
_VALUES_MOST = 64  # records of one set that are kept
_TEXT_MOST = 1024  # characters of one of them


def referral(message: dns.message.Message, apex: dns.name.Name, name: dns.name.Name) -> dns.rrset.RRset | None:
    """The NS records that lead from the zone at `apex` down towards the name; None if the message is no referral."""
    if message.answer or message.flags & dns.flags.AA or message.rcode() != dns.rcode.NOERROR:
        return None
    for rrset in message.authority:
        is_below = rrset.name != apex and rrset.name.is_subdomain(apex) and name.is_subdomain(rrset.name)
        if rrset.rdtype == RdataType.NS and is_below:
            return rrset
    return None


def glue_of(message: dns.message.Message, target: dns.name.Name) -> tuple[str, ...]:
    found: list[str] = []
    for rrset in message.additional:
        if rrset.name == target and rrset.rdtype in (RdataType.A, RdataType.AAAA):
            found += [rdata.address for rdata in rrset]
    return tuple(found[:4])


def follow(
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


def signed_set(message: dns.message.Message, name: dns.name.Name, rdtype: RdataType) -> dnssec.Signed:
    """The records of a type in an answer, and their signatures."""
    return (
        message.get_rrset(message.answer, name, dns.rdataclass.IN, rdtype),
        message.get_rrset(message.answer, name, dns.rdataclass.IN, RdataType.RRSIG, rdtype),
    )


def soa_owner(message: dns.message.Message, name: dns.name.Name) -> dns.name.Name | None:
    for rrset in (*message.answer, *message.authority):
        if rrset.rdtype == RdataType.SOA and name.is_subdomain(rrset.name):
            return rrset.name.canonicalize()
    return None


def texts(rrset: dns.rrset.RRset) -> tuple[str, ...]:
    values = []
    for rdata in list(rrset)[:_VALUES_MOST]:
        if isinstance(rdata, dns.rdtypes.ANY.TXT.TXT):
            text = b"".join(rdata.strings).decode("latin-1")
        else:
            text = rdata.to_text().rstrip(".") if rdata.rdtype in (RdataType.NS, RdataType.CNAME) else rdata.to_text()
        values.append(printable(text, _TEXT_MOST))
    return tuple(sorted(values))


def text_of(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower() if name != dns.name.root else ""


def chain_texts(chain: list[dns.name.Name]) -> tuple[str, ...]:
    return tuple(map(text_of, chain[1:]))

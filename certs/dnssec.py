"""Whether a signed zone holds together, for telling people why resolvers that validate get nothing from it.

This is no validation of a chain from the root. Looked for are the faults that keep a CA from a domain: DS records left
at the registrar after the zone has moved, keys changed on one side only, signatures that have run out. Pure; answers of
hostile servers cost a bounded number of signature checks.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import dns.dnssec
import dns.exception
import dns.name
import dns.rdatatype
import dns.rdtypes.ANY.DNSKEY
import dns.rdtypes.ANY.DS
import dns.rrset

_DS_MOST = 8
_KEYS_MOST = 8  # with the next, against answers made to be dear to check (CVE-2023-50387)
_SIGNATURES_MOST = 4

Signed = tuple[dns.rrset.RRset | None, dns.rrset.RRset | None]


def fault(ds: dns.rrset.RRset, dnskey: Signed, sets: Iterable[Signed], now: float) -> str:
    """What is wrong with a zone that its parent has DS records for; "" if nothing is, or if it cannot be judged.

    `dnskey` and `sets` are records of the zone, each with its RRSIGs (None: not there). `now`: unix seconds.
    """
    keys, key_signatures = dnskey
    if keys is None:
        return "its parent has DS records for it, but it has no DNSKEY"
    known = [one for one in list(ds)[:_DS_MOST] if _is_supported(one)]
    if not known:
        return ""  # algorithms that nobody here knows: it counts as unsigned (RFC 4035 §5.2)
    anchors = [key for key in list(keys)[:_KEYS_MOST] if any(_matches(one, keys.name, key) for one in known)]
    if not anchors:
        tags = ", ".join(sorted({str(one.key_tag) for one in known}))
        return f"its parent's DS records (key tag {tags}) fit none of its keys"
    if why := _unsigned(keys, key_signatures, dns.rrset.from_rdata_list(keys.name, keys.ttl, anchors), now):
        return f"its keys are not signed rightly: {why}"
    usable = dns.rrset.from_rdata_list(keys.name, keys.ttl, list(keys)[:_KEYS_MOST])
    for rrset, signatures in sets:
        if rrset is not None and (why := _unsigned(rrset, signatures, usable, now)):
            return f"its {dns.rdatatype.to_text(rrset.rdtype)} records are not signed rightly: {why}"
    return ""


def _is_supported(ds: dns.rdtypes.ANY.DS.DS) -> bool:
    return ds.digest_type in (2, 4) and int(ds.algorithm) in (8, 10, 13, 14, 15, 16)


def _matches(ds: dns.rdtypes.ANY.DS.DS, owner: dns.name.Name, key: dns.rdtypes.ANY.DNSKEY.DNSKEY) -> bool:
    if dns.dnssec.key_id(key) != ds.key_tag or key.algorithm != ds.algorithm:
        return False
    try:
        return bool(dns.dnssec.make_ds(owner, key, ds.digest_type, validating=True).digest == ds.digest)
    except (dns.exception.DNSException, ValueError):
        return False


def _unsigned(rrset: dns.rrset.RRset, signatures: dns.rrset.RRset | None, keys: dns.rrset.RRset, now: float) -> str:
    """Why none of the signatures holds; "" if one does."""
    if not signatures:
        return "there is no signature"
    why = "no signature is by one of its keys"
    for signature in list(signatures)[:_SIGNATURES_MOST]:
        if signature.expiration < now:
            why = f"the signature ran out {_day(signature.expiration)}"
        elif signature.inception > now:
            why = f"the signature holds from {_day(signature.inception)} on only"
        else:
            try:
                dns.dnssec.validate_rrsig(rrset, signature, {keys.name: keys}, now=now)
            except dns.exception.UnsupportedAlgorithm:
                return ""
            except (dns.exception.DNSException, ValueError):
                continue
            return ""
    return why


def _day(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"

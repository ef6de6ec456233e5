"""Host names as certificates have them: lower case, A-labels, no trailing dot."""

from __future__ import annotations

import functools
import ipaddress
import re

import idna
from publicsuffixlist import PublicSuffixList

from certs.errors import NameRefusedError

_is_label = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?").fullmatch
_PRIVATE = frozenset({"localhost", "internal", "local", "localdomain", "intranet", "private", "corp", "home", "lan"})


def normalise(text: str) -> str:
    """The name in the form that everything here uses; `*.` may lead.

    Raises NameRefusedError that says what is wrong: an IP address, a label, the length.
    """
    shown = repr(text[:80])
    name = text.strip().rstrip(".").lower()
    star, base = ("*.", name[2:]) if name.startswith("*.") else ("", name)
    try:
        ipaddress.ip_address(base.strip("[]"))
    except ValueError:
        pass
    else:
        raise NameRefusedError(f"{shown} is an IP address: certificates here are for host names")
    if not base.isascii():
        try:
            base = idna.encode(base, uts46=True).decode()
        except idna.IDNAError as error:
            raise NameRefusedError(f"{shown} is not an internationalised host name: {error}") from error
    if len(star + base) > 253:
        raise NameRefusedError(f"{shown}... has {len(star + base)} characters: a host name has 253 at most")
    for label in base.split("."):
        if not _is_label(label):
            raise NameRefusedError(
                f"{shown} is not a host name: its part {label[:70]!r} is not 1 to 63 letters, digits and dashes"
            )
    return star + base


def custom_domain(text: str) -> str:
    """The same for a name that somebody wants a certificate for: one that a customer can have.

    Raises NameRefusedError for what `normalise` does, and for a single label, a name that reads as an IP address, a
    broken A-label, and a wildcard of a public suffix (CA/Browser Forum Baseline Requirements §3.2.2.6).
    """
    name = normalise(text)
    shown = repr(text[:80])
    labels = name.removeprefix("*.").split(".")
    if name.startswith("*.") and (len(labels) == 1 or is_public_suffix(name)):
        raise NameRefusedError(
            f"{shown} would stand for names of strangers: anybody may register below {'.'.join(labels)!r}"
        )
    if len(labels) == 1:
        raise NameRefusedError(f"{shown} has one part only: a domain has two at least, as in example.com")
    if labels[-1].isdigit():
        raise NameRefusedError(f"{shown} ends in a number, so that clients take it for an IP address")
    for label in labels:
        if label.startswith("xn--"):
            try:
                idna.ulabel(label)
            except idna.IDNAError as error:
                raise NameRefusedError(f"{shown}: its part {label!r} is no internationalised label: {error}") from error
    return name


@functools.lru_cache(maxsize=1)
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


def registered_domain(name: str) -> str:
    """The domain that a registrar sold: what CAs count by ("shop.example.co.uk" -> "example.co.uk").

    A name that is a public suffix itself is its own. Source: publicsuffix.org, as shipped with publicsuffixlist.
    """
    base = name.removeprefix("*.")
    found: str | None = _suffixes().privatesuffix(base)
    return found or base


def is_public_suffix(name: str) -> bool:
    """Whether anybody may register names below it ("co.uk"): no wildcard may be had of one."""
    return bool(_suffixes().is_public(name.removeprefix("*.")))


def is_private(name: str) -> bool:
    """Whether no public CA can know it: one label, or below a suffix that is not in the public DNS (RFC 6761, 6762)."""
    labels = name.removeprefix("*.").split(".")
    return len(labels) == 1 or labels[-1] in _PRIVATE or labels[-2:] == ["home", "arpa"]


def covers(pattern: str, name: str) -> bool:
    """Whether a certificate's name serves a host name; a wildcard stands for one label (RFC 9525 §6.3)."""
    return pattern == name or (pattern.startswith("*.") and pattern[2:] == name.partition(".")[2])

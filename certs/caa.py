"""Whether CAA records let a CA issue (RFC 8659), for this account and by these methods (RFC 8657)."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection
from dataclasses import dataclass

from certs.look import CaaRecord

_KNOWN = frozenset({"issue", "issuewild", "iodef", "issuemail", "issuevmc", "contactemail", "contactphone"})
_is_parameter = re.compile(r"\s*([A-Za-z0-9-]+)\s*=\s*([\x21-\x3a\x3c-\x7e]*)\s*").fullmatch


class Verdict(enum.StrEnum):
    """Those after the first forbid."""

    PERMITTED = "permitted"
    ISSUER = "issuer"  # other CAs are named, or none is
    ACCOUNT = "account"  # the CA is, but for another account
    METHOD = "method"  # the CA is, but for challenges that are not to be had here
    CRITICAL = "critical"  # a record that says "do not issue if you do not know this"


@dataclass(frozen=True, slots=True)
class Ruling:
    verdict: Verdict
    record: CaaRecord | None = None  # the one that decided, if it is one
    tag: str = "issue"  # what a record that would permit has to be


def judge(
    records: Collection[CaaRecord], is_wildcard: bool, identities: Collection[str], account_uri: str,
    methods: Collection[str],
) -> Ruling:  # fmt: skip
    """What the relevant record set says to a CA that goes by `identities`.

    `account_uri` "" is an account that is not made yet: parameters for any account are then taken to fit. `methods` are
    challenge types that can be used. No records permit.
    """
    for record in records:
        if record.is_critical and record.tag not in _KNOWN:
            return Ruling(Verdict.CRITICAL, record)
    # issuewild, where there is one, is alone in charge of wildcards (RFC 8659 §4.3)
    tag = "issuewild" if is_wildcard and any(record.tag == "issuewild" for record in records) else "issue"
    relevant = [record for record in records if record.tag == tag]
    if not relevant:
        return Ruling(Verdict.PERMITTED)
    worst = Ruling(Verdict.ISSUER, relevant[0], tag)
    for record in relevant:
        read = _read(record.value)
        if read is None or read[0] not in identities:
            continue
        parameters = read[1]
        if account_uri and (account := parameters.get("accounturi")) is not None and account != account_uri:
            worst = Ruling(Verdict.ACCOUNT, record, tag)
        elif (allowed := parameters.get("validationmethods")) is not None and not set(allowed.split(",")) & set(
            methods
        ):
            worst = Ruling(Verdict.METHOD, record, tag)
        else:
            return Ruling(Verdict.PERMITTED)
    return worst


def _read(value: str) -> tuple[str, dict[str, str]] | None:
    """Issuer and parameters of an issue or issuewild value; None if it is malformed, which permits nobody."""
    domain, *rest = value.split(";")
    parameters = {}
    for part in rest:
        if not part.strip():
            continue
        if (found := _is_parameter(part)) is None:
            return None
        parameters[found[1].lower()] = found[2]
    return domain.strip().lower().rstrip("."), parameters

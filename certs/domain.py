"""What is kept of one name: whose it is, its certificates, what went wrong last and when it is looked at again.

Times are unix seconds, 0 for never. Chains and keys lie beside the record (`certificate_key`): they are needed far less
often.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable

import msgspec

from certs.certificate import Certificate
from certs.errors import Failure
from certs.pack import digest

ON_DEMAND_HOPE_S = 86_400.0
_CLOCK_SET_S = 60.0


class Source(enum.StrEnum):
    """Where a certificate is from."""

    ACME = "acme"
    RSA = "acme-rsa"  # beside the other, for clients without ECDSA
    CUSTOM = "custom"


class Origin(enum.StrEnum):
    """Who said that there is such a name."""

    CONFIGURED = "configured"  # the configuration: the name goes when it is no longer there
    ADDED = "added"  # an operator
    ON_DEMAND = "on_demand"  # a client that asked for it, and a rule that let it


class Held(msgspec.Struct, frozen=True):
    """A certificate that is there."""

    valid_from: float
    expires_at: float
    serial: str
    issuer: str
    key: str  # "ecdsa" | "rsa"
    obtained_at: float
    renew_at: float = 0.0  # 0: never, by us
    ask_ari_at: float = 0.0  # 0: the CA says nothing of renewals
    ari_explanation: str = ""
    digest: str = ""  # of chain and key, as the workers' file has it (pack.digest)


class Trouble(msgspec.Struct, frozen=True):
    """The last failure, until a certificate comes."""

    failure: Failure
    detail: str
    problem: str
    in_a_row: int
    since: float
    at: float
    next_try_at: float

    def due_at(self, now: float) -> float:
        """When to try again: at once where it was noted in a time that has not come, for the clock was set back."""
        return self.next_try_at if self.at <= now + _CLOCK_SET_S else now


class Domain(msgspec.Struct):
    """The record of one name, at `domain/<name>` in the store."""

    name: str
    app: str  # a label: what it means is the caller's matter
    origin: Origin
    added_at: float
    updated_at: float
    is_acme_wanted: bool = True
    challenge: str = ""  # the type that an operator asked for; "": as it comes
    avoid: tuple[str, ...] = ()  # challenge types that failed, tried last
    held: dict[Source, Held] = {}
    trouble: Trouble | None = None
    proven_at: float = 0.0  # ownership, for a custom certificate

    def next_at(self, now: float, ordered: Collection[Source], is_ordered: bool = True) -> float:
        """When it is to be looked at again: `now` or before if it is at once; infinity if nothing is to be done.

        `ordered`: the certificates that are kept in time (`sources_of`); others are left to end. `is_ordered`: whether
        the CA is asked for this name at all (keeper.Policy.is_ordered).
        """
        times = [held.expires_at for held in self.held.values() if held.expires_at > now]
        if (self.is_acme_wanted and is_ordered) or self.needs_proof:
            if self.trouble is not None:
                times.append(self.trouble.due_at(now))
            elif self.needs_proof or any(source not in self.held for source in ordered):
                return now
            else:
                for source in ordered:
                    held = self.held[source]
                    times.append(min(held.renew_at, held.ask_ari_at or held.renew_at))
        return min(times, default=float("inf"))

    @property
    def needs_proof(self) -> bool:
        """Whether a certificate was brought for a name of which nobody knows whose it is."""
        return Source.CUSTOM in self.held and not self.proven_at

    def is_given_up(self, now: float) -> bool:
        """Whether it came on demand and has had no certificate for a day, though it was tried."""
        last = max((held.expires_at for held in self.held.values()), default=self.added_at)
        return self.origin is Origin.ON_DEMAND and self.trouble is not None and now > last + ON_DEMAND_HOPE_S

    def served(self, now: float) -> Source | None:
        """The certificate to show: a custom one while it is valid, else ours."""
        for source in (Source.CUSTOM, Source.ACME, Source.RSA):
            held = self.held.get(source)
            if held is not None and now < held.expires_at and (source is not Source.CUSTOM or self.proven_at):
                return source
        return None

    def shown(self, now: float) -> tuple[Source, ...]:
        """What `served` is, and beside our own the one for clients without ECDSA, while that is valid."""
        source = self.served(now)
        if source is Source.ACME and (rsa := self.held.get(Source.RSA)) is not None and now < rsa.expires_at:
            return (Source.ACME, Source.RSA)
        return () if source is None else (source,)


def sources_of(key_types: Iterable[str]) -> frozenset[Source]:
    """The certificates that are ordered where these types of keys are asked for."""
    return frozenset(Source.RSA if one == "rsa" else Source.ACME for one in key_types)


def domain_key(name: str) -> str:
    return f"domain/{name}"


def certificate_key(name: str, source: Source) -> str:
    """Where chain and key lie in the store, as Certificate.to_pem has them."""
    return f"certificate/{name}/{source}"


def held_of(certificate: Certificate, key: str, now: float) -> Held:
    leaf = certificate.leaf
    issuer = leaf.issuer.rfc4514_string()
    return Held(
        valid_from=leaf.not_valid_before_utc.timestamp(),
        expires_at=certificate.expires_at,
        serial=f"{leaf.serial_number:x}",
        issuer=issuer[:200],
        key=key,
        obtained_at=now,
        digest=digest(certificate.chain_pem, certificate.key_pem).hex(),
    )

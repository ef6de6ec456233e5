"""What can go wrong with certificates. All are ValueErrors, so that callers who know nothing of us can catch them."""

from __future__ import annotations

import enum


class CertificateError(ValueError):
    """Base of all."""


class SealBrokenError(CertificateError):
    """A sealed value was made with another secret, for another name, or was altered."""


class NameRefusedError(CertificateError):
    """Not a name that a certificate can be made for."""


class IssuanceFailedError(CertificateError):
    """The issuer gave no certificate; the cause is chained."""


class PackInUseError(CertificateError):
    """Another process writes this certificate file."""


class ConflictError(CertificateError):
    """Another has changed the record meanwhile: read it again."""


class Failure(enum.StrEnum):
    """Why an order came to nothing, as far as it decides what to do next (renewal.py)."""

    NETWORK = "network"  # the CA cannot be reached, or does not answer in time
    SERVER = "server"  # it answers with a fault of its own, or with what cannot be read
    RATE_LIMITED = "rate_limited"  # by the CA, or by our own budget that is kept below the CA's
    VALIDATION = "validation"  # it looked at the name and did not find what it asked for
    REFUSED = "refused"  # it does not issue for this name, or not to us: only a person can change that
    ACCOUNT = "account"  # the account is unknown, or may not order
    STUCK = "stuck"  # the order does not get on
    WRONG_CERTIFICATE = "wrong_certificate"  # what it gave does not fit what was asked for
    DNS_HOOK = "dns_hook"  # the TXT record of a DNS-01 challenge could not be set
    NOT_POINTED = "not_pointed"  # DNS does not lead here yet: nothing was asked of the CA
    STORAGE = "storage"  # it could not be kept


class AcmeError(CertificateError):
    """The CA, or the way to it, failed.

    `problem` is the CA's own type without its prefix (RFC 8555 §6.7), "" if there is none; `retry_after_s` is what the
    CA asks to wait, 0 if it says nothing; `status` is that of its answer, 0 if there was none; `challenge` the type of
    the challenge that failed, if one did.
    """

    def __init__(
        self, failure: Failure, detail: str, *, problem: str = "", retry_after_s: float = 0.0, status: int = 0,
        challenge: str = "",
    ) -> None:  # fmt: skip
        super().__init__(detail)
        self.failure = failure
        self.detail = detail
        self.problem = problem
        self.retry_after_s = retry_after_s
        self.status = status
        self.challenge = challenge


class OrderHeldError(CertificateError):
    """Another node has the order for this name under way."""


class LookupFailedError(CertificateError):
    """DNS gave no answer, be it that there is nothing; `outcome` is one of certs.look.Outcome."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


class DnsHookError(CertificateError):
    """A TXT record could not be set or removed; it says by whom, and why."""


class NoClusterError(CertificateError):
    """This node belongs to no fleet yet: it has neither made an authority nor joined one."""


class PeerRefusedError(CertificateError):
    """What another node shows does not prove that it is of this fleet; it says why."""

"""What can go wrong with certificates. All are ValueErrors, so that callers who know nothing of us can catch them."""

from __future__ import annotations


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

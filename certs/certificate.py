"""A certificate with its key, and the times that matter about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from cryptography import x509

from certs.errors import CertificateError

_KEY_BEGINS = b"-----BEGIN PRIVATE KEY-----"


@dataclass(frozen=True)
class Certificate:
    """Chain (leaf first) and private key, as PEM. The key never shows in a repr."""

    name: str
    chain_pem: bytes
    key_pem: bytes = field(repr=False)

    @cached_property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.chain_pem)

    @property
    def expires_at(self) -> float:
        """Unix seconds."""
        return self.leaf.not_valid_after_utc.timestamp()

    @property
    def renew_at(self) -> float:
        """Unix seconds at which two thirds of its life have passed."""
        begins = self.leaf.not_valid_before_utc.timestamp()
        return begins + (self.expires_at - begins) * 2 / 3

    def to_pem(self) -> bytes:
        """Chain and key in one, as stored."""
        return self.chain_pem + self.key_pem

    @classmethod
    def from_pem(cls, name: str, pem: bytes) -> Certificate:
        """Read what `to_pem` wrote.

        Raises CertificateError if there is no key in it, or no certificate.
        """
        at = pem.find(_KEY_BEGINS)
        if at <= 0:
            raise CertificateError(f"{name}: expected a chain and a private key")
        certificate = cls(name, pem[:at], pem[at:])
        try:
            certificate.leaf  # noqa: B018  parsed now, so that a broken record is found here
        except ValueError as error:
            raise CertificateError(f"{name}: {error}") from error
        return certificate

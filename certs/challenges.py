"""What is shown to a CA to prove that a name is ours (RFC 8555 §8, RFC 8737): values; showing them is others' work."""

from __future__ import annotations

import base64
import datetime
import enum
import hashlib
from dataclasses import dataclass
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from certs.keys import key_to_pem, new_key

_ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")  # id-pe-acmeIdentifier, RFC 8737 §3


class ChallengeType(enum.StrEnum):
    HTTP_01 = "http-01"
    TLS_ALPN_01 = "tls-alpn-01"
    DNS_01 = "dns-01"


@dataclass(frozen=True, slots=True)
class Challenge:
    """One proof that a CA asked for. `name` has no `*.`; `is_wildcard` tells."""

    type: ChallengeType
    name: str
    token: str
    key_authorization: str
    is_wildcard: bool = False


class Presenter(Protocol):
    """Shows challenges to whoever asks. Both may be called again for the same challenge."""

    def types(self, name: str, is_wildcard: bool) -> tuple[ChallengeType, ...]:
        """Those that can be shown for this name, the ones to try first in front."""

    async def present(self, challenge: Challenge) -> None:
        """Return when the CA may look. Raises CertificateError or OSError."""

    async def clean_up(self, challenge: Challenge) -> None:
        """Take it away. Raises as above."""


def dns_value(key_authorization: str) -> str:
    """What the TXT record holds (RFC 8555 §8.4)."""
    digest = hashlib.sha256(key_authorization.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def tls_alpn_certificate(name: str, key_authorization: str, now: float) -> tuple[bytes, bytes]:
    """The self-signed certificate of a TLS-ALPN-01 challenge and its key, as PEM (RFC 8737 §3). `now`: unix seconds."""
    key = new_key()
    subject = x509.Name([])
    at = datetime.datetime.fromtimestamp(now, datetime.UTC)
    digest = hashlib.sha256(key_authorization.encode()).digest()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - datetime.timedelta(days=1))
        .not_valid_after(at + datetime.timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        # an OCTET STRING of 32 bytes
        .add_extension(x509.UnrecognizedExtension(_ACME_IDENTIFIER, b"\x04\x20" + digest), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_to_pem(key)

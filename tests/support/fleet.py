"""A fleet's authority, certificates of it that should be refused, and two ends of TLS without a network between."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs import Certificate, Seal, SealedFolder
from certs.cluster import ClusterCa, NodeIdentity
from certs.keys import key_from_pem, key_to_pem, key_usage, new_key

SECRET = bytes(range(32))
BOTH_ENDS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def storage_in(folder: Path, secret: bytes = SECRET) -> SealedFolder:
    return SealedFolder(folder / "certs", Seal(secret))


def authority(folder: Path, now: Callable[[], float] = time.time) -> ClusterCa:
    """That of the fleet whose first node keeps its files in `folder`."""
    made = ClusterCa(storage_in(folder), now)
    made.make()
    return made


def signed(
    ca: ClusterCa,
    node: str = "b",
    *,
    names: tuple[str, ...] | None = None,
    from_s: float = -3600.0,
    until_s: float = 86_400.0,
    usage: tuple[x509.ObjectIdentifier, ...] = BOTH_ENDS,
    is_ca: bool = False,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> NodeIdentity:
    """A node's certificate that is as our own are, but for what is said."""
    root, key, now = ca.bundle.root, key or new_key(), datetime.datetime.now(datetime.UTC)
    issuer = key_from_pem(root.key_pem)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(root.leaf.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(seconds=from_s))
        .not_valid_after(now + datetime.timedelta(seconds=until_s))
        .add_extension(
            x509.SubjectAlternativeName([general_name(one) for one in names or (f"{node}.node.wakefront",)]),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True, key_cert_sign=is_ca), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        .sign(issuer, hashes.SHA256())
    )
    pem = leaf.public_bytes(serialization.Encoding.PEM)
    return NodeIdentity(node, Certificate(node, pem, key_to_pem(key)), root.chain_pem)


def general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def der_of(identity: NodeIdentity) -> bytes:
    return identity.certificate.leaf.public_bytes(serialization.Encoding.DER)


@dataclass(slots=True)
class Shaken:
    """What came of a handshake, at both ends."""

    server: ssl.SSLObject
    client: ssl.SSLObject
    server_error: ssl.SSLError | None = None
    client_error: ssl.SSLError | None = None


def shake(server: ssl.SSLContext, client: ssl.SSLContext, meant: str | None = "a.node.wakefront") -> Shaken:
    """Shake hands over memory BIOs, as the edge's TLS does, and let each end read what the other has said last."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    shaken = Shaken(
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=meant),
    )
    for _ in range(4):
        shaken.client_error = shaken.client_error or _step(shaken.client)
        shaken.server_error = shaken.server_error or _step(shaken.server)
    return shaken


def _step(end: ssl.SSLObject) -> ssl.SSLError | None:
    try:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
            end.read(1)
    except ssl.SSLError as error:
        return error
    return None

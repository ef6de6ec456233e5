"""The fleet's own certificate authority, as a node of the fleet holds it.

The first node makes it, with a secret that seals what nodes share; both reach further nodes when they join, so that the
first may be lost. A node's certificate says its name alone, `<node>.node.wakefront`, and serves both ends of a
connection; what is judged by it is `node_tls`' matter. The root may sign no other names (RFC 5280 §4.2.1.10), so that
it is of no use against anything but the fleet.

    cluster/bundle    root, its key and the secret: what makes a node one of the fleet
    cluster/key       the node's own key, kept for as long as its data folder: by it others know the node again
    cluster/node      its certificate with that key and the root, all that a process needs that only meets other nodes
    cluster/former    the bundle that this node had before it joined another fleet

All blocking; `ClusterCa` is safe in several threads and processes, which agree on one root.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.certificate import Certificate
from certs.errors import CertificateError, NameRefusedError, NoClusterError
from certs.keys import key_from_pem, key_to_pem, key_usage, new_key
from certs.storage import Storage

ROOT_LIFE: Final = datetime.timedelta(days=3650)
NODE_LIFE: Final = datetime.timedelta(days=30)
SECRET_BYTES: Final = 32
SUFFIX: Final = ".node.wakefront"
_ZONE: Final = "node.wakefront"
_CLOCK_SKEW: Final = datetime.timedelta(hours=1)  # other nodes' clocks may be behind ours
_VERSION: Final = 1
_LOCK: Final = "cluster"
_BUNDLE: Final = "cluster/bundle"
_FORMER: Final = "cluster/former"
_KEY: Final = "cluster/key"
_NODE: Final = "cluster/node"

_label_is_valid = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?").fullmatch


def dns_name(node: str) -> str:
    """The name in a node's certificate.

    Raises NameRefusedError if the node's name is no DNS label in lower case.
    """
    if _label_is_valid(node) is None:
        raise NameRefusedError(f"{node[:80]!r} is no name of a node: expected lower case letters, digits and dashes")
    return node + SUFFIX


@dataclass(frozen=True)
class Bundle:
    """What every node of a fleet has. Whoever has it can be any node."""

    root: Certificate = field(repr=False)
    secret: bytes = field(repr=False)
    origin: str = "made"  # here, or "joined": of another node. Not handed on

    @cached_property
    def root_der(self) -> bytes:
        return self.root.leaf.public_bytes(serialization.Encoding.DER)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the root, by which an invite names the fleet."""
        return hashlib.sha256(self.root_der).digest()

    def to_bytes(self) -> bytes:
        fields = {
            "version": _VERSION,
            "root": self.root.to_pem().decode("ascii"),
            "secret": base64.b64encode(self.secret).decode("ascii"),
            "origin": self.origin,
        }
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Bundle:
        """Read what `to_bytes` wrote, and check that it is whole: its parts come from another node, or from a disk.

        Raises CertificateError if it is not.
        """
        try:
            fields = json.loads(data)
            if fields["version"] != _VERSION:
                raise ValueError(f"version {fields['version']!r}, expected {_VERSION}")
            root = Certificate.from_pem("root", fields["root"].encode("ascii"))
            secret = base64.b64decode(fields["secret"], validate=True)
            if len(secret) != SECRET_BYTES:
                raise ValueError(f"a secret of {len(secret)} bytes, expected {SECRET_BYTES}")
            if key_from_pem(root.key_pem).public_key() != root.leaf.public_key():
                raise ValueError("the key is not the root's")
            return cls(root, secret, str(fields.get("origin", "joined")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CertificateError(f"not what makes a node one of a fleet: {error}") from error


@dataclass(frozen=True)
class NodeIdentity:
    """What a node shows to others, and the root by which it judges them. The authority's key is not in it."""

    node: str
    certificate: Certificate
    root_pem: bytes

    @cached_property
    def root(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.root_pem)

    @property
    def expires_at(self) -> float:
        """Unix seconds."""
        return self.certificate.expires_at

    @property
    def renew_at(self) -> float:
        """Unix seconds at which two thirds of its life have passed."""
        return self.certificate.renew_at

    def to_bytes(self) -> bytes:
        fields = {
            "version": _VERSION,
            "node": self.node,
            "certificate": self.certificate.to_pem().decode("ascii"),
            "root": self.root_pem.decode("ascii"),
        }
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> NodeIdentity:
        """Read what `to_bytes` wrote. Raises CertificateError if it is not that."""
        try:
            fields = json.loads(data)
            if fields["version"] != _VERSION:
                raise ValueError(f"version {fields['version']!r}, expected {_VERSION}")
            certificate = Certificate.from_pem(dns_name(fields["node"]), fields["certificate"].encode("ascii"))
            identity = cls(fields["node"], certificate, fields["root"].encode("ascii"))
            identity.root  # noqa: B018  parsed now, so that a broken record is found here
            return identity
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CertificateError(f"not a node's identity: {error}") from error

    @classmethod
    def load(cls, storage: Storage) -> NodeIdentity | None:
        """What `ClusterCa.identity` has stored last, for processes that issue nothing; None if there is none."""
        data = storage.load(_NODE)
        return None if data is None else cls.from_bytes(data)


class ClusterCa:
    """Issues the certificates of nodes. `load`, `make` or `adopt` comes first."""

    def __init__(self, storage: Storage, now: Callable[[], float]) -> None:
        """`now` gives unix seconds."""
        self._storage = storage
        self._now = now
        self._bundle: Bundle | None = None

    # --- the fleet that this node belongs to

    def load(self) -> Bundle | None:
        """What is stored, or None: then this node belongs to no fleet.

        Raises CertificateError if it is there and cannot be read: another one must not take its place unasked.
        """
        data = self._storage.load(_BUNDLE)
        self._bundle = None if data is None else Bundle.from_bytes(data)
        return self._bundle

    def make(self) -> Bundle:
        """The bundle that is stored, or a new one: this is then the first node."""
        with self._storage.lock(_LOCK):
            bundle = self.load()
            if bundle is None:
                bundle = Bundle(self._make_root(), os.urandom(SECRET_BYTES))
                self._storage.save(_BUNDLE, bundle.to_bytes())
                self._bundle = bundle
        return bundle

    def adopt(self, bundle: Bundle, node: str, chain_pem: bytes) -> NodeIdentity:
        """Belong to the fleet of `bundle` from now on, with a certificate that one of its nodes has issued.

        The bundle before it is kept aside. The new one is written last: until then all is as it was.
        """
        identity = NodeIdentity(
            node, Certificate(dns_name(node), chain_pem, key_to_pem(self.node_key())), bundle.root.chain_pem
        )
        if identity.certificate.leaf.public_key() != self.node_key().public_key():
            raise CertificateError("the certificate is not for this node's key")
        bundle = dataclasses.replace(bundle, origin="joined")
        with self._storage.lock(_LOCK):
            former = self._storage.load(_BUNDLE)
            if former is not None:
                self._storage.save(_FORMER, former)
            self._storage.save(_NODE, identity.to_bytes())
            self._storage.save(_BUNDLE, bundle.to_bytes())
            self._bundle = bundle
        return identity

    @property
    def bundle(self) -> Bundle:
        """Raises NoClusterError where there is none."""
        if self._bundle is None:
            raise NoClusterError("this node belongs to no fleet yet")
        return self._bundle

    # --- certificates

    def node_key(self) -> ec.EllipticCurvePrivateKey:
        """This node's own key, made once."""
        with self._storage.lock("cluster-key"):
            stored = self._storage.load(_KEY)
            if stored is not None:
                return key_from_pem(stored)
            key = new_key()
            self._storage.save(_KEY, key_to_pem(key))
            return key

    def identity(self, node: str) -> NodeIdentity:
        """What this node shows: stored, or issued where there is none for this name and root, or it is due."""
        root_pem = self.bundle.root.chain_pem
        stored = self._stored_identity()
        if stored is not None and (stored.node, stored.root_pem) == (node, root_pem):
            begins = stored.certificate.leaf.not_valid_before_utc.timestamp()
            if begins <= self._now() < stored.renew_at:
                return stored
        key = self.node_key()
        identity = NodeIdentity(
            node, Certificate(dns_name(node), self.sign(node, key.public_key()), key_to_pem(key)), root_pem
        )
        self._storage.save(_NODE, identity.to_bytes())
        return identity

    def sign(self, node: str, public_key: ec.EllipticCurvePublicKey) -> bytes:
        """A certificate in PEM for a node's key. Raises NameRefusedError if the node's name is none."""
        name, root, now = dns_name(node), self.bundle.root, self._datetime()
        key = key_from_pem(root.key_pem)
        # A common name may have 64 characters, which a node's may exceed with its suffix: it is left to the
        # alternative name, which has to be critical then (RFC 5280 §4.2.1.6).
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(root.leaf.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(min(now + NODE_LIFE, root.leaf.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return leaf.public_bytes(serialization.Encoding.PEM)

    # ---

    def _stored_identity(self) -> NodeIdentity | None:
        """None too where it cannot be read: it is made again from what can."""
        try:
            return NodeIdentity.load(self._storage)
        except CertificateError:
            return None

    def _make_root(self) -> Certificate:
        key = new_key()
        now = self._datetime()
        serial = x509.random_serial_number()
        # The name tells the roots of two fleets apart in messages.
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Wakefront fleet CA {serial & 0xFFFFFFFF:08x}")])
        permitted = [x509.DNSName(_ZONE)]
        excluded = [x509.IPAddress(ipaddress.ip_network(one)) for one in ("0.0.0.0/0", "::/0")]
        root = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + ROOT_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.NameConstraints(permitted, excluded), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return Certificate("root", root.public_bytes(serialization.Encoding.PEM), key_to_pem(key))

    def _datetime(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._now(), datetime.UTC)

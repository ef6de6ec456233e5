"""Our own certificate authority, for development and for names that no public one can know.

Made on first use. Its key is stored sealed and never leaves the process that issues; its public half lies at
`ca.pem`, so that `curl --cacert` and browsers can be told of it. Leafs live 90 days, as public ones do, so that
renewal is exercised the same way.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.certificate import Certificate
from certs.errors import NameRefusedError
from certs.keys import key_from_pem, key_to_pem, key_usage, new_key
from certs.storage import Storage, write_atomically

ROOT_LIFE = datetime.timedelta(days=3650)
LEAF_LIFE = datetime.timedelta(days=90)
_CLOCK_SKEW = datetime.timedelta(hours=1)  # clients' clocks may be behind ours
_ROOT_KEY = "internal/root"

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_name_is_valid = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)*{_LABEL}").fullmatch


class InternalCA:
    """Issues leafs for one name each. Blocking (about 0.3 ms a leaf); safe in several threads once `open` returned."""

    def __init__(self, storage: Storage, public_path: Path, now: Callable[[], float]) -> None:
        """`now` gives unix seconds; the root's public PEM is kept at `public_path`."""
        self._storage = storage
        self._public_path = Path(public_path)
        self._now = now
        self._root: Certificate | None = None
        self._key: ec.EllipticCurvePrivateKey | None = None

    def open(self) -> Certificate:
        """Load the root, or make it. Several processes at once agree on one."""
        if self._root is None:
            with self._storage.lock("internal"):
                stored = self._storage.load(_ROOT_KEY)
                if stored is None:
                    root = self._make_root()
                    self._storage.save(_ROOT_KEY, root.to_pem())
                else:
                    root = Certificate.from_pem("root", stored)
                if not self._public_path.exists() or self._public_path.read_bytes() != root.chain_pem:
                    self._public_path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(self._public_path, root.chain_pem, 0o644)
            self._key = key_from_pem(root.key_pem)
            self._root = root
        return self._root

    def issue(self, name: str) -> Certificate:
        """A new leaf for a host name (lower case, A-labels) or a wildcard.

        Raises NameRefusedError if it is neither.
        """
        if len(name) > 253 or _name_is_valid(name) is None:
            raise NameRefusedError(f"{name[:80]!r} is not a host name in lower-case A-labels")
        root = self.open()
        assert self._key is not None
        key = new_key()
        now = self._datetime()
        # A common name may have 64 characters. Without one the alternative name has to be critical (RFC 5280 §4.2.1.6).
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if len(name) <= 64 else []
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(root.leaf.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(min(now + LEAF_LIFE, root.leaf.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=not subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Certificate(name, leaf.public_bytes(serialization.Encoding.PEM), key_to_pem(key))

    def _make_root(self) -> Certificate:
        key = new_key()
        now = self._datetime()
        # Roots of several nodes may lie in one trust store: the serial tells them apart.
        serial = x509.random_serial_number()
        subject = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"Wakefront internal CA {serial & 0xFFFFFFFF:08x}")]
        )
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
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return Certificate("root", root.public_bytes(serialization.Encoding.PEM), key_to_pem(key))

    def _datetime(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._now(), datetime.UTC)

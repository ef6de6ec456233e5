"""Judges a certificate that somebody had made elsewhere, before it is kept and shown to clients.

All that is wrong is told at once, each fault with what to do about it; what clients can live with is a warning. The
chain is put in order and the key written in one form, so that what is stored needs no second look. The work is bounded
before anything is parsed: sizes, then the number of certificates, then the size of the key.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from certs.certificate import Certificate
from certs.errors import CertificateError
from certs.keys import key_to_pem
from certs.names import covers

MAX_CHAIN_BYTES = 64 * 1024
MAX_KEY_BYTES = 16 * 1024
MAX_CERTIFICATES = 10
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 4096  # a handshake with 8192 takes a core 50 ms: whoever connects could hold up a worker
_CURVES = ("secp256r1", "secp384r1")
_MAX_BLOCKS = 40  # of PEM in a file, whatever they are
_SHOWN = 5  # names, blocks: as many as help

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, for programs (`code`) and for people, and what to do about it."""

    code: str
    message: str
    remedy: str


class CustomRefusedError(CertificateError):
    """The certificate cannot be used; `faults` says all that is wrong with it, `warnings` what else is odd."""

    def __init__(self, hostname: str, faults: Sequence[Fault], warnings: Sequence[Fault] = ()) -> None:
        super().__init__(f"{hostname}: " + "; ".join(fault.message for fault in faults))
        self.faults = tuple(faults)
        self.warnings = tuple(warnings)


@dataclass(frozen=True, slots=True)
class Judged:
    """A certificate that can be used, and what should be known of it nevertheless."""

    certificate: Certificate
    warnings: tuple[Fault, ...]


def judge_custom(hostname: str, fullchain_pem: bytes, key_pem: bytes, now: float) -> Judged:
    """Read a chain and its key for a host name (lower case, A-labels, perhaps a wildcard). `now`: unix seconds.

    The chain may come in any order and with certificates that do not belong to it: it is put leaf first, and that is
    warned of. The key may be PKCS #1, SEC 1 or PKCS #8: RSA of 2048 to 4096 bits, or ECDSA on P-256 or P-384. The name
    must be one of the certificate's alternative names, or its common name if it has none (spec: "name in SAN/CN").
    Takes up to about 0.2 s with the largest RSA key, so it belongs into a thread.

    Raises CustomRefusedError with every fault.
    """
    judge = _Judge(hostname, now)
    key = judge.read_key(key_pem, fullchain_pem)
    certificates = judge.read_chain(fullchain_pem, key_pem)
    leaf = judge.leaf_of(certificates, key)
    if leaf is not None:
        path = judge.order(leaf, certificates)
        judge.look_at_leaf(leaf, len(path))
        for certificate in path:
            judge.look_at(certificate, is_leaf=certificate is leaf)
    if judge.faults or key is None or leaf is None:
        raise CustomRefusedError(hostname, judge.faults, judge.warnings)
    chain = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in path)
    return Judged(Certificate(hostname, chain, key_to_pem(key)), tuple(judge.warnings))


class _Judge:
    """Collects faults and warnings of one pair of files."""

    def __init__(self, hostname: str, now: float) -> None:
        self._hostname = hostname
        self._now = datetime.datetime.fromtimestamp(now, datetime.UTC)
        self.faults: list[Fault] = []
        self.warnings: list[Fault] = []

    def _fault(self, code: str, message: str, remedy: str) -> None:
        if (fault := Fault(code, _sentence(message), remedy)) not in self.faults:
            self.faults.append(fault)

    def _warn(self, code: str, message: str, remedy: str) -> None:
        self.warnings.append(Fault(code, _sentence(message), remedy))

    # --- the key

    def read_key(self, pem: bytes, chain_pem: bytes) -> PrivateKey | None:
        block = self._key_block(pem, chain_pem)
        if block is None:
            return None
        try:
            # How long it is comes first: to look whether the numbers of a huge key are primes takes many seconds.
            key = serialization.load_pem_private_key(block, None, unsafe_skip_rsa_key_validation=True)
            if self._key_is_usable(key):
                key = serialization.load_pem_private_key(block, None)
        except TypeError:
            self._encrypted()
            return None
        except UnsupportedAlgorithm:
            self._fault("key_type", "The private key is of a kind that is not known here.", _NEW_KEY)
            return None
        except ValueError:
            self._fault("bad_key", "The private key cannot be read: the file is damaged or cut off.", _COPY_AGAIN)
            return None
        return key if isinstance(key, PrivateKey) and self._key_is_usable(key) else None

    def _key_block(self, pem: bytes, chain_pem: bytes) -> bytes | None:
        if len(pem) > MAX_KEY_BYTES:
            self._fault(
                "key_too_large",
                f"The private key has {len(pem):,} bytes: expected {MAX_KEY_BYTES:,} at most.",
                "Give the private key's own file, without other things in it.",
            )
            return None
        blocks = list(_blocks(pem))
        keys = [block for label, block in blocks if label.endswith(b"PRIVATE KEY")]
        if any(label == b"ENCRYPTED PRIVATE KEY" or b"Proc-Type: 4,ENCRYPTED" in block for label, block in blocks):
            self._encrypted()
        elif len(keys) > 1:
            self._fault("several_keys", f"There are {len(keys)} private keys in the key's file.", "Leave one in it.")
        elif keys:
            return keys[0]
        elif any(label == b"CERTIFICATE" for label, _ in blocks):
            if any(label.endswith(b"PRIVATE KEY") for label, _ in _blocks(chain_pem[:MAX_CHAIN_BYTES])):
                self._fault(
                    "swapped",
                    "The chain and the private key are swapped: each is in the other's place.",
                    "Give the certificates as the chain and the private key as the key.",
                )
            else:
                self._fault(
                    "no_key",
                    "Where the private key should be there is a certificate.",
                    "Give the file that begins with -----BEGIN PRIVATE KEY-----, EC PRIVATE KEY or RSA PRIVATE KEY.",
                )
        else:
            self._no_pem("private key", pem, blocks)
        return None

    def _encrypted(self) -> None:
        self._fault(
            "encrypted_key",
            "The private key is encrypted with a passphrase, which a server that starts by itself cannot know.",
            "Decrypt it: openssl pkey -in key.pem -out plain-key.pem. It is stored sealed here.",
        )

    def _key_is_usable(self, key: object) -> bool:
        match key:
            case rsa.RSAPrivateKey() if key.key_size < MIN_RSA_BITS:
                self._fault("small_rsa", f"The RSA key has {key.key_size} bits: clients want {MIN_RSA_BITS}.", _NEW_KEY)
            case rsa.RSAPrivateKey() if key.key_size > MAX_RSA_BITS:
                self._fault(
                    "large_rsa",
                    f"The RSA key has {key.key_size} bits: above {MAX_RSA_BITS} each handshake takes too long.",
                    _NEW_KEY,
                )
            case ec.EllipticCurvePrivateKey() if key.curve.name not in _CURVES:
                self._fault(
                    "curve", f"The key is on the curve {key.curve.name}: browsers know P-256 and P-384.", _NEW_KEY
                )
            case rsa.RSAPrivateKey() | ec.EllipticCurvePrivateKey():
                return True
            case ed25519.Ed25519PrivateKey() | ed448.Ed448PrivateKey():
                self._fault("key_type", "The key is an Ed25519 or Ed448 key: browsers do not accept these.", _NEW_KEY)
            case dsa.DSAPrivateKey():
                self._fault("key_type", "The key is a DSA key: no client accepts these any more.", _NEW_KEY)
            case _:
                self._fault("key_type", "The key is not one for signing.", _NEW_KEY)
        return False

    # --- the chain

    def read_chain(self, pem: bytes, key_pem: bytes) -> list[x509.Certificate]:
        if len(pem) > MAX_CHAIN_BYTES:
            self._fault(
                "chain_too_large",
                f"The chain has {len(pem):,} bytes: expected {MAX_CHAIN_BYTES:,} at most.",
                "Give the certificate and its intermediates only, not a bundle of roots.",
            )
            return []
        blocks = list(_blocks(pem))
        found = [block for label, block in blocks if label in (b"CERTIFICATE", b"X509 CERTIFICATE")]
        if not found:
            if not any(fault.code == "swapped" for fault in self.faults):
                self._no_pem("chain", pem, blocks)
            return []
        if len(found) > MAX_CERTIFICATES:
            self._fault(
                "too_many_certificates",
                f"The chain has {len(found)}{' or more' if len(found) == _MAX_BLOCKS else ''} certificates: expected "
                f"{MAX_CERTIFICATES} at most.",
                "Give the certificate and its intermediates only, not a bundle of roots.",
            )
            return []
        if _is_cut_off(pem):
            self._fault("cut_off", "The last certificate of the chain has no end.", _COPY_AGAIN)
        return self._parse(found)

    def _parse(self, blocks: list[bytes]) -> list[x509.Certificate]:
        certificates: list[x509.Certificate] = []
        for number, block in enumerate(blocks, 1):
            try:
                certificate = x509.load_pem_x509_certificate(block)
                _touch(certificate)
            except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, CryptographyDeprecationWarning):
                self._fault(
                    "bad_certificate",
                    f"Certificate {number} of the chain cannot be read: it is damaged, or of a kind not known here.",
                    _COPY_AGAIN,
                )
                continue
            if certificate in certificates:
                self._warn(
                    "duplicate_certificate",
                    f"{_title(certificate)} is in the chain more than once; it is kept once.",
                    "Leave it in the file once.",
                )
            else:
                certificates.append(certificate)
        return certificates

    def _no_pem(self, what: str, data: bytes, blocks: list[tuple[bytes, bytes]]) -> None:
        labels = [label for label, _ in blocks]
        key = what == "private key"
        if any(label.endswith(b"CERTIFICATE REQUEST") for label in labels):
            self._fault(
                "request",
                f"The {what} is a certificate request, which a CA makes a certificate of.",
                "Give what the CA sent back.",
            )
        elif b"PKCS7" in labels:
            self._fault(
                "pkcs7",
                f"The {what} is in PKCS #7 form.",
                "Convert it: openssl pkcs7 -print_certs -in chain.p7b -out chain.pem.",
            )
        elif labels:
            shown = ", ".join(label.decode("ascii") for label in labels[:_SHOWN])
            wanted = "PRIVATE KEY" if key else "CERTIFICATE"
            self._fault(f"no_{'key' if key else 'certificate'}", f"The {what} has {shown}, and no {wanted}.", _WHICH)
        elif data[:1] == b"\x30" and data[1:2] in b"\x80\x81\x82\x83":
            self._der(what, data, key)
        elif not data.strip():
            self._fault(f"no_{'key' if key else 'certificate'}", f"The {what} is empty.", _WHICH)
        elif b"-----BEGIN " in data:
            self._fault("cut_off", f"The {what} begins as PEM but has no end.", _COPY_AGAIN)
        else:
            self._fault("no_pem", f"The {what} is not PEM: it has no line -----BEGIN ...-----.", _WHICH)

    def _der(self, what: str, data: bytes, key: bool) -> None:
        if b"\x02\x01\x03" in data[2:9]:  # a PFX begins with its version, 3 (RFC 7292 §4)
            self._fault(
                "pkcs12",
                f"The {what} is a PKCS #12 file (.p12, .pfx).",
                "Take it apart: openssl pkcs12 -in file.p12 -nokeys -out chain.pem; "
                "openssl pkcs12 -in file.p12 -nocerts -nodes -out key.pem.",
            )
            return
        command = (
            "openssl pkey -inform DER -in key.der -out key.pem"
            if key
            else "openssl x509 -inform DER -in cert.der -out cert.pem"
        )
        self._fault("der", f"The {what} is in DER form, which is binary: expected PEM.", f"Convert it: {command}.")

    # --- order

    def leaf_of(self, certificates: list[x509.Certificate], key: PrivateKey | None) -> x509.Certificate | None:
        """The certificate that belongs to the key; where there is none, the one that issued no other of them.

        None if that one may be among those that could not be read.
        """
        if key is not None:
            wanted = _spki(key.public_key())
            for certificate in certificates:
                if _spki(certificate.public_key()) == wanted:
                    return certificate
        if not certificates or any(fault.code in ("bad_certificate", "cut_off") for fault in self.faults):
            return None
        issuers = {one.issuer for one in certificates if one.issuer != one.subject}
        leaf = next((one for one in certificates if one.subject not in issuers), certificates[0])
        if key is not None:
            self._fault(
                "key_mismatch",
                f"The private key does not belong to {_title(leaf)}.",
                "Give the key that its request was made with. These must print the same: openssl x509 -noout -pubkey "
                "-in chain.pem; openssl pkey -pubout -in key.pem.",
            )
        return leaf

    def order(self, leaf: x509.Certificate, given: list[x509.Certificate]) -> list[x509.Certificate]:
        """From the leaf upwards, each signed by the next, as far as the file goes."""
        path = [leaf]
        left = [one for one in given if one is not leaf]
        while not _is_self_issued(path[-1]) and (issuer := self._issuer(path[-1], left)) is not None:
            path.append(issuer)
            left.remove(issuer)
        if left:
            names = ", ".join(_title(one) for one in left[:_SHOWN])
            self._warn("unrelated_certificate", f"Not of this chain, and left out: {names}.", "Leave them out of it.")
        if [one for one in given if one not in left] != path:
            self._warn(
                "chain_reordered",
                "The chain was not in order; it is put leaf first, each followed by its issuer.",
                "Nothing needs to be done; another server may want the file in that order.",
            )
        return path

    def _issuer(self, certificate: x509.Certificate, others: list[x509.Certificate]) -> x509.Certificate | None:
        named = [one for one in others if one.subject == certificate.issuer]
        for one in named:
            if _is_signed_by(certificate, one):
                if not _is_ca(one):
                    self._fault(
                        "issuer_is_no_ca",
                        f"{_title(one)}, which signed {_title(certificate)}, may not issue certificates.",
                        "Get the certificate from a CA.",
                    )
                return one
        if named:
            self._fault(
                "broken_link",
                f"{_title(certificate)} was not signed with the key of {_title(named[0])}, though it names it.",
                "Give the intermediate certificates that the CA sent with this certificate.",
            )
        return None

    # --- each certificate

    def look_at_leaf(self, leaf: x509.Certificate, path_length: int) -> None:
        self._look_at_name(leaf)
        self._look_at_use(leaf)
        if _is_ca(leaf):
            self._fault(
                "is_ca",
                f"{_title(leaf)} is a CA's own certificate: browsers do not accept it of a server.",
                "Get one for the host name; for a self-signed one add -addext basicConstraints=critical,CA:FALSE to "
                "openssl req -x509.",
            )
        elif _is_self_issued(leaf):
            self._warn(
                "self_signed",
                "The certificate is self-signed: clients refuse it unless they were told to trust it.",
                f"For the public, remove it and let a CA issue one: wakefront certs add {self._hostname}.",
            )
        elif path_length == 1:
            where = _issuer_url(leaf)
            self._warn(
                "chain_incomplete",
                f"The certificate of its issuer, {_common_name(leaf.issuer)}, is not in the chain: many clients will "
                "not find a way to a root they trust.",
                f"Add it to the file, below the other{f': it is at {where}' if where else ''}.",
            )

    def _look_at_name(self, leaf: x509.Certificate) -> None:
        names = _dns_names(leaf)
        if any(covers(name, self._hostname) for name in names):
            return
        common = _common_name(leaf.subject).lower()
        if not names and covers(common, self._hostname):
            self._warn(
                "common_name_only",
                "The host name is the certificate's common name only: browsers look at alternative names alone.",
                "Get a certificate with the name as its subject alternative name.",
            )
            return
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        message = f"The certificate is not for {self._hostname} but for {shown or 'no host name'}."
        if any(
            name.startswith("*.") and self._hostname.removeprefix("*.").endswith(name[1:]) for name in names
        ):  # the commonest surprise
            message += " A wildcard stands for one label only."
        self._fault("wrong_host", message, "Import it for a name that it has, or get one that has this name.")

    def _look_at_use(self, leaf: x509.Certificate) -> None:
        uses = _extension(leaf, x509.ExtendedKeyUsage)
        if uses is not None and not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(
            uses
        ):
            self._fault(
                "not_for_servers",
                "The certificate is not for servers: its extended key usage has no serverAuth.",
                "Get a TLS server certificate.",
            )
        usage = _extension(leaf, x509.KeyUsage)
        if usage is not None and not usage.digital_signature:
            self._fault(
                "key_usage",
                "The certificate's key may not sign (its key usage has no digitalSignature), as each handshake needs.",
                "Get a TLS server certificate.",
            )
        for extension in leaf.extensions:
            if isinstance(extension.value, x509.PrecertPoison):
                self._fault(
                    "precertificate",
                    "This is a precertificate, meant for the logs of certificate transparency alone.",
                    "Give the final certificate.",
                )
            elif extension.critical and isinstance(extension.value, x509.UnrecognizedExtension):
                self._fault(
                    "critical_extension",
                    f"The certificate has a critical extension that clients do not know ({extension.oid.dotted_string}"
                    "): they refuse it.",
                    "Get a TLS server certificate.",
                )

    def look_at(self, certificate: x509.Certificate, *, is_leaf: bool) -> None:
        title = "The certificate" if is_leaf else _title(certificate)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if self._now >= ends:
            self._fault(
                "expired",
                f"{title} expired at {_date(ends)}.",
                "Get a new one." if is_leaf else "Give the CA's present intermediate.",
            )
        elif self._now < begins:
            self._fault(
                "not_yet_valid",
                f"{title} is valid from {_date(begins)} on; here it is {_date(self._now)}.",
                "Wait until then, or set this host's clock.",
            )
        elif is_leaf and (ends - self._now) < (ends - begins) / 3:
            self._warn(
                "expires_soon",
                f"The certificate expires at {_date(ends)}, and nobody renews an imported one.",
                "Import the next one before that.",
            )
        if not is_leaf and _is_self_issued(certificate):
            return  # a root is trusted for what it is, whatever it is signed with
        if isinstance(certificate.signature_hash_algorithm, hashes.SHA1 | hashes.MD5):
            self._fault(
                "weak_signature",
                f"{title} is signed with {certificate.signature_hash_algorithm.name.upper()}: clients refuse that.",
                "Get one signed with SHA-256.",
            )
        key = certificate.public_key()
        if isinstance(key, rsa.RSAPublicKey) and key.key_size < MIN_RSA_BITS and not is_leaf:
            self._fault(
                "small_rsa", f"{title} has an RSA key of {key.key_size} bits: clients want {MIN_RSA_BITS}.", _NEW_KEY
            )


_NEW_KEY = "Get a certificate for a new key: openssl ecparam -name prime256v1 -genkey -noout -out key.pem."
_COPY_AGAIN = "Copy the file again, whole and unchanged."
_WHICH = "Give PEM: the chain has -----BEGIN CERTIFICATE-----, the key -----BEGIN PRIVATE KEY-----."
_BEGIN, _END = b"-----BEGIN ", b"-----END "


def _blocks(pem: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Label and text of each PEM block (RFC 7468 §3), in linear time; what lies between blocks is passed over."""
    at = 0
    for _ in range(_MAX_BLOCKS):
        begins = pem.find(_BEGIN, at)
        label_ends = pem.find(b"-----", begins + len(_BEGIN))
        if begins < 0 or label_ends < 0:
            return
        label = pem[begins + len(_BEGIN) : label_ends]
        end = _END + label + b"-----"
        ends = pem.find(end, label_ends)
        if ends < 0 or not label.isascii() or len(label) > 40:
            return
        at = ends + len(end)
        yield label, pem[begins:at]


def _is_cut_off(pem: bytes) -> bool:
    return pem.rfind(_BEGIN) > pem.rfind(_END)


def _touch(certificate: x509.Certificate) -> None:
    """Have all that is looked at later parsed now, since that is when faults in it show. Raises what parsing does."""
    if certificate.serial_number <= 0:  # RFC 5280 §4.1.2.2; the library still only warns of it
        raise ValueError("the serial number is not positive")
    certificate.public_key()
    certificate.extensions  # noqa: B018
    certificate.subject, certificate.issuer  # noqa: B018
    certificate.not_valid_before_utc, certificate.not_valid_after_utc  # noqa: B018
    certificate.signature_hash_algorithm  # noqa: B018


def _spki(key: object) -> bytes:
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(encoding, form)  # type: ignore[attr-defined,no-any-return]  # all public keys have it


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def _is_self_issued(certificate: x509.Certificate) -> bool:
    return certificate.issuer == certificate.subject


def _is_ca(certificate: x509.Certificate) -> bool:
    constraints = _extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _dns_names(leaf: x509.Certificate) -> list[str]:
    names = _extension(leaf, x509.SubjectAlternativeName)
    return [] if names is None else [name.lower().rstrip(".")[:253] for name in names.get_values_for_type(x509.DNSName)]


def _common_name(name: x509.Name) -> str:
    values = name.get_attributes_for_oid(NameOID.COMMON_NAME) or list(name)
    return (str(values[0].value)[:100] if values else "") or "a CA without a name"


def _title(certificate: x509.Certificate) -> str:
    """How messages call it: by its subject, its first name, or its serial number."""
    if list(certificate.subject):
        return f"the certificate of {_common_name(certificate.subject)}"
    names = _dns_names(certificate)
    return f"the certificate of {names[0]}" if names else f"the certificate {certificate.serial_number:x}"


def _sentence(text: str) -> str:
    """As it is shown: what a certificate says of itself may not write into somebody's terminal or log."""
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown[:1].upper() + shown[1:]


def _issuer_url(leaf: x509.Certificate) -> str:
    """Where the CA publishes its own certificate (RFC 5280 §4.2.2.1)."""
    for access in _extension(leaf, x509.AuthorityInformationAccess) or ():
        location = access.access_location
        if access.access_method == AuthorityInformationAccessOID.CA_ISSUERS and isinstance(
            location, x509.UniformResourceIdentifier
        ):
            return location.value if location.value.isprintable() and len(location.value) <= 200 else ""
    return ""


def _date(at: datetime.datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")

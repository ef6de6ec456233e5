"""TLS between nodes of a fleet: contexts that ask for both certificates, who the other is, and why not.

TLS 1.3 only, without tickets: connections are kept, and a resumed one would skip the look at the certificate. OpenSSL
checks chain, times, purpose and the root's name constraints in the handshake. `judge_peer` says afterwards which node
it is, and is stricter: one name, of our form, under our root. A connection is whose name it says only after both.

Make connections from these contexts themselves: what a context verifies is fixed when an SSLObject is made of it, and
setting another `context` later does not change it. And look at `selected_alpn_protocol()`: with a peer that offers none
of a server's protocols OpenSSL shakes hands all the same, and it is None.
"""

from __future__ import annotations

import datetime
import os
import ssl
from collections.abc import Sequence
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.cluster import SUFFIX, NodeIdentity, dns_name
from certs.errors import NameRefusedError, PeerRefusedError

_E = TypeVar("_E", bound=x509.ExtensionType)
_REMEDY = (
    "two nodes that each made a CA know nothing of each other: take one of them into the other's fleet "
    "(`wakefront node invite` there, `wakefront node join` here)"
)


def server_context(identity: NodeIdentity, alpn: Sequence[str], *, mutual: bool = True) -> ssl.SSLContext:
    """For connections from other nodes. Not `mutual` is for nodes that join, which have no certificate yet."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity, alpn)
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE
    return context


def client_context(identity: NodeIdentity, alpn: Sequence[str]) -> ssl.SSLContext:
    """For connections to other nodes; `server_hostname` is `cluster.dns_name` of the one that is meant."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity, alpn)


def joining_context(root_pem: bytes | None, alpn: Sequence[str]) -> ssl.SSLContext:
    """For a node that has no certificate yet, to one that invites it; without a root nothing is verified."""
    context = _bare_context(ssl.PROTOCOL_TLS_CLIENT, alpn)
    if root_pem is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=root_pem.decode("ascii"))
    return context


def _context(protocol: int, identity: NodeIdentity, alpn: Sequence[str]) -> ssl.SSLContext:
    context = _bare_context(protocol, alpn)
    context.load_verify_locations(cadata=identity.root_pem.decode("ascii"))
    # `load_cert_chain` takes paths only: the key is shown to it in memory, never on a disk.
    descriptor = os.memfd_create("node", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, identity.certificate.to_pem())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def _bare_context(protocol: int, alpn: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(list(alpn))
    return context


def judge_peer(der: bytes | None, root: x509.Certificate, now: float) -> str:
    """The name of the node that a certificate is of.

    Raises PeerRefusedError, which says why, if it does not prove one: whatever TLS has found in it before.
    """
    if not der:
        raise PeerRefusedError("it showed no certificate")
    try:
        leaf = x509.load_der_x509_certificate(der)
        extensions = leaf.extensions
        begins, ends = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise PeerRefusedError(f"its certificate cannot be read: {str(error)[:200]}") from error
    try:
        leaf.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise PeerRefusedError(f"its certificate is not of this fleet's CA; {_REMEDY}") from error
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    if moment < begins:
        raise PeerRefusedError(f"its certificate is not valid before {begins:%F %T}Z: the clocks of the nodes differ")
    if moment > ends:
        raise PeerRefusedError(f"its certificate has expired at {ends:%F %T}Z: did it run, and is its clock right?")
    if (basic := _extension(extensions, x509.BasicConstraints)) is not None and basic.ca:
        raise PeerRefusedError("its certificate is an authority's, not a node's")
    usage = _extension(extensions, x509.ExtendedKeyUsage)
    if usage is None or not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(usage):
        raise PeerRefusedError("its certificate is not for both ends of a connection, as a node's is")
    names = list(_extension(extensions, x509.SubjectAlternativeName) or ())
    if len(names) != 1 or not isinstance(names[0], x509.DNSName):
        raise PeerRefusedError(f"its certificate names {len(names)} things, a node's one DNS name")
    node = names[0].value.removesuffix(SUFFIX)
    try:
        if names[0].value == dns_name(node):
            return node
    except NameRefusedError:
        pass
    raise PeerRefusedError(f"its certificate is for {names[0].value[:80]!r}, which is no node's name")


def _extension(extensions: x509.Extensions, kind: type[_E]) -> _E | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def peer_name(peer: ssl.SSLObject | ssl.SSLSocket | bytes, root: x509.Certificate, now: float) -> str | None:
    """The node at the other end of a connection, after the handshake, or of a certificate in DER; None: nobody.

    `judge_peer` says why.
    """
    try:
        return judge_peer(peer if isinstance(peer, bytes) else peer.getpeercert(binary_form=True), root, now)
    except PeerRefusedError:
        return None


def explain(error: Exception) -> str:
    """What has kept two nodes from shaking hands, for a log line: ssl's words, and what they mean here."""
    if isinstance(error, ssl.SSLCertVerificationError):
        meaning = _VERIFY_MEANING.get(error.verify_code)
        return f"{meaning or 'its certificate is refused'} ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        meaning = next((text for part, text in _ALERT_MEANING.items() if part in reason), None)
        return f"{meaning} ({reason})" if meaning else f"no TLS between these nodes: {reason}"
    return str(error) or type(error).__name__


_FOREIGN = f"its certificate is not of this fleet's CA; {_REMEDY}"
_VERIFY_MEANING = {  # X509_V_ERR_... of OpenSSL's x509_vfy.h
    2: _FOREIGN, 7: _FOREIGN, 18: _FOREIGN, 19: _FOREIGN, 20: _FOREIGN, 21: _FOREIGN, 29: _FOREIGN, 30: _FOREIGN,
    9: "its certificate is not valid yet: the clocks of the nodes differ",
    10: "its certificate has expired: did it run, and is its clock right?",
    26: "its certificate is not for this end of a connection, as a node's is for both",
    47: "its certificate is for a name that is no node's",
    48: "its certificate is for an address, which is no node's name",
    62: "it is another node than the one that was meant",
}  # fmt: skip
_ALERT_MEANING = {  # parts of OpenSSL's reasons; alerts are what the other node has sent
    "ALERT_UNKNOWN_CA": f"it does not know the CA of this node's certificate; {_REMEDY}",
    "CERTIFICATE_REQUIRED": "it wants a certificate of the fleet, and was shown none",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "ALERT_CERTIFICATE_EXPIRED": "it takes this node's certificate for expired: are the clocks right?",
    "ALERT_BAD_CERTIFICATE": "it refuses this node's certificate: are the clocks right?",
    "ALERT_UNSUPPORTED_CERTIFICATE": "it refuses this node's certificate as not for this purpose",
    "ALERT_PROTOCOL_VERSION": "it wants TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "NO_APPLICATION_PROTOCOL": "it speaks another version of this protocol",
    "WRONG_VERSION_NUMBER": "what answers does not speak TLS: is that the other node's backhaul?",
    "HTTP_REQUEST": "it does not speak TLS",
}

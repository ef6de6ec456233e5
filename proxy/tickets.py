"""The TLS context that owns the session-ticket keys. Standard library only: the supervisor makes it before any fork.

A ticket is sealed with keys that belong to one context and cannot be set from Python. So there is one base context,
inherited by every worker, and each connection starts from it and then takes its certificate from a leaf context
(`edge/certificates.py`): a ticket given by one worker resumes at every other, and at their successors. What goes over
the wire (versions, suites, renegotiation) is decided here, since a connection keeps what it was created with.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence

# Fly's suites (spec network §5). The RSA forms are there for imported RSA certificates; an ECDSA leaf never picks them.
# TLS 1.3 has its three suites by default.
CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:"
    "ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-CHACHA20-POLY1305"
)


def new_base_context(highest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> ssl.SSLContext:
    """A server context without a certificate: TLS 1.2 and up, one ticket a handshake, no renegotiation."""
    context = _server_context()
    context.maximum_version = highest
    # Each ticket costs 15 us, and a browser that opens several connections gets one on each.
    context.num_tickets = 1
    return context


def new_leaf_context(pem_paths: Sequence[str], alpn: tuple[str, ...]) -> ssl.SSLContext:
    """A context that lends its certificates and its ALPN list to connections made from the base context.

    Each of `pem_paths` holds chain and key, one after the other; of an ECDSA and an RSA one each client gets the one it
    can verify. ALPN must be set here: after the swap the list of the base context counts no longer.

    Raises ssl.SSLError if chain or key do not parse or do not belong together.
    """
    context = _server_context()
    for path in pem_paths:
        context.load_cert_chain(path)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    return context

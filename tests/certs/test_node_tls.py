from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs import Certificate, InternalCA
from certs.cluster import ClusterCa, NodeIdentity
from certs.errors import PeerRefusedError
from certs.node_tls import client_context, explain, joining_context, judge_peer, peer_name, server_context
from tests.support.fleet import authority, der_of, shake, signed, storage_in

ALPN = ("wakefront/1",)
HOUR = 3600.0


def _internal(folder: Path) -> NodeIdentity:
    """What the node's own CA for app names would make of a node's name."""
    ca = InternalCA(storage_in(folder), folder / "ca.pem", time.time)
    leaf = ca.issue("b.node.wakefront")
    return NodeIdentity("b", leaf, ca.open().chain_pem)


@pytest.fixture
def ca(tmp_path: Path) -> ClusterCa:
    return authority(tmp_path / "fleet")


def test_two_nodes_of_a_fleet_know_each_other_by_name(ca: ClusterCa) -> None:
    shaken = shake(server_context(signed(ca, "a"), ALPN), client_context(signed(ca, "b"), ALPN))
    assert (shaken.server_error, shaken.client_error) == (None, None)
    root = ca.bundle.root.leaf
    assert peer_name(shaken.client, root, time.time()) == "a"
    assert peer_name(shaken.server, root, time.time()) == "b"
    for end in (shaken.server, shaken.client):
        assert (end.version(), end.selected_alpn_protocol()) == ("TLSv1.3", "wakefront/1")
        assert end.session_reused is False


def test_clocks_that_differ_by_minutes_do_not_matter(tmp_path: Path) -> None:
    for ahead_s in (-300.0, 300.0):
        ca = authority(tmp_path / str(ahead_s), lambda ahead_s=ahead_s: time.time() + ahead_s)  # type: ignore[misc]
        identity = ca.identity("a")
        shaken = shake(server_context(identity, ALPN), client_context(identity, ALPN))
        assert (shaken.server_error, shaken.client_error) == (None, None)
        assert judge_peer(der_of(identity), ca.bundle.root.leaf, time.time()) == "a"


REFUSED: list[tuple[str, Callable[[ClusterCa, Path], NodeIdentity], str, str]] = [
    # who, how it comes by its certificate, what TLS says of it as a client (else judge_peer), what judge_peer says
    ("of another fleet", lambda ca, at: signed(authority(at / "other"), "b"), "wakefront node join", "not of this"),
    ("of the node's own CA", lambda ca, at: _internal(at), "wakefront node join", "not of this fleet's CA"),
    ("expired", lambda ca, at: signed(ca, until_s=-1.0), "has expired", "has expired at"),
    ("not yet valid", lambda ca, at: signed(ca, from_s=HOUR), "clocks of the nodes differ", "is not valid before"),
    (
        "for servers alone",
        lambda ca, at: signed(ca, usage=(ExtendedKeyUsageOID.SERVER_AUTH,)),
        "not for this end", "both ends",
    ),
    ("for clients alone", lambda ca, at: signed(ca, usage=(ExtendedKeyUsageOID.CLIENT_AUTH,)), "", "both ends"),
    (
        "with two names",
        lambda ca, at: signed(ca, names=("b.node.wakefront", "a.node.wakefront")),
        "", "names 2 things",
    ),
    ("with a wildcard", lambda ca, at: signed(ca, names=("*.node.wakefront",)), "", "'*.node.wakefront'"),
    ("two labels deep", lambda ca, at: signed(ca, names=("a.b.node.wakefront",)), "", "no node's name"),
    ("in capitals", lambda ca, at: signed(ca, names=("B.node.wakefront",)), "", "no node's name"),
    ("of the bare zone", lambda ca, at: signed(ca, names=("node.wakefront",)), "", "no node's name"),
    ("for a public name", lambda ca, at: signed(ca, names=("b.example.com",)), "no node's", "'b.example.com'"),
    ("for an address", lambda ca, at: signed(ca, names=("127.0.0.1",)), "address", "one DNS name"),
    ("an authority", lambda ca, at: signed(ca, is_ca=True), "refused", "an authority's"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "by_tls", "by_us"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_certificate_that_proves_no_node_is_refused_and_the_log_can_say_why(
    ca: ClusterCa, tmp_path: Path, make: Callable[[ClusterCa, Path], NodeIdentity], by_tls: str, by_us: str
) -> None:
    bad, root = make(ca, tmp_path), ca.bundle.root.leaf
    with pytest.raises(PeerRefusedError, match=by_us.replace("*", r"\*")) as refused:
        judge_peer(der_of(bad), root, time.time())
    assert str(refused.value).isprintable()
    assert peer_name(der_of(bad), root, time.time()) is None

    bad = NodeIdentity(bad.node, bad.certificate, ca.bundle.root.chain_pem)  # its side would take ours
    shaken = shake(server_context(signed(ca, "a"), ALPN), client_context(bad, ALPN))
    assert peer_name(shaken.server, root, time.time()) is None if shaken.server_error is None else True
    if by_tls:
        assert shaken.server_error is not None and by_tls in explain(shaken.server_error)
        assert shaken.client_error is not None and explain(shaken.client_error)

    shaken = shake(server_context(bad, ALPN), client_context(signed(ca, "a"), ALPN), "b.node.wakefront")
    if shaken.client_error is None:
        assert peer_name(shaken.client, root, time.time()) is None
    else:
        assert explain(shaken.client_error).isprintable()


def test_a_certificate_for_clients_alone_does_not_serve(ca: ClusterCa) -> None:
    bad = signed(ca, "a", usage=(ExtendedKeyUsageOID.CLIENT_AUTH,))
    shaken = shake(server_context(bad, ALPN), client_context(signed(ca, "b"), ALPN))
    assert shaken.client_error is not None and "not for this end" in explain(shaken.client_error)


def test_a_node_other_than_the_one_that_was_meant_is_refused(ca: ClusterCa) -> None:
    shaken = shake(server_context(signed(ca, "c"), ALPN), client_context(signed(ca, "b"), ALPN), "a.node.wakefront")
    assert shaken.client_error is not None and "another node" in explain(shaken.client_error)


def test_two_nodes_that_each_made_a_ca_are_told_what_to_do(ca: ClusterCa, tmp_path: Path) -> None:
    other = authority(tmp_path / "other")
    shaken = shake(server_context(ca.identity("a"), ALPN), client_context(other.identity("b"), ALPN))
    assert shaken.client_error is not None and shaken.server_error is not None
    for error in (shaken.client_error, shaken.server_error):
        assert "node invite" in explain(error) and "node join" in explain(error)


def test_no_certificate_no_connection(ca: ClusterCa) -> None:
    server = server_context(signed(ca, "a"), ALPN)
    shaken = shake(server, joining_context(ca.bundle.root.chain_pem, ALPN))
    assert shaken.server_error is not None and "showed no certificate" in explain(shaken.server_error)
    assert shaken.client_error is not None and "shown none" in explain(shaken.client_error)
    with pytest.raises(PeerRefusedError, match="no certificate"):
        judge_peer(None, ca.bundle.root.leaf, time.time())


def test_a_node_that_joins_has_no_certificate_and_verifies_the_one_it_meets(ca: ClusterCa, tmp_path: Path) -> None:
    server = server_context(signed(ca, "a"), ("wakefront-join/1",), mutual=False)
    for root_pem in (None, ca.bundle.root.chain_pem):
        shaken = shake(server, joining_context(root_pem, ("wakefront-join/1",)))
        assert (shaken.server_error, shaken.client_error) == (None, None)
        assert peer_name(shaken.server, ca.bundle.root.leaf, time.time()) is None
    foreign = authority(tmp_path / "other").bundle.root.chain_pem
    shaken = shake(server, joining_context(foreign, ("wakefront-join/1",)))
    assert shaken.client_error is not None and "not of this fleet's CA" in explain(shaken.client_error)


def test_tls_1_2_is_refused_at_both_ends(ca: ClusterCa) -> None:
    old = client_context(signed(ca, "b"), ALPN)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    shaken = shake(server_context(signed(ca, "a"), ALPN), old)
    assert shaken.server_error is not None and "TLS 1.3" in explain(shaken.server_error)
    assert shaken.client_error is not None and "TLS 1.3" in explain(shaken.client_error)
    old = server_context(signed(ca, "a"), ALPN)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    shaken = shake(old, client_context(signed(ca, "b"), ALPN))
    assert shaken.client_error is not None or shaken.server_error is not None


def test_a_peer_without_our_protocol_shakes_hands_with_none(ca: ClusterCa) -> None:
    """What whoever accepts has to look at: OpenSSL does not refuse it."""
    shaken = shake(server_context(signed(ca, "a"), ALPN), client_context(signed(ca, "b"), ("h2",)))
    assert shaken.server.selected_alpn_protocol() is None


def test_a_context_of_a_connection_cannot_be_exchanged_for_one_that_verifies(ca: ClusterCa) -> None:
    """Why connections are made from these contexts, and not given them later."""
    bare = server_context(signed(ca, "a"), ALPN, mutual=False)
    mutual = server_context(signed(ca, "a"), ALPN)
    bare.sni_callback = lambda connection, name, context: setattr(connection, "context", mutual)
    shaken = shake(bare, client_context(signed(ca, "b"), ALPN))
    assert shaken.server_error is None
    assert peer_name(shaken.server, ca.bundle.root.leaf, time.time()) is None


@pytest.mark.parametrize("der", [b"", b"\x30", b"x" * 4096, b"\x30\x82\xff\xff"])
def test_what_is_no_certificate_is_nobody(ca: ClusterCa, der: bytes) -> None:
    assert peer_name(der, ca.bundle.root.leaf, time.time()) is None


def test_a_certificate_cut_or_altered_anywhere_is_nobody(ca: ClusterCa) -> None:
    root, der = ca.bundle.root.leaf, der_of(signed(ca, "b"))
    assert peer_name(der, root, time.time()) == "b"
    for at in range(0, len(der), 3):
        altered = der[:at] + bytes([der[at] ^ 0x41]) + der[at + 1 :]
        assert peer_name(altered, root, time.time()) is None, at
        assert peer_name(der[:at], root, time.time()) is None, at


def test_a_certificate_that_a_nodes_certificate_has_signed_is_refused(ca: ClusterCa) -> None:
    """A node's key alone makes no other nodes."""
    node = signed(ca, "b")
    forged = ClusterCa.__new__(ClusterCa)
    forged._bundle = type(ca.bundle)(Certificate("root", node.certificate.chain_pem, node.certificate.key_pem), b"")
    leaf = signed(forged, "c")
    assert leaf.certificate.leaf.issuer == x509.Name([])
    chain = leaf.certificate.chain_pem + node.certificate.chain_pem
    bad = NodeIdentity("c", Certificate("c", chain, leaf.certificate.key_pem), ca.bundle.root.chain_pem)
    shaken = shake(server_context(signed(ca, "a"), ALPN), client_context(bad, ALPN))
    assert shaken.server_error is not None
    der = leaf.certificate.leaf.public_bytes(serialization.Encoding.DER)
    assert peer_name(der, ca.bundle.root.leaf, time.time()) is None

from __future__ import annotations

import datetime
import hashlib
import json
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs import Certificate, CertificateError, NameRefusedError, SealBrokenError
from certs.cluster import Bundle, ClusterCa, NodeIdentity, dns_name
from certs.errors import NoClusterError
from certs.keys import key_to_pem, new_key
from tests.support.fleet import authority, der_of, storage_in

NOW = 1_800_000_000.0
DAY = 86_400.0


def test_the_root_is_made_once_whoever_comes_first(tmp_path: Path) -> None:
    made: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: made.append(ClusterCa(storage_in(tmp_path), lambda: NOW).make().fingerprint))
        for _ in range(8)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(made) == 8 and len(set(made)) == 1
    loaded = ClusterCa(storage_in(tmp_path), lambda: NOW).load()
    assert loaded is not None and loaded.fingerprint == made[0]


def test_a_node_that_has_made_and_joined_nothing_belongs_to_no_fleet(tmp_path: Path) -> None:
    ca = ClusterCa(storage_in(tmp_path), lambda: NOW)
    assert ca.load() is None
    with pytest.raises(NoClusterError):
        ca.identity("a")
    assert NodeIdentity.load(storage_in(tmp_path)) is None


def test_all_of_it_lies_sealed_for_its_owner_alone(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    ca.identity("a")
    files = [path for path in (tmp_path / "certs" / "cluster").iterdir()]
    assert {path.name for path in files} == {"bundle.sealed", "key.sealed", "node.sealed"}
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"BEGIN" not in path.read_bytes() and ca.bundle.secret not in path.read_bytes()
    for one in (ca.bundle, ca.identity("a")):
        assert "PRIVATE" not in repr(one) and repr(ca.bundle.secret) not in repr(one)


def test_a_bundle_that_cannot_be_opened_is_not_replaced_by_a_new_one(tmp_path: Path) -> None:
    authority(tmp_path)
    before = (tmp_path / "certs" / "cluster" / "bundle.sealed").read_bytes()
    with pytest.raises(SealBrokenError):
        ClusterCa(storage_in(tmp_path, bytes(32)), lambda: NOW).make()
    assert (tmp_path / "certs" / "cluster" / "bundle.sealed").read_bytes() == before


def test_the_root_lives_ten_years_and_signs_nothing_but_nodes(tmp_path: Path) -> None:
    ca = authority(tmp_path, lambda: NOW)
    root = ca.bundle.root.leaf
    assert root.not_valid_after_utc.timestamp() == NOW + 3650 * DAY
    basic = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    constraints = root.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical and constraints.value.permitted_subtrees == [x509.DNSName("node.wakefront")]
    assert hashlib.sha256(ca.bundle.root_der).digest() == ca.bundle.fingerprint
    assert len(ca.bundle.secret) == 32


@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_a_nodes_certificate_verifies_strictly_at_both_ends(tmp_path: Path, purpose: str) -> None:
    ca = authority(tmp_path)
    (tmp_path / "root.pem").write_bytes(ca.bundle.root.chain_pem)
    (tmp_path / "node.pem").write_bytes(ca.identity("n" * 63).certificate.chain_pem)
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-verify_hostname", f"{'n' * 63}.node.wakefront",
         "-CAfile", tmp_path / "root.pem", tmp_path / "node.pem"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr


def test_a_nodes_certificate_lives_30_days_and_is_renewed_after_two_thirds_with_its_key(tmp_path: Path) -> None:
    now = NOW
    ca = authority(tmp_path, lambda: now)
    first = ca.identity("a")
    assert first.expires_at == NOW + 30 * DAY
    assert first.certificate.leaf.not_valid_before_utc.timestamp() == NOW - 3600
    now = first.renew_at - 1
    assert ca.identity("a") == first
    now = first.renew_at
    assert NOW + 19 * DAY < now < NOW + 20 * DAY
    second = ca.identity("a")
    assert second.expires_at > first.expires_at
    assert second.certificate.key_pem == first.certificate.key_pem == key_to_pem(ca.node_key())
    assert NodeIdentity.load(storage_in(tmp_path)) == second


def test_no_certificate_outlives_the_root(tmp_path: Path) -> None:
    now = NOW
    ca = authority(tmp_path, lambda: now)
    now = NOW + 3640 * DAY
    assert ca.identity("a").expires_at == NOW + 3650 * DAY


def test_another_name_or_another_root_gets_another_certificate(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    a, b = ca.identity("a"), ca.identity("b")
    assert (a.node, b.node) == ("a", "b") and a.certificate != b.certificate
    other = authority(tmp_path / "other")
    other.adopt(ca.bundle, "b", ca.sign("b", other.node_key().public_key()))
    assert other.identity("b").root_pem == ca.bundle.root.chain_pem


def test_a_clock_that_was_set_back_gets_a_certificate_that_is_valid_now(tmp_path: Path) -> None:
    now = NOW
    ca = authority(tmp_path, lambda: now)
    now = NOW + 300
    ca.identity("a")
    now = NOW - 7200
    assert ca.identity("a").certificate.leaf.not_valid_before_utc.timestamp() == now - 3600


@pytest.mark.parametrize("node", ["", "A", "a.b", "-a", "a-", "*", "a" * 64, "ä", "a\n", "a b"])
def test_what_is_no_name_of_a_node_gets_no_certificate(tmp_path: Path, node: str) -> None:
    with pytest.raises(NameRefusedError):
        authority(tmp_path).sign(node, new_key().public_key())
    with pytest.raises(NameRefusedError):
        dns_name(node)


# --- joining another fleet


def test_a_node_that_joins_has_all_that_the_first_has_and_may_be_the_last(tmp_path: Path) -> None:
    first, second = authority(tmp_path / "a"), ClusterCa(storage_in(tmp_path / "b"), lambda: NOW)
    first.identity("a")
    handed_on = Bundle.from_bytes(first.bundle.to_bytes())
    chain = first.sign("b", second.node_key().public_key())
    identity = second.adopt(handed_on, "b", chain)
    assert identity.certificate.chain_pem == chain
    again = ClusterCa(storage_in(tmp_path / "b"), lambda: datetime.datetime.now().timestamp())
    bundle = again.load()
    assert bundle is not None
    assert (bundle.fingerprint, bundle.secret) == (first.bundle.fingerprint, first.bundle.secret)
    assert (bundle.origin, first.bundle.origin) == ("joined", "made")
    assert again.identity("b") == identity
    again.sign("c", new_key().public_key())


def test_the_bundle_of_a_fleet_that_was_left_is_kept_aside(tmp_path: Path) -> None:
    first, second = authority(tmp_path / "a"), authority(tmp_path / "b")
    left = second.bundle
    second.adopt(first.bundle, "b", first.sign("b", second.node_key().public_key()))
    former = storage_in(tmp_path / "b").load("cluster/former")
    assert former is not None and Bundle.from_bytes(former) == left


def test_a_certificate_for_another_key_is_not_adopted(tmp_path: Path) -> None:
    first, second = authority(tmp_path / "a"), ClusterCa(storage_in(tmp_path / "b"), lambda: NOW)
    with pytest.raises(CertificateError, match="key"):
        second.adopt(first.bundle, "b", first.sign("b", new_key().public_key()))
    assert second.load() is None


def test_what_fails_in_the_middle_of_joining_leaves_the_node_as_it_was(tmp_path: Path) -> None:
    """On a full disk, or killed: the bundle is written last, and what was written before it is of no consequence."""
    first = authority(tmp_path / "a")
    for fails_at in range(4):
        storage = Failing(tmp_path / f"b{fails_at}", fails_at)
        second = ClusterCa(storage, lambda: NOW)
        before = second.make() if fails_at % 2 else second.load()
        storage.arm()
        with pytest.raises(OSError, match="No space"):
            second.adopt(first.bundle, "b", first.sign("b", second.node_key().public_key()))
        again = ClusterCa(storage_in(tmp_path / f"b{fails_at}"), lambda: NOW)
        after = again.load()
        assert after == before
        if after is not None:
            assert again.identity("b").root_pem == after.root.chain_pem


class Failing:
    """A folder whose disk is full after so many more writes."""

    def __init__(self, folder: Path, writes: int) -> None:
        self._inner = storage_in(folder)
        self._left: int | None = None
        self._writes = writes
        self.load, self.delete, self.keys, self.lock = (
            self._inner.load, self._inner.delete, self._inner.keys, self._inner.lock,
        )  # fmt: skip

    def arm(self) -> None:
        self._left = self._writes

    def save(self, key: str, value: bytes) -> None:
        if self._left == 0:
            raise OSError(28, os.strerror(28))
        if self._left is not None:
            self._left -= 1
        self._inner.save(key, value)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": None}, {"root": ""}, {"root": 5}, {"secret": "AAAA"}, {"secret": "?"},
        {"secret": None},
    ],
)  # fmt: skip
def test_a_bundle_that_is_not_whole_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    fields = json.loads(authority(tmp_path).bundle.to_bytes()) | change
    with pytest.raises(CertificateError, match="fleet"):
        Bundle.from_bytes(json.dumps(fields).encode())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"{" * 2000, b"null"])
def test_what_is_no_bundle_and_no_identity_is_refused(data: bytes) -> None:
    for kind in (Bundle, NodeIdentity):
        with pytest.raises(CertificateError):
            kind.from_bytes(data)


def test_a_bundle_whose_key_is_not_the_roots_is_refused(tmp_path: Path) -> None:
    bundle = authority(tmp_path).bundle
    other = Certificate("root", bundle.root.chain_pem, key_to_pem(new_key()))
    with pytest.raises(CertificateError, match="key is not the root's"):
        Bundle.from_bytes(Bundle(other, bundle.secret).to_bytes())


def test_an_identity_that_cannot_be_read_is_issued_anew(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    ca.identity("a")
    storage_in(tmp_path).save("cluster/node", b"broken")
    identity = ca.identity("a")
    assert NodeIdentity.load(storage_in(tmp_path)) == identity
    assert isinstance(identity.certificate.leaf.public_key(), ec.EllipticCurvePublicKey)
    assert der_of(identity)

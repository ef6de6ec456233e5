from __future__ import annotations

import datetime
import os
import ssl
import stat
import subprocess
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
from cryptography import x509

from certs import Certificate, CertificateError, InternalCA, NameRefusedError, Seal, SealBrokenError, SealedFolder
from certs.seal import load_or_make_secret

SECRET = bytes(range(32))


def authority(folder: Path, now: Callable[[], float] = time.time) -> InternalCA:
    return InternalCA(SealedFolder(folder / "certs", Seal(SECRET)), folder / "certs" / "ca.pem", now)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_leaf_verifies_under_the_public_root_even_strictly(tmp_path: Path) -> None:
    certificate = authority(tmp_path).issue("app.example.com")
    (tmp_path / "leaf.pem").write_bytes(certificate.chain_pem)
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "app.example.com",
         "-CAfile", tmp_path / "certs" / "ca.pem", tmp_path / "leaf.pem"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (tmp_path / "both.pem").write_bytes(certificate.to_pem())
    context.load_cert_chain(tmp_path / "both.pem")


def test_a_leaf_lives_90_days_and_is_due_after_two_thirds(tmp_path: Path) -> None:
    now = 1_800_000_000.0
    certificate = authority(tmp_path, lambda: now).issue("a.example")
    day = 86_400
    assert certificate.expires_at == now + 90 * day
    assert now + 59 * day < certificate.renew_at < now + 60 * day
    names = certificate.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example"]


def test_a_name_too_long_for_a_common_name_gets_a_critical_alternative_name(tmp_path: Path) -> None:
    name = "a" * 60 + ".example.com"
    leaf = authority(tmp_path).issue(name).leaf
    assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
    assert list(leaf.subject) == []


def test_wildcards_are_issued(tmp_path: Path) -> None:
    assert b"BEGIN CERTIFICATE" in authority(tmp_path).issue("*.example.com").chain_pem


@pytest.mark.parametrize(
    "name", ["", "A.example", "a b", "bücher.example", "a..b", "*.*.a", "a.*.b", "../x", "a" * 254]
)
def test_what_is_no_host_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(NameRefusedError):
        authority(tmp_path).issue(name)


def test_the_root_is_made_once_and_kept_sealed(tmp_path: Path) -> None:
    first = authority(tmp_path).open()
    second = authority(tmp_path).open()
    assert first == second
    assert first.leaf.not_valid_after_utc - first.leaf.not_valid_before_utc > datetime.timedelta(days=3650)
    assert (tmp_path / "certs" / "ca.pem").read_bytes() == first.chain_pem
    stored = tmp_path / "certs" / "internal" / "root.sealed"
    assert mode(stored) == 0o600
    assert b"PRIVATE" not in stored.read_bytes() and b"CERTIFICATE" not in stored.read_bytes()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"PRIVATE KEY" not in path.read_bytes(), path


def test_a_lost_public_root_is_written_again(tmp_path: Path) -> None:
    root = authority(tmp_path).open()
    (tmp_path / "certs" / "ca.pem").unlink()
    authority(tmp_path).open()
    assert (tmp_path / "certs" / "ca.pem").read_bytes() == root.chain_pem


def _open_in_process(folder: Path) -> bytes:
    secret = load_or_make_secret(folder / "secret.key")
    ca = InternalCA(SealedFolder(folder / "certs", Seal(secret)), folder / "certs" / "ca.pem", time.time)
    return secret + ca.open().chain_pem


@pytest.mark.slow
def test_processes_that_come_first_at_once_agree_on_one_secret_and_one_root(tmp_path: Path) -> None:
    with get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_open_in_process, [tmp_path] * 8, chunksize=1))) == 1
        pool.close()
        pool.join()


def test_the_secret_is_private_and_anything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    secret = load_or_make_secret(path)
    assert len(secret) == 32 and mode(path) == 0o600
    assert load_or_make_secret(path) == secret
    assert os.listdir(tmp_path) == ["secret.key"]
    path.chmod(0o640)
    with pytest.raises(CertificateError, match="0600"):
        load_or_make_secret(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(CertificateError, match="expected 32 bytes"):
        load_or_make_secret(path)


def test_a_sealed_value_opens_only_with_its_secret_its_name_and_unaltered() -> None:
    seal = Seal(SECRET)
    sealed = seal.close(b"value", "a")
    assert seal.open(sealed, "a") == b"value"
    for other, value, name in (
        (seal, sealed, "b"),
        (Seal(bytes(32)), sealed, "a"),
        (seal, sealed[:-1] + bytes((sealed[-1] ^ 1,)), "a"),
        (seal, b"", "a"),
    ):
        with pytest.raises(SealBrokenError):
            other.open(value, name)


def test_storage_keeps_what_is_saved_until_it_is_deleted(tmp_path: Path) -> None:
    storage = SealedFolder(tmp_path / "certs", Seal(SECRET))
    assert storage.load("leaf/*.example.com") is None
    storage.save("leaf/*.example.com", b"one")
    storage.save("leaf/*.example.com", b"two")
    storage.save("leaf/b", b"three")
    assert SealedFolder(tmp_path / "certs", Seal(SECRET)).load("leaf/*.example.com") == b"two"
    assert sorted(storage.keys("leaf")) == ["leaf/*.example.com", "leaf/b"]
    assert list(storage.keys("other")) == []
    storage.delete("leaf/b")
    storage.delete("leaf/b")
    assert list(storage.keys("leaf")) == ["leaf/*.example.com"]
    assert mode(tmp_path / "certs" / "leaf") == 0o700


def test_a_name_as_long_as_names_get_can_be_stored(tmp_path: Path) -> None:
    storage = SealedFolder(tmp_path, Seal(SECRET))
    name = "leaf/" + ".".join(["a" * 60] * 4)
    storage.save(name, b"x")
    assert storage.load(name) == b"x"


@pytest.mark.parametrize("key", ["../x", "leaf/../x", "/etc/passwd", "leaf/", "", "leaf//x", "Leaf/x", "leaf/.hidden"])
def test_a_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(CertificateError):
        SealedFolder(tmp_path, Seal(SECRET)).save(key, b"")


def test_a_failed_write_leaves_the_old_value_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = SealedFolder(tmp_path, Seal(SECRET))
    storage.save("leaf/a", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.save("leaf/a", b"new")
    monkeypatch.undo()
    assert storage.load("leaf/a") == b"old"
    assert os.listdir(tmp_path / "leaf") == ["a.sealed"]


def test_a_stored_pem_without_key_or_certificate_is_refused(tmp_path: Path) -> None:
    certificate = authority(tmp_path).issue("a.example")
    assert Certificate.from_pem("a.example", certificate.to_pem()) == certificate
    assert "PRIVATE" not in repr(certificate)
    for pem in (b"", certificate.chain_pem, certificate.key_pem, b"junk" + certificate.key_pem):
        with pytest.raises(CertificateError):
            Certificate.from_pem("a.example", pem)

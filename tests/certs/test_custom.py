"""What an imported certificate is told: real keys and chains, some of them made by openssl."""

from __future__ import annotations

import datetime
import re
import ssl
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa, x25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from certs.custom import MAX_CHAIN_BYTES, MAX_KEY_BYTES, CustomRefusedError, Judged, judge_custom

NOW = 1_800_000_000.0
DAY = datetime.timedelta(days=1)
HOST = "shop.example.com"
PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
AT = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
LEAF_KEY, CA_KEY, ROOT_KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))


@dataclass(frozen=True)
class Signer:
    name: str
    key: Any
    ca: bool = True


ROOT, INTERMEDIATE = Signer("Test Root", ROOT_KEY), Signer("Test Intermediate", CA_KEY)


def certificate(
    subject: str, key: Any, by: Signer, *, names: list[str] | None = None, begins: float = -10, ends: float = 80,
    ca: bool = False, extensions: list[tuple[x509.ExtensionType, bool]] | None = None, digest: Any = None,
) -> bytes:  # fmt: skip
    """PEM; `begins` and `ends` are days from now."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, by.name)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(AT + begins * DAY)
        .not_valid_after(AT + ends * DAY)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), False)
    for value, critical in extensions or []:
        builder = builder.add_extension(value, critical)
    return builder.sign(by.key, digest or hashes.SHA256()).public_bytes(PEM)


def pkcs8(key: Any) -> bytes:
    pem: bytes = key.private_bytes(PEM, PKCS8, serialization.NoEncryption())
    return pem


LEAF = certificate("", LEAF_KEY, INTERMEDIATE, names=[HOST])
CA = certificate("Test Intermediate", CA_KEY, ROOT, ca=True, ends=800)
ROOT_PEM = certificate("Test Root", ROOT_KEY, ROOT, ca=True, ends=3000)
KEY = pkcs8(LEAF_KEY)


def leaf(**more: Any) -> bytes:
    return certificate(**({"subject": "", "key": LEAF_KEY, "by": INTERMEDIATE, "names": [HOST]} | more))


def good(chain: bytes = LEAF + CA, key: bytes = KEY, host: str = HOST) -> Judged:
    return judge_custom(host, chain, key, NOW)


def faults(chain: bytes = LEAF + CA, key: bytes = KEY, host: str = HOST) -> dict[str, str]:
    """Code -> message of each fault; each says what to do."""
    with pytest.raises(CustomRefusedError) as refused:
        judge_custom(host, chain, key, NOW)
    assert all(fault.message.endswith(".") and fault.remedy.endswith(".") for fault in refused.value.faults)
    assert len(set(refused.value.faults)) == len(refused.value.faults)
    return {fault.code: fault.message for fault in refused.value.faults}


def codes(judged: Judged) -> list[str]:
    return [warning.code for warning in judged.warnings]


# --- what is taken


def test_a_good_pair_is_taken_and_served_by_openssl(tmp_path: Path) -> None:
    judged = good()
    assert judged.warnings == () and judged.certificate.name == HOST
    (tmp_path / "both.pem").write_bytes(judged.certificate.to_pem())
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "both.pem")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2048, 4096])
def test_an_rsa_key_in_its_old_form_is_rewritten(bits: int) -> None:
    key = rsa.generate_private_key(65_537, bits)
    old = key.private_bytes(PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    assert old.startswith(b"-----BEGIN RSA PRIVATE KEY-----")
    assert good(leaf(key=key) + CA, old).certificate.key_pem == pkcs8(key)


def test_a_sec1_key_as_openssl_ecparam_writes_it_is_rewritten(tmp_path: Path) -> None:
    command = ["openssl", "ecparam", "-name", "secp384r1", "-genkey", "-out", tmp_path / "key.pem"]
    subprocess.run(command, check=True, capture_output=True)
    written = (tmp_path / "key.pem").read_bytes()
    assert b"EC PARAMETERS" in written and b"EC PRIVATE KEY" in written
    key = serialization.load_pem_private_key(written, None)
    assert good(leaf(key=key) + CA, written).certificate.key_pem == pkcs8(key)


def test_text_around_the_blocks_and_windows_line_ends_do_not_matter() -> None:
    chain = b"\xef\xbb\xbfsubject=CN = x\n" + LEAF + b"\n\nissuer: me\n" + CA
    assert good(chain.replace(b"\n", b"\r\n"), b"Bag Attributes\n" + KEY).certificate.chain_pem == LEAF + CA


def test_a_chain_in_any_order_is_mended_and_that_is_said() -> None:
    for chain in (CA + LEAF, ROOT_PEM + CA + LEAF, CA + LEAF + ROOT_PEM):
        judged = good(chain)
        assert judged.certificate.chain_pem.startswith(LEAF + CA) and codes(judged) == ["chain_reordered"]
    assert codes(good(LEAF + CA + ROOT_PEM)) == []


def test_certificates_that_come_twice_or_do_not_belong_are_left_out_and_named() -> None:
    stranger = certificate("A Stranger", ROOT_KEY, ROOT, ca=True)
    judged = good(LEAF + LEAF + stranger + CA)
    assert judged.certificate.chain_pem == LEAF + CA
    assert codes(judged) == ["duplicate_certificate", "unrelated_certificate"]
    assert "A Stranger" in judged.warnings[1].message


def test_a_missing_issuer_is_a_warning_that_says_where_it_is() -> None:
    url = "http://ca.example/issuer.crt"
    access = x509.AuthorityInformationAccess(
        [x509.AccessDescription(x509.AuthorityInformationAccessOID.CA_ISSUERS, x509.UniformResourceIdentifier(url))]
    )
    judged = good(leaf(extensions=[(access, False)]))
    assert codes(judged) == ["chain_incomplete"]
    assert "Test Intermediate" in judged.warnings[0].message and url in judged.warnings[0].remedy


def test_a_self_signed_certificate_is_taken_with_a_warning() -> None:
    chain = certificate(HOST, LEAF_KEY, Signer(HOST, LEAF_KEY), names=[HOST])
    assert codes(good(chain)) == ["self_signed"]


def test_a_certificate_near_its_end_is_taken_with_a_warning() -> None:
    assert codes(good(leaf(ends=3) + CA)) == ["expires_soon"]


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["*.example.com"], "shop.example.com"),
        (["*.example.com"], "*.example.com"),
        (["other.example", "SHOP.Example.com"], "shop.example.com"),
        (["xn--bcher-kva.example"], "xn--bcher-kva.example"),
    ],
)
def test_a_name_is_covered_by_itself_or_by_a_wildcard_of_one_label(names: list[str], host: str) -> None:
    assert good(leaf(names=names) + CA, host=host).certificate.name == host


def test_a_common_name_counts_only_without_alternative_names() -> None:
    assert codes(good(certificate(HOST, LEAF_KEY, INTERMEDIATE) + CA)) == ["common_name_only"]
    assert "wrong_host" in faults(certificate(HOST, LEAF_KEY, INTERMEDIATE, names=["other.example"]) + CA)


# --- what is refused


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["*.example.com"], "a.shop.example.com"),
        (["*.example.com"], "example.com"),
        (["shop.example.com"], "*.example.com"),
        (["shop.example.com.evil.example"], "shop.example.com"),
        ([f"n{number}.example" for number in range(60)], "shop.example.com"),
    ],
)
def test_another_host_is_refused_with_the_names_it_has(names: list[str], host: str) -> None:
    message = faults(leaf(names=names) + CA, host=host)["wrong_host"]
    assert host in message and names[0] in message and len(message) < 300


def test_all_faults_are_told_at_once() -> None:
    weak = rsa.generate_private_key(65_537, 1024)
    usage = (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
    chain = certificate("", weak, INTERMEDIATE, names=["other.example"], begins=-90, ends=-1, extensions=[usage]) + CA
    assert faults(chain, pkcs8(weak)).keys() == {"small_rsa", "wrong_host", "not_for_servers", "expired"}
    assert faults(chain, KEY).keys() == {"key_mismatch", "wrong_host", "not_for_servers", "expired"}


def test_the_key_of_another_certificate_is_refused() -> None:
    assert "does not belong to the certificate of shop.example.com" in faults(key=pkcs8(ROOT_KEY))["key_mismatch"]


def test_certificates_out_of_their_time_are_refused_with_the_date() -> None:
    assert "expired at 2027-01-14" in faults(leaf(begins=-90, ends=-1) + CA)["expired"]
    message = faults(leaf(begins=1, ends=90) + CA)["not_yet_valid"]
    assert "valid from 2027-01-16" in message and "here it is 2027-01-15" in message
    old = certificate("Test Intermediate", CA_KEY, ROOT, ca=True, begins=-90, ends=-1)
    assert "The certificate of Test Intermediate expired" in faults(LEAF + old)["expired"]


def test_a_chain_whose_links_do_not_hold_is_refused() -> None:
    impostor = certificate("Test Intermediate", LEAF_KEY, ROOT, ca=True)
    assert "Test Intermediate" in faults(leaf() + impostor.replace(b"\n\n", b"\n"), KEY).get("broken_link", "")
    no_ca = certificate("Test Intermediate", CA_KEY, ROOT)
    assert "may not issue" in faults(LEAF + no_ca)["issuer_is_no_ca"]


def test_the_right_issuer_is_found_among_two_of_one_name() -> None:
    impostor = certificate("Test Intermediate", ROOT_KEY, ROOT, ca=True)
    assert good(LEAF + impostor + CA).certificate.chain_pem == LEAF + CA


def test_a_certificate_that_is_a_ca_is_refused_as_openssl_makes_it(tmp_path: Path) -> None:
    command = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN={HOST} "
        f"-addext subjectAltName=DNS:{HOST} -keyout key.pem -out cert.pem"
    ).split()
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    chain, key = (tmp_path / "cert.pem").read_bytes(), (tmp_path / "key.pem").read_bytes()
    with pytest.raises(CustomRefusedError) as refused:
        judge_custom(HOST, chain, key, time.time() + 60)
    (fault,) = refused.value.faults
    assert fault.code == "is_ca"
    subprocess.run([*command, "-addext", "basicConstraints=critical,CA:FALSE"], check=True, capture_output=True,
                   cwd=tmp_path)  # fmt: skip
    assert "-addext basicConstraints=critical,CA:FALSE" in fault.remedy
    mended = (tmp_path / "cert.pem").read_bytes(), (tmp_path / "key.pem").read_bytes()
    assert codes(judge_custom(HOST, *mended, time.time() + 60)) == ["self_signed"]


@pytest.mark.parametrize("old", [True, False])
def test_an_encrypted_key_is_refused_and_the_remedy_works(tmp_path: Path, old: bool) -> None:
    form = serialization.PrivateFormat.TraditionalOpenSSL if old else PKCS8
    encrypted = LEAF_KEY.private_bytes(PEM, form, serialization.BestAvailableEncryption(b"secret"))
    with pytest.raises(CustomRefusedError) as refused:
        judge_custom(HOST, LEAF + CA, encrypted, NOW)
    (fault,) = refused.value.faults
    assert fault.code == "encrypted_key"
    (tmp_path / "key.pem").write_bytes(encrypted)
    command = fault.remedy.removeprefix("Decrypt it: ").partition(". ")[0].split()
    subprocess.run([*command, "-passin", "pass:secret"], check=True, cwd=tmp_path)
    assert good(key=(tmp_path / "plain-key.pem").read_bytes()).certificate.key_pem == KEY


def test_chain_and_key_in_each_others_place_are_seen() -> None:
    assert list(faults(KEY, LEAF + CA)) == ["swapped"]
    assert list(faults(LEAF + CA, LEAF + CA)) == ["no_key"]
    assert list(faults(KEY, KEY)) == ["no_certificate"]
    assert good(LEAF + CA + KEY, KEY + LEAF).certificate.key_pem == KEY  # one file of both is no fault


@pytest.mark.parametrize(
    ("chain", "key", "code", "says"),
    [
        (b"", KEY, "no_certificate", "is empty"),
        (b"hello", KEY, "no_pem", "no line -----BEGIN"),
        (LEAF + CA, b"hello", "no_pem", "private key"),
        (LEAF.decode().encode("utf-16"), KEY, "no_pem", "chain"),
        (x509.load_pem_x509_certificate(LEAF).public_bytes(serialization.Encoding.DER), KEY, "der", "binary"),
        (LEAF + CA, LEAF_KEY.private_bytes(serialization.Encoding.DER, PKCS8, serialization.NoEncryption()), "der",
         "private key"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAA==\n-----END CERTIFICATE REQUEST-----\n", KEY, "request", "request"),
        (b"-----BEGIN PKCS7-----\nAA==\n-----END PKCS7-----\n", KEY, "pkcs7", "PKCS #7"),
        (LEAF[:300], KEY, "cut_off", "no end"),
        (LEAF + CA[:300], KEY, "cut_off", "no end"),
        (LEAF.replace(b"MII", b"MIJ", 1) + CA, KEY, "bad_certificate", "Certificate 1"),
        (LEAF + CA, KEY.replace(b"M", b"!", 1), "bad_key", "damaged"),
        (LEAF + CA, KEY[:60], "cut_off", "private key"),
        (LEAF + CA, KEY + pkcs8(ROOT_KEY), "several_keys", "2 private keys"),
        (LEAF + CA, KEY.replace(b"PRIVATE", b"PUBLIC"), "no_key", "PUBLIC KEY"),
        (b"x" * (MAX_CHAIN_BYTES + 1), KEY, "chain_too_large", "65,537"),
        (LEAF * 1500, KEY, "chain_too_large", "65,536"),
        (LEAF + CA, KEY + b"\n" * MAX_KEY_BYTES, "key_too_large", "16,384"),
        (LEAF + CA * 10, KEY, "too_many_certificates", "11 certificates"),
    ],
)  # fmt: skip
def test_what_is_no_chain_or_no_key_is_said_what_it_is(chain: bytes, key: bytes, code: str, says: str) -> None:
    found = faults(chain, key)
    assert list(found) == [code] and says in found[code]


def test_a_pkcs12_file_is_told_how_to_take_apart() -> None:
    from cryptography.hazmat.primitives.serialization import pkcs12

    leaf = x509.load_pem_x509_certificate(LEAF)
    packed = pkcs12.serialize_key_and_certificates(b"x", LEAF_KEY, leaf, None, serialization.NoEncryption())
    assert list(faults(packed, packed)) == ["pkcs12"]


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (rsa.generate_private_key(65_537, 1024), "small_rsa"),
        (ec.generate_private_key(ec.SECP521R1()), "curve"),
        (ec.generate_private_key(ec.SECP256K1()), "curve"),
        (ed25519.Ed25519PrivateKey.generate(), "key_type"),
        (x25519.X25519PrivateKey.generate(), "key_type"),
        (dsa.generate_private_key(2048), "key_type"),
    ],
)
def test_keys_that_clients_do_not_take_are_refused_with_the_reason(key: Any, code: str) -> None:
    assert code in faults(key=pkcs8(key))


def test_a_huge_rsa_key_is_refused_before_its_primes_are_looked_at() -> None:
    e = 65_537
    p, q = (1 << 6000) + 1, (1 << 6001) + 1  # no primes: to find that out would take seconds
    d = pow(e, -1, (p - 1) * (q - 1)) if (p - 1) * (q - 1) % e else 3
    numbers = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), 3, rsa.RSAPublicNumbers(e, p * q))
    pem = pkcs8(numbers.private_key(unsafe_skip_rsa_key_validation=True))
    began = time.process_time()
    assert faults(key=pem).keys() & {"large_rsa", "bad_key"}
    assert time.process_time() - began < 0.5


def test_sha1_in_the_chain_is_refused_but_not_in_the_root(tmp_path: Path) -> None:
    weak = subprocess.run(
        ["openssl", "req", "-x509", "-sha1", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", tmp_path / "key.pem", "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}",
         "-addext", "basicConstraints=critical,CA:FALSE", "-days", "30"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    with pytest.raises(CustomRefusedError) as refused:
        judge_custom(HOST, weak, (tmp_path / "key.pem").read_bytes(), time.time() + 60)
    assert [fault.code for fault in refused.value.faults] == ["weak_signature"]
    assert "SHA1" in refused.value.faults[0].message


def test_certificates_that_are_not_for_tls_servers_are_refused() -> None:
    usage = x509.KeyUsage(False, False, True, False, False, False, False, False, False)
    assert "key_usage" in faults(leaf(extensions=[(usage, True)]) + CA)
    assert "precertificate" in faults(leaf(extensions=[(x509.PrecertPoison(), True)]) + CA)
    odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"), b"\x04\x00")
    assert "1.3.6.1.5.5.7.1.31" in faults(leaf(extensions=[(odd, True)]) + CA)["critical_extension"]


# --- hostile input


def test_a_name_that_would_write_into_a_terminal_is_shown_without_that() -> None:
    message = faults(leaf(names=["\x1b[2Jevil.example"]) + CA)["wrong_host"]
    assert message.isprintable() and "?[2jevil.example" in message


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_input_is_refused_or_taken_but_breaks_nothing(data: st.DataObject) -> None:
    import base64

    source = x509.load_pem_x509_certificate(data.draw(st.sampled_from([LEAF, CA])))
    der = bytearray(source.public_bytes(serialization.Encoding.DER))
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"
    chain = data.draw(st.sampled_from([pem + CA, LEAF + pem, pem]))
    try:
        judge_custom(HOST, chain, KEY, NOW)
    except CustomRefusedError as refused:
        told = [fault.message for fault in refused.faults]
        assert told and all(message.isprintable() for message in told)  # it may be taken, too


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_reason(chain: bytes, key: bytes) -> None:
    assert faults(chain, key)


def test_thousands_of_begins_without_an_end_take_no_time() -> None:
    began = time.process_time()
    assert faults(b"-----BEGIN CERTIFICATE-----\n" * 2300, b"-----BEGIN PRIVATE KEY-----\n" * 580)
    assert time.process_time() - began < 0.2


def test_the_key_is_in_no_message() -> None:
    with pytest.raises(CustomRefusedError) as refused:
        judge_custom("other.example", LEAF + CA, KEY, NOW)
    assert KEY.splitlines()[1].decode() not in str(refused.value) + repr(refused.value.faults)
    assert KEY.splitlines()[1].decode() not in repr(good())


def test_every_code_is_in_the_docs_and_no_other() -> None:
    root = Path(__file__).resolve().parents[2]
    source = (root / "certs" / "custom.py").read_text()
    codes = set(re.findall(r'(?:_fault|_warn)\(\s*"(\w+)"', source)) | {"no_key", "no_certificate"}  # made of two parts
    listed = (
        (root / "docs" / "admin-api.md").read_text().partition("Codes of an import's faults:")[2].partition("\n\n")[0]
    )
    assert set(re.findall(r"`(\w+)`", listed)) == codes

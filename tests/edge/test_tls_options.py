"""What a port's tls_options and the kinds of certificates come to for real clients."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certs.keys import key_from_pem, key_to_pem, new_rsa_key
from proxy.edge.certificates import Certificates
from proxy.errors import Code, ProxyError
from proxy.wire.client_hello import PROTOCOL_VERSION, ClientHello, HelloError
from tests.support.tls import NAME, Server, serve


async def negotiated(server: Server, version: ssl.TLSVersion | None = None) -> str:
    _, writer = await server.connect(NAME, version)
    found = str(writer.get_extra_info("ssl_object").version())
    writer.close()
    return found


async def test_a_port_of_tls_1_2_alone_negotiates_that_with_everybody(tmp_path: Path) -> None:
    async with serve(tmp_path, on_hello=lambda hello, peer: True) as server:
        assert await negotiated(server) == "TLSv1.2"
        assert await negotiated(server, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises(ssl.SSLError):
            await negotiated(server, ssl.TLSVersion.TLSv1_3)


async def test_who_is_too_old_for_a_port_is_told_so(tmp_path: Path) -> None:
    def only_new(hello: ClientHello, peer: object) -> bool:
        if 0x0304 not in hello.versions:
            raise HelloError(PROTOCOL_VERSION, "TLS 1.3 alone")
        return False

    async with serve(tmp_path, on_hello=only_new) as server:
        assert await negotiated(server) == "TLSv1.3"
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            await negotiated(server, ssl.TLSVersion.TLSv1_2)


def rsa_beside(server: Server, name: str) -> None:
    """An RSA certificate of the same authority."""
    key = new_rsa_key()
    issuer = server.authority.open()
    leaf = server.authority.issue(name).leaf
    made = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(leaf.issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key_from_pem(issuer.key_pem), hashes.SHA256())
    )
    server.pack.append(f"rsa/{name}", made.public_bytes(serialization.Encoding.PEM), key_to_pem(key))


async def shown_to(server: Server, ciphers: str) -> x509.Certificate:
    context = server.client_context(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers(ciphers)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname=NAME)
    leaf = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(leaf)


async def test_each_client_gets_the_kind_of_certificate_it_can_verify(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        with pytest.raises(ssl.SSLError):
            await shown_to(server, "ECDHE-RSA-AES128-GCM-SHA256")
        rsa_beside(server, NAME)
        server.certificates.refresh()
        old = await shown_to(server, "ECDHE-RSA-AES128-GCM-SHA256")
        assert isinstance(old.public_key(), rsa.RSAPublicKey)
        new = await shown_to(server, "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256")
        assert isinstance(new.public_key(), ec.EllipticCurvePublicKey)
        server.pack.remove(f"rsa/{NAME}")
        server.certificates.refresh()
        with pytest.raises(ssl.SSLError):
            await shown_to(server, "ECDHE-RSA-AES128-GCM-SHA256")


async def test_a_record_that_the_disk_altered_is_asked_for_again_and_written_anew(tmp_path: Path) -> None:
    async with serve(tmp_path, names=(NAME, "other.example")) as server:
        place = server.pack._places[NAME]
        path = tmp_path / "certificates"
        content = bytearray(path.read_bytes())
        content[place.offset + place.length - 1] ^= 1
        path.write_bytes(content)  # the same file: readers have looked at it already
        asked: list[str] = []
        certificates = Certificates(server.certificates._records, asked.append, lambda: 1.0)
        for _ in range(3):
            with pytest.raises(ProxyError) as caught:
                certificates.find(NAME)
            assert caught.value.code is Code.TLS_INTERNAL
        assert asked == [NAME]
        assert certificates.find("other.example") is not None
        certificate = server.authority.issue(NAME)
        assert server.pack.append(NAME, certificate.chain_pem, certificate.key_pem)
        certificates.ready(NAME, None)
        assert certificates.find(NAME) is not None


async def test_an_altered_record_is_written_again_even_if_nothing_else_changed(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        certificate = server.issue("same.example")
        assert not server.pack.append("same.example", certificate.chain_pem, certificate.key_pem)
        place = server.pack._places["same.example"]
        path = tmp_path / "certificates"
        content = bytearray(path.read_bytes())
        content[place.offset + place.length - 1] ^= 1
        path.write_bytes(content)
        assert server.pack.append("same.example", certificate.chain_pem, certificate.key_pem)
        assert not server.pack.append("same.example", certificate.chain_pem, certificate.key_pem)

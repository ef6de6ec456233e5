"""What a CA meets that looks whether a name is ours: HTTP-01 and TLS-ALPN-01, out of the certificate file."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509

from certs.challenges import tls_alpn_certificate
from proxy.errors import Code
from proxy.model import MachineState
from tests.support.edge import EdgeHarness, answers
from tests.support.tls import NAME, serve

TOKEN = "evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA"
ANSWER = TOKEN.encode() + b".thumbprint"
PATH = "/.well-known/acme-challenge/"


def get(path: str, host: str = "hello.apps.test", method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


@pytest.fixture
def shown() -> dict[str, bytes]:
    return {TOKEN: ANSWER}


async def test_a_challenge_is_answered_before_redirects_rules_and_sleep(shown: dict[str, bytes]) -> None:
    async with EdgeHarness() as edge:
        edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED), force_https=True))
        edge.edge.http_challenge = shown.get
        answer = await edge.request(get(PATH + TOKEN))
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n" + ANSWER)
        assert (await edge.request(get(PATH + TOKEN, method="HEAD"))).startswith(b"HTTP/1.1 200 ")
        assert (await edge.request(get(PATH + TOKEN, host="no.app.has.it"))).endswith(ANSWER)
        assert not edge.woken


@pytest.mark.parametrize(
    "path",
    [
        PATH + "../" + TOKEN,
        PATH + "%2e%2e/" + TOKEN,
        PATH + TOKEN + "/x",
        PATH + TOKEN + "?x=1",
        PATH + TOKEN[:15],
        PATH + TOKEN * 4,
        PATH,
        "/.well-known/acme-challenge" + TOKEN,
        PATH + "%" + TOKEN[1:],
        PATH + TOKEN[:-1] + "B",
    ],
)
async def test_what_is_not_a_token_of_ours_is_the_apps(shown: dict[str, bytes], path: str) -> None:
    async with EdgeHarness() as edge:
        origin = await edge.origin(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\napps"))
        edge.set_app(edge.app(edge.machine(origin.port)))
        edge.edge.http_challenge = shown.get
        assert (await edge.request(get(path))).endswith(b"\r\n\r\napps")


async def test_a_foreign_token_wakes_nobody(shown: dict[str, bytes]) -> None:
    async with EdgeHarness() as edge:
        edge.set_app(edge.app(edge.machine(0, state=MachineState.STOPPED)))
        edge.edge.http_challenge = shown.get
        answer = await edge.request(get(PATH + "x" * 43))
        assert answer.startswith(b"HTTP/1.1 404 ") and Code.NO_CHALLENGE.value.encode() in answer
        assert not edge.woken


async def test_a_post_is_no_look_for_a_challenge(shown: dict[str, bytes]) -> None:
    async with EdgeHarness() as edge:
        edge.edge.http_challenge = shown.get
        assert (await edge.request(get(PATH + TOKEN, method="POST"))).startswith(b"HTTP/1.1 404 ")


def acme_client(version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["acme-tls/1"])
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_ca_sees_the_challenge_certificate_and_nothing_else(tmp_path: Path, version: ssl.TLSVersion) -> None:
    async with serve(tmp_path) as server:
        server.pack.append(f"tls-alpn-01/{NAME}", *tls_alpn_certificate(NAME, "token.thumbprint", time.time()))
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=acme_client(version), server_hostname=NAME
        )
        tls = writer.get_extra_info("ssl_object")
        assert tls.selected_alpn_protocol() == "acme-tls/1"
        leaf = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True))
        proof = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"))
        assert proof.critical and len(proof.value.public_bytes()) == 34
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [NAME]
        assert await asyncio.wait_for(reader.read(), 5) == b""  # it ends, and no protocol began
        assert not server.inners
        writer.close()
        site, ordinary = await server.connect()  # who comes for the site gets the site
        ordinary.write(b"hello")
        assert await asyncio.wait_for(site.readexactly(5), 5) == b"hello"
        ordinary.close()


async def test_without_a_challenge_a_ca_is_told_that_the_name_is_not_known(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=acme_client(ssl.TLSVersion.TLSv1_3), server_hostname=NAME
            )
        server.pack.append(f"tls-alpn-01/{NAME}", *tls_alpn_certificate(NAME, "a.b", time.time()))
        server.pack.remove(f"tls-alpn-01/{NAME}")
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=acme_client(ssl.TLSVersion.TLSv1_3), server_hostname=NAME
            )

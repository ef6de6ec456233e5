"""Orders against a real CA: Pebble, -strict, with its refused nonces and authorizations that are used again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certs import Certificate
from certs.challenges import Challenge, ChallengeType, dns_value, tls_alpn_certificate
from certs.errors import AcmeError, Failure
from certs.issuer import AcmeClient, ExternalAccount
from certs.order import KeyType, OrderRun, Want, order_key
from certs.store import SealedStore
from tests.support.pebble import Pebble, pebble

SECRET = bytes(range(32))


class Shower:
    """Shows challenges: an HTTP server, a TLS server, and the TXT records of the CA's DNS."""

    def __init__(self, folder: Path) -> None:
        self.kinds: tuple[ChallengeType, ...] = tuple(ChallengeType)
        self.tokens: dict[str, str] = {}
        self.certificates: dict[str, ssl.SSLContext] = {}
        self.shown: list[ChallengeType] = []
        self.cleaned: list[ChallengeType] = []
        self.ca: Pebble | None = None
        self._folder = folder
        tokens = self.tokens

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = tokens.get(self.path.rpartition("/")[2], "").encode()
                self.send_response(200 if body else 404)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Answer)
        self.tls = socket.create_server(("127.0.0.1", 0))
        self._threads = [
            threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}),
            threading.Thread(target=self._shake_hands),
        ]
        for thread in self._threads:
            thread.start()

    def _shake_hands(self) -> None:
        base = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        base.set_alpn_protocols(["acme-tls/1"])

        def choose(own: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
            if name not in self.certificates:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            own.context = self.certificates[name]
            return None

        base.sni_callback = choose
        while True:
            try:
                raw, _ = self.tls.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), raw:
                raw.settimeout(5)
                base.wrap_socket(raw, server_side=True).close()

    def types(self, name: str, is_wildcard: bool) -> tuple[ChallengeType, ...]:
        return (ChallengeType.DNS_01,) if is_wildcard else self.kinds

    async def present(self, challenge: Challenge) -> None:
        self.shown.append(challenge.type)
        match challenge.type:
            case ChallengeType.HTTP_01:
                self.tokens[challenge.token] = challenge.key_authorization
            case ChallengeType.TLS_ALPN_01:
                chain, key = tls_alpn_certificate(challenge.name, challenge.key_authorization, time.time())
                path = self._folder / "challenge.pem"
                path.write_bytes(chain + key)
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(path)
                context.set_alpn_protocols(["acme-tls/1"])
                self.certificates[challenge.name] = context
            case ChallengeType.DNS_01:
                assert self.ca is not None
                value = dns_value(challenge.key_authorization)
                await asyncio.to_thread(self.ca.set_txt, f"_acme-challenge.{challenge.name}", value)

    async def clean_up(self, challenge: Challenge) -> None:
        self.cleaned.append(challenge.type)
        self.tokens.pop(challenge.token, None)
        self.certificates.pop(challenge.name, None)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.tls.shutdown(socket.SHUT_RDWR)
        self.tls.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture(scope="module")
def shower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shower]:
    made = Shower(tmp_path_factory.mktemp("shower"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def ca(shower: Shower, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pebble]:
    with pebble(tmp_path_factory.mktemp("pebble"), shower.http.server_port, shower.tls.getsockname()[1]) as made:
        shower.ca = made
        yield made


class Orders:
    """A client with its store, and what was kept."""

    def __init__(self, folder: Path, ca: Pebble, shower: Shower, **client: ExternalAccount) -> None:
        shower.kinds = tuple(ChallengeType)
        shower.shown.clear()
        shower.cleaned.clear()
        self.shower = shower
        self.store = SealedStore(folder / "store.db", SECRET, time.time)
        self.client = AcmeClient(
            ca.directory_url, self.store, time.time, ca_file=str(ca.ca_file), email="ops@example.com",
            external_account=client.get("external"),
        )  # fmt: skip
        self.kept: list[Certificate] = []
        self.points: list[str] = []

    async def keep(self, certificate: Certificate) -> None:
        self.kept.append(certificate)

    async def order(self, want: Want, **patience: float) -> Certificate:
        run = OrderRun(self.client, self.store, self.shower, time.time, "node", on_point=self.points.append, **patience)  # type: ignore[arg-type]  # patiences are all floats
        return await run.run(want, self.keep)


@pytest.fixture
async def orders(tmp_path: Path, ca: Pebble, shower: Shower) -> AsyncIterator[Orders]:
    made = Orders(tmp_path, ca, shower)
    yield made
    await made.client.close()
    made.store.close()


@pytest.mark.parametrize("kind", list(ChallengeType))
async def test_a_name_is_proven_by_each_kind_of_challenge(orders: Orders, ca: Pebble, kind: ChallengeType) -> None:
    orders.shower.kinds = (kind,)
    name = f"{kind}.example.com"
    certificate = await orders.order(Want((name,)))
    assert orders.kept == [certificate] and orders.shower.shown == [kind] == orders.shower.cleaned
    assert isinstance(certificate.leaf.public_key(), ec.EllipticCurvePublicKey)
    names = certificate.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [name]
    assert orders.store.get(order_key(name, KeyType.ECDSA)) is None
    root = x509.load_pem_x509_certificate(ca.roots())
    chain = x509.load_pem_x509_certificates(certificate.chain_pem)
    chain[-1].verify_directly_issued_by(root)


async def test_a_wildcard_is_proven_in_dns(orders: Orders) -> None:
    certificate = await orders.order(Want(("*.wild.example.com",)))
    assert certificate.name == "*.wild.example.com" and orders.shower.shown == [ChallengeType.DNS_01]


async def test_rsa_is_made_on_request(orders: Orders) -> None:
    certificate = await orders.order(Want(("rsa.example.com",), KeyType.RSA))
    assert isinstance(certificate.leaf.public_key(), rsa.RSAPublicKey)


async def test_a_challenge_that_failed_is_tried_last(orders: Orders) -> None:
    avoid = (ChallengeType.TLS_ALPN_01,)
    orders.shower.kinds = (ChallengeType.TLS_ALPN_01, ChallengeType.HTTP_01)
    await orders.order(Want(("avoid.example.com",), avoid=avoid))
    assert orders.shower.shown == [ChallengeType.HTTP_01]


async def test_what_the_ca_did_not_find_is_said_and_ends_the_order(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forget(challenge: Challenge) -> None:
        pass

    monkeypatch.setattr(orders.shower, "present", forget)
    orders.shower.kinds = (ChallengeType.HTTP_01,)
    with pytest.raises(AcmeError) as caught:
        await orders.order(Want(("nothing.example.com",)))
    error = caught.value
    assert (error.failure, error.problem, error.challenge) == (Failure.VALIDATION, "unauthorized", "http-01")
    assert "nothing.example.com by http-01" in str(error)
    assert orders.store.get(order_key("nothing.example.com", KeyType.ECDSA)) is None


async def test_the_account_survives_a_change_of_its_key(orders: Orders) -> None:
    before = await orders.client.open()
    after = await orders.client.roll_key()
    assert (after.url, after.next_key_pem) == (before.url, "") and after.key_pem != before.key_pem
    assert (await orders.order(Want(("rolled.example.com",)))).name == "rolled.example.com"


@pytest.mark.parametrize("has_arrived", [False, True], ids=["before the CA has it", "after"])
async def test_a_change_of_the_accounts_key_may_be_cut_off(
    tmp_path: Path, ca: Pebble, shower: Shower, monkeypatch: pytest.MonkeyPatch, has_arrived: bool
) -> None:
    first = Orders(tmp_path, ca, shower)
    account = await first.client.open()
    real = first.client._post

    async def cut(url: str, *rest: object) -> object:
        if has_arrived:
            await real(url, *rest)  # type: ignore[arg-type]  # as it was called
        raise asyncio.CancelledError

    monkeypatch.setattr(first.client, "_post", cut)
    with pytest.raises(asyncio.CancelledError):
        await first.client.roll_key()
    await first.client.close()
    first.store.close()
    second = Orders(tmp_path, ca, shower)
    found = await second.client.open()
    assert found.url == account.url and found.next_key_pem == ""
    assert (found.key_pem != account.key_pem) is has_arrived
    assert (await second.order(Want(("cut.example.com",)))).name == "cut.example.com"
    await second.client.close()
    second.store.close()


async def test_two_changes_of_the_accounts_key_at_once_leave_the_one_that_the_ca_has(
    tmp_path: Path, ca: Pebble, shower: Shower
) -> None:
    first = Orders(tmp_path, ca, shower)
    account = await first.client.open()
    await asyncio.gather(first.client.roll_key(), first.client.roll_key())
    await first.client.close()
    first.store.close()
    second = Orders(tmp_path, ca, shower)
    assert (await second.client.open()).url == account.url
    assert (await second.order(Want(("twice.example.com",)))).name == "twice.example.com"
    await second.client.close()
    second.store.close()


async def test_a_change_of_the_accounts_key_whose_answer_is_lost_may_be_asked_for_again(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await orders.client.open()
    real = orders.client._post

    async def lose(url: str, *rest: object) -> object:
        answer = await real(url, *rest)  # type: ignore[arg-type]  # as it was called
        if "roll" in url or "key" in url:
            monkeypatch.setattr(orders.client, "_post", real)
            raise AcmeError(Failure.NETWORK, "the connection was reset")
        return answer

    monkeypatch.setattr(orders.client, "_post", lose)
    with pytest.raises(AcmeError, match="reset"):
        await orders.client.roll_key()
    after = await orders.client.roll_key()
    assert (after.url, after.next_key_pem) == (account.url, "")
    assert (await orders.order(Want(("lost.example.com",)))).name == "lost.example.com"


async def test_an_external_account_is_bound_and_its_lack_is_told(tmp_path: Path, shower: Shower) -> None:
    key = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    with pebble(
        tmp_path / "ca", shower.http.server_port, shower.tls.getsockname()[1], mac_keys={"kid-1": key}
    ) as other:
        without = Orders(tmp_path / "without", other, shower)
        with pytest.raises(AcmeError, match="acme_eab_kid") as caught:
            await without.order(Want(("eab.example.com",)))
        assert caught.value.failure is Failure.ACCOUNT
        await without.client.close()
        without.store.close()
        bound = Orders(tmp_path / "with", other, shower, external=ExternalAccount("kid-1", key))
        bound.shower.kinds = (ChallengeType.HTTP_01,)
        assert (await bound.order(Want(("eab.example.com",)))).name == "eab.example.com"
        await bound.client.close()
        bound.store.close()


async def test_a_ca_that_is_not_trusted_or_not_there_is_named(tmp_path: Path, ca: Pebble) -> None:
    store = SealedStore(tmp_path / "store.db", SECRET, time.time)
    for url, said in ((ca.directory_url, "acme_ca_file"), ("https://127.0.0.1:1/dir", "cannot be reached")):
        client = AcmeClient(url, store, time.time)
        with pytest.raises(AcmeError, match=said) as caught:
            await client.open()
        assert caught.value.failure is Failure.NETWORK and url in str(caught.value)
        await client.close()
    store.close()

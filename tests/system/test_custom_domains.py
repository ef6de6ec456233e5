"""Custom domains, from `certs add` to an answer that a client trusts, against a real CA."""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.support.apps import make_app
from tests.support.ask import AskServer
from tests.support.faults import kill_control
from tests.support.pebble import Pebble, pebble
from tests.support.processes import wait_for
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
DNS_HOOK = Path(__file__).resolve().parents[2] / "demo" / "dns_hook.py"


class Site:
    """A node with an app, beside a CA that looks for challenges at the node's ports."""

    def __init__(self, node: ServedNode, ca: Pebble, ask: AskServer) -> None:
        self.node, self.ca, self.ask = node, ca, ask
        self.context = ssl.create_default_context(cadata=ca.roots().decode())

    def visit(self, host: str, context: ssl.SSLContext | None = None) -> tuple[bytes, x509.Certificate]:
        """The app's answer under a name, and the certificate that was shown and trusted."""
        raw = socket.create_connection(("127.0.0.1", self.node.https_port), timeout=20)
        with (context or self.context).wrap_socket(raw, server_hostname=host) as sock:
            sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while piece := sock.recv(65_536):
                answer += piece
            leaf = sock.getpeercert(binary_form=True)
            assert leaf is not None
            return answer, x509.load_der_x509_certificate(leaf)

    def show(self, host: str, app: str = "web") -> Any:
        status, found = self.node.api("GET", f"/v1/apps/{app}/certificates/{host.replace('*', '%2A')}")
        assert status == 200, found
        return found

    def wait_active(self, host: str, seconds: float = 20.0) -> Any:
        return wait_for(
            lambda: found if (found := self.show(host))["status"] == "active" else None,
            seconds,
            lambda: f"a certificate of {host}: {json.dumps(self.show(host), indent=1)}\n{self.node.log()[-3000:]}",
        )


def certs_section(ca: Pebble, more: str = "") -> str:
    return f"""
[certs]
issuer = "acme"
acme_directory = "{ca.directory_url}"
acme_ca_file = "{ca.ca_file}"
acme_email = "ops@example.com"
addresses = ["127.0.0.1"]
dns_servers = ["{ca.dns}"]
{more}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    ask = AskServer()
    node = ServedNode(folder / "node", workers=2)
    try:
        with pebble(folder / "ca", node.http_port, node.https_port) as ca:
            on_demand = f'\n[apps.on_demand]\nask = "{ask.url}"\ndomain_burst = 3\nnegative_ttl = "30s"\n'
            web = make_app(node.folder, "web") + on_demand
            other = make_app(node.folder, "other")
            with (node.folder / "apps" / "other" / "fly.toml").open("a") as fly_toml:
                fly_toml.write('\n[http_service.tls_options]\ndefault_self_signed = true\nversions = ["TLSv1.3"]\n')
            node.write_config(certs_section(ca, 'key_types = ["ecdsa", "rsa"]') + web + other)
            with node:
                yield Site(node, ca, ask)
    finally:
        ask.close()


def test_a_domain_that_is_added_is_trusted_seconds_later(site: Site) -> None:
    began = time.monotonic()
    status, detail = site.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "Shop.Example.com."})
    assert status == 201 and detail["hostname"] == "shop.example.com"
    answer, leaf = site.visit("shop.example.com")  # the handshake waits for the certificate
    took = time.monotonic() - began
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert "Pebble" in leaf.issuer.rfc4514_string()
    assert took < 10, took
    found = site.wait_active("shop.example.com")
    (certificate,) = found["certificates"]
    assert certificate["source"] == "fly" and certificate["issued"][0]["type"] == "ecdsa"


@pytest.mark.parametrize("challenge", ["http-01", "tls-alpn-01"])
def test_each_challenge_is_answered_by_the_edge_itself(site: Site, challenge: str) -> None:
    host = f"{challenge}.example.org"
    site.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": host, "challenge": challenge})
    site.wait_active(host)
    assert site.visit(host)[0].startswith(b"HTTP/1.1 200 ")
    asked = site.ca.log.read_text()
    assert f"{host}" in asked


def test_a_name_of_another_app_is_refused(site: Site) -> None:
    site.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "mine.example.com"})
    status, error = site.node.api("POST", "/v1/apps/other/certificates/acme", {"hostname": "mine.example.com"})
    assert status == 409 and "web" in error["error"]
    assert site.node.api("GET", "/v1/apps/other/certificates/mine.example.com")[0] == 404


def test_a_domain_whose_dns_leads_elsewhere_waits_and_is_noticed(site: Site) -> None:
    site.ca.set_a("later.example.com", "192.0.2.1")
    site.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "later.example.com"})
    found = wait_for(
        lambda: found if (found := site.show("later.example.com"))["validation_errors"] else None,
        10,
        lambda: "an error",
    )
    assert found["validation_errors"][0]["code"] == "not_pointed", found["validation_errors"]
    with pytest.raises(ssl.SSLError):
        site.visit("later.example.com")
    site.ca.set_a("later.example.com", "127.0.0.1")
    site.wait_active("later.example.com")
    assert site.visit("later.example.com")[0].startswith(b"HTTP/1.1 200 ")


def test_a_client_that_knows_only_rsa_is_served_and_trusts_it_too(site: Site) -> None:
    site.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "old.example.com"})
    wait_for(
        lambda: len([one for one in site.show("old.example.com")["certificates"] for _ in one["issued"]]) == 2,
        20,
        lambda: json.dumps(site.show("old.example.com")),
    )
    old = ssl.create_default_context(cadata=site.ca.roots().decode())
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")

    def served() -> x509.Certificate | None:
        try:
            return site.visit("old.example.com", old)[1]
        except ssl.SSLError:
            return None

    leaf = wait_for(served, 10, "the RSA certificate")
    assert type(leaf.public_key()).__name__ == "RSAPublicKey"
    _, newer = site.visit("old.example.com")
    assert type(newer.public_key()).__name__ != "RSAPublicKey"


def test_an_app_may_show_a_certificate_of_our_own_until_there_is_one(site: Site) -> None:
    site.ca.set_a("soon.example.com", "192.0.2.1")
    site.node.api("POST", "/v1/apps/other/certificates/acme", {"hostname": "soon.example.com"})
    with pytest.raises(ssl.SSLCertVerificationError):
        site.visit("soon.example.com")
    lenient = ssl.create_default_context()
    lenient.check_hostname, lenient.verify_mode = False, ssl.CERT_NONE
    answer, leaf = site.visit("soon.example.com", lenient)
    assert answer.startswith(b"HTTP/1.1 200 ") and "Wakefront" in leaf.issuer.rfc4514_string()
    site.ca.set_a("soon.example.com", "127.0.0.1")

    def trusted() -> bool:
        try:
            return "Pebble" in site.visit("soon.example.com")[1].issuer.rfc4514_string()
        except ssl.SSLCertVerificationError:
            return False

    wait_for(trusted, 15, lambda: json.dumps(site.show("soon.example.com", "other")))
    lenient.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        site.visit("soon.example.com", lenient)


def test_what_was_added_survives_a_killed_control_and_a_restart(site: Site) -> None:
    site.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "lasting.example.com"})
    site.wait_active("lasting.example.com")
    serial = site.visit("lasting.example.com")[1].serial_number
    kill_control(site.node)
    assert site.visit("lasting.example.com")[1].serial_number == serial  # with no control there
    site.node.wait_ready()
    assert site.visit("lasting.example.com")[1].serial_number == serial
    site.node.stop()
    site.node.start()
    site.node.wait_ready()
    answer, leaf = site.visit("lasting.example.com")
    assert answer.startswith(b"HTTP/1.1 200 ") and leaf.serial_number == serial


def test_a_removed_domain_is_served_no_more(site: Site) -> None:
    site.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "gone.example.com"})
    site.wait_active("gone.example.com")
    site.visit("gone.example.com")
    assert site.node.api("DELETE", "/v1/apps/web/certificates/gone.example.com")[0] == 204

    def refused() -> bool:
        try:
            site.visit("gone.example.com")
        except ssl.SSLError:
            return True
        return False

    wait_for(refused, 10, lambda: "the name to be refused")
    assert site.node.api("GET", "/v1/apps/web/certificates/gone.example.com")[0] == 404


def test_a_name_nobody_added_is_asked_for_once_and_issued_if_permitted(site: Site) -> None:
    site.ask.permitted.add("tenant.example.net")
    answer, leaf = site.visit("tenant.example.net")
    assert answer.startswith(b"HTTP/1.1 200 ") and "Pebble" in leaf.issuer.rfc4514_string()
    assert site.ask.asked["tenant.example.net"] == 1
    assert site.visit("tenant.example.net")[1] == leaf
    for _ in range(5):
        with pytest.raises(ssl.SSLError):
            site.visit("stranger.example.net")
    assert site.ask.asked["stranger.example.net"] == 1


def test_a_flood_of_invented_names_ends_at_the_bucket_of_their_domain(site: Site) -> None:
    names = [f"n{number}.flood.example" for number in range(12)]
    site.ask.permitted.update(names)
    served = 0
    for name in names:
        began = time.monotonic()
        try:
            site.visit(name)
            served += 1
        except ssl.SSLError:
            assert time.monotonic() - began < 2.5, "nobody waits for an order"
    assert served == 3


def test_a_slow_ask_fails_the_handshake_in_time(site: Site) -> None:
    site.ask.delay_s = 5.0
    try:
        began = time.monotonic()
        with pytest.raises(ssl.SSLError):
            site.visit("slow.example.biz")
        assert time.monotonic() - began < 2.5, "nobody waits for the answer"
    finally:
        site.ask.delay_s = 0.0


@pytest.mark.parametrize("has_dns_01", [True, False], ids=["one wildcard", "each its own"])
def test_the_apps_own_names_have_certificates_too(tmp_path: Path, has_dns_01: bool) -> None:
    node = ServedNode(tmp_path / "node", workers=1)
    node._head = node._head.replace('"apps.localhost"', '"apps.example.net"')
    with pebble(tmp_path / "ca", node.http_port, node.https_port) as ca:
        hook = json.dumps([sys.executable, str(DNS_HOOK)])
        dns = f'[certs.dns]\nhook = "exec"\ncommand = {hook}\n' if has_dns_01 else ""
        node._env["DEMO_DNS"] = ca.dns_management
        node.write_config(certs_section(ca, dns) + make_app(node.folder, "web") + make_app(node.folder, "other"))
        with node:
            context = ssl.create_default_context(cadata=ca.roots().decode())
            served = Site.__new__(Site)
            served.node, served.ca, served.context = node, ca, context
            shown = {served.visit(f"{app}.apps.example.net")[1].serial_number for app in ("web", "other")}
            assert len(shown) == (1 if has_dns_01 else 2)
            listed = json.loads(node.cli("certs", "list", "--json"))
            names = {one["hostname"] for one in listed if one["status"] == "active"}
            assert ("*.apps.example.net" in names) is has_dns_01
            assert node.api("GET", "/v1/status")[1]["certificates"]["failing"] == 0

"""Domains that are added to a node whose certificates are its own CA's: no other CA is asked, whatever the name."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

from tests.support.apps import make_app
from tests.support.faults import kill_control
from tests.support.processes import wait_for
from tests.support.serve import ServedNode
from tests.system.test_custom_domains import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

# Were the CA of the default asked, it would be here, where nobody listens: the name would show that as its trouble.
CERTS = '\n[certs]\nacme_directory = "https://127.0.0.1:9/nobody"\ncheck_dns = false\n'


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    node = ServedNode(tmp_path_factory.mktemp("node"), workers=2)
    node.write_config(CERTS + make_app(node.folder, "web"))
    with node:
        yield node


def of(node: ServedNode, trust: ssl.SSLContext) -> Site:
    """A site without a CA beside it."""
    site = Site.__new__(Site)
    site.node, site.context = node, trust
    return site


def visit(node: ServedNode, host: str) -> bytes:
    return of(node, ssl.create_default_context(cafile=node.data_dir / "certs" / "ca.pem")).visit(host)[0]


def listed(node: ServedNode) -> dict[str, Any]:
    return {one["hostname"]: one for one in json.loads(node.cli("certs", "list", "--json"))}


def test_a_domain_has_its_certificate_at_once(node: ServedNode) -> None:
    node.cli("certs", "add", "shop.example.com", "--wait", "5")
    assert visit(node, "shop.example.com").startswith(b"HTTP/1.1 200 ")
    checked = node.cli("certs", "check", "shop.example.com")
    assert "Issued" in checked and "internal CA" in checked
    summary = listed(node)["shop.example.com"]
    assert summary["configured"] is True and summary["status"] == "active"
    assert listed(node)["web.apps.localhost"]["configured"] is True
    assert "shop.example.com" not in node.cli("certs", "forecast")


def test_a_wildcard_serves_the_names_one_label_below_it(node: ServedNode) -> None:
    node.cli("certs", "add", "*.wild.example.com")
    assert visit(node, "a.wild.example.com").startswith(b"HTTP/1.1 200 ")
    with pytest.raises(OSError):
        visit(node, "a.b.wild.example.com")


def test_a_domain_that_is_removed_is_served_no_more(node: ServedNode) -> None:
    node.cli("certs", "add", "gone.example.com")
    assert visit(node, "gone.example.com").startswith(b"HTTP/1.1 200 ")
    node.cli("certs", "remove", "gone.example.com", "-y")
    with pytest.raises(OSError):
        visit(node, "gone.example.com")
    node.cli("certs", "show", "gone.example.com", status=1)


def test_an_imported_certificate_is_shown_once_the_domain_is_proven_and_the_internal_one_after_it(
    node: ServedNode,
) -> None:
    host, folder = "web.apps.localhost", node.folder
    authority = trustme.CA()
    leaf = authority.issue_cert(host)
    leaf.private_key_pem.write_to_path(str(folder / "own.key"))
    (folder / "own.pem").write_bytes(b"".join(one.bytes() for one in leaf.cert_chain_pems))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    refused = node.cli(
        "certs", "import", "shop.example.net", "--fullchain", "own.pem", "--private-key", "own.key", status=1
    )
    assert refused == "" and "shop.example.net" not in listed(node)
    node.cli("certs", "import", host, "--fullchain", "own.pem", "--private-key", "own.key")  # config.toml proves it
    assert of(node, trust).visit(host)[0].startswith(b"HTTP/1.1 200 ")
    shown = node.cli("certs", "show", host)
    assert "Custom Certificate" in shown and "Verified" in shown
    node.cli("certs", "remove", host, "--custom", "-y")
    assert visit(node, host).startswith(b"HTTP/1.1 200 ")
    with pytest.raises(ssl.SSLError):
        of(node, trust).visit(host)


def test_domains_outlive_control(node: ServedNode) -> None:
    node.cli("certs", "add", "kept.example.com")
    kill_control(node)
    assert visit(node, "kept.example.com").startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: listed(node).get("kept.example.com", {}).get("configured"), 20, lambda: node.log()[-2000:])
    assert visit(node, "kept.example.com").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ["*.com", "localhost", "192.0.2.1", "my_shop.example.com"])
def test_a_name_that_can_be_nobodys_is_refused(node: ServedNode, name: str) -> None:
    node.cli("certs", "add", name, status=2)
    assert name not in listed(node)

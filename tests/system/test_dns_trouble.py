"""A node beside BIND: what `certs check` says of broken set-ups, and a wildcard by DNS-01."""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from certs.resolver import Resolver
from tests.support import pebble
from tests.support.apps import make_app
from tests.support.bind import Bind, needs_bind, zone
from tests.support.processes import wait_for
from tests.support.serve import ServedNode

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    needs_bind,
    pytest.mark.skipif(not pebble.is_installed(), reason="needs Pebble (Debian: pebble)"),
]

KEY_NAME, SECRET = "wakefront", "YW5vdGhlci1zZWNyZXQtb2YtMzItYnl0ZXMtZm9yLWk="
HERE = "127.0.0.1"  # the node's address, as its configuration says

_PROOF = hashlib.sha256(b"wild.example").hexdigest()[:20]  # as `certs setup` shows it, for this name for ever

ZONES = {
    ".": zone("ns.root. A 127.0.0.1", ns="ns.root."),
    "edge.example": zone(f"ns A {HERE}\nweb A {HERE}\nother A 198.51.100.8", ns="ns"),
    "acme.example": zone(f"ns A {HERE}", ns="ns"),
    "shop.example": zone(
        f"""
ns A {HERE}
elsewhere A 198.51.100.7
two A {HERE}
two A 198.51.100.7
six A {HERE}
six AAAA 2001:db8:bad::1
wrong CNAME other.edge.example.
dangling CNAME gone.edge.example.
private A 10.1.2.3
empty TXT "nothing here"
loop CNAME pool
pool CNAME loop
cdn A 104.16.1.1
right CNAME web.edge.example.
""",
        ns="ns",
    ),
    "wild.example": zone(f"ns A {HERE}\n_acme-challenge CNAME {_PROOF}.acme.example.", ns="ns"),
    "unloaded.example": "this is no zone\n",
}


@dataclass
class Site:
    """A node that asks BIND, beside a CA that does too."""

    node: ServedNode
    ca: pebble.Pebble
    dns: Bind


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("trouble")
    keys = {KEY_NAME: SECRET}
    with Bind(folder / "bind", {HERE: ZONES}, keys=keys, dynamic=("acme.example",), is_resolver=True) as dns:
        made = ServedNode(folder / "node", workers=1)
        with pebble.pebble(folder / "ca", made.http_port, made.https_port, dns_server=dns.at()) as ca:
            made.write_config(f"""
[certs]
issuer = "acme"
acme_directory = "{ca.directory_url}"
acme_ca_file = "{ca.ca_file}"
acme_email = "ops@example.com"
addresses = ["{HERE}"]
cname_target = "web.edge.example"
dns_servers = ["{dns.at()}"]
dns_delegation = "acme.example"

[certs.dns]
hook = "rfc2136"
server = "{dns.at()}"
key_name = "{KEY_NAME}"
key_secret = "{SECRET}"
{make_app(made.folder, "web")}""")
            with made:
                yield Site(made, ca, dns)


@pytest.mark.parametrize(
    ("host", "says", "records"),
    [
        ("nope.shop.example", "Problem: There is no nope.shop.example in DNS",
         ["Set:", f"nope.shop.example.  300  IN  A  {HERE}"]),
        ("www.shop.exampel", 'Problem: There is no top-level domain "exampel"', []),
        ("elsewhere.shop.example", "Problem: elsewhere.shop.example points to 198.51.100.7, which is not this node.",
         [f"elsewhere.shop.example.  300  IN  A  {HERE}", "Remove:", "elsewhere.shop.example.  300  IN  A "
         " 198.51.100.7"]),
        ("two.shop.example", "Problem: two.shop.example points here and also to 198.51.100.7",
         ["Remove:", "two.shop.example.  300  IN  A  198.51.100.7"]),
        ("six.shop.example", "Problem: Over IPv4 six.shop.example points here, but its AAAA record 2001:db8:bad::1"
        " leads elsewhere",
         ["Remove:", "six.shop.example.  300  IN  AAAA  2001:db8:bad::1"]),
        ("wrong.shop.example", "Problem: wrong.shop.example is a CNAME of other.edge.example, which leads to"
        " 198.51.100.8",
         ["wrong.shop.example.  300  IN  CNAME  web.edge.example.", "wrong.shop.example.  300  IN  CNAME "
         " other.edge.example."]),
        ("dangling.shop.example", "Problem: dangling.shop.example is a CNAME of gone.edge.example, which does not"
        " exist.",
         ["dangling.shop.example.  300  IN  CNAME  web.edge.example."]),
        ("private.shop.example", "Problem: private.shop.example points to 10.1.2.3, an address of a private network",
         [f"private.shop.example.  300  IN  A  {HERE}"]),
        ("empty.shop.example", "Problem: empty.shop.example is in DNS, but has no address",
         [f"empty.shop.example.  300  IN  A  {HERE}"]),
        ("loop.shop.example", "Problem: The CNAMEs of loop.shop.example lead in a circle",
         ["loop.shop.example.  300  IN  CNAME  web.edge.example."]),
        ("www.unloaded.example", "Problem: The name servers of unloaded.example fail when asked for"
        " www.unloaded.example",
         []),
        ("*.shop.example", "Problem: _acme-challenge.shop.example is not a CNAME of",
         ["_acme-challenge.shop.example.  300  IN  CNAME  ", ".acme.example."]),
        ("cdn.shop.example", "Warning: cdn.shop.example points to Cloudflare (104.16.1.1)",
         ["_fly-ownership.cdn.shop.example.  300  IN  TXT"]),
    ],
)  # fmt: skip
def test_check_names_the_cause_first_and_the_records(site: Site, host: str, says: str, records: list[str]) -> None:
    node = site.node
    assert node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": host})[0] == 201
    shown = node.cli("certs", "check", host, status=1)
    print(shown)  # the transcript
    assert next(line for line in shown.splitlines() if line.startswith(("Problem:", "Warning:"))).startswith(says)
    rest = shown[shown.index(says) :]
    for one in records:
        assert one in rest
        rest = rest[rest.index(one) :]
    node.api("DELETE", f"/v1/apps/web/certificates/{host.replace('*', '%2A')}")


def test_a_wildcard_comes_by_way_of_the_customers_cname(site: Site) -> None:
    node = site.node
    status, detail = node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "*.wild.example"})
    assert status == 201
    assert detail["dns_requirements"]["acme_challenge"]["target"] == f"{_PROOF}.acme.example"

    def shown() -> bool:
        found: str = node.api("GET", "/v1/apps/web/certificates/%2A.wild.example")[1]["status"]
        return found == "active"

    wait_for(shown, 30, lambda: node.log()[-3000:])
    context = ssl.create_default_context(cadata=site.ca.roots().decode())
    raw = socket.create_connection((HERE, node.https_port), timeout=20)
    with context.wrap_socket(raw, server_hostname="any.wild.example") as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: any.wild.example\r\nConnection: close\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 200"
    left = Resolver((site.dns.at(),), 2.0).txt(f"{_PROOF}.acme.example")
    assert left == ()  # the proof is cleaned up
    assert "is verified and active" in node.cli("certs", "check", "*.wild.example")

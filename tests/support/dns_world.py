"""A small internet of names on loopback: a root, a top-level domain, zones set up well and badly; BIND serves it all.

Node and app: the edge is at 203.0.113.10 and 2001:db8::10, shop-app.edge.test is what CNAMEs should point to. What is
"elsewhere" is 198.51.100.7. Nothing here sends anything to these addresses.
"""

from __future__ import annotations

from pathlib import Path

import dns.dnssec
import dns.zone
from cryptography.hazmat.primitives.asymmetric import ec

from certs.resolver import Resolver
from tests.support.bind import Bind, zone

ROOT, TLD, NS1, NS2, LAME, CDN_NS = (f"127.77.0.{n}" for n in (1, 2, 3, 4, 5, 6))
SILENT = "127.77.0.9"  # nothing is there, but what a test puts there
NODE_V4, NODE_V6, ELSEWHERE = "203.0.113.10", "2001:db8::10", "198.51.100.7"
KEY = {"update-key": "c2VjcmV0LW9mLXRoaXJ0eS10d28tYnl0ZXMtb2YtaXQ="}

_POINTS_HERE = f"@ A {NODE_V4}\n@ AAAA {NODE_V6}\nwww CNAME shop-app.edge.test.\n"


def _delegated(name: str, *servers: str) -> str:
    return "\n".join(f"{name} NS n{i}.{name}\nn{i}.{name} A {address}" for i, address in enumerate(servers, 1))


_KEYS = [(key := ec.generate_private_key(ec.SECP256R1()), dns.dnssec.make_dnskey(key.public_key(), 13)) for _ in "ab"]


def _signed(name: str, until: int = 2_000_000_000, key: int = 0) -> str:
    """A zone with signatures that hold until then (unix seconds)."""
    made = dns.zone.from_text(zone(f"n1 A {NS1}\n@ A {NODE_V4}", ns="n1"), name, relativize=False)
    with made.writer() as writer:
        keys = [_KEYS[key]]
        dns.dnssec.sign_zone(made, writer, keys, dnskey_ttl=60, inception=1_500_000_000, expiration=until)
    text: str = made.to_text(relativize=False)
    return text


def _ds(name: str, key: int = 0) -> str:
    ds = dns.dnssec.make_ds(f"{name}.test.", _KEYS[key][1], "SHA256")
    return f"{_delegated(name, NS1)}\n{name} DS {ds.to_text()}\n"


_ROOT = f"""
test. NS ns.nic.test.
ns.nic.test. A {TLD}
ns.root. A {ROOT}
"""

_TLD = "\n".join(
    [
        "ns.nic A " + TLD,
        _delegated("edge", NS1, NS2),
        _delegated("good", NS1, NS2),
        _delegated("wrong", NS1),
        _delegated("broken", NS1),
        _delegated("stale", NS1, NS2),
        _delegated("lame", LAME),
        _delegated("halflame", NS1, LAME),
        _delegated("halfdead", NS1, SILENT),
        _delegated("silent", SILENT),
        _delegated("unloaded", NS1),
        _delegated("dyn", NS1),
        _delegated("caa", NS1),
        "cdn NS ada.ns.cloudflare-like.test.\n",
        _delegated("cloudflare-like", CDN_NS),
        # two zones whose servers lie in each other: there is no way in
        "knot NS ns.tangle.test.\ntangle NS ns.knot.test.\n",
        # served by hosts in another zone, with no addresses here
        "glueless NS ns1.hoster.test.\nglueless NS ns2.hoster.test.\n",
        _delegated("hoster", NS1, NS2),
        _ds("signed"),
        _ds("expired"),
        _ds("rolled", key=1),
        _ds("unsigned"),
        # two zones that only their servers know to be two
        _delegated("deep", NS1),
    ]
)

_EDGE = f"""
n1 A {NS1}
n2 A {NS2}
shop-app A {NODE_V4}
shop-app AAAA {NODE_V6}
other-app A {ELSEWHERE}
"""

_WRONG = (
    f"""
elsewhere A {ELSEWHERE}
two A {NODE_V4}
two A {ELSEWHERE}
v6 A {NODE_V4}
v6 AAAA 2001:db8:bad::1
v4only A {NODE_V4}
cname CNAME other-app.edge.test.
dangling CNAME gone.edge.test.
private A 192.168.1.10
parked TXT "nothing else"
acme A {NODE_V4}
_acme-challenge.acme CNAME acme.elsewhere.good.test.
leftover A {NODE_V4}
_acme-challenge.leftover TXT "left-from-last-year-aaaaaaaaaaaaaaaaaaaaaaa"
owned TXT "x"
_fly-ownership.owned TXT "org-1; app-42"
loop1 CNAME loop2
loop2 CNAME loop3
loop3 CNAME loop1
"""
    + "\n".join(f"hop{i} CNAME hop{i + 1}" for i in range(12))
    + "\n"
)

_CAA = f"""
@ A {NODE_V4}
@ CAA 0 issue "other-ca.example"
allowed CAA 0 issue "letsencrypt.org"
allowed A {NODE_V4}
inherits A {NODE_V4}
none CAA 0 issue ";"
none A {NODE_V4}
wild CAA 0 issue "letsencrypt.org"
wild CAA 0 issuewild ";"
*.wild A {NODE_V4}
account CAA 0 issue "letsencrypt.org; accounturi=https://ca.example/acct/1"
account A {NODE_V4}
method CAA 0 issue "letsencrypt.org; validationmethods=dns-01"
method A {NODE_V4}
critical CAA 128 tbs "unknown"
critical A {NODE_V4}
iodef CAA 0 iodef "mailto:security@caa.test"
iodef A {NODE_V4}
alias CNAME target.broken.test.
"""

SERVERS: dict[str, dict[str, str]] = {
    ROOT: {".": zone(_ROOT, ns="ns.root.")},
    TLD: {"test": zone(_TLD, ns="ns.nic")},
    NS1: {
        "edge.test": zone(_EDGE, ns="n1 n2"),
        "good.test": zone(_POINTS_HERE + f"n1 A {NS1}\nn2 A {NS2}\n*.wild A {NODE_V4}\n", ns="n1 n2"),
        "wrong.test": zone(_WRONG + f"n1 A {NS1}", ns="n1"),
        "broken.test": zone(f'n1 A {NS1}\ntarget A {NODE_V4}\ntarget CAA 0 issue "other-ca.example"', ns="n1"),
        "stale.test": zone(f"n1 A {NS1}\nn2 A {NS2}\n@ A {NODE_V4}", ns="n1 n2", serial=5),
        "halflame.test": zone(f"n1 A {NS1}\n@ A {NODE_V4}", ns="n1"),
        "halfdead.test": zone(f"n1 A {NS1}\n@ A {NODE_V4}", ns="n1"),
        "unloaded.test": "this is no zone\n",
        "dyn.test": zone(f"n1 A {NS1}\n@ A {NODE_V4}", ns="n1"),
        "caa.test": zone(_CAA + f"n1 A {NS1}", ns="n1"),
        "hoster.test": zone(f"n1 A {NS1}\nn2 A {NS2}\nns1 A {NS1}\nns2 A {NS2}", ns="n1 n2"),
        "glueless.test": zone(f"@ A {NODE_V4}", ns="ns1.hoster.test. ns2.hoster.test."),
        "signed.test": _signed("signed.test"),
        "expired.test": _signed("expired.test", until=1_700_000_000),
        "rolled.test": _signed("rolled.test"),
        "unsigned.test": zone(f"n1 A {NS1}\n@ A {NODE_V4}", ns="n1"),
        "deep.test": zone(f"n1 A {NS1}\nsub NS n1", ns="n1"),
        "sub.deep.test": zone(f"@ A {NODE_V4}\nwww A {NODE_V4}", ns="n1.deep.test."),
    },
    NS2: {
        "edge.test": zone(_EDGE, ns="n1 n2"),
        "good.test": zone(_POINTS_HERE + f"n1 A {NS1}\nn2 A {NS2}\n*.wild A {NODE_V4}\n", ns="n1 n2"),
        "stale.test": zone(f"n1 A {NS1}\nn2 A {NS2}\n@ A {ELSEWHERE}", ns="n1 n2", serial=3),
        "hoster.test": zone(f"n1 A {NS1}\nn2 A {NS2}\nns1 A {NS1}\nns2 A {NS2}", ns="n1 n2"),
        "glueless.test": zone(f"@ A {NODE_V4}", ns="ns1.hoster.test. ns2.hoster.test."),
    },
    LAME: {},
    CDN_NS: {
        "cloudflare-like.test": zone(f"n1 A {CDN_NS}\nada.ns A {CDN_NS}", ns="n1"),
        "cdn.test": zone("@ A 104.16.1.1\n@ AAAA 2606:4700::6810:101", ns="ada.ns.cloudflare-like.test."),
    },
}  # fmt: skip


def world(folder: Path) -> Bind:
    """All of it, not started yet; dyn.test takes updates signed with KEY."""
    return Bind(folder, SERVERS, keys=KEY, dynamic=("dyn.test",), options="check-integrity no;")


def resolver_of(bind: Bind, timeout_s: float = 1.0, total_s: float = 6.0) -> Resolver:
    """One that goes down from this world's root."""
    return Resolver((), timeout_s, total_s=total_s, roots=(ROOT,), port=bind.port, is_public_only=False)

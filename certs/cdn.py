"""Which content delivery network stands in front of a name, by its addresses or the CNAMEs on the way there.

The tables are small and may age: a network that is not recognised is taken for "elsewhere", which is as true.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable

# Sources: cloudflare.com/ips; api.fastly.com/public-ip-list; ip-ranges.amazonaws.com (CLOUDFRONT, the larger blocks)
_NETWORKS = {
    "Cloudflare": """
        173.245.48.0/20 103.21.244.0/22 103.22.200.0/22 103.31.4.0/22 141.101.64.0/18 108.162.192.0/18 190.93.240.0/20
        188.114.96.0/20 197.234.240.0/22 198.41.128.0/17 162.158.0.0/15 104.16.0.0/13 104.24.0.0/14 172.64.0.0/13
        131.0.72.0/22 2400:cb00::/32 2606:4700::/32 2803:f800::/32 2405:b500::/32 2405:8100::/32 2a06:98c0::/29
        2c0f:f248::/32""",
    "Fastly": """
        23.235.32.0/20 43.249.72.0/22 103.244.50.0/24 103.245.222.0/23 103.245.224.0/24 104.156.80.0/20 140.248.64.0/18
        140.248.128.0/17 146.75.0.0/17 151.101.0.0/16 157.52.64.0/18 167.82.0.0/17 167.82.128.0/20 167.82.160.0/20
        167.82.224.0/20 172.111.64.0/18 185.31.16.0/22 199.27.72.0/21 199.232.0.0/16 2a04:4e40::/32 2a04:4e42::/32""",
    "Amazon CloudFront": """
        13.32.0.0/15 13.224.0.0/14 13.249.0.0/16 18.64.0.0/14 18.154.0.0/15 18.160.0.0/15 18.164.0.0/15 18.172.0.0/15
        18.238.0.0/15 18.244.0.0/15 52.84.0.0/15 52.222.128.0/17 54.182.0.0/16 54.192.0.0/16 54.230.0.0/16
        54.239.128.0/18 99.84.0.0/16 99.86.0.0/16 108.138.0.0/15 108.156.0.0/14 143.204.0.0/16 204.246.164.0/22
        205.251.192.0/19 2600:9000::/28""",
}  # fmt: skip

_SUFFIXES = {
    "cdn.cloudflare.net": "Cloudflare",
    "fastly.net": "Fastly",
    "fastlylb.net": "Fastly",
    "cloudfront.net": "Amazon CloudFront",
    "edgekey.net": "Akamai",
    "edgesuite.net": "Akamai",
    "akamaiedge.net": "Akamai",
    "akamai.net": "Akamai",
    "azureedge.net": "Azure",
    "azurefd.net": "Azure",
    "b-cdn.net": "bunny.net",
    "cdn77.org": "CDN77",
}


@functools.cache
def _networks() -> tuple[tuple[str, ipaddress.IPv4Network | ipaddress.IPv6Network], ...]:
    return tuple((name, ipaddress.ip_network(one)) for name, text in _NETWORKS.items() for one in text.split())


def cdn_of(addresses: Iterable[str], cnames: Iterable[str] = ()) -> str | None:
    """The network's name if all addresses are one's, or a CNAME leads into it; else None."""
    for cname in cnames:
        for suffix, name in _SUFFIXES.items():
            if cname == suffix or cname.endswith("." + suffix):
                return name
    found = {_owner(address) for address in addresses}
    return found.pop() if len(found) == 1 else None


def _owner(address: str) -> str | None:
    one = ipaddress.ip_address(address)
    return next((name for name, network in _networks() if one in network), None)

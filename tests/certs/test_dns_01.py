"""DNS-01 from end to end: a CA (Pebble) that asks BIND for what our hooks put where the customer's CNAME leads."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from certs import Certificate
from certs.challenges import Challenge, ChallengeType, dns_value
from certs.dns_hooks import DnsHook, ExecHook, Rfc2136Hook, challenge_name, wait_visible
from certs.errors import AcmeError, Failure
from certs.issuer import AcmeClient
from certs.order import OrderRun, Want
from certs.resolver import Resolver
from certs.store import SealedStore
from tests.support import pebble
from tests.support.bind import Bind, needs_bind, zone
from tests.support.dns_world import KEY

((KEY_NAME, SECRET),) = KEY.items()
NSUPDATE = shutil.which("nsupdate")
DELEGATED = "x1.acme.test"

pytestmark = [
    needs_bind,
    pytest.mark.slow,
    pytest.mark.skipif(not pebble.is_installed(), reason="needs Pebble (Debian: pebble)"),
]


@pytest.fixture(scope="module")
def dns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bind]:
    """The customer's zone never changes; ours takes updates."""
    zones = {
        ".": zone("ns.root. A 127.0.0.1", ns="ns.root."),
        "cust.test": zone(
            f"ns A 127.0.0.1\n_acme-challenge CNAME {DELEGATED}.\n_acme-challenge.a CNAME {DELEGATED}.", ns="ns"
        ),
        "acme.test": zone("ns A 127.0.0.1", ns="ns"),
    }
    folder = tmp_path_factory.mktemp("bind")
    with Bind(folder, {"127.0.0.1": zones}, keys=KEY, dynamic=("acme.test",), is_resolver=True) as bind:
        yield bind


@pytest.fixture(scope="module")
def ca(dns: Bind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pebble.Pebble]:
    with pebble.pebble(tmp_path_factory.mktemp("pebble"), 1, 1, dns_server=dns.at()) as made:
        yield made


@pytest.fixture(params=["rfc2136", "exec"])
def hook(request: pytest.FixtureRequest, dns: Bind, tmp_path: Path) -> DnsHook:
    if request.param == "rfc2136":
        return Rfc2136Hook(dns.at(), None, KEY_NAME, SECRET)
    if NSUPDATE is None:
        pytest.skip("needs nsupdate (Debian: bind9-dnsutils)")
    script = tmp_path / "hook.sh"
    script.write_text(f"""#!/bin/sh
case $1 in present) what=add ttl=60 ;; cleanup) what=delete ttl= ;; esac
printf 'server 127.0.0.1 {dns.port}\\nupdate %s %s. %s TXT "%s"\\nsend\\n' $what "$2" "$ttl" "$3" |
    {NSUPDATE} -y hmac-sha256:{KEY_NAME}:{SECRET}
""")
    script.chmod(0o755)
    return ExecHook((str(script),), 20)


class Delegated:
    """Puts the proof where the CNAME leads, and waits until it is there."""

    def __init__(self, hook: DnsHook, resolver: Resolver) -> None:
        self.hook = hook
        self.resolver = resolver
        self.most_at_once = 0

    def types(self, name: str, is_wildcard: bool) -> tuple[ChallengeType, ...]:
        return (ChallengeType.DNS_01,)

    async def present(self, challenge: Challenge) -> None:
        await asyncio.to_thread(self._present, challenge)

    def _present(self, challenge: Challenge) -> None:
        name, value = challenge_name(challenge.name, self.resolver), dns_value(challenge.key_authorization)
        assert name == DELEGATED
        self.hook.present(name, value)
        wait_visible(self.resolver, name, value, time.monotonic() + 10, time.sleep)
        self.most_at_once = max(self.most_at_once, len(self.resolver.txt(name)))

    async def clean_up(self, challenge: Challenge) -> None:
        await asyncio.to_thread(self.hook.clean_up, DELEGATED, dns_value(challenge.key_authorization))


async def _order(folder: Path, ca: pebble.Pebble, shower: Delegated, names: tuple[str, ...]) -> Certificate:
    store = SealedStore(folder / "store.db", bytes(range(32)), time.time)
    client = AcmeClient(ca.directory_url, store, time.time, ca_file=str(ca.ca_file), email="ops@example.com")

    async def keep(certificate: Certificate) -> None:
        pass

    try:
        return await OrderRun(client, store, shower, time.time, "node").run(Want(names), keep)
    finally:
        await client.close()
        store.close()


async def test_a_wildcard_and_its_base_are_proven_at_one_delegated_name(
    tmp_path: Path, dns: Bind, ca: pebble.Pebble, hook: DnsHook
) -> None:
    shower = Delegated(hook, Resolver((dns.at(),), 2.0))
    certificate = await _order(tmp_path, ca, shower, ("cust.test", "*.cust.test"))
    names = certificate.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert sorted(names.get_values_for_type(x509.DNSName)) == ["*.cust.test", "cust.test"]
    assert await asyncio.to_thread(shower.resolver.txt, DELEGATED) == ()  # nothing is left behind


async def test_a_hook_that_fails_says_so_in_the_orders_error(tmp_path: Path, dns: Bind, ca: pebble.Pebble) -> None:
    refused = Rfc2136Hook(dns.at(), None, "other-key", SECRET)
    with pytest.raises(AcmeError, match="BADKEY: the server knows no key other-key") as caught:
        await _order(tmp_path, ca, Delegated(refused, Resolver((dns.at(),), 2.0)), ("*.a.cust.test", "*.cust.test"))
    assert caught.value.failure is Failure.DNS_HOOK

"""A17: names that nobody has added, by the thousand, each of which might have a certificate made.

One question a name however often it comes, so many orders as its registered domain's bucket has, a refusal within a
second, and names that were added are served and ordered as if nothing were.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.attacks import cases
from tests.attacks.conftest import Begin
from tests.support.attacks import KEPT, AttackedNode
from tests.support.pebble import Pebble, pebble
from tests.support.plane import static_app
from tests.support.processes import wait_for
from tests.system.test_custom_domains import Ask, certs_section

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]
NAMES = min(cases(1500), 10_000)
AT_ONCE = 16
FAILS_S = 1.0
BURST = 3


class Tenants:
    """A node whose app `tenants` takes names on demand, its CA, and who is asked."""

    def __init__(self, node: AttackedNode, ca: Pebble, ask: Ask) -> None:
        self.node, self.ca, self.ask = node, ca, ask
        self.context = ssl.create_default_context(cadata=ca.roots().decode())

    def handshake(self, name: str) -> tuple[bool, float]:
        """Whether a handshake under this name was done with a trusted certificate, and how long it took."""
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.node.https_port), timeout=20) as raw:
            try:
                with self.context.wrap_socket(raw, server_hostname=name):
                    return True, time.monotonic() - began
            except (ssl.SSLError, ConnectionError):
                return False, time.monotonic() - began

    def crowd(self, names: list[str]) -> list[tuple[bool, float]]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.handshake, names))

    def orders(self) -> int:
        return self.ca.log.read_text().count("There are now")  # what Pebble says of each new order


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants")
    ask, node = Ask(), AttackedNode(folder / "node")
    try:
        with pebble(folder / "ca", node.http_port, node.https_port) as ca:
            app = static_app(node.folder, "tenants", f"127.0.0.1:{node.origin.port}", KEPT)
            rules = (
                f'[apps.on_demand]\nask = "{ask.url}"\ndomain_burst = {BURST}\ndomain_hour = 1\nnegative_ttl = "10m"\n'
            )
            node.config.write_text(node.config.read_text() + certs_section(ca) + app + rules)
            with node:
                yield Tenants(node, ca, ask)
    finally:
        ask.close()


def spread(count: int, mark: str) -> list[str]:
    """Names below many registered domains and, every other one, below one."""
    return [f"n{number}.{mark}.example" if number % 2 else f"www.{mark}{number}.example" for number in range(count)]


def test_invented_names_are_asked_for_once_and_refused_in_time(tenants: Tenants, attack: Begin) -> None:
    names = spread(NAMES, "refused")
    with attack("A17", "names that the app refuses", tenants.node, p99_ms=50, growth_mib=30) as under:
        under.figures.cases = 2 * len(names)
        first = tenants.crowd(names)
        again = tenants.crowd(names)
        slowest = max(took for _, took in first + again)
        asked = Counter(tenants.ask.asked)
        under.note(
            f"{sum(asked[name] for name in names):,} questions for {len(names):,} names twice, slowest {slowest:.2f} s"
        )
        assert not any(done for done, _ in first + again)
        assert slowest < FAILS_S
        assert max(asked[name] for name in names) == 1


@pytest.mark.parametrize("fault", ["slow", "failing"])
def test_an_ask_that_does_not_work_fails_the_handshake_and_nobody_else(
    tenants: Tenants, attack: Begin, fault: str
) -> None:
    names = spread(NAMES // 10, fault)
    tenants.ask.delay_s = 5.0 if fault == "slow" else 0.0
    tenants.ask.status = 500 if fault == "failing" else 0
    try:
        with attack("A17", f"an ask that is {fault}", tenants.node, p99_ms=50, growth_mib=30) as under:
            under.figures.cases = len(names)
            found = tenants.crowd(names)
            slowest = max(took for _, took in found)
            under.note(f"slowest {slowest:.2f} s")
            assert not any(done for done, _ in found) and slowest < FAILS_S + 0.2
    finally:
        tenants.ask.delay_s, tenants.ask.status = 0.0, 0


def test_an_ask_that_permits_all_has_the_bucket_of_each_domain_and_no_more(tenants: Tenants, attack: Begin) -> None:
    names = [f"n{number}.flooded.example" for number in range(60)]
    tenants.ask.permitted.update(names)
    added: list[float] = []

    def add() -> None:
        began = time.monotonic()
        path = "/v1/apps/web/certificates"
        assert tenants.node.api("POST", f"{path}/acme", {"hostname": "mine.example.org"})[0] == 201
        wait_for(
            lambda: tenants.node.api("GET", f"{path}/mine.example.org")[1]["status"] == "active", 20, "a certificate"
        )
        added.append(time.monotonic() - began)

    with attack("A17", "an ask that permits all", tenants.node, p99_ms=50, growth_mib=30) as under:
        under.figures.cases = len(names)
        meanwhile = threading.Thread(target=add)
        meanwhile.start()
        found = tenants.crowd(names)
        meanwhile.join(30)
        served = sum(done for done, _ in found)
        refused = [took for done, took in found if not done]
        under.note(
            f"{served} of {len(names)} issued; a name added meanwhile had its certificate after {added[0]:.1f} s"
        )
        assert served == BURST
        assert max(refused) < FAILS_S
        assert added[0] < 5

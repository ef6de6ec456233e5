"""A17: names that nobody has, by the thousand, where certificates are made on demand.

A stranger's handshake costs at most a question, and ends within a second; the app is asked for a name once in the time
that a refusal holds; orders are the bucket's of the registered domain; who is known is served as if nothing went on,
and a name that is added meanwhile has its certificate as soon as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.attacks import cases
from tests.attacks.conftest import Begin
from tests.support.ask import AskServer, Mode
from tests.support.attacks import AttackedNode, Sampler
from tests.support.bystander import quantile
from tests.support.pebble import Pebble, is_installed, pebble

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not is_installed(), reason="pebble is not installed"),
]

NAMES = 2_500  # 10,000 is what the attack is said to be: ./run soak has more
AT_ONCE = 32  # more than that, on a small host, measures how the attacker takes the node's processor
BURST = 5
ASK_TIMEOUT_S = 0.8
FAILS_WITHIN_S = 1.0
PATIENCE_S = 20.0
HOST_MS = 250.0  # where the host keeps the worker from running for longer, its times are not judged
_PLACE = "q" * 16
_LABELS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Site(AttackedNode):
    """The node that is attacked, whose app `web` takes names on demand, beside a CA."""

    ca: Pebble
    ask_server: AskServer
    # Of one process: the attacker shares no thread with those who measure. On a host of its own it would take none of
    # the node's processor: here it has the lower priority.
    attackers: ProcessPoolExecutor

    def shake(self, names: Sequence[str]) -> Handshakes:
        return self.attackers.submit(shake_all, self.https_port, names).result()

    def known_context(self) -> ssl.SSLContext:
        return self.client_context()

    def show(self, host: str) -> Any:
        status, found = self.api("GET", f"/v1/apps/web/certificates/{host}")
        assert status == 200, found
        return found

    def kept_names(self) -> list[str]:
        """Names of the app that the node has made its own."""
        status, found = self.api("GET", "/v1/apps/web/certificates?limit=500")
        assert status == 200 and "next_cursor" not in found, found
        return [one["hostname"] for one in found["certificates"]]

    def seconds_to_add(self, host: str) -> float:
        """How long a name takes that an operator adds, until it has its certificate."""
        began = time.monotonic()
        status, told = self.api("POST", "/v1/apps/web/certificates/acme", {"hostname": host})
        assert status == 201, told
        while self.show(host)["status"] != "active":
            assert time.monotonic() - began < 30, f"{self.show(host)}\n{self.log()[-4000:]}"
            time.sleep(0.05)  # a look more often would be a load of its own
        return time.monotonic() - began


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("on-demand")
    ask = AskServer()
    on_demand = f"""
[apps.on_demand]
ask = "{ask.url}"
ask_timeout = "{int(ASK_TIMEOUT_S * 1000)}ms"
domain_burst = {BURST}
domain_hour = 1
negative_ttl = "10m"
"""
    node = Site(folder / "node")
    try:
        with pebble(folder / "ca", node.http_port, node.https_port) as ca:
            own = node.config.read_text()
            certs = f"""
[certs]
issuer = "acme"
acme_directory = "{ca.directory_url}"
acme_ca_file = "{ca.ca_file}"
addresses = ["127.0.0.1"]
dns_servers = ["{ca.dns}"]
"""
            before, web, rest = own.partition("[[apps]]")
            first, machines, others = rest.partition("[[apps.machines]]")
            machine, quiet, last = others.partition("[[apps]]")
            node.config.write_text(f"{before}{certs}{web}{first}{machines}{machine}{on_demand}{quiet}{last}")
            node.ca, node.ask_server = ca, ask
            spawn = multiprocessing.get_context("spawn")
            with node, ProcessPoolExecutor(1, spawn, os.nice, (10,)) as node.attackers:
                node.seconds_to_add("first.example.com")  # the account is there
                yield node
    finally:
        ask.close()


def strangers(site: Site) -> list[str]:
    """What the node has made its own without having been told."""
    return [one for one in site.kept_names() if not one.startswith(("added-", "first."))]


# --- the attacker


@dataclass
class Handshakes:
    """What came of many ClientHellos."""

    refused: int = 0
    served: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    longest_s: float = 0.0


def hello_template() -> bytes:
    """A ClientHello whose server name is to be put in place of another of the same length."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=f"{_PLACE}.example").do_handshake()
    return outgoing.read()


def names_of_many_domains(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(_LABELS[:26], k=16)) + ".example" for _ in range(count)]


def names_below_one(rng: random.Random, count: int, domain: str) -> list[str]:
    assert len(domain) == 13, "the length of what follows the label in the template"
    return ["".join(rng.choices(_LABELS[:26], k=10)) + "." + domain for _ in range(count)]


def shake_all(port: int, names: Sequence[str]) -> Handshakes:
    return asyncio.run(shake(port, names))


async def shake(port: int, names: Sequence[str]) -> Handshakes:
    """Begin a handshake for every name, so many at once, each from an address of its own."""
    template = hello_template()
    found = Handshakes()
    todo = iter(enumerate(names))
    loop = asyncio.get_running_loop()

    async def one(number: int, name: str) -> None:
        assert len(name) == len(_PLACE) + 8
        source = f"127.{2 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}"
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        began = loop.time()
        try:
            writer.write(template.replace(f"{_PLACE}.example".encode(), name.encode()))
            async with asyncio.timeout(PATIENCE_S):
                kind = await reader.read(1)
            took = loop.time() - began
            if kind == b"\x16":
                found.served.append(name)
                return
            found.refused += 1
            found.longest_s = max(found.longest_s, took)
        except TimeoutError:
            found.silent.append(name)
        except ConnectionError:
            found.refused += 1
        finally:
            writer.transport.abort()

    async def some() -> None:
        for number, name in todo:
            await one(number, name)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return found


class Known:
    """Handshakes of a name that has been served all along, twenty a second, timed. A context manager."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.took_ms: list[float] = []
        self.failures: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="known")

    def __enter__(self) -> Known:
        self._site.known_context()
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._over.wait(0.05):
            began = time.monotonic()
            try:
                self._site.connect("quiet", tls=True, timeout=20).close()
            except OSError as error:
                self.failures.append(str(error))
            self.took_ms.append((time.monotonic() - began) * 1000)

    @property
    def p99_ms(self) -> float:
        return quantile(self.took_ms, 0.99)


# --- the attack

_rounds = itertools.count()


def attack_with(
    site: Site, attack: Begin, title: str, mode: Mode, names: Sequence[str], *, again: int = 200
) -> Handshakes:
    """All names once, then some of them again; what holds whatever the app's URL does is asserted here."""
    site.ask_server.forget(mode)
    kept = set(strangers(site))
    added: list[float] = []
    control = Sampler([site.pid_of("control")])
    with attack("A17", title, site, growth_mib=64, p99_ms=50) as run, Known(site) as known:
        for name in names:
            run.case(name)
        over = threading.Event()

        def add() -> None:
            while not over.is_set():
                added.append(site.seconds_to_add(f"added-{next(_rounds)}.example.org"))
                over.wait(1.0)

        adding = threading.Thread(target=add, name="adding")
        adding.start()
        try:
            found = site.shake(names)
            second = site.shake(names[:again])
        finally:
            over.set()
            adding.join(60)
        grown_mib, control_cpu_s = control.stop()
        asked = site.ask_server.asked
        newly = set(strangers(site)) - kept
        run.note(
            f"{found.refused} refused, the slowest {max(found.longest_s, second.longest_s):.2f} s, "
            f"{len(found.served)} served; {sum(asked.values())} questions for {len(asked)} names, "
            f"{site.ask_server.most_at_once} at once; known names' handshakes p99 {known.p99_ms:.0f} ms; "
            f"{len(added)} names added, the slowest in "
            f"{max(added, default=0):.1f} s; control +{grown_mib:.1f} MiB, {control_cpu_s:.1f} s CPU; {len(newly)} kept"
        )
        assert found.silent == [] and second.silent == [], "a handshake without an end"
        host_s = control.longest_wait_ms / 1000  # for which others' processes kept control from running
        assert max(found.longest_s, second.longest_s) <= FAILS_WITHIN_S + host_s
        assert not asked or asked.most_common(1)[0][1] == 1, asked.most_common(3)
        assert known.failures == []
        assert added and max(added) <= 5.0, added
        assert grown_mib <= 64, grown_mib
        assert set(found.served) <= newly
    host_ms = run.figures.waited_ms or 0.0
    if host_ms <= HOST_MS:
        assert known.p99_ms <= 50 + host_ms, (known.p99_ms, host_ms)
    else:
        run.note("nor was that of known names' handshakes")
    return found


@pytest.mark.parametrize("mode", ["no", "fail", "hang", "cut", "flood"])
def test_names_that_the_app_does_not_permit_cost_a_question_at_most(site: Site, attack: Begin, mode: Mode) -> None:
    rng = random.Random(f"A17 {mode}")
    count = cases(NAMES if mode in ("no", "fail") else NAMES // 10)
    names = names_of_many_domains(rng, count // 2) + names_below_one(rng, count // 2, "below.example")
    rng.shuffle(names)
    kept = strangers(site)
    found = attack_with(site, attack, f"random names, ask: {mode}", mode, names)
    assert found.served == [] and found.refused == len(names)
    assert strangers(site) == kept


def test_who_was_crowded_out_is_not_held_responsible_for_the_crowd(site: Site, attack: Begin) -> None:
    names = names_of_many_domains(random.Random("A17 crowd"), 200)
    attack_with(site, attack, "ask: hang, then well", "hang", names)
    unasked = next(name for name in names if not site.ask_server.asked[name])
    refused = next(iter(site.ask_server.asked))
    site.ask_server.forget("yes")
    time.sleep(1.1)  # a worker remembers a refusal for a second
    assert site.shake([unasked]).served == [unasked]
    assert site.shake([refused]).served == []
    assert list(site.ask_server.asked) == [unasked]


def test_an_app_that_permits_everything_keeps_no_name_that_leads_elsewhere(site: Site, attack: Begin) -> None:
    site.ca.set_default_a("192.0.2.1")
    for number in range(40):
        site.ca.set_a(f"added-{number}.example.org", "127.0.0.1")
    try:
        rng = random.Random("A17 elsewhere")
        names = names_of_many_domains(rng, cases(NAMES) // 2) + names_below_one(rng, cases(NAMES) // 2, "aside.example")
        rng.shuffle(names)
        kept = strangers(site)
        found = attack_with(site, attack, "random names that lead elsewhere, ask: yes", "yes", names)
        assert found.served == [] and strangers(site) == kept
    finally:
        site.ca.set_default_a("127.0.0.1")


def test_an_app_that_permits_everything_has_the_bucket_of_each_domain(site: Site, attack: Begin) -> None:
    names = names_below_one(random.Random("A17 below one"), cases(NAMES), "baits.example")
    kept = set(strangers(site))
    attack_with(site, attack, "random names below one domain that leads here, ask: yes", "yes", names)
    new = set(strangers(site)) - kept
    assert len(new) == BURST, new
    asked = sum(site.ask_server.asked.values())
    # names are asked about until DNS has been looked at for the first of them, and they are counted: then no more
    late = [name for name in names[len(names) * 3 // 4 :] if site.ask_server.asked[name]]
    assert not late, "once the bucket is empty nobody is asked"
    assert asked < len(names) // 2


def test_names_of_many_domains_that_all_lead_here_leave_room_for_those_that_are_added(
    site: Site, attack: Begin
) -> None:
    names = names_of_many_domains(random.Random("A17 many here"), cases(NAMES) // 10)
    found = attack_with(site, attack, "random domains that lead here, ask: yes", "yes", names)
    assert found.served, "what is permitted is served, as far as there is room"

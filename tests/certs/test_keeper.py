"""The life of names in certificates, against a real CA behind one that can be told to misbehave. The clock is ours."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from certs.budget import OTHERS, Budget, Event, Limit
from certs.domain import Domain, Origin, Source, Trouble, certificate_key
from certs.errors import Failure
from certs.issuer import AcmeClient, certificate_id
from certs.keeper import ON_DEMAND_AT_ONCE, Keeper, Policy
from certs.order import KeyType
from certs.store import SealedStore
from tests.support.faulty_ca import Fault, FaultyCa, faulty_ca, hang, problem, says
from tests.support.pebble import Pebble, pebble
from tests.support.txt_records import TxtRecords

SECRET = bytes(range(32))
DAY = 86_400.0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pebble]:
    no_refusals = {"PEBBLE_WFE_NONCEREJECT": "0"}  # of good nonces: a repeated request would be counted as an order
    with pebble(tmp_path_factory.mktemp("pebble"), 1, 1, environment=no_refusals) as made:
        yield made


@pytest.fixture(scope="module")
def front(real: Pebble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyCa]:
    with faulty_ca(tmp_path_factory.mktemp("front"), real) as made:
        yield made


class Around(TxtRecords):
    """What a node would be to its keeper."""

    def __init__(self, ca: Pebble) -> None:
        super().__init__(ca.dns_management)
        self.missing: dict[str, str] = {}
        self.unowned: set[str] = set()
        self.served: list[tuple[str, Source | None]] = []
        self.dropped: list[tuple[str, str]] = []
        self.now: Callable[[], float] = time.time

    async def is_pointed(self, domain: Domain) -> str:
        return self.missing.get(domain.name, "")

    async def is_owned(self, domain: Domain) -> str:
        return "add the TXT record" if domain.name in self.unowned else ""

    async def on_dropped(self, domain: Domain, why: str) -> None:
        self.dropped.append((domain.name, why))

    async def on_certificate(self, domain: Domain) -> None:
        self.served.append((domain.name, domain.served(self.now())))


class Life:
    """A keeper that runs, with its store and a clock that can be set."""

    def __init__(self, folder: Path, front: FaultyCa, real: Pebble) -> None:
        front.heal()
        front.seen.clear()
        front.window = None
        self.front = front
        self.offset_s = 0.0
        self.store = SealedStore(folder / "store.db", SECRET, self.now)
        self.around = Around(real)
        self.around.now = self.now
        self.limits = dict(OTHERS)
        self.request_timeout_s = 2.0
        self.policy = Policy(prove_patience_s=2.0, finalize_patience_s=2.0)
        self.keeper: Keeper
        self._task: asyncio.Task[None] | None = None

    def now(self) -> float:
        return time.time() + self.offset_s

    async def start(self) -> None:
        client = AcmeClient(
            self.front.directory_url, self.store, self.now, ca_file=str(self.front.ca_file),
            request_timeout_s=self.request_timeout_s,
        )  # fmt: skip
        budget = Budget(self.store, self.now, self.limits)
        self.keeper = Keeper(
            client, self.store, budget, self.around, self.now, "node", policy=self.policy, rng=random.Random(1)
        )
        assert await self.keeper.load() == []
        self._task = asyncio.get_running_loop().create_task(self.keeper.run())

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self.keeper.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def add(self, name: str, origin: Origin = Origin.ADDED) -> Domain:
        now = self.now()
        domain = Domain(name, "web", origin, now, now)
        await self.keeper.add(domain)
        return domain

    def pass_time(self, seconds: float) -> None:
        self.offset_s += seconds
        self.keeper._wake.set()  # as its own sleep of a minute at the most would

    async def until(self, condition: Callable[[], object], seconds: float = 15.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    def orders(self) -> list[dict[str, object]]:
        return [one.payload for one in self.front.seen if one.endpoint == "new order"]


@pytest.fixture
async def life(tmp_path: Path, front: FaultyCa, real: Pebble) -> AsyncIterator[Life]:
    made = Life(tmp_path, front, real)
    await made.start()
    yield made
    await made.stop()
    made.store.close()


async def test_a_name_gets_its_certificate_and_keeps_it_over_a_restart(life: Life) -> None:
    domain = await life.add("a.example.com")
    await life.until(lambda: Source.ACME in domain.held)
    await life.until(lambda: life.around.served)
    assert life.around.served == [("a.example.com", Source.ACME)] and domain.trouble is None
    serial = domain.held[Source.ACME].serial
    await life.restart()
    again = life.keeper.get("a.example.com")
    assert again is not None and again is not domain and again.held[Source.ACME].serial == serial
    await asyncio.sleep(0.2)
    assert len(life.orders()) == 1
    found = await life.keeper.certificate("a.example.com", Source.ACME)
    assert found is not None and f"{found.leaf.serial_number:x}" == serial


async def test_rsa_comes_beside_ecdsa_where_both_are_asked_for(life: Life) -> None:
    life.policy = Policy((KeyType.ECDSA, KeyType.RSA))
    await life.restart()
    domain = await life.add("both.example.com")
    await life.until(lambda: len(domain.held) == 2)
    assert domain.held[Source.ACME].key == "ecdsa" and domain.held[Source.RSA].key == "rsa"


async def test_a_certificate_is_renewed_at_two_thirds_of_its_life_and_shown(life: Life) -> None:
    domain = await life.add("old.example.com")
    await life.until(lambda: Source.ACME in domain.held)
    first = domain.held[Source.ACME]
    lasts = first.expires_at - first.valid_from
    life.pass_time(0.6 * lasts)
    await asyncio.sleep(0.2)
    assert domain.held[Source.ACME] is first and len(life.orders()) == 1
    life.pass_time(0.08 * lasts)
    await life.until(lambda: domain.held[Source.ACME].serial != first.serial)
    await life.until(lambda: len(life.around.served) == 2)
    assert life.keeper.renewed == 1


async def test_the_ca_decides_when_and_is_told_what_is_replaced(life: Life) -> None:
    now = datetime.datetime.now(datetime.UTC)
    life.front.window = (now + datetime.timedelta(days=10), now + datetime.timedelta(days=11))
    await life.restart()  # the directory is read anew
    domain = await life.add("ari.example.com")
    await life.until(lambda: Source.ACME in domain.held and domain.held[Source.ACME].ari_explanation)
    held = domain.held[Source.ACME]
    assert 9.9 * DAY < held.renew_at - life.now() < 11.1 * DAY
    assert held.ask_ari_at > life.now() + 6 * 3500
    life.front.window = (now - datetime.timedelta(days=2), now - datetime.timedelta(days=1))  # it was revoked, say
    life.pass_time(6.1 * 3600)
    old = await life.keeper.certificate("ari.example.com", Source.ACME)
    assert old is not None
    await life.until(lambda: domain.held[Source.ACME].serial != held.serial)
    assert life.orders()[-1]["replaces"] == certificate_id(old.leaf)
    await asyncio.sleep(0.5)
    assert len(life.orders()) == 2, "a CA that always says `now` is not asked in a circle"


async def test_what_failed_is_tried_again_later_and_the_old_certificate_serves_on(life: Life) -> None:
    domain = await life.add("sick.example.com")
    await life.until(lambda: Source.ACME in domain.held)
    first = domain.held[Source.ACME]
    life.front.faults.append(Fault("new order", says(500, b"<html>")))
    life.pass_time(0.7 * (first.expires_at - first.valid_from))
    await life.until(lambda: domain.trouble is not None)
    assert domain.trouble is not None
    assert domain.trouble.failure is Failure.SERVER and domain.served(life.now()) is Source.ACME
    tries = life.front.count("new order")
    await asyncio.sleep(0.3)
    assert life.front.count("new order") == tries, "not before its time"
    for number in range(2, 5):
        life.pass_time(max(0.0, domain.trouble.next_try_at - life.now()) + 0.01)
        await life.until(lambda number=number: domain.trouble.in_a_row == number)
    life.front.heal()
    life.pass_time(domain.trouble.next_try_at - life.now() + 0.01)
    await life.until(lambda: domain.trouble is None)
    assert domain.held[Source.ACME].serial != first.serial


async def test_trouble_is_remembered_over_a_restart(life: Life) -> None:
    life.front.faults.append(Fault("new order", problem("rateLimited", 429, "3600")))
    domain = await life.add("limited.example.com")
    await life.until(lambda: domain.trouble is not None and not life.keeper.is_under_way("limited.example.com"))
    tries = life.front.count("new order")
    await life.restart()
    again = life.keeper.get("limited.example.com")
    assert again is not None and again.trouble is not None
    assert again.trouble.failure is Failure.RATE_LIMITED and again.trouble.next_try_at > life.now() + 3500
    life.keeper.look("limited.example.com")  # an operator's `check` does not break the CA's limit
    await asyncio.sleep(0.3)
    assert life.front.count("new order") == tries


async def test_nothing_is_asked_of_the_ca_before_dns_leads_here(life: Life) -> None:
    life.around.missing["later.example.com"] = "point it here"
    domain = await life.add("later.example.com")
    await life.until(lambda: domain.trouble is not None)
    assert domain.trouble is not None and domain.trouble.failure is Failure.NOT_POINTED
    assert domain.trouble.detail == "point it here" and not life.orders()
    assert domain.trouble.next_try_at - life.now() < 3
    del life.around.missing["later.example.com"]
    life.pass_time(domain.trouble.next_try_at - life.now() + 0.01)
    await life.until(lambda: Source.ACME in domain.held)


async def test_a_brought_certificate_is_shown_once_the_name_is_proven_and_falls_back_at_its_end(life: Life) -> None:
    domain = await life.add("brought.example.com")
    await life.until(lambda: Source.ACME in domain.held)
    certificate = await life.keeper.certificate("brought.example.com", Source.ACME)
    assert certificate is not None
    life.around.unowned.add("brought.example.com")
    await life.keeper.set_custom(domain, certificate, "ecdsa")
    await life.until(lambda: domain.trouble is not None)
    assert domain.served(life.now()) is Source.ACME
    life.around.unowned.clear()
    life.pass_time(domain.trouble.next_try_at - life.now() + 0.01)
    await life.until(lambda: domain.proven_at)
    await life.until(lambda: life.around.served[-1][1] is Source.CUSTOM)
    held = domain.held[Source.CUSTOM]
    import msgspec

    domain.held[Source.CUSTOM] = msgspec.structs.replace(held, expires_at=life.now() + 60)
    await life.keeper.add(domain)
    life.pass_time(61)
    await life.until(lambda: life.around.served[-1][1] is Source.ACME)


async def test_a_certificate_that_is_lost_is_ordered_anew(life: Life) -> None:
    domain = await life.add("lost.example.com")
    await life.until(lambda: Source.ACME in domain.held)
    await life.until(lambda: not life.keeper.is_under_way("lost.example.com"))
    first = domain.held[Source.ACME].serial
    life.store.delete(certificate_key("lost.example.com", Source.ACME))
    assert await life.keeper.certificate("lost.example.com", Source.ACME) is None
    await life.until(lambda: Source.ACME in domain.held and domain.held[Source.ACME].serial != first)


async def test_names_on_demand_never_keep_added_ones_waiting(life: Life) -> None:
    life.request_timeout_s = 50.0  # as long as this test takes, those that hang do
    await life.restart()
    life.front.faults.append(Fault("new order", hang, times=ON_DEMAND_AT_ONCE))
    strangers = [await life.add(f"n{number}.strangers.example", Origin.ON_DEMAND) for number in range(12)]
    await life.until(lambda: life.keeper.on_demand_is_busy)
    await asyncio.sleep(0.1)
    under_way = [one.name for one in strangers if life.keeper.is_under_way(one.name)]
    assert len(under_way) == ON_DEMAND_AT_ONCE
    domain = await life.add("mine.example.com")
    await life.until(lambda: Source.ACME in domain.held)
    assert under_way == [one.name for one in strangers if life.keeper.is_under_way(one.name)]


async def test_a_stranger_for_whom_nothing_can_be_had_is_forgotten(life: Life) -> None:
    life.around.missing["away.strangers.example"] = "it leads elsewhere"
    await life.add("away.strangers.example", Origin.ON_DEMAND)
    await life.until(lambda: life.around.dropped)
    assert life.around.dropped == [("away.strangers.example", "it leads elsewhere")]
    assert life.keeper.get("away.strangers.example") is None and not life.orders()
    assert not list(life.store.items("domain", lambda key, error: None))
    del life.around.missing["away.strangers.example"]
    domain = await life.add("away.strangers.example", Origin.ON_DEMAND)  # it may come again
    await life.until(lambda: Source.ACME in domain.held)


async def test_looking_often_does_not_make_the_schedule_grow(life: Life) -> None:
    domain = await life.add("often.example.com")
    await life.until(lambda: Source.ACME in domain.held and not life.keeper.is_under_way("often.example.com"))
    for _ in range(100):
        life.keeper.look("often.example.com")
    assert len(life.keeper._heap) <= 2


async def test_a_name_on_demand_is_kept_a_day_after_its_last_certificate_has_ended(life: Life) -> None:
    domain = await life.add("tenant.example.com", Origin.ON_DEMAND)
    await life.until(lambda: Source.ACME in domain.held)
    ends = domain.held[Source.ACME].expires_at
    assert not domain.is_given_up(ends)
    domain.trouble = Trouble(Failure.VALIDATION, "it moved away", "", 9, ends, ends, ends)
    assert not domain.is_given_up(ends + 86_400) and domain.is_given_up(ends + 86_401)
    life.front.faults.append(Fault("new order", problem("rejectedIdentifier", 403), times=9))
    life.pass_time(ends + 86_401 - life.now())
    life.keeper.look("tenant.example.com")
    await life.until(lambda: life.around.dropped)
    assert life.keeper.get("tenant.example.com") is None
    assert life.store.get(certificate_key("tenant.example.com", Source.ACME)) is None


async def test_our_own_limit_is_said_and_kept(life: Life) -> None:
    life.limits = {Event.ORDER: Limit(2, 3600)}
    await life.restart()
    domains = [await life.add(f"n{number}.limit.example") for number in range(2)]
    await life.until(lambda: all(Source.ACME in one.held for one in domains))
    third = await life.add("n3.limit.example")
    await life.until(lambda: third.trouble is not None)
    assert third.trouble is not None and third.trouble.failure is Failure.RATE_LIMITED
    assert "our own limit" in third.trouble.detail and len(life.orders()) == 2
    life.pass_time(3700)
    life.pass_time(max(0.0, third.trouble.next_try_at - life.now()) + 1)
    await life.until(lambda: Source.ACME in third.held)


async def test_a_name_that_is_removed_leaves_nothing_behind(life: Life) -> None:
    domain = await life.add("gone.example.com")
    await life.until(lambda: Source.ACME in domain.held)
    await life.keeper.remove("gone.example.com")
    assert life.keeper.get("gone.example.com") is None
    for key in ("domain/gone.example.com", certificate_key("gone.example.com", Source.ACME)):
        assert life.store.get(key) is None
    life.front.faults.append(Fault("new order", hang))
    await life.add("hanging.example.com")
    await life.until(lambda: life.front.count("new order") > 1)
    await life.keeper.remove("hanging.example.com")
    assert not list(life.store.items("order", lambda key, error: None))
    assert not life.keeper.is_under_way("hanging.example.com")


async def test_an_order_now_is_made_at_once_though_nothing_is_due(life: Life) -> None:
    domain = await life.add("leaked.example.com")
    await life.until(lambda: Source.ACME in domain.held and not life.keeper.is_under_way("leaked.example.com"))
    first = domain.held[Source.ACME].serial
    life.keeper.renew("leaked.example.com")
    await life.until(lambda: domain.held[Source.ACME].serial != first)


async def test_a_clock_that_is_days_off_orders_all_the_same_and_is_told(life: Life) -> None:
    for days in (2, -2):
        life.offset_s = days * DAY
        name = f"skew{days + 2}.example.com"
        domain = await life.add(name)
        await life.until(lambda domain=domain: Source.ACME in domain.held)
        assert life.keeper.client.clock_skew_s == pytest.approx(-days * DAY, abs=60)
        await asyncio.sleep(0.2)
        assert not life.keeper.is_under_way(name)
    assert len(life.orders()) == 2


async def test_a_key_type_that_is_no_longer_ordered_is_let_end_in_peace(life: Life) -> None:
    life.policy = Policy((KeyType.ECDSA, KeyType.RSA))
    await life.restart()
    domain = await life.add("fewer.example.com")
    await life.until(lambda: len(domain.held) == 2)
    life.policy = Policy()
    await life.restart()
    again = life.keeper.get("fewer.example.com")
    assert again is not None
    # each has a draw of its own within a sixtieth of its life: later than both
    life.pass_time(max(held.renew_at for held in again.held.values()) - life.now() + DAY)
    await life.until(lambda: life.keeper.renewed == 1)
    await asyncio.sleep(0.3)

    def revision() -> int:
        entry = life.store.get("domain/fewer.example.com")
        assert entry is not None
        return entry.revision

    before = revision()
    await asyncio.sleep(0.4)
    assert revision() == before


async def test_a_certificate_of_another_key_type_does_not_stand_for_the_one_that_is_ordered(life: Life) -> None:
    life.policy = Policy((KeyType.RSA,))
    await life.restart()
    domain = await life.add("other.example.com")
    await life.until(lambda: Source.RSA in domain.held)
    life.policy = Policy((KeyType.ECDSA,))
    await life.restart()
    again = life.keeper.get("other.example.com")
    assert again is not None
    await life.until(lambda: Source.ACME in again.held)


async def test_a_failure_of_a_time_that_has_not_come_is_tried_again_at_once(life: Life) -> None:
    """The clock was years ahead when it failed, and was set right."""
    life.offset_s = 3650 * DAY
    life.around.missing["early.example.com"] = "it points elsewhere"
    domain = await life.add("early.example.com")
    await life.until(lambda: domain.trouble is not None)
    del life.around.missing["early.example.com"]
    life.pass_time(-3650 * DAY)
    await life.until(lambda: Source.ACME in domain.held)


async def test_a_name_that_comes_again_while_it_is_dropped_is_kept(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    life.around.missing["back.example.com"] = "it points elsewhere"
    come: list[Domain] = []

    async def add_again(domain: Domain, why: str) -> None:
        life.around.missing.clear()
        come.append(await life.add("back.example.com"))
        await asyncio.sleep(0.3)

    monkeypatch.setattr(life.around, "on_dropped", add_again)
    await life.add("back.example.com", Origin.ON_DEMAND)
    await life.until(lambda: come and Source.ACME in come[0].held)

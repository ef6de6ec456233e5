"""Names and their certificates over a reload of [certs]."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from certs import Certificate, PackReader
from certs.domain import Domain, Origin, Source, certificate_key, domain_key, held_of
from certs.keeper import Keeper
from proxy.clock import SystemClock
from proxy.config import CertsSection
from proxy.control.domains import Domains
from tests.certs.test_custom import CA, KEY, LEAF
from tests.control.rig import a_plan, an_app

HOST = "shop.example.com"


@pytest_asyncio.fixture
async def domains(tmp_path: Path) -> AsyncIterator[Domains]:
    """Loaded and open, with the plan `a_plan()`."""
    (tmp_path / "run").mkdir()
    made = Domains(str(tmp_path), str(tmp_path / "run"), SystemClock(), random.Random(1))
    await made.load(a_plan())
    await made.open()
    yield made
    await made.close()


def kept(domains: Domains, name: str, sources: tuple[Source, ...] = (Source.ACME,)) -> Domain:
    """A name whose certificates lie in the store; nobody has shown them yet."""
    certificate = Certificate(name, LEAF + CA, KEY)
    now = time.time()
    assert domains._store is not None
    for source in sources:
        domains._store.put(certificate_key(name, source), certificate.to_pem())
    held = {source: held_of(certificate, "ecdsa", now) for source in sources}
    return Domain(name, "web", Origin.ADDED, now, now, is_acme_wanted=False, held=held)


async def until_shown(domains: Domains, tmp_path: Path, *names: str) -> None:
    reader = PackReader(tmp_path / "run" / "certificates", domains._secret)
    wanted = set(names)
    async with asyncio.timeout(5):
        while wanted := wanted - set(reader.refresh()):
            await asyncio.sleep(0.02)
    reader.close()


async def test_renewals_go_on_after_something_unforeseen_and_status_tells_of_it(
    domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.control.domains._BEGIN_AGAIN_S", 0.05)
    begin = Keeper._begin
    failed: list[str] = []

    def fails_at_first(self: Keeper, domain: Domain) -> None:
        if domain.name == "a.example.com" and len(failed) < 2:
            failed.append(domain.name)
            raise RuntimeError("no such thing")
        begin(self, domain)

    monkeypatch.setattr(Keeper, "_begin", fails_at_first)
    assert domains._keeper is not None and not (await domains.status())["warnings"]
    for name in ("a.example.com", "b.example.com"):
        await domains._keeper.add(kept(domains, name))
    await until_shown(domains, tmp_path, "a.example.com", "b.example.com")
    assert len(failed) == 2
    (warning,) = (await domains.status())["warnings"]
    assert "no such thing" in warning and "begun again" in warning


async def test_configured_names_have_their_internal_certificates_before_anybody_asks(
    domains: Domains, tmp_path: Path
) -> None:
    app = an_app(hostnames=("web.apps.localhost", "*.wild.example.com"))
    await domains.apply(a_plan(app))
    await until_shown(domains, tmp_path, "web.apps.localhost", "*.wild.example.com")


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_an_rsa_certificate_beside_the_other_is_taken_out_at_its_end(
    domains: Domains, tmp_path: Path, is_restarted: bool
) -> None:
    assert domains._keeper is not None and domains._store is not None
    domain = kept(domains, HOST, (Source.ACME, Source.RSA))
    await domains._keeper.add(domain)
    await until_shown(domains, tmp_path, HOST, f"rsa/{HOST}")
    ended = msgspec.structs.replace(domain.held[Source.RSA], expires_at=time.time() - 1)
    domain.held = {**domain.held, Source.RSA: ended}
    if is_restarted:
        domains._store.put(domain_key(HOST), msgspec.json.encode(domain))
        await domains.apply(dataclasses.replace(a_plan(), certs=CertsSection(acme_email="ops@example.com")))
    else:
        domains._keeper.look(HOST)
    reader = PackReader(tmp_path / "run" / "certificates", domains._secret)
    reader.refresh()
    async with asyncio.timeout(5):
        while reader.exact(f"rsa/{HOST}") is not None:
            await asyncio.sleep(0.02)
            reader.refresh()
    assert reader.exact(HOST) is not None
    reader.close()


async def test_what_was_stored_and_not_shown_when_certs_was_changed_is_shown_after(
    domains: Domains, tmp_path: Path
) -> None:
    domain = kept(domains, HOST)
    assert domains._store is not None
    domains._store.put(domain_key(HOST), msgspec.json.encode(domain))
    await domains.apply(dataclasses.replace(a_plan(), certs=CertsSection(acme_email="ops@example.com")))
    await until_shown(domains, tmp_path, HOST)


@pytest.mark.parametrize("of_all", [lambda one: one.list(None), Domains.forecast, Domains.status])
async def test_what_goes_over_all_names_lets_others_have_their_turns(
    domains: Domains, of_all: Callable[[Domains], Awaitable[object]]
) -> None:
    assert domains._keeper is not None
    names = [f"{number}.example.com" for number in range(2000)]
    domain = kept(domains, HOST)
    domains._keeper._domains |= {name: msgspec.structs.replace(domain, name=name) for name in names}
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    found = await of_all(domains)
    task.cancel()
    assert turns >= 2000 / 100
    told = {one["hostname"] for one in found} if isinstance(found, list) else set()
    assert told >= set(names) or found["names"] == 2000

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from certs import (
    Certificate,
    CertificateError,
    CertificateManager,
    InternalCA,
    IssuanceFailedError,
    NameRefusedError,
    Seal,
    SealedFolder,
)

SECRET = bytes(range(32))
DAY = 86_400.0


class SlowIssuer:
    """The internal authority behind a gate; counts what it made, fails on demand."""

    def __init__(self, ca: InternalCA) -> None:
        self.ca = ca
        self.issued: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def issue(self, name: str) -> Certificate:
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        self.issued.append(name)
        return self.ca.issue(name)


class Setup:
    def __init__(self, folder: Path) -> None:
        self.now = 1_800_000_000.0
        self.storage = SealedFolder(folder / "certs", Seal(SECRET))
        self.issuer = SlowIssuer(InternalCA(self.storage, folder / "certs" / "ca.pem", lambda: self.now))
        self.told: list[str] = []
        self.manager = self.new_manager()

    def new_manager(self) -> CertificateManager:
        return CertificateManager(
            self.issuer, self.storage, lambda: self.now, lambda certificate: self.told.append(certificate.name)
        )


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.issuer.open.set()
    await made.manager.close()


async def test_a_crowd_asks_for_one_name_and_one_is_issued(setup: Setup) -> None:
    setup.issuer.open.clear()
    waiting = [asyncio.create_task(setup.manager.get("a.example")) for _ in range(100)]
    await asyncio.sleep(0)
    setup.issuer.open.set()
    assert len({certificate.chain_pem for certificate in await asyncio.gather(*waiting)}) == 1
    assert setup.issuer.issued == setup.told == ["a.example"]


async def test_one_waiters_cancellation_leaves_the_others(setup: Setup) -> None:
    setup.issuer.open.clear()
    first = asyncio.create_task(setup.manager.get("a.example"))
    second = asyncio.create_task(setup.manager.get("a.example"))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    setup.issuer.open.set()
    assert (await second).name == "a.example"
    assert setup.issuer.issued == ["a.example"]


async def test_a_new_manager_finds_it_in_the_storage(setup: Setup) -> None:
    first = await setup.manager.get("a.example")
    other = setup.new_manager()
    assert await other.get("a.example") == first
    await other.close()
    assert setup.issuer.issued == ["a.example"]


async def test_it_is_renewed_when_due_and_not_before(setup: Setup) -> None:
    first = await setup.manager.get("a.example")
    setup.now = first.renew_at - 1
    assert await setup.manager.renew(["a.example"]) == {}
    assert setup.issuer.issued == ["a.example"]
    setup.now = first.renew_at
    assert await setup.manager.renew(["a.example", "b.example"]) == {}
    assert setup.issuer.issued == setup.told == ["a.example", "a.example", "b.example"]
    assert (await setup.manager.get("a.example")).renew_at > setup.now


async def test_a_failed_renewal_leaves_the_present_one_until_it_expires(setup: Setup) -> None:
    first = await setup.manager.get("a.example")
    setup.now = first.renew_at
    setup.issuer.error = OSError("no answer")
    assert await setup.manager.get("a.example") == first
    setup.issuer.error = None
    setup.now += 60
    assert await setup.manager.get("a.example") == first  # not tried again at once
    setup.now += 3600
    assert await setup.manager.get("a.example") != first


async def test_an_expired_one_is_never_given(setup: Setup) -> None:
    first = await setup.manager.get("a.example")
    setup.now = first.expires_at + 1
    setup.issuer.error = OSError("no answer")
    with pytest.raises(IssuanceFailedError, match="no answer"):
        await setup.manager.get("a.example")


async def test_the_issuers_refusal_reaches_every_waiter_and_is_not_remembered(setup: Setup) -> None:
    results = await asyncio.gather(*(setup.manager.get("a b") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, NameRefusedError | CertificateError) for result in results)
    setup.issuer.error = OSError("no answer")
    with pytest.raises(IssuanceFailedError):
        await setup.manager.get("a.example")
    setup.issuer.error = None
    assert (await setup.manager.get("a.example")).name == "a.example"


async def test_an_unreadable_stored_record_is_issued_anew(setup: Setup, tmp_path: Path) -> None:
    first = await setup.manager.get("a.example")
    (tmp_path / "certs" / "leaf" / "a.example.sealed").write_bytes(b"garbage of more than a nonce")
    other = setup.new_manager()
    assert await other.get("a.example") != first
    await other.close()

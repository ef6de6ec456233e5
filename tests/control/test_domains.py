"""Names and their certificates over a reload of [certs]."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from pathlib import Path

import msgspec

from certs import Certificate, PackReader
from certs.domain import Domain, Origin, Source, certificate_key, domain_key, held_of
from proxy.clock import SystemClock
from proxy.config import CertsSection
from proxy.control.domains import Domains
from tests.certs.test_custom import CA, KEY, LEAF
from tests.control.rig import a_plan

HOST = "shop.example.com"


async def test_what_was_stored_and_not_shown_when_certs_was_changed_is_shown_after(tmp_path: Path) -> None:
    plan = a_plan()
    (tmp_path / "run").mkdir()
    domains = Domains(str(tmp_path), str(tmp_path / "run"), SystemClock(), random.Random(1))
    await domains.load(plan)
    await domains.open()
    try:
        certificate = Certificate(HOST, LEAF + CA, KEY)
        now = time.time()
        held = {Source.ACME: held_of(certificate, "ecdsa", now)}
        domain = Domain(HOST, "web", Origin.ADDED, now, now, is_acme_wanted=False, held=held)
        assert domains._store is not None
        domains._store.put(certificate_key(HOST, Source.ACME), certificate.to_pem())
        domains._store.put(domain_key(HOST), msgspec.json.encode(domain))
        await domains.apply(dataclasses.replace(plan, certs=CertsSection(acme_email="ops@example.com")))
        reader = PackReader(tmp_path / "run" / "certificates", domains._secret)
        async with asyncio.timeout(5):
            while HOST not in reader.refresh():
                await asyncio.sleep(0.02)
        reader.close()
    finally:
        await domains.close()

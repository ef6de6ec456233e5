"""kill -9 at every step of an order, then a restart: no second order while the first lives, no key lost, all completed.

Against Pebble, whose list of an account's orders says how many there were. `python -m pytest -s` shows the table.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from certs.certificate import Certificate
from certs.issuer import AcmeClient
from certs.order import OrderRecord, order_key
from certs.store import SealedStore
from tests.certs.order_child import SECRET
from tests.support.pebble import Pebble, pebble

pytestmark = [pytest.mark.slow]
POINTS = (
    "begun: stored", "ordering: stored", "ordering: answered", "ordered: stored", "proving: stored", "proving: shown",
    "proving: answered", "finalizing: stored", "finalizing: answered", "issued: stored", "issued: downloaded", "kept",
    "stored",
)  # fmt: skip
TABLE: list[tuple[str, str, int, str]] = []


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pebble]:
    with pebble(tmp_path_factory.mktemp("pebble"), 1, 1) as made:
        yield made
    print("\n| killed at | order's record then | orders at the CA in all | after the restart |\n|---|---|--:|---|")
    for row in TABLE:
        print("| {} | {} | {} | {} |".format(*row))


def child(folder: Path, ca: Pebble, name: str, fatal: str) -> int:
    command = [sys.executable, "-m", "tests.certs.order_child", str(folder / "store.db"), ca.directory_url,
               str(ca.ca_file), ca.dns_management, name, fatal]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


def record_of(folder: Path, name: str) -> OrderRecord | None:
    import msgspec

    store = SealedStore(folder / "store.db", SECRET, time.time)
    entry = store.get(order_key(name, "ecdsa"))  # type: ignore[arg-type]  # a StrEnum's value
    store.close()
    return None if entry is None else msgspec.json.decode(entry.value, type=OrderRecord)


async def orders_at(folder: Path, ca: Pebble, name: str) -> list[str]:
    """States of all orders that the account has at the CA for this name."""
    store = SealedStore(folder / "store.db", SECRET, time.time)
    client = AcmeClient(ca.directory_url, store, time.time, ca_file=str(ca.ca_file))
    try:
        found = [await client.order(url) for url in await client.open_orders()]
        return [one.status for one in found if one.names == (name,)]
    finally:
        await client.close()
        store.close()


def certificate_of(folder: Path, name: str) -> Certificate | None:
    store = SealedStore(folder / "store.db", SECRET, time.time)
    entry = store.get(f"certificate/{name}/acme")
    store.close()
    return None if entry is None else Certificate.from_pem(name, entry.value)


@pytest.mark.parametrize("point", POINTS)
def test_an_order_survives_a_kill(tmp_path: Path, ca: Pebble, point: str) -> None:
    name = point.replace(": ", "-").replace(" ", "-") + ".example.com"
    assert child(tmp_path, ca, name, point) == -9
    record = record_of(tmp_path, name)
    before = asyncio.run(orders_at(tmp_path, ca, name))
    assert len(before) <= 1
    if record is not None and record.url == "":
        assert record.step in ("begun", "ordering")
    key_before = record.key_pem if record is not None else None
    kept = certificate_of(tmp_path, name)
    assert record is not None or kept is not None
    if not (point == "stored" and record is None):
        assert child(tmp_path, ca, name, "") == 0
    after = asyncio.run(orders_at(tmp_path, ca, name))
    certificate = certificate_of(tmp_path, name)
    assert certificate is not None
    assert after == ["valid"], "the one order, and no second one"
    assert key_before is not None and certificate.key_pem.decode() == key_before, "the key that was stored first"
    key = serialization.load_pem_private_key(certificate.key_pem, password=None)
    assert key.public_key() == certificate.leaf.public_key()
    assert record_of(tmp_path, name) is None
    TABLE.append((point, record.step if record is not None else "none", len(after), "completed, same key"))


@pytest.mark.parametrize("point", ["ordering: answered", "proving: shown", "finalizing: answered"])
def test_an_order_survives_two_kills_in_a_row(tmp_path: Path, ca: Pebble, point: str) -> None:
    name = "twice-" + point.replace(": ", "-") + ".example.com"
    assert child(tmp_path, ca, name, point) == -9
    assert child(tmp_path, ca, name, "issued: stored") == -9
    assert child(tmp_path, ca, name, "") == 0
    assert asyncio.run(orders_at(tmp_path, ca, name)) == ["valid"]

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from certs.errors import CertificateError, ConflictError, SealBrokenError
from certs.store import SealedStore

SECRET = bytes(range(32))


def nothing_broken(key: str, error: CertificateError) -> None:
    raise AssertionError(f"{key}: {error}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SealedStore]:
    made = SealedStore(tmp_path / "certs" / "store.db", SECRET, time.time)
    yield made
    made.close()


def test_what_was_put_is_there_for_the_next_one_and_sealed_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "certs" / "store.db"
    first = SealedStore(path, SECRET, time.time)
    first.put("domain/a.example", b"a very plain value")
    first.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    everything = b"".join(one.read_bytes() for one in path.parent.iterdir())
    assert b"very plain" not in everything
    second = SealedStore(path, SECRET, time.time)
    entry = second.get("domain/a.example")
    assert entry is not None and entry.value == b"a very plain value" and not second.faults
    assert second.get("domain/b.example") is None
    second.close()


def test_a_write_that_was_decided_upon_an_older_revision_fails(store: SealedStore) -> None:
    first = store.put("order/a", b"1", 0)
    with pytest.raises(ConflictError, match="order/a"):
        store.put("order/a", b"2", 0)
    second = store.put("order/a", b"2", first)
    assert second > first
    with pytest.raises(ConflictError):
        store.put("order/a", b"3", first)
    with pytest.raises(ConflictError):
        store.delete("order/a", first)
    store.delete("order/a", second)
    assert store.get("order/a") is None
    assert store.put("order/a", b"4", 0) > second  # a revision is never given twice


def test_items_are_those_below_a_prefix_in_order(store: SealedStore) -> None:
    for key in ("domain/b", "domain/a", "domains/x", "domain", "certificate/a/acme"):
        store.put(key, key.encode())
    assert [(key, entry.value) for key, entry in store.items("domain", nothing_broken)] == [
        ("domain/a", b"domain/a"),
        ("domain/b", b"domain/b"),
    ]


def test_a_value_moved_to_another_key_does_not_open(store: SealedStore) -> None:
    store.put("domain/a", b"of a")
    store.put("domain/b", b"of b")
    with sqlite3.connect(store.path) as other:
        other.execute(
            "UPDATE records SET value = (SELECT value FROM records WHERE key = 'domain/a') WHERE key = 'domain/b'"
        )
    other.close()
    with pytest.raises(SealBrokenError, match="domain/b"):
        store.get("domain/b")
    broken: list[str] = []
    assert [key for key, _ in store.items("domain", lambda key, error: broken.append(key))] == ["domain/a"]
    assert broken == ["domain/b"]


@pytest.mark.parametrize("kind", ["foreign", "damaged", "other secret", "newer"])
def test_a_file_that_cannot_be_used_is_set_aside_and_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "store.db"
    made = SealedStore(path, bytes(32) if kind == "other secret" else SECRET, time.time)
    for number in range(200):
        made.put(f"domain/{number}", os.urandom(400))
    made.close()
    if kind == "foreign":
        path.write_bytes(b"this is no database, but somebody's letter" * 100)
    elif kind == "damaged":
        content = bytearray(path.read_bytes())
        content[4096:12_288] = os.urandom(8192)
        path.write_bytes(content)
    elif kind == "newer":
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version=99")
        other.close()
    before = path.read_bytes()
    store = SealedStore(path, SECRET, lambda: 1_800_000_000.0)
    (fault,) = store.faults
    aside = tmp_path / "store.db.unusable-1800000000"
    assert str(aside) in fault and aside.read_bytes()[4096:] == before[4096:]
    if kind in ("foreign", "other secret"):
        assert store.get("domain/1") is None
    store.put("domain/1", b"anew")
    store.close()


def test_what_can_be_read_of_a_damaged_file_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    made = SealedStore(path, SECRET, time.time)
    for number in range(400):
        made.put(f"domain/{number:03d}", b"%d" % number + bytes(400))
    last = made.put("domain/999", b"last")
    made.close()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)
    store = SealedStore(path, SECRET, time.time)
    (fault,) = store.faults
    assert "of its records could be read" in fault
    found = [key for key, _ in store.items("domain", nothing_broken)]
    assert 200 < len(found) < 401 and {"domain/000", "domain/999"} <= set(found)
    assert store.put("domain/new", b"1") > last
    store.close()


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "certs").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        SealedStore(tmp_path / "certs" / "store.db", SECRET, time.time)


def _count(path: str, times: int) -> None:
    store = SealedStore(Path(path), SECRET, time.time)
    done = 0
    while done < times:
        entry = store.get("counter")
        try:
            store.put("counter", str(int(entry.value) + 1 if entry else 1).encode(), entry.revision if entry else 0)
        except ConflictError:
            continue
        done += 1
    store.close()


@pytest.mark.slow  # SQLite waits five seconds for the lock
def test_a_file_that_another_holds_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certs.store._BUSY_S", 0.3)
    path = tmp_path / "certs" / "store.db"
    first = SealedStore(path, SECRET, time.time)
    first.put("domain/a.example", b"kept")
    first.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match="locked"):
            SealedStore(path, SECRET, time.time)
        other.execute("ROLLBACK")
    again = SealedStore(path, SECRET, time.time)
    found = again.get("domain/a.example")
    assert found is not None and found.value == b"kept" and again.faults == []
    again.close()
    assert sorted(one.name for one in path.parent.iterdir()) == ["store.db"]


def test_of_two_processes_none_loses_the_others_write(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    SealedStore(path, SECRET, time.time).close()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count, args=(str(path), 50)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    store = SealedStore(path, SECRET, time.time)
    entry = store.get("counter")
    assert entry is not None and entry.value == b"100"
    store.close()


def test_a_full_disk_is_an_os_error_and_what_was_there_stays(store: SealedStore) -> None:
    store.put("domain/a", b"1")
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(OSError, match="full"):
        store.put("domain/large", os.urandom(400_000))
    store._db.execute("PRAGMA max_page_count=100000")
    entry = store.get("domain/a")
    assert entry is not None and entry.value == b"1"
    store.put("domain/b", b"2")

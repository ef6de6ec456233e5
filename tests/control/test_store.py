from __future__ import annotations

import os
import resource
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.control.store import KEPT_EVENTS, Event, MachineRow, Store
from proxy.control.ulid import new_ulid


def a_row(**more: object) -> MachineRow:
    values: dict[str, object] = {"id": "0a", "app": "web", "group": "app", "index": 0, "slot": 3}
    return MachineRow(**(values | more))  # type: ignore[arg-type]  # the keys are those of MachineRow


def an_event(number: int) -> Event:
    return Event(new_ulid(1.0), "start", "starting", "proxy", number, {"number": number})


def test_a_row_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = str(tmp_path / "a.db")
    row = a_row(ports={8080: 20001}, pid=77, start_ticks=5, exit_code=3, hold_reason="broken", state="failed")
    store = Store(path)
    store.save(row)
    store.close()
    assert Store(path).machines() == [row]


def test_what_was_saved_survives_a_kill_and_what_was_queued_a_flush(tmp_path: Path) -> None:
    path = str(tmp_path / "a.db")
    store = Store(path)
    store.save(a_row(version=1))
    store.save_later(a_row(version=2))
    other = Store(path)  # as the next control sees it while nothing was closed
    assert other.machines()[0].version == 1
    store.flush()
    assert other.machines()[0].version == 2


def test_a_write_at_once_keeps_the_order_with_what_is_queued(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.db"))
    store.save_later(a_row(version=1))
    store.save(a_row(version=2))
    store.flush()
    assert store.machines()[0].version == 2


def test_the_newest_events_of_a_machine_are_kept(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.db"))
    for number in range(KEPT_EVENTS + 5):
        store.add_event("0a", an_event(number))
    store.add_event("0b", an_event(99))
    told = store.events("0a")
    assert [one.timestamp for one in told] == list(range(KEPT_EVENTS + 4, 4, -1))
    assert told[0].request == {"number": KEPT_EVENTS + 4}
    assert [one.timestamp for one in store.events("0a", 2)] == [24, 23]


def test_epochs_grow_even_when_the_database_is_lost(tmp_path: Path) -> None:
    path = str(tmp_path / "a.db")
    store = Store(path)
    first, second = store.next_epoch(1000.0), store.next_epoch(1000.0)
    assert (first, second) == (1000, 1001)
    store.close()
    os.unlink(path)
    assert Store(path).next_epoch(1002.0) > second


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_an_unreadable_database_is_set_aside_and_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(content)
    store = Store(str(path))
    assert store.machines() == []
    assert "set aside" in store.faults[0]
    (aside,) = tmp_path.glob("a.db.unreadable-*")
    assert aside.read_bytes() == content
    store.save(a_row())
    assert len(store.machines()) == 1


def test_a_database_of_a_newer_version_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    assert "newer version" in Store(str(path)).faults[0]


def test_a_record_that_cannot_be_read_is_told_and_left_out(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.db"))
    store.save(a_row())
    store._db.execute("INSERT INTO machines VALUES ('0b', 'web', '{\"id\": 5}')")
    assert [row.id for row in store.machines()] == ["0a"]
    assert "0b" in store.faults[0]


def test_a_write_that_fails_is_told_and_raises_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.db"))
    store._db.execute("PRAGMA query_only=1")
    store.save(a_row())
    store.add_event("0a", an_event(1))
    store.flush()
    assert len(store.faults) == 1 and "cannot be written" in store.faults[0]


def test_a_checkpoint_beside_a_writer_loses_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.db"))
    for version in range(50):
        store.save(a_row(version=version))
    store.checkpoint()
    store.save(a_row(version=50))
    store.close()
    assert Store(store.path).machines()[0].version == 50


def test_a_checkpoint_that_fails_is_told_and_raises_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.db"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        store.checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    store.checkpoint()
    assert len(store.faults) == 1 and "cannot be written" in store.faults[0]


def test_the_database_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    Store(str(path))
    assert path.stat().st_mode & 0o077 == 0


def test_app_slots_are_kept(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a.db"))
    store.save_app_slot("web", 4)
    store.save_app_slot("api", 5)
    store.delete_app("web")
    assert store.app_slots() == {"api": 5}


@given(st.floats(0, 2**40 / 1000), st.floats(0, 2**40 / 1000))
def test_ulids_sort_by_time(first: float, second: float) -> None:
    one, other = new_ulid(first), new_ulid(second)
    assert len(one) == 26
    if int(first * 1000) < int(second * 1000):
        assert one < other

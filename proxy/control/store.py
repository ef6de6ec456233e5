"""SQLite in data_dir: machines, their slots, their journal and their events. What control knows after it was killed.

Synchronous is NORMAL and checkpoints run elsewhere, so that a write never waits for the disk: one on the way to a start
costs some tens of microseconds. What may be lost with the last tenth of a second (events of a normal course) is queued
and written in one transaction; what may not (a start about to happen, a pid, an exit) is written at once.

A write that fails does not stop a wake: it is told in `faults`, and the machine can still be found by FLY_MACHINE_ID.
A database that cannot be read is set aside under another name and a new one begun.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass, field
from typing import Any

import msgspec

from proxy.control.ulid import new_ulid

KEPT_EVENTS = 20  # per machine, as Fly keeps them
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS apps (name TEXT PRIMARY KEY, slot INTEGER NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS machines (id TEXT PRIMARY KEY, app TEXT NOT NULL, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id TEXT PRIMARY KEY, machine TEXT NOT NULL, type TEXT NOT NULL, status TEXT NOT NULL, source TEXT NOT NULL,
    timestamp INTEGER NOT NULL, request TEXT);
CREATE INDEX IF NOT EXISTS events_by_machine ON events (machine);
"""
_SCHEMA_VERSION = 1
_SAVE = "INSERT OR REPLACE INTO machines VALUES (?, ?, ?)"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to change a machine alone, for a while."""

    nonce: str
    expires_at: int  # unix seconds
    owner: str
    description: str
    version: str  # the machine's instance_id when it was taken


@dataclass(slots=True)
class MachineRow:
    """All that is kept of a machine. `ports` are those of its endpoints by internal port."""

    id: str
    app: str
    group: str
    index: int
    slot: int
    state: str = "created"
    version: int = 0
    instance_id: str = ""
    digest: str = ""  # of the spec that instance_id stands for
    ports: dict[int, int] = field(default_factory=dict)
    pid: int | None = None
    start_ticks: int = 0
    netns_pid: int = 0
    stopped_by: str = ""  # user | flyd | proxy: who asked for the last stop
    failures: int = 0  # starts that came to nothing, in a row
    hold_until: float = 0.0
    hold_reason: str | None = None
    restart_count: int = 0
    exit_code: int | None = None
    exit_signal: int | None = None
    exit_at: float = 0.0
    oom_killed: bool = False
    created_at: float = 0.0
    updated_at: float = 0.0
    started_at: float = 0.0  # its last start or resume
    failing_ports: tuple[int, ...] = ()  # internal ports of services with a check that does not pass
    cordoned: bool = False  # by an operator: it gets no new requests
    metadata: dict[str, str] = field(default_factory=dict)  # as set by users; `fly_process_group` is not among it
    lease: Lease | None = None  # the last one taken; it may have expired


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a machine, as Fly's API tells it."""

    id: str
    type: str  # launch | start | stop | suspend | exit | restart | update
    status: str
    source: str  # user | flyd | proxy
    timestamp: int  # unix milliseconds
    request: dict[str, Any] | None = None  # Any: free JSON, by type of event


class Store:
    """The database. Used from the loop's thread alone, but for `checkpoint`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.faults: list[str] = []
        self._pending: list[tuple[str, tuple[object, ...] | MachineRow]] = []
        self._encode = msgspec.json.Encoder().encode
        self._decode_row = msgspec.json.Decoder(MachineRow).decode
        self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            return _connect(self.path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and not os.path.exists(self.path):
                raise  # the folder can't be written: nothing to set aside
            aside = f"{self.path}.unreadable-{new_ulid(os.stat(self.path).st_mtime)[:10]}"
            os.replace(self.path, aside)
            for tail in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.path + tail, aside + tail)
            self.faults.append(
                f"{self.path} could not be read ({error}); it was set aside as {aside} and a new one begun. "
                "Running machines are found again by their id; events and exit records of before are in that file."
            )
            return _connect(self.path)

    # --- what is asked once, at the start

    def next_epoch(self, unix_s: float) -> int:
        """A number higher than that of any control before, also of one whose database was lost."""
        found = self._db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
        epoch = max((found[0] if found else 0) + 1, int(unix_s))
        self._write("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (epoch,))
        return epoch

    def machines(self) -> list[MachineRow]:
        rows = []
        for name, text in self._db.execute("SELECT id, record FROM machines ORDER BY id"):
            try:
                rows.append(self._decode_row(text))
            except msgspec.MsgspecError as error:
                self.faults.append(f"the record of machine {name} could not be read ({error}); it is made anew")
        return rows

    def app_slots(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT name, slot FROM apps"))

    # --- written at once

    def save(self, row: MachineRow) -> None:
        self._write(_SAVE, self._values(row))

    def _values(self, row: MachineRow) -> tuple[object, ...]:
        return (row.id, row.app, self._encode(row).decode())

    def delete_machine(self, machine: str) -> None:
        self._write("DELETE FROM machines WHERE id = ?", (machine,))
        self._write("DELETE FROM events WHERE machine = ?", (machine,))

    def save_app_slot(self, name: str, slot: int) -> None:
        self._write("INSERT OR REPLACE INTO apps VALUES (?, ?)", (name, slot))

    def delete_app(self, name: str) -> None:
        self._write("DELETE FROM apps WHERE name = ?", (name,))

    # --- queued

    def save_later(self, row: MachineRow) -> None:
        """Written as it is by then: what it was in between matters to nobody."""
        self._pending.append((_SAVE, row))

    def add_event(self, machine: str, event: Event) -> None:
        request = None if event.request is None else self._encode(event.request).decode()
        values = (event.id, machine, event.type, event.status, event.source, event.timestamp, request)
        self._pending.append(("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", values))
        self._pending.append(
            (
                "DELETE FROM events WHERE machine = ? AND rowid NOT IN "
                "(SELECT rowid FROM events WHERE machine = ? ORDER BY rowid DESC LIMIT ?)",
                (machine, machine, KEPT_EVENTS),
            )
        )

    def flush(self) -> None:
        """Write what is queued, in one transaction."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        try:
            self._db.execute("BEGIN")
            for statement, values in pending:
                self._db.execute(statement, self._values(values) if isinstance(values, MachineRow) else values)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._tell(error)
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def events(self, machine: str, limit: int = KEPT_EVENTS) -> list[Event]:
        """Newest first."""
        self.flush()
        found = self._db.execute(
            "SELECT id, type, status, source, timestamp, request FROM events WHERE machine = ? "
            "ORDER BY rowid DESC LIMIT ?",
            (machine, limit),
        )
        return [
            Event(one, kind, status, source, at, None if request is None else msgspec.json.decode(request))
            for one, kind, status, source, at, request in found.fetchall()
        ]

    def checkpoint(self) -> None:
        """Move the log into the database. May wait for the disk: call it in a thread. What fails is tried again."""
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=1.0)) as other:
                other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:  # a full disk, or no descriptor left
            self._tell(error)

    def close(self) -> None:
        self.flush()
        self._db.close()

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        if self._pending:
            self._pending.append((statement, values))  # what was queued before comes first, in the same transaction
            self.flush()
            return
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            self._tell(error)

    def _tell(self, error: sqlite3.Error) -> None:
        text = f"{self.path} cannot be written ({error}); machines go on, but a restart may know less of them"
        if text not in self.faults:
            self.faults.append(text)


def _connect(path: str) -> sqlite3.Connection:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.close(descriptor)
    db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
    try:
        db.execute("PRAGMA journal_mode=WAL").fetchone()
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("PRAGMA wal_autocheckpoint=0")  # a checkpoint waits for the disk: see checkpoint()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"it was written by a newer version (schema {version}, ours {_SCHEMA_VERSION})")
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        db.execute("SELECT count(*) FROM machines").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db

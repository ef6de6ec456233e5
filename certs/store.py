"""What must not be lost: domains, orders, certificates, the account. Sealed values by key, each with a revision.

The contract (`Store`) is one that a replicated store can keep as well: a write names the revision it was decided upon,
and fails with ConflictError where another came before it. `SealedStore` keeps it in one SQLite file, mode 0600, whose
values are sealed under the node's secret, each bound to its key. A write is on disk when it returns.

A file that is not a database of ours, is damaged, or was sealed with another secret is set aside under another name and
a new one begun: `faults` says so, and what was in it is issued anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from certs.errors import CertificateError, ConflictError, SealBrokenError
from certs.seal import Seal

_BUSY_S = 5.0  # another process writes; a write takes milliseconds
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, revision INTEGER NOT NULL, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS revisions (last INTEGER NOT NULL);
"""
_PROBE = "store/seal"  # a value known to all, which tells whether the secret is the one that sealed the file
_PROBE_VALUE = b"wakefront"
MAX_KEY_CHARS = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """A value as it was read, and the revision that a later write may name."""

    value: bytes
    revision: int


class Store(Protocol):
    """Values by key, keys being `/`-separated words. All methods block; they may be called in any thread."""

    def get(self, key: str) -> Entry | None:
        """The value. Raises SealBrokenError if it cannot be opened, OSError if it cannot be read."""

    def put(self, key: str, value: bytes, revision: int | None = None) -> int:
        """Set the value, durably; its new revision.

        `revision` is the one read before, 0 for a key that must not exist, None where it does not matter. Raises
        ConflictError if the key is at another one, OSError if it cannot be written.
        """

    def delete(self, key: str, revision: int | None = None) -> None:
        """Remove the value, if there is one. Raises as `put` does."""

    def items(self, prefix: str, on_broken: Callable[[str, CertificateError], None]) -> Iterator[tuple[str, Entry]]:
        """All that is below `<prefix>/`, in order of keys; `on_broken` is told of what cannot be opened."""


class SealedStore:
    """A Store in one SQLite file. `close` it."""

    def __init__(self, path: Path, secret: bytes, now: Callable[[], float]) -> None:
        """Open or make the file. `now` gives unix seconds, for the name of a file that is set aside.

        Raises OSError if the folder cannot be written, the disk is full or another process does not let go: what
        is there is then left as it is.
        """
        self.path = Path(path)
        self.faults: list[str] = []
        self._seal = Seal(secret)
        self._now = now
        self._lock = threading.Lock()
        self._db = self._open()

    # --- Store

    def get(self, key: str) -> Entry | None:
        with self._lock, _as_os_error(self.path):
            row = self._db.execute("SELECT value, revision FROM records WHERE key = ?", (key,)).fetchone()
        return None if row is None else Entry(self._seal.open(row[0], key), row[1])

    def put(self, key: str, value: bytes, revision: int | None = None) -> int:
        if not 0 < len(key) <= MAX_KEY_CHARS:
            raise CertificateError(f"{key[:80]!r} is not a key of the store")
        sealed = self._seal.close(value, key)
        with self._lock, _as_os_error(self.path), self._transaction():
            self._expect(key, revision)
            new: int = self._db.execute("UPDATE revisions SET last = last + 1 RETURNING last").fetchone()[0]
            self._db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (key, new, sealed))
        return new

    def delete(self, key: str, revision: int | None = None) -> None:
        with self._lock, _as_os_error(self.path), self._transaction():
            self._expect(key, revision)
            self._db.execute("DELETE FROM records WHERE key = ?", (key,))

    def items(self, prefix: str, on_broken: Callable[[str, CertificateError], None]) -> Iterator[tuple[str, Entry]]:
        with self._lock, _as_os_error(self.path):
            rows = self._db.execute(
                "SELECT key, value, revision FROM records WHERE key >= ? AND key < ? ORDER BY key",
                (f"{prefix}/", f"{prefix}0"),  # "0" follows "/"
            ).fetchall()
        for key, sealed, revision in rows:
            try:
                value = self._seal.open(sealed, key)
            except SealBrokenError as error:
                on_broken(key, error)
                continue
            yield key, Entry(value, revision)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # ---

    def _expect(self, key: str, revision: int | None) -> None:
        if revision is None:
            return
        row = self._db.execute("SELECT revision FROM records WHERE key = ?", (key,)).fetchone()
        found = row[0] if row is not None else 0
        if found != revision:
            raise ConflictError(f"{key} is at revision {found}, not {revision}: another has changed it")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except (sqlite3.DatabaseError, SealBrokenError) as error:
            if isinstance(error, sqlite3.DatabaseError) and _says_nothing_of_the_file(error, self.path):
                raise OSError(f"{self.path}: {error}") from error
            aside = self._set_aside()
            with _as_os_error(self.path):
                db = self._connect()
                saved = self._salvage(aside, db) if isinstance(error, sqlite3.DatabaseError) else 0
            lost = "Certificates are issued anew; domains that were added may have to be added again."
            taken = f" {saved} of its records could be read and are in the new one." if saved else ""
            self.faults.append(
                f"{self.path} cannot be used ({error}): it was set aside as {aside} and a new one begun.{taken} {lost}"
            )
            return db

    def _salvage(self, aside: Path, db: sqlite3.Connection) -> int:
        """Take over what can still be read of a damaged file, from both its ends; how many records that is."""
        saved: dict[str, tuple[str, int, bytes]] = {}
        try:
            with contextlib.closing(sqlite3.connect(f"file:{aside}?mode=ro", uri=True)) as old:
                for order in ("ASC", "DESC"):
                    with contextlib.suppress(sqlite3.DatabaseError):
                        for key, revision, sealed in old.execute(f"SELECT * FROM records ORDER BY key {order}"):
                            with contextlib.suppress(SealBrokenError, TypeError, AttributeError):
                                self._seal.open(sealed, key)
                                saved[key] = key, int(revision), sealed
        except sqlite3.DatabaseError:
            return 0
        db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", saved.values())
        last = max((revision for _, revision, _ in saved.values()), default=0)
        db.execute("UPDATE revisions SET last = max(last, ?)", (last,))
        return len(saved)

    def _set_aside(self) -> Path:
        number, aside = 0, self.path.with_name(f"{self.path.name}.unusable-{int(self._now())}")
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.unusable-{int(self._now())}-{number}")
        os.replace(self.path, aside)
        for tail in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{tail}", f"{aside}{tail}")
        return aside

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(self.path, isolation_level=None, timeout=_BUSY_S, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL").fetchone()
            db.execute("PRAGMA synchronous=FULL")  # a key that a certificate was issued for must not be lost
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"a newer version wrote it: schema {version}, ours is {_SCHEMA_VERSION}")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
            if db.execute("SELECT last FROM revisions").fetchone() is None:
                db.execute("INSERT INTO revisions VALUES (0)")
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("it is damaged")
            self._probe(db)
        except BaseException:
            db.close()
            raise
        return db

    def _probe(self, db: sqlite3.Connection) -> None:
        """Raises SealBrokenError if the file was sealed with another secret."""
        row = db.execute("SELECT value FROM records WHERE key = ?", (_PROBE,)).fetchone()
        if row is None:
            db.execute("INSERT INTO records VALUES (?, 0, ?)", (_PROBE, self._seal.close(_PROBE_VALUE, _PROBE)))
        else:
            self._seal.open(row[0], _PROBE)


# No room, no permission, no memory, another process at it: the file may be as good as ever.
_PASSING = frozenset({
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_AUTH,
})  # fmt: skip


def _says_nothing_of_the_file(error: sqlite3.DatabaseError, path: Path) -> bool:
    """Whether an error in opening is of a kind that passes, so that the file must be left where it is."""
    code = getattr(error, "sqlite_errorcode", None)  # our own errors have none
    return (code is not None and code & 0xFF in _PASSING) or not path.exists()


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:  # a full disk, most often
        raise OSError(f"{path}: {error}") from error

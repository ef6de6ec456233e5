"""Where certificates and keys are kept: the contract, and a folder of sealed files that keeps it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from certs.errors import CertificateError
from certs.seal import Seal

_key_is_valid = re.compile(r"[a-z0-9_*][a-z0-9_.*-]*(?:/[a-z0-9_*][a-z0-9_.*-]*)*").fullmatch


class Storage(Protocol):
    """Values by key, keys being `/`-separated lower-case words. All methods block and may be called in any thread.

    `save` is atomic and durable: a reader sees the old value or the new one, and after it returned, the new one.
    Values are private: an implementation keeps them sealed at rest.
    """

    def load(self, key: str) -> bytes | None:
        """The value, or None if there is none."""

    def save(self, key: str, value: bytes) -> None:
        """Set the value."""

    def delete(self, key: str) -> None:
        """Remove the value, if there is one."""

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys `<prefix>/<word>`, in no order."""

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Held by one at a time among all who share the storage; ends with its holder."""


class SealedFolder:
    """A file per key, mode 0600, in subfolders of mode 0700, written beside and renamed."""

    def __init__(self, folder: Path, seal: Seal) -> None:
        self._folder = Path(folder)
        self._seal = seal

    def load(self, key: str) -> bytes | None:
        try:
            sealed = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        return self._seal.open(sealed, key)

    def save(self, key: str, value: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, self._seal.close(value, key), 0o600)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def keys(self, prefix: str) -> Iterator[str]:
        try:
            names = os.listdir(self._folder / _checked(prefix))
        except FileNotFoundError:
            return
        for name in names:
            if name.endswith(".sealed"):
                yield f"{prefix}/{name.removesuffix('.sealed')}"

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f".{_checked(key).replace('/', '.')}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, key: str) -> Path:
        return self._folder / f"{_checked(key)}.sealed"


def _checked(key: str) -> str:
    if _key_is_valid(key) is None or len(key) > 300:
        raise CertificateError(f"{key!r} is not a storage key")
    return key


def write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Replace a file by a complete and durable new one, or leave it as it is."""
    temporary = path.with_name(f".{os.urandom(8).hex()}.new")  # short: the name itself may be as long as a name can be
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""The certificate file: one process appends sealed records, others read new ones as they come.

It lets a worker serve every known name while nothing else of the program is alive, without holding 10,000 keys in
memory: a reader keeps only where each record lies, and unseals it on first use. Nothing here is the only copy: what is
lost is issued or stored again, so appends are not forced to disk.

    file    = magic, record*
    record  = length u32, crc32 u32, body[length]                     little-endian; the checksum is the body's
    body    = name length u16, digest[16] of chain and key, name, sealed(chain length u32, chain PEM, key PEM)

The last record of a name counts; one whose chain is empty says that there is none any more. A name is a host name, or a
kind and what it is of: `rsa/<host>`, an RSA certificate beside the other; `self-signed/<host>`, shown where there is
nothing better; `http-01/<token>` (the key authorization in the chain's place) and `tls-alpn-01/<host>`, what a CA is
shown. A record that is incomplete or fails its checksum ends the file: a reader looks at it
again later (the writer may be in the middle of it), the next writer cuts it off. When most of the file is stale the
writer makes a new one beside it and renames; readers notice the other inode and start over.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from certs.errors import CertificateError, PackInUseError, SealBrokenError
from certs.seal import Seal

_MAGIC = b"wakefront pack 1\n"
_FRAME = struct.Struct("<II")
_BODY = struct.Struct("<H16s")
_CHAIN = struct.Struct("<I")
MAX_RECORD_BYTES = 1 << 20
_COMPACT_FROM_BYTES = 1 << 20  # smaller files are not worth it
_CHUNK_BYTES = 1 << 20
_GONE = bytes(16)  # in the digest's place: the name has no record any more


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the body of a name's record lies, and what it says in short."""

    offset: int
    length: int
    digest: bytes


class PackWriter:
    """The one writer. Opening repairs the tail and compacts; `close` lets another one in."""

    def __init__(self, path: Path, secret: bytes) -> None:
        """Open or make the file.

        Raises PackInUseError while another process (or another PackWriter) has it.
        """
        self._path = Path(path)
        self._seal = Seal(secret)
        self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise PackInUseError(f"{path}: another process writes this file") from error
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._places: dict[str, _Place] = {}
        self._end = 0
        self._live = 0  # bytes of records that count
        self._not_before_bytes = 0  # no new file before this one has grown so far: the last attempt failed
        self._open()

    def append(self, name: str, chain_pem: bytes, key_pem: bytes) -> bool:
        """Make this the certificate of `name` for all readers; False if it is already.

        Raises CertificateError if the record would be too large, OSError if it cannot be written (the file is then as
        before).
        """
        found = digest(chain_pem, key_pem)
        known = self._places.get(name)
        if known is not None and known.digest == found and self._opens(name, known):
            return False
        encoded = name.encode()
        sealed = self._seal.close(_CHAIN.pack(len(chain_pem)) + chain_pem + key_pem, name)
        body = _BODY.pack(len(encoded), found) + encoded + sealed
        if len(body) > MAX_RECORD_BYTES:
            raise CertificateError(f"{name}: a record of {len(body)} bytes is over the {MAX_RECORD_BYTES} allowed")
        self._write(_FRAME.pack(len(body), zlib.crc32(body)) + body)
        self._live += len(body) + _FRAME.size - self._weight(known)
        self._places[name] = _Place(self._end - len(body), len(body), found)
        self._compact_if_stale()
        return True

    def _opens(self, name: str, place: _Place) -> bool:
        """Whether readers can make something of the record: the disk may have altered it, or it has another secret."""
        body = os.pread(self._fd, place.length, place.offset)
        try:
            self._seal.open(body[_BODY.size + len(name.encode()) :], name)
        except SealBrokenError:
            return False
        return True

    def remove(self, name: str) -> bool:
        """Make all readers forget a name; False if it is not there. Raises OSError as `append` does."""
        known = self._places.get(name)
        if known is None:
            return False
        encoded = name.encode()
        body = _BODY.pack(len(encoded), _GONE) + encoded
        self._write(_FRAME.pack(len(body), zlib.crc32(body)) + body)
        self._live -= self._weight(known)
        del self._places[name]
        self._compact_if_stale()
        return True

    @staticmethod
    def _weight(place: _Place | None) -> int:
        return 0 if place is None else place.length + _FRAME.size

    def has(self, name: str, digest_hex: str) -> bool:
        """Whether the name's record is the one with this digest, as far as its head says."""
        place = self._places.get(name)
        return place is not None and place.digest.hex() == digest_hex

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._lock)

    def _write(self, content: bytes) -> None:
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(self._fd, content[written:], self._end + written)
        except OSError:
            os.ftruncate(self._fd, self._end)
            raise
        self._end += len(content)

    def _open(self) -> None:
        if os.pread(self._fd, len(_MAGIC), 0) != _MAGIC:
            os.ftruncate(self._fd, 0)
            self._write(_MAGIC)
            return
        self._end = len(_MAGIC)
        for name, place in _scan(self._fd, self._end):
            if place.digest == _GONE:
                self._places.pop(name, None)
            else:
                self._places[name] = place
            self._end = place.offset + place.length
        size = os.fstat(self._fd).st_size
        if size > self._end:
            os.ftruncate(self._fd, self._end)
        self._live = sum(self._weight(place) for place in self._places.values())
        self._compact_if_stale()

    def _compact_if_stale(self) -> None:
        """A file that cannot be made anew goes on as it is, and grows until there is room."""
        if self._end <= _COMPACT_FROM_BYTES or self._live >= self._end / 2 or self._end < self._not_before_bytes:
            return
        before = self._fd, self._places, self._end
        try:
            self._compact()
        except OSError:
            if self._fd != before[0]:
                os.close(self._fd)
            self._fd, self._places, self._end = before
            self._not_before_bytes = self._end + _COMPACT_FROM_BYTES

    def _compact(self) -> None:
        old, places = self._fd, self._places
        temporary = f"{self._path}.new"
        self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._end = 0
        self._places = {}
        self._write(_MAGIC)
        for name, place in places.items():
            body = os.pread(old, place.length, place.offset)
            self._write(_FRAME.pack(len(body), zlib.crc32(body)) + body)
            self._places[name] = _Place(self._end - len(body), len(body), place.digest)
        os.fsync(self._fd)  # else the new name could survive a power cut that its content does not
        os.rename(temporary, self._path)
        os.close(old)


class PackReader:
    """A reader; its index is as new as the last `refresh`. The file need not exist yet."""

    def __init__(self, path: Path, secret: bytes) -> None:
        self._path = Path(path)
        self._seal = Seal(secret)
        self._fd = -1
        self._inode = (0, 0)
        self._end = 0
        self._places: dict[str, _Place] = {}
        self.refresh()

    def refresh(self) -> set[str]:
        """Take in what was written since; the names whose certificate changed."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return set()
        before: dict[str, _Place] = {}
        if (status.st_dev, status.st_ino) != self._inode or status.st_size < self._end:
            before = self._reopen()
        elif status.st_size == self._end:
            return set()
        if self._end == 0:
            if os.pread(self._fd, len(_MAGIC), 0) != _MAGIC:
                return set()
            self._end = len(_MAGIC)
        changed = set()
        for name, place in _scan(self._fd, self._end):
            known = self._places.get(name) or before.get(name)
            self._end = place.offset + place.length
            if place.digest == _GONE:
                if self._places.pop(name, None) is not None:
                    changed.add(name)
                continue
            if known is None or known.digest != place.digest:
                changed.add(name)
            self._places[name] = place
        return changed | (before.keys() - self._places.keys())

    def match(self, name: str) -> str | None:
        """The record that serves a host name: its own, else the wildcard's one label up, else a self-signed one."""
        if "/" in name:
            return None  # a client's text: what it names is no host
        if name in self._places:
            return name
        wildcard = "*." + name.partition(".")[2]
        if wildcard in self._places:
            return wildcard
        own = f"self-signed/{name}"
        return own if own in self._places else None

    def get(self, name: str) -> tuple[bytes, bytes] | None:
        """Chain and key of the record that serves a host name, as PEM. Raises CertificateError as `exact` does."""
        match = self.match(name)
        return None if match is None else self.exact(match)

    def exact(self, match: str) -> tuple[bytes, bytes] | None:
        """Chain and key of the record of this very name.

        Raises CertificateError if the record does not open: written under another secret, or the disk altered it.
        """
        place = self._places.get(match)
        if place is None:
            return None
        body = os.pread(self._fd, place.length, place.offset)
        try:
            name_length, _ = _BODY.unpack_from(body)
            plain = self._seal.open(body[_BODY.size + name_length :], match)
            (chain_length,) = _CHAIN.unpack_from(plain)
        except struct.error as error:
            raise CertificateError(f"{match}: the record ends in the middle of a field") from error
        return plain[_CHAIN.size : _CHAIN.size + chain_length], plain[_CHAIN.size + chain_length :]

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._inode = (0, 0)
            self._end = 0

    def _reopen(self) -> dict[str, _Place]:
        """Open the file that has the name now; the index that is no longer true, for comparison."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self.close()
        status = os.fstat(descriptor)
        self._fd, self._inode = descriptor, (status.st_dev, status.st_ino)
        before, self._places = self._places, {}
        return before


def _scan(fd: int, offset: int) -> Iterator[tuple[str, _Place]]:
    """The whole, undamaged records from `offset` on."""
    buffer = b""
    at = 0
    while True:
        chunk = os.pread(fd, _CHUNK_BYTES, offset + len(buffer))
        buffer += chunk
        while len(buffer) - at >= _FRAME.size:
            length, checksum = _FRAME.unpack_from(buffer, at)
            if not _BODY.size < length <= MAX_RECORD_BYTES:
                return
            begin = at + _FRAME.size
            if len(buffer) - begin < length:
                break
            body = buffer[begin : begin + length]
            if zlib.crc32(body) != checksum:
                return
            name_length, found = _BODY.unpack_from(body)
            name = body[_BODY.size : _BODY.size + name_length].decode("utf-8", "replace")
            yield name, _Place(offset + begin, length, found)
            at = begin + length
        if not chunk:
            return
        buffer = buffer[at:]
        offset += at
        at = 0


def digest(chain_pem: bytes, key_pem: bytes) -> bytes:
    """Tells one record of a name from the next."""
    return hashlib.sha256(chain_pem + key_pem).digest()[:16]

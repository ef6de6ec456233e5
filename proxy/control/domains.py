"""Which names this node has certificates for, and that workers can show them.

Every hostname of every app gets its leaf in the background at load, others are refused; a worker that meets a name
first asks, and is told once the record is in the certificate file. Issuing and writing happen in threads; how a
certificate comes to be is certs/'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from certs import (
    Certificate,
    CertificateError,
    CertificateManager,
    InternalCA,
    PackInUseError,
    PackWriter,
    Seal,
    SealedFolder,
    load_or_make_secret,
)
from proxy.clock import Clock, spawn

log = logging.getLogger(__name__)

_RENEWAL_LOOK_S = 3600.0
_OPEN_PATIENCE_S = 8.0  # what a question that comes before `open` is done waits for it
_PACK_PATIENCE_S = 5.0  # the control before may be in its last moments


class Domains:
    """The names and their certificates. `open` it first."""

    def __init__(self, data_dir: str, run_dir: str, clock: Clock) -> None:
        self._data_dir = Path(data_dir)
        self._pack_path = Path(run_dir) / "certificates"
        self._clock = clock
        self._names: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self._opened = asyncio.Event()
        self._lock = asyncio.Lock()  # of the pack: one write at a time
        self._pack: PackWriter | None = None
        self._manager: CertificateManager | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.faults: dict[str, str] = {}  # name -> why it has no certificate
        self.on_renewed: Callable[[str], None] = lambda name: None

    @property
    def ca_path(self) -> Path:
        return self._data_dir / "certs" / "ca.pem"

    async def open(self) -> None:
        """Read or make the secret and the authority. Raises CertificateError or OSError."""
        deadline = self._clock.monotonic() + _PACK_PATIENCE_S
        while True:
            try:
                self._manager, self._pack = await asyncio.to_thread(self._open)
                break
            except PackInUseError:
                if self._clock.monotonic() >= deadline:
                    raise
                await self._clock.sleep(0.1)
        self._opened.set()
        self._keeper = spawn(self._keep(), "certificates")

    def _open(self) -> tuple[CertificateManager, PackWriter]:
        secret = load_or_make_secret(self._data_dir / "secret.key")
        pack = PackWriter(self._pack_path, secret)
        try:
            storage = SealedFolder(self._data_dir / "certs", Seal(secret))
            authority = InternalCA(storage, self.ca_path, self._clock.unix)
            authority.open()
        except BaseException:
            pack.close()
            raise
        return CertificateManager(authority, storage, self._clock.unix), pack

    def set_names(self, names: Iterable[str]) -> None:
        """The host names of all apps; they are seen to in the background, the ones workers ask for first."""
        self._names = frozenset(names)
        self._changed.set()

    async def provide(self, name: str) -> str | None:
        """See that the certificate file has this name; None, or why it cannot."""
        if name not in self._names:
            return f"no app here answers to {name}"
        try:
            async with asyncio.timeout(_OPEN_PATIENCE_S):
                await self._opened.wait()
        except TimeoutError:
            return "certificates cannot be made now"
        assert self._manager is not None and self._pack is not None
        try:
            certificate = await self._manager.get(name)
            async with self._lock:
                if await asyncio.to_thread(self._write, self._pack, certificate):
                    self.on_renewed(name)
        except (CertificateError, OSError) as error:
            self.faults[name] = str(error)
            log.error("no certificate for %s: %s", name, error)
            return str(error)
        self.faults.pop(name, None)
        return None

    @staticmethod
    def _write(pack: PackWriter, certificate: Certificate) -> bool:
        return pack.append(certificate.name, certificate.chain_pem, certificate.key_pem)

    async def _keep(self) -> None:
        """Names come first when they change, and are looked over for renewals every hour."""
        while True:
            self._changed.clear()
            for name in sorted(self._names):
                await self.provide(name)
                await asyncio.sleep(0)
            try:
                async with asyncio.timeout(_RENEWAL_LOOK_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._manager is not None:
            await self._manager.close()
        if self._pack is not None:
            self._pack.close()

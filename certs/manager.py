"""From a name to its certificate: memory, then storage, then the issuer, one issuance per name at a time.

Whether a name may have a certificate is the caller's decision (it knows the apps); so is who is told of a new one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from certs.certificate import Certificate
from certs.errors import CertificateError, IssuanceFailedError
from certs.storage import Storage

T = TypeVar("T")

_log = logging.getLogger("wakefront.certs")
_KEPT_IN_MEMORY = 1024
_THREADS = 4
_RETRY_AFTER_S = 3600.0  # a renewal that failed is tried again then, not at every handshake


class Issuer(Protocol):
    def issue(self, name: str) -> Certificate:
        """Make a certificate; blocks. Raises CertificateError or OSError if it cannot."""


class CertificateManager:
    """Belongs to one event loop. `close` it at the end."""

    def __init__(
        self,
        issuer: Issuer,
        storage: Storage,
        now: Callable[[], float],
        on_issued: Callable[[Certificate], None] | None = None,
    ) -> None:
        """`now` gives unix seconds. `on_issued` is called in the loop for each new or renewed certificate."""
        self._issuer = issuer
        self._storage = storage
        self._now = now
        self._on_issued = on_issued
        self._known: OrderedDict[str, Certificate] = OrderedDict()
        self._under_way: dict[str, asyncio.Task[Certificate]] = {}
        self._not_before: dict[str, float] = {}  # names whose renewal failed: when to try again
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="certs")

    async def get(self, name: str) -> Certificate:
        """The certificate of a name: valid now, and renewed if two thirds of its life are over.

        A caller that is cancelled leaves the others' wait, and the issuance, untouched. When a renewal fails, the
        certificate that there is does until it expires.

        Raises IssuanceFailedError or another CertificateError if there is none and none can be had.
        """
        known = self._known.get(name)
        if known is not None and self._now() < known.renew_at:
            self._known.move_to_end(name)
            return known
        task = self._under_way.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._obtain(name), name=f"certificate {name}")
            self._under_way[name] = task
            task.add_done_callback(lambda done: self._ended(name, done))
        return await asyncio.shield(task)

    async def renew(self, names: Iterable[str]) -> dict[str, CertificateError]:
        """See that each of these names has a certificate that is not due; to be called now and then.

        Returns what failed; `on_issued` has told of what was renewed.
        """
        failed: dict[str, CertificateError] = {}
        for name in names:
            try:
                await self.get(name)
            except CertificateError as error:
                failed[name] = error
        return failed

    async def close(self) -> None:
        """End what is under way and wait for it."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=True)

    async def _obtain(self, name: str) -> Certificate:
        stored = self._known.get(name) or await self._in_thread(self._load, name)
        now = self._now()
        if stored is not None and (
            now < stored.renew_at or now < min(self._not_before.get(name, 0), stored.expires_at)
        ):
            self._remember(stored)
            return stored
        try:
            issued = await self._in_thread(self._issue, name)
        except (CertificateError, OSError) as error:
            if stored is not None and now < stored.expires_at:
                _log.warning("renewal of %s failed, the present certificate stays: %s", name, error)
                self._not_before[name] = now + _RETRY_AFTER_S
                self._remember(stored)
                return stored
            if isinstance(error, CertificateError):
                raise
            raise IssuanceFailedError(f"{name}: {error}") from error
        self._not_before.pop(name, None)
        self._remember(issued)
        if self._on_issued is not None:
            self._on_issued(issued)
        return issued

    async def _in_thread(self, call: Callable[[str], T], name: str) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, name)

    def _load(self, name: str) -> Certificate | None:
        """A record that cannot be read is as good as none: it is issued anew and overwritten."""
        try:
            pem = self._storage.load(_storage_key(name))
            return None if pem is None else Certificate.from_pem(name, pem)
        except CertificateError as error:
            _log.warning("stored certificate of %s is unusable: %s", name, error)
            return None

    def _issue(self, name: str) -> Certificate:
        issued = self._issuer.issue(name)
        self._storage.save(_storage_key(name), issued.to_pem())
        return issued

    def _remember(self, certificate: Certificate) -> None:
        self._known[certificate.name] = certificate
        self._known.move_to_end(certificate.name)
        if len(self._known) > _KEPT_IN_MEMORY:
            self._known.popitem(last=False)

    def _ended(self, name: str, task: asyncio.Task[Certificate]) -> None:
        del self._under_way[name]
        if not task.cancelled():
            task.exception()  # seen, even if every waiter has gone


def _storage_key(name: str) -> str:
    return f"leaf/{name}"

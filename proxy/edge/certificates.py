"""The worker's certificates: sealed records in, leaf contexts out, and who waits for names that have no record yet.

`find` never waits. `need` asks control, through the `ask` that worker.py plugs in, and calls the waiter when `ready`
tells the answer; one question per name however many wait. Waits have no timer here: each waiter's connection has one.
Records are read through a small protocol, so that nothing here knows how they are sealed or who issued them.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from proxy.edge.tls import Waiter
from proxy.errors import Code, ProxyError, Source
from proxy.tickets import new_leaf_context

_log = logging.getLogger("wakefront.tls")

_NEGATIVE_TTL_S: Final = 1.0  # a refused name is not asked for again so soon
_MAX_REFUSED: Final = 4096
ALPN = ("http/1.1",)


class CertificateRecords(Protocol):
    """What certs.PackReader offers."""

    def refresh(self) -> Iterable[str]:
        """Take in new records; the names that changed. Raises OSError."""

    def match(self, name: str) -> str | None:
        """The name of the record that serves a host name (its own or a wildcard), if there is one."""

    def exact(self, match: str) -> tuple[bytes, bytes] | None:
        """Chain and key of the record with this very name, as PEM: one that `match` told, or such as `http-01/<token>`.

        Raises ValueError if it cannot be opened, or OSError.
        """


class Certificates:
    """A tls.CertificateSource. A context weighs 24 KB and 0.7 ms to make: the last `capacity` used are kept."""

    def __init__(
        self,
        records: CertificateRecords,
        ask: Callable[[str], None],
        now: Callable[[], float],
        *,
        alpn: tuple[str, ...] = ALPN,
        capacity: int = 2000,
        max_waiters: int = 10_000,
    ) -> None:
        """`ask(name)` sends the question, or drops it when nobody can be asked: then `ask_again` comes later."""
        self._records = records
        self._ask = ask
        self._now = now
        self._alpn = alpn
        self._capacity = capacity
        self._max_waiters = max_waiters
        self._contexts: OrderedDict[str, ssl.SSLContext] = OrderedDict()
        self._waiters: dict[str, dict[Waiter, None]] = {}
        self._waiting = 0
        self._refused: dict[str, tuple[float, str]] = {}  # name -> until when, and why

    def find(self, name: str | None) -> ssl.SSLContext | None:
        """The context of a name that has a record.

        Raises ProxyError(TLS_NO_CERTIFICATE) without a name, TLS_INTERNAL if the record is unusable.
        """
        if name is None:
            raise ProxyError(Code.TLS_NO_CERTIFICATE, Source.DOWNSTREAM, detail="the client names no host")
        match = self._records.match(name)
        if match is None:
            return None
        context = self._contexts.get(match)
        if context is not None:
            self._contexts.move_to_end(match)
            return context
        return self._build(match)

    def need(self, name: str | None, waiter: Waiter) -> None:
        try:
            if self._is_refused(name):
                raise ProxyError(Code.TLS_NO_CERTIFICATE, detail=self._refused[name or ""][1])
            self.refresh()  # control may have answered another worker
            context = self.find(name)
        except ProxyError as error:
            waiter(None, error)
            return
        if context is not None or name is None:
            waiter(context, None)
            return
        if self._waiting >= self._max_waiters:
            waiter(None, ProxyError(Code.TLS_INTERNAL, detail="too many handshakes wait for certificates"))
            return
        waiters = self._waiters.setdefault(name, {})
        is_first = not waiters
        waiters[waiter] = None
        self._waiting += 1
        if is_first:
            self._ask(name)

    def challenge(self, name: str | None) -> ssl.SSLContext:
        """The context for a TLS-ALPN-01 challenge: made for each, a CA comes with a handful."""
        if name is not None:
            self.refresh()
            try:
                record = self._records.exact(f"tls-alpn-01/{name}")
                if record is not None:
                    return _context_from_pem((record,), ("acme-tls/1",))
            except (ValueError, OSError) as error:
                raise ProxyError(Code.TLS_INTERNAL, detail=f"challenge of {name}: {error}") from error
        raise ProxyError(Code.TLS_NO_CERTIFICATE, Source.DOWNSTREAM, detail=f"no TLS-ALPN-01 challenge for {name}")

    def http_challenge(self, token: str) -> bytes | None:
        """The key authorization of an HTTP-01 challenge that is under way (RFC 8555 §8.3)."""
        try:
            self.refresh()
            record = self._records.exact(f"http-01/{token}")
        except (ProxyError, ValueError, OSError) as error:
            _log.error("the challenge %s cannot be read: %s", token, error)
            return None
        return None if record is None else record[0]

    def forget(self, name: str | None, waiter: Waiter) -> None:
        waiters = self._waiters.get(name or "")
        if waiters is not None and waiters.pop(waiter, self) is None:
            self._waiting -= 1
            if not waiters:
                del self._waiters[name or ""]

    def ready(self, name: str, error: str | None) -> None:
        """Control's answer: there is a (new) record of this name, or there will be none and why."""
        outcome: ProxyError | None = None
        context: ssl.SSLContext | None = None
        if error is not None:
            self._refuse(name, error)
            outcome = ProxyError(Code.TLS_NO_CERTIFICATE, detail=error)
        self._contexts.pop(name, None)  # whoever refreshed the records, this name's are new
        try:
            self.refresh()
            if error is None and name in self._waiters:
                context = self.find(name)
        except ProxyError as failure:
            outcome = failure
        if context is None and outcome is None:
            outcome = ProxyError(Code.TLS_INTERNAL, detail=f"{name}: announced, but not in the certificate file")
        waiters = self._waiters.pop(name, {})
        self._waiting -= len(waiters)
        for waiter in waiters:
            waiter(context, outcome)

    def refresh(self) -> None:
        """Forget contexts whose record was replaced; after a reconnect and now and then, since announcements get lost.

        Raises ProxyError(TLS_INTERNAL) if the file cannot be read.
        """
        try:
            for name in self._records.refresh():
                self._contexts.pop(name.removeprefix("rsa/"), None)
                self._refused.pop(name, None)
        except (OSError, ValueError) as error:
            _log.error("the certificate file cannot be read: %s", error)
            raise ProxyError(Code.TLS_INTERNAL, detail=str(error)) from error

    def ask_again(self) -> None:
        """After a reconnect to control: it does not know what we wait for."""
        for name in tuple(self._waiters):
            self._ask(name)

    @property
    def waiting(self) -> int:
        return self._waiting

    def _build(self, match: str) -> ssl.SSLContext:
        try:
            record = self._records.exact(match)
            if record is None:
                raise ValueError("the record has gone")
            beside = self._records.exact(f"rsa/{match}")  # for clients that cannot verify the other
            context = _context_from_pem((record,) if beside is None else (record, beside), self._alpn)
        except (ValueError, OSError) as error:  # ssl.SSLError is an OSError
            _log.error("the certificate of %s is unusable: %s", match, error)
            if not self._is_refused(match):
                self._refuse(match, "its record is unusable")
                self._ask(match)  # control writes it again
            raise ProxyError(Code.TLS_INTERNAL, detail=f"certificate of {match}: {error}") from error
        self._contexts[match] = context
        if len(self._contexts) > self._capacity:
            self._contexts.popitem(last=False)
        return context

    def _is_refused(self, name: str | None) -> bool:
        known = self._refused.get(name or "")
        if known is None:
            return False
        if self._now() < known[0]:
            return True
        del self._refused[name or ""]
        return False

    def _refuse(self, name: str, why: str) -> None:
        if len(self._refused) >= _MAX_REFUSED:
            self._refused.clear()  # forgetting early costs a question, nothing else
        self._refused[name] = (self._now() + _NEGATIVE_TTL_S, why)


def _context_from_pem(records: tuple[tuple[bytes, bytes], ...], alpn: tuple[str, ...]) -> ssl.SSLContext:
    """`load_cert_chain` takes paths only: keys are shown to it in memory, never on a disk."""
    descriptors: list[int] = []
    try:
        for chain_pem, key_pem in records:
            descriptors.append(os.memfd_create("certificate", os.MFD_CLOEXEC))
            os.write(descriptors[-1], chain_pem + key_pem)
        return new_leaf_context([f"/proc/self/fd/{one}" for one in descriptors], alpn)
    finally:
        for one in descriptors:
            os.close(one)

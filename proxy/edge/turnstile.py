"""Lets TLS handshakes through a few at a time, so that a flood of them leaves the loop to the requests under way.

A handshake is half a millisecond of computing in one piece, and a hundred may be ready in one turn of the loop. At most
`A_TURN` begin in one turn; the others stand in line, in order, for the turns after. It is a CertificateSource around
another: who has to wait for its turn is one who has to wait for its certificate. Their wait ends with the handshake
timeout; more than `LINE_MAX` are refused at once.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import OrderedDict

from proxy.edge.tls import CertificateSource, Waiter
from proxy.errors import Code, ProxyError

A_TURN = 8  # 3 to 4 ms
LINE_MAX = 4096


class Turnstile:
    """One per worker, before its certificates."""

    def __init__(self, loop: asyncio.AbstractEventLoop, inner: CertificateSource) -> None:
        self._loop = loop
        self._inner = inner
        self._begun = 0  # in this turn
        self._line: OrderedDict[Waiter, str | None] = OrderedDict()
        self._waiting: dict[Waiter, Waiter] = {}  # for a certificate: who is told of it, on whose behalf
        self._scheduled = False

    def __len__(self) -> int:
        return len(self._line)

    def find(self, name: str | None) -> ssl.SSLContext | None:
        if self._begun >= A_TURN or self._line:
            return None
        self._count()
        return self._inner.find(name)

    def need(self, name: str | None, waiter: Waiter) -> None:
        if self._begun < A_TURN and not self._line:  # `find` let it through: the certificate is what is missing
            self._await_certificate(name, waiter)
        else:
            self._stand_in_line(name, waiter)

    def forget(self, name: str | None, waiter: Waiter) -> None:
        if waiter in self._line:
            del self._line[waiter]
        elif (given := self._waiting.pop(waiter, None)) is not None:
            self._inner.forget(name, given)

    def challenge(self, name: str | None) -> ssl.SSLContext:
        self._count()
        return self._inner.challenge(name)

    def _await_certificate(self, name: str | None, waiter: Waiter) -> None:
        """A crowd that waits for one certificate is given it in one piece, and begins a few a turn all the same."""

        def given(context: ssl.SSLContext | None, error: ProxyError | None) -> None:
            del self._waiting[waiter]
            if context is not None and (self._begun >= A_TURN or self._line):
                self._stand_in_line(name, waiter)
                return
            if context is not None:
                self._count()
            waiter(context, error)

        self._waiting[waiter] = given
        self._inner.need(name, given)

    def _stand_in_line(self, name: str | None, waiter: Waiter) -> None:
        if len(self._line) >= LINE_MAX:
            waiter(None, ProxyError(Code.TLS_OVERLOADED, detail=f"{LINE_MAX} handshakes wait for their turn"))
            return
        self._line[waiter] = name
        self._schedule()

    def _count(self) -> None:
        self._begun += 1
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._scheduled = False
        self._begun = 0
        while self._line and self._begun < A_TURN:
            waiter, name = self._line.popitem(last=False)
            self._count()
            context = self._inner.find(name)
            if context is not None:
                waiter(context, None)
            else:
                self._await_certificate(name, waiter)

"""Handshakes begin a few a turn, in the order they came, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import ssl

from proxy.edge import turnstile as module
from proxy.edge.tls import Waiter
from proxy.edge.turnstile import A_TURN, Turnstile
from proxy.errors import Code, ProxyError

CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


class Certificates:
    """Has a certificate for every name but `late`, which is given when asked to."""

    def __init__(self) -> None:
        self.late: list[Waiter] = []
        self.forgotten = 0
        self.has_come = False

    def find(self, name: str | None) -> ssl.SSLContext | None:
        return None if name == "late" and not self.has_come else CONTEXT

    def need(self, name: str | None, waiter: Waiter) -> None:
        self.late.append(waiter)

    def forget(self, name: str | None, waiter: Waiter) -> None:
        self.forgotten += 1

    def challenge(self, name: str | None) -> ssl.SSLContext:
        return CONTEXT


class Client:
    def __init__(self, turnstile: Turnstile, name: str = "known") -> None:
        self.name = name
        self.context: ssl.SSLContext | None = None
        self.error: ProxyError | None = None
        self._turnstile = turnstile

    def begin(self) -> Client:
        """As TlsConnection does."""
        self.context = self._turnstile.find(self.name)
        if self.context is None:
            self._turnstile.need(self.name, self.given)
        return self

    def given(self, context: ssl.SSLContext | None, error: ProxyError | None) -> None:
        assert self.context is None and self.error is None, "told once"
        self.context, self.error = context, error


async def test_only_so_many_begin_in_one_turn_and_the_rest_follow_in_order() -> None:
    one = Turnstile(asyncio.get_running_loop(), Certificates())
    clients = [Client(one).begin() for _ in range(A_TURN * 3 + 1)]
    for turn in range(1, 5):
        begun = [client.context is not None for client in clients]
        expected = min(turn * A_TURN, len(clients))
        assert begun == [True] * expected + [False] * (len(clients) - expected)
        await asyncio.sleep(0)
    assert len(one) == 0


async def test_who_comes_later_does_not_pass_those_in_line() -> None:
    one = Turnstile(asyncio.get_running_loop(), Certificates())
    crowd = [Client(one).begin() for _ in range(A_TURN * 3)]
    await asyncio.sleep(0)
    late = Client(one).begin()
    await asyncio.sleep(0)
    assert all(client.context for client in crowd) and late.context is None
    await asyncio.sleep(0)
    assert late.context is not None


async def test_one_without_its_certificate_waits_for_that_and_holds_nobody_up() -> None:
    certificates = Certificates()
    one = Turnstile(asyncio.get_running_loop(), certificates)
    first = Client(one, "late").begin()
    others = [Client(one).begin() for _ in range(A_TURN)]
    behind = Client(one, "late").begin()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(client.context for client in others) and first.context is None and behind.context is None
    for waiter in certificates.late:
        waiter(CONTEXT, None)
    assert first.context is CONTEXT and behind.context is CONTEXT


async def test_a_crowd_that_waits_for_one_certificate_begins_a_few_a_turn() -> None:
    certificates = Certificates()
    one = Turnstile(asyncio.get_running_loop(), certificates)
    crowd = []
    for _ in range(3):
        crowd += [Client(one, "late").begin() for _ in range(A_TURN)]
        await asyncio.sleep(0)
    while one._begun:  # those that stood in line have had their turn
        await asyncio.sleep(0)
    assert len(certificates.late) == len(crowd)
    certificates.has_come = True
    for waiter in certificates.late:
        waiter(CONTEXT, None)
    gone = crowd[-1]
    one.forget(gone.name, gone.given)
    for turn in (1, 2, 3):
        assert sum(client.context is not None for client in crowd) == min(turn * A_TURN, len(crowd) - 1)
        await asyncio.sleep(0)
    assert len(one) == 0 and gone.context is None and certificates.forgotten == 0


async def test_a_crowd_is_told_at_once_that_there_is_no_certificate() -> None:
    certificates = Certificates()
    one = Turnstile(asyncio.get_running_loop(), certificates)
    crowd = []
    for _ in range(2):
        crowd += [Client(one, "late").begin() for _ in range(A_TURN)]
        await asyncio.sleep(0)
    while one._begun:
        await asyncio.sleep(0)
    for waiter in certificates.late:
        waiter(None, ProxyError(Code.TLS_NO_CERTIFICATE))
    assert all(client.error is not None for client in crowd)


async def test_one_that_left_the_line_is_not_called() -> None:
    certificates = Certificates()
    one = Turnstile(asyncio.get_running_loop(), certificates)
    clients = [Client(one).begin() for _ in range(A_TURN + 2)]
    gone = clients[-2]
    one.forget(gone.name, gone.given)
    await asyncio.sleep(0)
    assert gone.context is None and clients[-1].context is not None and certificates.forgotten == 0
    waiting = Client(one, "late").begin()
    one.forget("late", waiting.given)
    assert certificates.forgotten == 1


async def test_a_line_too_long_refuses_at_once(monkeypatch: object) -> None:
    one = Turnstile(asyncio.get_running_loop(), Certificates())
    clients = [Client(one).begin() for _ in range(A_TURN + module.LINE_MAX + 1)]
    error = clients[-1].error
    assert error is not None and error.code is Code.TLS_OVERLOADED
    assert all(client.error is None for client in clients[:-1])

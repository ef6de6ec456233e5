"""Waits until a machine accepts a connection. One of these runs per machine that starts, however many requests wait.
The connection that was accepted may be had, for the first of them: the program need not accept one for nothing.

The first attempt is made at once, the next ones every max(0.2 ms, 2 % of the time waited), at most 25 ms apart: so
that what is added to a start stays in proportion to it. An attempt is given 250 ms. Whoever learns that the machine has
ended cancels the task that waits here.

An attempt costs two system calls on one socket and no task: the program that starts may be on the same processor, and
what is spent here is taken from it. (With a socket, a timer and a future for each, a Python start of 15 ms lost 3.)
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Protocol

from proxy.clock import Clock
from proxy.model import Endpoint

FIRST_PAUSE_S = 0.0002
PAUSE_SHARE = 0.02
LONGEST_PAUSE_S = 0.025
ATTEMPT_S = 0.25

SocketMaker = Callable[[int, int], socket.socket]  # netns pid (0: ours), address family -> non-blocking TCP socket


class Alarm(Protocol):
    """Calls back once after each `set`."""

    def set(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class AlarmClock(Clock, Protocol):
    """A clock that can call back."""

    def alarm(self, callback: Callable[[], None]) -> Alarm: ...


async def wait_until_listening(
    endpoint: Endpoint, netns_pid: int, deadline: float, clock: AlarmClock, make_socket: SocketMaker
) -> bool:
    """True once it accepted a connection, False when it had not by `deadline` (monotonic).

    Connections are closed at once, without a byte.
    """
    sock = await connect_when_listening(endpoint, netns_pid, deadline, clock, make_socket)
    if sock is not None:
        sock.close()
    return sock is not None


async def connect_when_listening(
    endpoint: Endpoint, netns_pid: int, deadline: float, clock: AlarmClock, make_socket: SocketMaker
) -> socket.socket | None:
    """The first connection that it accepted, nothing sent on it; the caller closes it. None: none by `deadline`."""
    probe = _Probe(endpoint, netns_pid, deadline, clock, make_socket)
    try:
        probe.attempt()
        return probe.take() if await probe.found else None
    finally:
        probe.close()


class _Probe:
    """The attempts on one endpoint: made, waited for at most ATTEMPT_S, made again after a pause."""

    __slots__ = (
        "_address", "_alarm", "_began", "_clock", "_deadline", "_family", "_make_socket", "_netns_pid", "_pending",
        "_socket", "found",
    )  # fmt: skip

    def __init__(
        self, endpoint: Endpoint, netns_pid: int, deadline: float, clock: AlarmClock, make_socket: SocketMaker
    ) -> None:
        self._address = (endpoint.host, endpoint.port)
        self._family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        self._netns_pid = netns_pid
        self._deadline = deadline
        self._clock = clock
        self._make_socket = make_socket
        self._began = clock.monotonic()
        self._alarm = clock.alarm(self._ring)
        self._socket: socket.socket | None = None
        self._pending = False  # an attempt waits for its end
        self.found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def attempt(self) -> None:
        """Connect. On loopback it is over when the call returns; a second one says how, and lets the socket go on."""
        sock = self._socket
        if sock is None:
            try:
                sock = self._socket = self._make_socket(self._netns_pid, self._family)
            except OSError:  # the namespace is not there (yet, or any more): its end is told by the driver
                self._pause()
                return
        code = sock.connect_ex(self._address)
        if code == errno.EINPROGRESS:
            code = sock.connect_ex(self._address)
        if code == errno.EALREADY:
            self._pending = True
            asyncio.get_running_loop().add_writer(sock, self._end_attempt)
            self._alarm.set(min(ATTEMPT_S, max(0.0, self._deadline - self._clock.monotonic())))
        else:
            self._judge(sock, code)

    def _end_attempt(self) -> None:
        """The attempt that was waited for is over, or its time is."""
        sock = self._socket
        assert sock is not None
        self._forget_pending(sock)
        code = sock.connect_ex(self._address)
        self._judge(sock, errno.ETIMEDOUT if code == errno.EALREADY else code)

    def _judge(self, sock: socket.socket, code: int) -> None:
        if code == 0 and _has_two_ends(sock):
            self._settle(True)
            return
        if code != errno.ECONNREFUSED:  # only after a refusal is a socket as new
            self._drop_socket()
        self._pause()

    def _pause(self) -> None:
        now = self._clock.monotonic()
        left = self._deadline - now
        if left <= 0:
            self._settle(False)
            return
        self._alarm.set(min(max(FIRST_PAUSE_S, PAUSE_SHARE * (now - self._began)), LONGEST_PAUSE_S, left))

    def _ring(self) -> None:
        if self.found.done():
            return
        try:
            if self._pending:
                self._end_attempt()
            else:
                self.attempt()
        except Exception as error:  # who waits has no other end than ours
            self.found.set_exception(error)

    def _settle(self, found: bool) -> None:
        if not self.found.done():
            self.found.set_result(found)

    def _forget_pending(self, sock: socket.socket) -> None:
        if self._pending:
            self._pending = False
            asyncio.get_running_loop().remove_writer(sock)

    def _drop_socket(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            self._forget_pending(sock)
            sock.close()

    def take(self) -> socket.socket | None:
        """The connection, once found; `close` leaves it alone then."""
        sock, self._socket = self._socket, None
        return sock

    def close(self) -> None:
        self._drop_socket()
        self._alarm.close()


def _has_two_ends(sock: socket.socket) -> bool:
    """A loopback port inside ip_local_port_range that nobody listens on may connect to itself: no machine is there."""
    try:
        return bool(sock.getsockname() != sock.getpeername())
    except OSError:  # it was reset meanwhile
        return False


def plain_socket(netns_pid: int, family: int) -> socket.socket:
    """A SocketMaker for machines in our own network. Raises OSError for others: see proxy.namespace."""
    if netns_pid:
        raise OSError(errno.EOPNOTSUPP, "this prober knows no other networks")
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

"""Waits until a machine accepts a connection. One of these runs per machine that starts, however many requests wait.

The first attempt is made at once, the next ones every max(0.2 ms, 2 % of the time waited), at most 25 ms apart: so
that what is added to a start stays in proportion to it. An attempt is given 250 ms. Whoever learns that the machine has
ended cancels the task that waits here.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

from proxy.clock import Clock
from proxy.model import Endpoint

FIRST_PAUSE_S = 0.0002
PAUSE_SHARE = 0.02
LONGEST_PAUSE_S = 0.025
ATTEMPT_S = 0.25

SocketMaker = Callable[[int, int], socket.socket]  # netns pid (0: ours), address family -> non-blocking TCP socket


async def wait_until_listening(
    endpoint: Endpoint, netns_pid: int, deadline: float, clock: Clock, make_socket: SocketMaker
) -> bool:
    """True once it accepted a connection, False when it had not by `deadline` (monotonic)."""
    began = clock.monotonic()
    while True:
        if await can_connect(endpoint, netns_pid, make_socket):
            return True
        now = clock.monotonic()
        if now >= deadline:
            return False
        await clock.sleep(min(max(FIRST_PAUSE_S, PAUSE_SHARE * (now - began)), LONGEST_PAUSE_S, deadline - now))


async def can_connect(endpoint: Endpoint, netns_pid: int, make_socket: SocketMaker) -> bool:
    """One attempt. The connection is closed at once, without a byte.

    A loopback port inside ip_local_port_range that nobody listens on may connect to itself: equal ends are a failure.
    """
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        attempt = make_socket(netns_pid, family)
    except OSError:  # the namespace is not there (yet, or any more): its end is told by the driver
        return False
    with attempt:
        code = attempt.connect_ex((endpoint.host, endpoint.port))
        if code == errno.EINPROGRESS:  # on loopback it is over by now, mostly, and the loop need not be asked
            code = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code and not _is_connected(attempt):
                code = await _outcome(attempt)
        if code:
            return False
        try:
            return bool(attempt.getsockname() != attempt.getpeername())
        except OSError:  # it was reset meanwhile
            return False


async def _outcome(attempt: socket.socket) -> int:
    """How a connection under way ends, as an errno. (The loop's own sock_connect costs five times as much.)"""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    loop.add_writer(attempt, _settle, done)
    limit = loop.call_later(ATTEMPT_S, _settle, done)
    try:
        await done
        failure = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return failure or (0 if _is_connected(attempt) else errno.ETIMEDOUT)
    finally:
        limit.cancel()
        loop.remove_writer(attempt)


def _is_connected(attempt: socket.socket) -> bool:
    try:
        attempt.getpeername()
    except OSError:
        return False
    return True


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def plain_socket(netns_pid: int, family: int) -> socket.socket:
    """A SocketMaker for machines in our own network. Raises OSError for others: see proxy.namespace."""
    if netns_pid:
        raise OSError(errno.EOPNOTSUPP, "this prober knows no other networks")
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

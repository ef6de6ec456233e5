from __future__ import annotations

import asyncio
import socket

import pytest

from proxy.clock import monotonic
from proxy.control.fine_timer import FineClock
from proxy.control.prober import can_connect, plain_socket, wait_until_listening
from proxy.model import Endpoint
from tests.support.clock import FakeClock, settle


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Attempts:
    """A SocketMaker that notes when it was asked."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.at: list[float] = []

    def __call__(self, netns_pid: int, family: int) -> socket.socket:
        self.at.append(self.clock.monotonic() - 1000.0)
        return plain_socket(netns_pid, family)


async def test_a_listener_is_found_at_the_first_attempt() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint(80, "127.0.0.1", server.getsockname()[1])
        assert await wait_until_listening(endpoint, 0, 1001.0, FakeClock(), plain_socket)


async def test_the_first_attempt_is_at_once_and_the_pauses_grow_with_the_time_waited() -> None:
    clock = FakeClock()
    attempts = Attempts(clock)
    endpoint = Endpoint(80, "127.0.0.1", a_free_port())
    probe = asyncio.get_running_loop().create_task(
        wait_until_listening(endpoint, 0, 1004.0, clock, attempts), name="probe"
    )
    await clock.advance(4.1)
    assert await probe is False
    pauses = [later - earlier for earlier, later in zip(attempts.at, attempts.at[1:], strict=False)]
    assert attempts.at[0] == 0.0
    assert pauses[0] == pytest.approx(0.0002)
    for moment, pause in zip(attempts.at, pauses[:-1], strict=False):
        assert pause == pytest.approx(min(max(0.0002, 0.02 * moment), 0.025))
    assert len(attempts.at) < 500


async def test_a_machine_that_begins_to_listen_is_found_by_the_next_attempt() -> None:
    clock = FakeClock()
    port = a_free_port()
    waiting = wait_until_listening(Endpoint(80, "127.0.0.1", port), 0, 1010.0, clock, plain_socket)
    probe = asyncio.get_running_loop().create_task(waiting, name="probe")
    await clock.advance(0.5)
    assert not probe.done()
    with socket.create_server(("127.0.0.1", port)):
        await clock.advance(0.011)
        assert await probe


async def test_a_connection_to_itself_is_a_failure() -> None:
    """A socket bound to the very port that it connects to is connected with itself, by TCP's simultaneous open."""
    port = a_free_port()
    made: list[socket.socket] = []

    def bound(netns_pid: int, family: int) -> socket.socket:
        one = plain_socket(netns_pid, family)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", port))
        made.append(one)
        return one

    assert not await can_connect(Endpoint(80, "127.0.0.1", port), 0, bound)
    assert len(made) == 1


async def test_an_attempt_that_nobody_answers_is_given_up_after_a_quarter_second() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        fillers = []
        for _ in range(4):  # fill the backlog: further SYNs are dropped
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        await settle()
        began = monotonic()
        assert not await can_connect(Endpoint(80, *address), 0, plain_socket)
        assert 0.2 < monotonic() - began < 1.0
        for filler in fillers:
            filler.close()


async def test_a_cancelled_probe_leaves_no_descriptor_behind() -> None:
    clock = FakeClock()
    made: list[socket.socket] = []

    def noting(netns_pid: int, family: int) -> socket.socket:
        made.append(plain_socket(netns_pid, family))
        return made[-1]

    waiting = wait_until_listening(Endpoint(80, "127.0.0.1", a_free_port()), 0, 1010.0, clock, noting)
    probe = asyncio.get_running_loop().create_task(waiting, name="probe")
    await clock.advance(0.01)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert made and all(one.fileno() == -1 for one in made)


async def test_short_sleeps_of_the_fine_clock_end_on_time() -> None:
    clock = FineClock()
    began = monotonic()
    for _ in range(20):
        await clock.sleep(0.0005)
    took = monotonic() - began
    assert 0.01 <= took < 0.1
    clock.close()


async def test_a_cancelled_fine_sleep_leaves_its_timer_for_the_next() -> None:
    clock = FineClock()
    sleeper = asyncio.get_running_loop().create_task(clock.sleep(0.019), name="sleeper")
    await asyncio.sleep(0)
    sleeper.cancel()
    await asyncio.gather(sleeper, return_exceptions=True)
    began = monotonic()
    await clock.sleep(0.001)
    assert monotonic() - began >= 0.001
    clock.close()

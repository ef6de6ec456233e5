from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.clock import monotonic
from proxy.control.fine_timer import FineClock
from proxy.control.prober import connect_when_listening, plain_socket, wait_until_listening
from proxy.model import Endpoint
from tests.support.clock import FakeClock, settle


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Noted(socket.socket):
    """A socket that notes when it was told to connect."""

    clock: FakeClock
    at: list[float]

    def connect_ex(self, address: object) -> int:
        moment = self.clock.monotonic() - 1000.0
        if not self.at or self.at[-1] != moment:  # an attempt connects, then asks how that ended
            self.at.append(moment)
        return super().connect_ex(address)  # type: ignore[arg-type]  # an address, as socket takes it


class Attempts:
    """A SocketMaker whose sockets note their attempts."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.at: list[float] = []
        self.made: list[socket.socket] = []

    def __call__(self, netns_pid: int, family: int) -> socket.socket:
        one = Noted(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        one.clock, one.at = self.clock, self.at
        self.made.append(one)
        return one


async def test_a_listener_is_found_at_the_first_attempt() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint(80, "127.0.0.1", server.getsockname()[1])
        assert await wait_until_listening(endpoint, 0, 1001.0, FakeClock(), plain_socket)


async def test_the_connection_that_was_accepted_can_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint(80, "127.0.0.1", server.getsockname()[1])
        sock = await connect_when_listening(endpoint, 0, 1001.0, FakeClock(), plain_socket)
        assert sock is not None
        accepted, _ = server.accept()
        with sock, accepted:
            sock.send(b"hello")
            assert accepted.recv(5) == b"hello"


async def test_one_that_is_cancelled_as_it_is_accepted_leaves_no_descriptor_behind() -> None:
    clock, port = FakeClock(), a_free_port()
    made: list[socket.socket] = []

    class Cancelling(socket.socket):
        def connect_ex(self, address: object) -> int:
            if (code := super().connect_ex(address)) == 0:  # type: ignore[arg-type]  # an address, as socket takes it
                probe.cancel()
            return code

    def cancelling(netns_pid: int, family: int) -> socket.socket:
        made.append(Cancelling(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        return made[-1]

    waiting = connect_when_listening(Endpoint(80, "127.0.0.1", port), 0, 1010.0, clock, cancelling)
    probe = asyncio.get_running_loop().create_task(waiting, name="probe")
    await clock.advance(0.1)
    with socket.create_server(("127.0.0.1", port)):
        await clock.advance(0.1)
        assert probe.cancelled()
    assert [one.fileno() for one in made] == [-1]


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
    assert len(attempts.made) == 1  # a refused socket connects again


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

    clock = FakeClock()
    waiting = wait_until_listening(Endpoint(80, "127.0.0.1", port), 0, 1000.1, clock, bound)
    probe = asyncio.get_running_loop().create_task(waiting, name="probe")
    await clock.advance(0.2)
    assert await probe is False
    assert len(made) > 5  # each of them met itself, and was of no more use
    assert all(one.fileno() == -1 for one in made)


@pytest_asyncio.fixture
async def unanswering() -> AsyncIterator[Endpoint]:
    """An endpoint whose backlog is full: further SYNs are dropped."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
            fillers.append(filler)
        await settle()
        yield Endpoint(80, *server.getsockname())
        for filler in fillers:
            filler.close()


async def test_an_attempt_that_nobody_answers_is_given_up_after_a_quarter_second(unanswering: Endpoint) -> None:
    clock = FakeClock()
    attempts = Attempts(clock)
    waiting = wait_until_listening(unanswering, 0, 1000.4, clock, attempts)
    probe = asyncio.get_running_loop().create_task(waiting, name="probe")
    await clock.advance(0.24)
    assert len(attempts.made) == 1
    await clock.advance(0.02)
    assert len(attempts.made) == 2  # one that got no answer is no use for the next attempt
    await clock.advance(0.5)
    assert await probe is False
    assert all(one.fileno() == -1 for one in attempts.made)


async def test_an_attempt_that_nobody_answers_does_not_outlast_the_deadline(unanswering: Endpoint) -> None:
    clock = FakeClock()
    waiting = wait_until_listening(unanswering, 0, 1000.1, clock, plain_socket)
    probe = asyncio.get_running_loop().create_task(waiting, name="probe")
    await clock.advance(0.11)
    assert probe.done() and probe.result() is False


async def test_an_attempt_under_way_ends_as_soon_as_it_is_answered() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        clock = FakeClock()
        waiting = wait_until_listening(Endpoint(80, *address), 0, 1010.0, clock, plain_socket)
        probe = asyncio.get_running_loop().create_task(waiting, name="probe")
        await clock.advance(0.1)
        assert not probe.done()
        for filler in fillers:
            filler.close()
        accepted = server.accept()[0], server.accept()[0]
        async with asyncio.timeout(10):  # the kernel sends the SYN again after a second
            assert await probe
        for one in accepted:
            one.close()


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


async def test_an_attempt_that_fails_in_an_unforeseen_way_ends_the_wait() -> None:
    failures: list[Exception] = [OSError("not yet"), RuntimeError("what is this")]

    def failing(netns_pid: int, family: int) -> socket.socket:
        raise failures.pop(0)

    clock = FakeClock()
    waiting = wait_until_listening(Endpoint(80, "127.0.0.1", a_free_port()), 0, 1010.0, clock, failing)
    probe = asyncio.get_running_loop().create_task(waiting, name="probe")
    await clock.advance(0.01)
    with pytest.raises(RuntimeError, match="what is this"):
        await asyncio.wait_for(probe, 1)


async def test_short_alarms_of_the_fine_clock_ring_on_time() -> None:
    rang = asyncio.Event()
    alarm = FineClock().alarm(rang.set)
    began = monotonic()
    for _ in range(20):
        alarm.set(0.0005)
        await rang.wait()
        rang.clear()
    took = monotonic() - began
    alarm.close()
    assert 0.01 <= took < 0.1


@pytest.mark.parametrize(("first", "second"), [(0.005, 0.03), (0.03, 0.005), (0.03, 0.04), (0.005, 0.006)])
async def test_an_alarm_that_is_set_again_rings_once_and_at_the_later_word(first: float, second: float) -> None:
    rings: list[float] = []
    alarm = FineClock().alarm(lambda: rings.append(monotonic()))
    began = monotonic()
    alarm.set(first)
    alarm.set(second)
    await asyncio.sleep(0.08)
    alarm.close()
    assert len(rings) == 1
    assert rings[0] - began >= second - 0.001


async def test_a_closed_alarm_rings_no_more() -> None:
    rings: list[float] = []
    for seconds in (0.002, 0.025):
        alarm = FineClock().alarm(lambda: rings.append(monotonic()))
        alarm.set(seconds)
        alarm.close()
    await asyncio.sleep(0.05)
    assert rings == []

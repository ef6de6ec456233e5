"""The line through several processes, without HTTP: real memory, real bells, no place lost when one is killed."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import traceback
from collections.abc import Callable, Iterator

import pytest

from proxy.clock import monotonic_ns
from proxy.edge.queue import Queue, Ticket
from proxy.edge.timers import Wheel
from proxy.errors import ProxyError
from proxy.state import Load, SharedMemory

WORKERS = 4
APP, MACHINE = 3, 5
HELD, SERVED, LATE_NS = 40, 41, 42  # cells of a worker's block that nobody else uses
AT_ONCE = 20  # requests that each worker has at any time
WAIT_S = 30.0


class Crowd:
    """A worker's requests: each stands in line as exchanges do, holds its place for a moment, and comes again."""

    def __init__(self, memory: SharedMemory, bells: list[int], worker: int, limit: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.memory, self.limit = memory, limit
        self.load = Load(memory, worker)
        self.base = memory.worker_base(worker)
        self.wheel = Wheel(self.loop)
        self.queue = Queue(self.loop, self.load, memory, worker, self.wheel, self._ring)
        self.bells, self.bell = bells, bells[worker]
        self.loop.add_reader(self.bell, self._on_bell)
        self.rng = random.Random(worker)
        self.most = 0

    def _ring(self, worker: int) -> None:
        os.eventfd_write(self.bells[worker], 1)

    def _on_bell(self) -> None:
        os.eventfd_read(self.bell)
        self.queue.on_bell()

    async def hold(self, hold_s: float = 0.0) -> None:
        """One request, from the end of the line to the end of its hold."""
        since = 0
        if self.queue.is_contended(APP) or not self.load.admit(MACHINE, self.limit):
            while True:
                room: asyncio.Future[None] = self.loop.create_future()
                ticket: Ticket = self.queue.wait(
                    APP, (MACHINE,), self.limit, WAIT_S, 1000, lambda error, room=room: settle(room, error), since
                )  # fmt: skip
                since = ticket.since_ns
                await room
                if self.load.admit(MACHINE, self.limit):
                    break
        cells = self.memory.cells
        if since:
            self._note_older(since)
        cells[self.base + HELD] += 1
        self.most = max(self.most, self._held_at_once())
        await asyncio.sleep(hold_s)
        self.most = max(self.most, self._held_at_once())
        cells[self.base + HELD] -= 1
        cells[self.base + SERVED] += 1
        self.load.release_fenced(MACHINE)
        self.queue.freed(APP)

    def _held_at_once(self) -> int:
        """Requests held at one moment: two readings of all workers' counters that agree. 0 if none do.

        A single reading takes its time: a place that went from one worker to another meanwhile is in it twice.
        """
        before: list[int] = []
        for _ in range(10):
            rows = [self.memory.worker_base(worker) for worker in range(WORKERS)]
            now = [self.memory.cells[row + cell] for row in rows for cell in (HELD, SERVED)]
            if now == before:
                return sum(now[::2])
            before = now
        return 0

    def _note_older(self, since: int) -> None:
        """By how much the oldest that still waits anywhere came before the one that is let in."""
        oldest = [one for w in range(WORKERS) if (one := self.memory.cells[self.memory.queue_base(w) + APP])]
        late = since - min(oldest, default=since)
        self.memory.cells[self.base + LATE_NS] = max(self.memory.cells[self.base + LATE_NS], late)

    async def run(self, requests: int) -> None:
        left = requests

        async def client() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.hold(self.rng.choice((0.0, 0.0, 0.0005)))

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))


def settle(room: asyncio.Future[None], error: ProxyError | None) -> None:
    if error is not None:
        room.set_exception(error)
    else:
        room.set_result(None)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    fd, memory = SharedMemory.create(WORKERS)
    os.close(fd)
    yield memory
    memory.close()


@pytest.fixture
def bells() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(WORKERS)]
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Start a process that runs a job; what still lives at the end of the test is killed."""
    alive: dict[int, int] = {}

    def start(job: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                job()
                code = 0
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(code)
        alive[pid] = os.pidfd_open(pid)
        return pid

    yield start
    for pid, pidfd in alive.items():
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):  # the test has seen its end
            pass
        os.close(pidfd)


def end_of(pid: int, within_s: float = 60.0) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        assert select.select([pidfd], [], [], within_s)[0], f"process {pid} hangs"
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 5])
def test_all_are_served_in_order_and_never_more_at_once_than_the_limit(
    memory: SharedMemory, bells: list[int], fork: Callable[[Callable[[], None]], int], limit: int
) -> None:
    requests = 1500

    async def work(worker: int) -> None:
        crowd = Crowd(memory, bells, worker, limit)
        await crowd.run(requests)
        assert 0 < crowd.most <= limit

    began = monotonic_ns()
    pids = [fork(lambda worker=worker: asyncio.run(work(worker))) for worker in range(WORKERS)]  # type: ignore[misc]
    assert [end_of(pid) for pid in pids] == [0] * WORKERS
    took = monotonic_ns() - began
    assert memory.worker_total(SERVED) == WORKERS * requests
    assert memory.in_flight(MACHINE) == 0
    latest = max(memory.cells[memory.worker_base(worker) + LATE_NS] for worker in range(WORKERS))
    print(f"limit {limit}: {took / 1e9:.2f} s, let in at most {latest / 1e6:.1f} ms before an older one")
    assert latest < 150_000_000


@pytest.mark.slow
def test_a_worker_killed_while_it_holds_and_waits_leaves_its_places_to_the_others(
    memory: SharedMemory, bells: list[int], fork: Callable[[Callable[[], None]], int]
) -> None:
    ready, told = os.pipe()

    async def hold_all_and_wait() -> None:
        crowd = Crowd(memory, bells, 0, 2)
        holds = [asyncio.create_task(crowd.hold(WAIT_S)) for _ in range(4)]
        await asyncio.sleep(0)
        assert len(crowd.queue) == 2
        os.write(told, b"1")
        await asyncio.gather(*holds)

    async def work(worker: int) -> None:
        crowd = Crowd(memory, bells, worker, 2)
        os.write(told, b"1")
        await crowd.run(200)

    doomed = fork(lambda: asyncio.run(hold_all_and_wait()))
    assert select.select([ready], [], [], 10)[0] and os.read(ready, 1)
    pids = [fork(lambda worker=worker: asyncio.run(work(worker))) for worker in (1, 2, 3)]  # type: ignore[misc]
    for _ in pids:
        assert select.select([ready], [], [], 10)[0] and os.read(ready, 1)
    os.kill(doomed, signal.SIGKILL)
    assert end_of(doomed) == -signal.SIGKILL
    memory.clear_worker(0)  # as the supervisor does after it has reaped it
    assert [end_of(pid) for pid in pids] == [0, 0, 0]
    assert memory.worker_total(SERVED) == 3 * 200 and memory.in_flight(MACHINE) == 0
    os.close(ready)
    os.close(told)

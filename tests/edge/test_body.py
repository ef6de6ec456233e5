"""edge/body.py: what a request's body was can be sent again byte for byte, within bounds, whatever the disk does."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.edge import body as module
from proxy.edge.body import BLOCK, HIGH_MARK, BodyBudget, KeptBody, Replayed
from proxy.model import AppName

APP = AppName("shop")
OTHER = AppName("blog")
KIB = 1024
MIB = 1024 * KIB


class Budget(BodyBudget):
    """Knows when its threads are through, and that no body has two jobs at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, folder: Path, **bounds: int) -> None:
        super().__init__(loop, folder, **bounds)
        self.jobs = 0
        self.order: list[object] = []  # the file of each job
        self._under_way: set[int] = set()
        self._is_idle = asyncio.Event()

    def run(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        method: Any = job.func if isinstance(job, partial) else job
        file = method.__self__
        assert id(file) not in self._under_way, "two jobs at once for one body"
        self._under_way.add(id(file))
        self.order.append(file)
        self.jobs += 1

        def done(result: Any) -> None:
            self.jobs -= 1
            self._under_way.discard(id(file))
            then(result)
            if not self.jobs:
                self._is_idle.set()

        super().run(job, done)

    async def idle(self) -> None:
        while self.jobs:
            self._is_idle.clear()
            await asyncio.wait_for(self._is_idle.wait(), 20)
        await asyncio.sleep(0)

    def assert_empty(self) -> None:
        assert (self.memory_used, self.spool_used) == (0, 0)
        for app in (APP, OTHER):
            use = self.use_of(app)
            assert (use.memory, use.spool) == (0, 0)


class Client:
    """Whose reading is paused and resumed, in turns."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.reads.set()
        self.pauses = 0

    def pause(self) -> None:
        assert self.reads.is_set()
        self.reads.clear()
        self.pauses += 1

    def resume(self) -> None:
        assert not self.reads.is_set()
        self.reads.set()


class Sink:
    """A machine's connection: takes bytes; may ask for a pause after each so many."""

    def __init__(self, pause_every: int = 0) -> None:
        self.data = bytearray()
        self.pieces: list[int] = []
        self.error: Exception | None = None
        self.over = asyncio.Event()
        self.wrote = asyncio.Event()
        self.replayed: Replayed | None = None
        self.is_deaf = False  # must not be called any more
        self.on_write: Callable[[], None] = lambda: None
        self._pause_every = pause_every

    def write(self, data: bytes) -> None:
        assert not self.is_deaf and not self.over.is_set()
        assert isinstance(data, bytes) and 0 < len(data) <= BLOCK
        self.data += data
        self.pieces.append(len(data))
        self.wrote.set()
        if self._pause_every and len(self.pieces) % self._pause_every == 0:
            assert self.replayed is not None
            self.replayed.pause()
            asyncio.get_running_loop().call_soon(self.replayed.resume)
        self.on_write()

    def done(self) -> None:
        assert not self.is_deaf and not self.over.is_set()
        self.over.set()

    def failed(self, error: Exception) -> None:
        self.error = error
        self.done()

    def begin(self, body: KeptBody) -> Sink:
        self.replayed = body.replay(self)
        return self

    async def all(self) -> bytes:
        await asyncio.wait_for(self.over.wait(), 20)
        if self.error is not None:
            raise self.error
        return bytes(self.data)


class Gate:
    """Stands in the way of one of the system's calls until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.arrived = threading.Event()
        self._open = threading.Event()
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            self.arrived.set()
            assert self._open.wait(20)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.arrived.wait, 20)

    def open(self) -> None:
        self._open.set()


class Plane:
    """Makes budgets and bodies, and holds them to account at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.budget = Budget(asyncio.get_running_loop(), folder)
        self.client = Client()

    def with_bounds(self, **bounds: int) -> Plane:
        self.budget = Budget(asyncio.get_running_loop(), self.folder, **bounds)
        return self

    def body(self, memory: int = MIB, spool: int = 0, app: AppName = APP, client: Client | None = None) -> KeptBody:
        client = client or self.client
        return KeptBody(self.budget, app, memory, spool, client.pause, client.resume)

    async def feed(self, body: KeptBody, data: bytes, size: int = 50_000, client: Client | None = None) -> None:
        """Add `data` as a connection would: not while paused."""
        client = client or self.client
        for at in range(0, len(data), size):
            await asyncio.wait_for(client.reads.wait(), 20)
            body.add(data[at : at + size])
            await asyncio.sleep(0)

    async def end(self, *bodies: KeptBody) -> None:
        for body in bodies:
            body.release()
        await self.budget.idle()
        self.budget.assert_empty()
        assert self.client.reads.is_set()
        self.budget.close()
        assert not list(self.folder.glob("*"))


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    plane = Plane(tmp_path / "spool")
    yield plane
    plane.budget.close()


@pytest.fixture(autouse=True)
def descriptors_stay_the_same() -> Iterator[None]:
    before = spool_files()
    yield
    assert spool_files() == before


def spool_files() -> int:
    """Descriptors of this process that lead to a kept body."""
    return sum("/spool/" in link for link in map(_link, Path("/proc/self/fd").iterdir()))


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the listing's own
        return ""


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# --- in memory


async def test_a_body_is_sent_again_as_often_as_asked(plane: Plane) -> None:
    body = plane.body()
    body.add(b"name=")
    body.add(b"")
    body.add(b"value")
    assert [await Sink().begin(body).all() for _ in range(3)] == [b"name=value"] * 3
    assert (body.size, plane.budget.memory_used) == (10, 10)
    await plane.end(body)


async def test_an_empty_body_is_done_at_once(plane: Plane) -> None:
    body = plane.body()
    assert await Sink().begin(body).all() == b""
    await plane.end(body)


async def test_a_replay_begins_after_its_handle_was_returned(plane: Plane) -> None:
    body = plane.body()
    body.add(b"x" * 200_000)
    sink = Sink(pause_every=1)
    sink.replayed = body.replay(sink)
    assert not sink.pieces
    assert await sink.all() == b"x" * 200_000
    assert sink.pieces == [65536, 65536, 65536, 3392]
    await plane.end(body)


async def test_bytes_that_arrive_during_a_replay_follow_in_order(plane: Plane) -> None:
    data = content(900_000)
    body = plane.body()
    body.add(data[:300_000])
    sink = Sink(pause_every=1)
    sink.on_write = lambda: body.add(data[body.size : body.size + 70_000])
    assert await sink.begin(body).all() == data
    body.add(b"later")
    assert bytes(sink.data) == data, "after done() the rest is the caller's to pass on"
    await plane.end(body)


async def test_a_paused_replay_sends_nothing_until_it_is_resumed(plane: Plane) -> None:
    body = plane.body()
    body.add(b"held")
    sink = Sink().begin(body)
    assert sink.replayed is not None
    sink.replayed.pause()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not sink.pieces
    sink.replayed.resume()
    assert await sink.all() == b"held"
    assert not sink.replayed.is_running
    sink.replayed.resume()
    sink.replayed.cancel()
    await plane.end(body)


async def test_a_cancelled_replay_is_silent_and_the_next_begins_at_the_start(plane: Plane) -> None:
    body = plane.body()
    body.add(content(500_000))
    first = Sink(pause_every=1).begin(body)
    await first.wrote.wait()
    assert first.replayed is not None
    first.replayed.cancel()
    first.is_deaf = True
    assert await Sink().begin(body).all() == content(500_000)
    await plane.end(body)


@pytest.mark.parametrize("how", ["cancel", "release"])
async def test_a_sink_may_end_it_all_from_within_a_write(plane: Plane, how: str) -> None:
    body = plane.body()
    body.add(content(500_000))
    sink = Sink()

    def end() -> None:
        assert sink.replayed is not None
        sink.is_deaf = True
        sink.replayed.cancel() if how == "cancel" else body.release()

    sink.on_write = end
    sink.begin(body)
    await asyncio.wait_for(sink.wrote.wait(), 5)
    await asyncio.sleep(0)
    assert len(sink.pieces) == 1
    await plane.end(body)


async def test_a_long_replay_leaves_other_callbacks_their_turn(plane: Plane) -> None:
    body = plane.body(memory=8 * MIB)
    body.add(bytes(8 * MIB))
    turns: list[int] = []
    sink = Sink().begin(body)
    loop = asyncio.get_running_loop()

    def turn() -> None:
        turns.append(len(sink.pieces))
        if not sink.over.is_set():
            loop.call_soon(turn)

    loop.call_soon(turn)
    await sink.all()
    assert max(later - earlier for earlier, later in pairwise(turns)) <= 32
    await plane.end(body)


async def test_past_its_memory_a_body_without_a_file_is_given_up_and_freed_at_once(plane: Plane) -> None:
    body = plane.body(memory=1000)
    body.add(b"x" * 1000)
    assert body.is_replayable
    body.add(b"y")
    assert not body.is_replayable
    assert plane.budget.memory_used == 0
    assert plane.budget.given_up == 1
    body.add(b"z" * 5000)
    assert (body.size, plane.budget.memory_used, plane.budget.given_up) == (6001, 0, 1)
    with pytest.raises(RuntimeError, match="not kept whole"):
        body.replay(Sink())
    await plane.end(body)


async def test_a_body_given_up_during_a_replay_still_reaches_that_sink_whole(plane: Plane) -> None:
    body = plane.body(memory=300_000)
    body.add(content(300_000))
    sink = Sink().begin(body)
    assert sink.replayed is not None
    sink.replayed.pause()
    body.add(b"too much")
    assert not body.is_replayable
    assert not plane.client.reads.is_set(), "the client waits, so that no more has to be held"
    body.add(b", already read")
    sink.replayed.resume()
    assert await sink.all() == content(300_000) + b"too much, already read"
    assert plane.client.reads.is_set()
    assert plane.budget.memory_used == 0
    await plane.end(body)


async def test_a_body_no_longer_wanted_is_freed_when_its_last_replay_ends(plane: Plane) -> None:
    body = plane.body()
    body.add(content(100_000))
    sinks = [Sink().begin(body), Sink().begin(body)]
    body.stop_keeping()
    assert plane.budget.memory_used == 100_000
    assert not plane.client.reads.is_set()
    assert sinks[0].replayed is not None
    sinks[0].replayed.cancel()
    sinks[0].is_deaf = True
    assert not plane.client.reads.is_set()
    assert await sinks[1].all() == content(100_000)
    assert plane.client.reads.is_set()
    assert plane.budget.memory_used == 0
    body.stop_keeping()
    await plane.end(body)


async def test_after_release_nothing_is_kept_and_nobody_called(plane: Plane) -> None:
    body = plane.body()
    body.add(b"gone")
    sink = Sink().begin(body)
    sink.is_deaf = True
    body.release()
    body.release()
    body.add(b"more")
    assert (body.is_replayable, plane.budget.memory_used) == (False, 0)
    await asyncio.sleep(0)
    await plane.end(body)


# --- budgets


async def test_one_apps_bodies_leave_room_for_anothers(plane: Plane) -> None:
    plane.with_bounds(memory_per_worker=250_000, memory_per_app=100_000)
    kept, over, other = plane.body(), plane.body(), plane.body(app=OTHER)
    kept.add(bytes(80_000))
    over.add(bytes(30_000))
    other.add(bytes(90_000))
    assert [body.is_replayable for body in (kept, over, other)] == [True, False, True]
    assert plane.budget.use_of(APP).memory == 80_000
    kept.release()
    after = plane.body()
    after.add(bytes(80_000))
    assert after.is_replayable
    await plane.end(after, other, over)


async def test_all_apps_together_stay_below_the_workers_bound(plane: Plane) -> None:
    plane.with_bounds(memory_per_worker=100_000, memory_per_app=90_000)
    first, second = plane.body(), plane.body(app=OTHER)
    first.add(bytes(80_000))
    second.add(bytes(30_000))
    assert (first.is_replayable, second.is_replayable) == (True, False)
    await plane.end(first, second)


@pytest.mark.parametrize("bound", ["spool_per_worker", "spool_per_app"])
async def test_past_the_bound_on_files_a_body_is_given_up(plane: Plane, bound: str) -> None:
    plane.with_bounds(**{bound: MIB})
    body = plane.body(memory=100_000, spool=4 * MIB)
    await plane.feed(body, content(2 * MIB))
    await plane.budget.idle()
    assert not body.is_replayable
    assert plane.budget.given_up == 1
    plane.budget.assert_empty()
    await plane.end(body)


async def test_a_body_longer_than_its_file_may_be_is_given_up(plane: Plane) -> None:
    body = plane.body(memory=100_000, spool=MIB)
    await plane.feed(body, bytes(MIB))
    assert body.is_replayable
    body.add(b"x")
    assert not body.is_replayable
    await plane.end(body)


async def test_when_memory_runs_short_bodies_go_to_the_disk_early(plane: Plane) -> None:
    plane.with_bounds(memory_per_app=MIB)
    data = content(400_000)
    bodies = [plane.body(spool=4 * MIB, client=Client()) for _ in range(8)]
    for number, body in enumerate(bodies):
        await plane.feed(body, data[number:])
        await plane.budget.idle()
    assert all(body.is_replayable for body in bodies), "3.2 MB under a bound of 1 MB"
    assert plane.budget.memory_used <= MIB
    assert [await Sink().begin(body).all() for body in bodies] == [data[number:] for number in range(8)]
    await plane.end(*bodies)


@pytest.mark.slow
async def test_two_hundred_uploads_at_once_stay_below_every_bound(plane: Plane) -> None:
    plane.with_bounds(memory_per_worker=16 * MIB, memory_per_app=12 * MIB, spool_per_worker=60 * MIB)
    data = content(MIB)
    bodies, clients = [], [Client() for _ in range(200)]
    for number, client in enumerate(clients):
        spool = 0 if number % 4 == 0 else 4 * MIB
        bodies.append(plane.body(256 * KIB, spool, OTHER if number % 3 == 0 else APP, client))
    peaks = [0, 0, 0]

    async def upload(number: int) -> None:
        for at in range(number, MIB, 65_000):
            await asyncio.wait_for(clients[number].reads.wait(), 20)
            bodies[number].add(data[at : at + 65_000])
            for which, used in enumerate(
                (plane.budget.memory_used, plane.budget.use_of(APP).memory, plane.budget.spool_used)
            ):
                peaks[which] = max(peaks[which], used)
            await asyncio.sleep(0)

    await asyncio.gather(*(upload(number) for number in range(200)))
    await plane.budget.idle()
    assert peaks[0] <= 16 * MIB and peaks[1] <= 12 * MIB and peaks[2] <= 60 * MIB
    assert all(client.reads.is_set() for client in clients)
    whole = [number for number, body in enumerate(bodies) if body.is_replayable]
    assert 55 <= len(whole) <= 64, "about as many as fit: 15 blocks of each lie on disk"
    for number in whole:
        assert await Sink().begin(bodies[number]).all() == data[number:]
    await plane.end(*bodies)


# --- on disk


async def test_a_long_body_lies_on_disk_and_is_sent_again_from_there(plane: Plane) -> None:
    data = content(3_333_333)
    body = plane.body(memory=200_000, spool=8 * MIB)
    await plane.feed(body, data)
    await plane.budget.idle()
    assert plane.budget.memory_used < BLOCK, "only the tail"
    assert plane.budget.spool_used == len(data) // BLOCK * BLOCK
    for pause_every in (0, 1, 3):
        assert await Sink(pause_every).begin(body).all() == data
    await plane.end(body)


async def test_two_replays_and_an_upload_go_on_side_by_side(plane: Plane) -> None:
    data = content(4_000_000)
    body = plane.body(memory=100_000, spool=8 * MIB)
    await plane.feed(body, data[:2_000_000])
    slow, fast = Sink(pause_every=1).begin(body), Sink().begin(body)
    await plane.feed(body, data[2_000_000:], size=31_000)
    assert await slow.all() == data[: len(slow.data)] and await fast.all() == data[: len(fast.data)]
    assert min(len(slow.data), len(fast.data)) >= 2_000_000
    await plane.end(body)


async def test_a_paused_replay_reads_no_more_than_two_pieces_ahead(plane: Plane) -> None:
    body = plane.body(memory=0, spool=8 * MIB)
    body.add(content(2 * MIB))
    await plane.budget.idle()
    sink = Sink().begin(body)
    assert sink.replayed is not None
    sink.replayed.pause()
    await asyncio.sleep(0)
    await plane.budget.idle()
    assert plane.budget.memory_used == 2 * BLOCK
    sink.replayed.cancel()
    assert plane.budget.memory_used == 0
    await plane.end(body)


async def test_the_client_waits_while_too_much_waits_for_the_disk(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "pwritev")
    body = plane.body(memory=100_000, spool=64 * MIB)
    body.add(content(HIGH_MARK))
    assert plane.client.reads.is_set()
    body.add(content(BLOCK))
    assert not plane.client.reads.is_set()
    body.add(content(BLOCK))
    gate.open()
    await asyncio.wait_for(plane.client.reads.wait(), 5)
    assert plane.budget.memory_used <= HIGH_MARK // 4
    await plane.budget.idle()
    assert await Sink().begin(body).all() == content(HIGH_MARK) + content(BLOCK) * 2
    assert plane.client.pauses == 1
    await plane.end(body)


async def test_a_released_client_is_resumed(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "pwritev")
    body = plane.body(memory=100_000, spool=64 * MIB)
    body.add(content(2 * HIGH_MARK))
    assert not plane.client.reads.is_set()
    body.release()
    assert plane.client.reads.is_set()
    gate.open()
    await plane.end(body)


async def test_a_body_released_during_a_write_frees_the_rest_when_that_has_ended(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "pwritev")
    body = plane.body(memory=100_000, spool=64 * MIB)
    body.add(content(MIB))
    await gate.reached()
    body.release()
    assert plane.budget.memory_used == 256 * KIB, "what the thread holds"
    assert spool_files() == 1, "a descriptor that is written to must not be closed, its number may be given away"
    gate.open()
    await plane.end(body)


async def test_a_body_released_during_a_read_leaves_nothing(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    body = plane.body(memory=0, spool=64 * MIB)
    body.add(content(MIB))
    await plane.budget.idle()
    gate = Gate(monkeypatch, "pread")
    sink = Sink().begin(body)
    sink.is_deaf = True
    await gate.reached()
    body.release()
    gate.open()
    await plane.end(body)


async def test_a_disk_that_takes_little_at_a_time_is_asked_again(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_read = os.pwritev, os.pread

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        joined = b"".join(buffers)
        return real_write(fd, [joined[: 40_000 + len(joined) % 7]], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real_read(fd, min(length, 9_999), offset))
    body = plane.body(memory=0, spool=64 * MIB)
    body.add(content(MIB))
    assert await Sink().begin(body).all() == content(MIB)
    await plane.end(body)


async def test_many_bodies_share_the_threads_in_turns(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "pwritev")
    bodies = [plane.body(memory=0, spool=64 * MIB, client=Client()) for _ in range(5)]
    bodies[0].add(content(4 * MIB))
    for body in bodies[1:]:
        body.add(content(BLOCK))
    gate.open()
    await plane.budget.idle()
    assert len(set(plane.budget.order[:5])) == 5, "the long one's second job comes after the others' first"
    await plane.end(*bodies)


async def test_the_file_has_no_name_and_is_its_owners_alone(plane: Plane) -> None:
    body = plane.body(memory=0, spool=MIB)
    body.add(bytes(BLOCK))
    await plane.budget.idle()
    assert plane.folder.stat().st_mode & 0o777 == 0o700
    assert not list(plane.folder.iterdir())
    (fd,) = (fd for fd in Path("/proc/self/fd").iterdir() if str(plane.folder) in _link(fd))
    assert fd.stat().st_mode & 0o777 == 0o600
    assert not os.get_inheritable(int(fd.name))
    await plane.end(body)


async def test_where_every_file_needs_a_name_none_is_left_behind(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    plane.folder.mkdir()
    (plane.folder / "body-of-a-crashed-worker").touch()
    body = plane.body(memory=0, spool=MIB)
    body.add(content(MIB))
    await plane.budget.idle()
    assert not list(plane.folder.iterdir())
    assert await Sink().begin(body).all() == content(MIB)
    await plane.end(body)


async def test_a_folder_that_was_taken_away_is_made_again(plane: Plane) -> None:
    for _ in range(2):
        body = plane.body(memory=0, spool=MIB)
        body.add(content(MIB))
        await plane.budget.idle()
        assert body.is_replayable
        body.release()
        shutil.rmtree(plane.folder)
    await plane.end()


@pytest.mark.slow
async def test_a_hundred_megabytes_cost_a_few_in_memory(plane: Plane) -> None:
    block = content(250_000)
    count = 400
    body = plane.body(spool=128 * MIB)
    tracemalloc.start()
    try:
        for number in range(count):
            await asyncio.wait_for(plane.client.reads.wait(), 20)
            body.add(b"%08d" % number + block[8:])
        written_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        checked = Checked(block, count)
        body.replay(checked)
        await asyncio.wait_for(checked.over.wait(), 50)
        read_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checked.at == count * len(block)
    assert max(written_peak, read_peak) < 8 * MIB
    await plane.end(body)


class Checked:
    """Compares as it goes, and keeps nothing."""

    def __init__(self, block: bytes, count: int) -> None:
        self.at = 0
        self.over = asyncio.Event()
        self._block = block
        self._rest = bytearray()
        self._number = 0
        self._count = count

    def write(self, data: bytes) -> None:
        self.at += len(data)
        self._rest += data
        while len(self._rest) >= len(self._block):
            assert self._rest[:8] == b"%08d" % self._number
            assert self._rest[8 : len(self._block)] == self._block[8:]
            del self._rest[: len(self._block)]
            self._number += 1

    def done(self) -> None:
        assert self._number == self._count and not self._rest
        self.over.set()

    def failed(self, error: Exception) -> None:
        raise AssertionError from error


async def test_a_replay_goes_on_when_the_files_bound_is_met_between_two_of_its_reads(plane: Plane) -> None:
    plane.with_bounds(spool_per_app=4 * BLOCK)
    body = plane.body(memory=0, spool=MIB)
    body.add(content(4 * BLOCK))
    await plane.budget.idle()
    sink = Sink().begin(body)
    await asyncio.sleep(0)
    body.add(content(BLOCK))
    assert body.is_replayable, "the read comes first"
    assert await sink.all() == content(4 * BLOCK) + content(BLOCK)
    assert not body.is_replayable
    await plane.end(body)


# --- a disk that fails


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    real = os.pwritev

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)


async def test_on_a_full_disk_requests_go_on_and_one_warning_a_minute_is_logged(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full_disk(monkeypatch)
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    bodies = [plane.body(memory=0, spool=MIB, client=Client()) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        for body in bodies[:2]:
            body.add(bytes(2 * BLOCK))
        await plane.budget.idle()
        now += 60
        bodies[2].add(bytes(2 * BLOCK))
        await plane.budget.idle()
    assert not any(body.is_replayable for body in bodies)
    assert len(caplog.records) == 2
    assert "No space left" in caplog.text and str(plane.folder) in caplog.text
    assert plane.budget.given_up == 3
    plane.budget.assert_empty()
    await plane.end(*bodies)


async def test_a_disk_that_fills_up_during_a_replay_leaves_it_whole(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, after=256 * KIB)
    data = content(MIB)
    body = plane.body(memory=0, spool=8 * MIB)
    body.add(data[:300_000])
    sink = Sink().begin(body)
    assert sink.replayed is not None
    sink.replayed.pause()
    await plane.budget.idle()
    body.add(data[300_000:])
    await plane.budget.idle()
    assert not body.is_replayable
    assert not plane.client.reads.is_set()
    sink.replayed.resume()
    assert await sink.all() == data, "a part from the disk, the rest from memory"
    assert plane.client.reads.is_set()
    await plane.end(body)


@pytest.mark.parametrize("fault", ["error", "short"])
async def test_a_file_that_cannot_be_read_fails_the_replay(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    body = plane.body(memory=0, spool=8 * MIB)
    body.add(bytes(MIB))
    await plane.budget.idle()
    calls = 0

    def pread(fd: int, length: int, offset: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls < 3:
            return bytes(length)
        if fault == "short":
            return b""
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "pread", pread)
    sink = Sink().begin(body)
    with pytest.raises(OSError, match="bad sector" if fault == "error" else "before what was written"):
        await sink.all()
    assert bytes(sink.data) == bytes(2 * BLOCK)
    assert not body.is_replayable
    await plane.end(body)


async def test_a_folder_that_cannot_be_made_gives_bodies_up(plane: Plane, caplog: pytest.LogCaptureFixture) -> None:
    plane.folder.touch()
    body = plane.body(memory=0, spool=MIB)
    body.add(bytes(BLOCK))
    await plane.budget.idle()
    assert not body.is_replayable
    assert "cannot be kept" in caplog.text
    plane.folder.unlink()
    await plane.end(body)


LIMITED = """
import asyncio, resource, sys
from pathlib import Path
import uvloop
from proxy.edge.body import BodyBudget, KeptBody
from proxy.model import AppName

async def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    budget = BodyBudget(asyncio.get_running_loop(), Path(sys.argv[1]))
    body = KeptBody(budget, AppName("shop"), 100_000, 10_000_000, lambda: None, lambda: None)
    for _ in range(200):
        body.add(bytes(10_000))
        await asyncio.sleep(0)
    for _ in range(10_000):
        if not body.is_replayable and not budget.spool_used:
            break
        await asyncio.sleep(0.001)
    print(body.is_replayable, body.size, budget.memory_used, budget.spool_used, budget.given_up)
    budget.close()

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


@pytest.mark.slow
def test_a_write_that_the_system_cuts_short_and_refuses_frees_the_body(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "spool")], cwd=root, capture_output=True, text=True, timeout=30
    )
    assert child.stdout.split() == ["False", "2000000", "0", "0", "1"], child.stderr
    assert "File too large" in child.stderr


# --- the end


async def test_closing_ends_the_threads_and_closes_every_file(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, busy = plane.body(memory=0, spool=MIB), plane.body(memory=0, spool=MIB, client=Client())
    plain.add(bytes(BLOCK))
    await plane.budget.idle()
    gate = Gate(monkeypatch, "pwritev")
    busy.add(bytes(BLOCK * 8))
    await gate.reached()
    gate.open()
    plane.budget.close()
    assert spool_files() == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("body")]
    busy.add(bytes(BLOCK))
    await plane.budget.idle()
    assert not busy.is_replayable
    sink = Sink().begin(plain)
    with pytest.raises(OSError, match="given up"):
        await sink.all()
    late = plane.body(memory=0, spool=MIB, client=Client())
    late.add(bytes(BLOCK))
    late.add(bytes(BLOCK))
    await plane.end(plain, busy, late)


# --- whatever happens

STEP = st.one_of(
    st.tuples(st.just("add"), st.sampled_from([0, 1, 100, 5_000, BLOCK - 1, BLOCK, 150_000, 400_000])),
    st.tuples(st.just("replay"), st.just(0)),
    st.tuples(st.sampled_from(["pause", "resume", "cancel"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["turn", "disk", "disk fills up", "disk has room"]), st.just(0)),
)
LAST = st.sampled_from(["", "", "stop_keeping", "release"])


class Trial:
    """One sequence of steps on one body, compared with the bytes that were added."""

    def __init__(self, folder: Path, memory: int, spool: int, bounds: dict[str, int]) -> None:
        self.budget = Budget(asyncio.get_running_loop(), folder, **bounds)
        self.client = Client()
        self.body = KeptBody(self.budget, APP, memory, spool, self.client.pause, self.client.resume)
        self.added = bytearray()
        self.sinks: list[Sink] = []
        self._is_full = False
        self._pwritev = os.pwritev

    async def step(self, what: str, argument: int) -> None:
        if what == "add":
            data = content(argument, seed=len(self.added))
            self.added += data
            self.body.add(data)
        elif what == "replay":
            if self.body.is_replayable:
                self.sinks.append(Sink().begin(self.body))
        elif what == "turn":
            await asyncio.sleep(0)
        elif what == "disk":
            await self.budget.idle()
        elif what.startswith("disk"):
            self._is_full = what == "disk fills up"
        elif argument < len(self.sinks):
            self._tell(self.sinks[argument], what)
        for sink in self.sinks:
            assert self.added.startswith(sink.data)

    def pwritev(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self._is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._pwritev(fd, buffers, offset)

    def _tell(self, sink: Sink, what: str) -> None:
        assert sink.replayed is not None
        getattr(sink.replayed, what)()
        if what == "cancel" and not sink.over.is_set():
            sink.is_deaf = True

    async def finish(self, last: str) -> None:
        if last:
            getattr(self.body, last)()
        for sink in self.sinks:
            assert sink.replayed is not None
            if last == "release":
                sink.is_deaf = sink.is_deaf or not sink.over.is_set()
            sink.replayed.resume()
        for sink in self.sinks:
            if not sink.is_deaf:
                assert self.added.startswith(await sink.all())
        whole = self.body.is_replayable
        assert not whole or await Sink().begin(self.body).all() == self.added
        self.body.release()
        await self.budget.idle()
        self.budget.assert_empty()
        assert self.client.reads.is_set()
        self.budget.close()


@pytest.mark.slow
@given(
    steps=st.lists(STEP, max_size=30),
    last=LAST,
    memory=st.sampled_from([0, 1000, 200_000, MIB]),
    spool=st.sampled_from([0, MIB, 64 * MIB]),
    bounds=st.fixed_dictionaries(
        {}, optional={"memory_per_app": st.sampled_from([300_000, MIB]), "spool_per_app": st.just(600_000)}
    ),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sink_gets_the_bytes_added_in_order_and_budgets_return_to_zero(
    tmp_path: Path, steps: list[tuple[str, int]], last: str, memory: int, spool: int, bounds: dict[str, int]
) -> None:
    async def run() -> None:
        trial = Trial(tmp_path / "spool", memory, spool, bounds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwritev", trial.pwritev)
            for what, argument in steps:
                await trial.step(what, argument)
            await trial.finish(last)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())

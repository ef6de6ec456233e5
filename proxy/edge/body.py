"""Request bodies kept while they stream, so that a request can be sent again, elsewhere or after a failure.

A `KeptBody` holds its bytes in memory, and past its share of that in an unnamed file; `BodyBudget`, one per worker,
bounds both, per app and in all, and owns the few threads that touch the disk. Over any bound, and when the disk fails,
the request goes on and is merely not replayable. When to keep, to replay and to release is the exchange's to say.

    offset  0 ............ on disk ............ _start ...... blocks of 64 KiB in memory ...... size

Blocks are written once they are full, in order, and then dropped; a tail shorter than a block never goes to the disk.
All state is the event loop's: a thread gets blocks that change no more, or a range to read, and answers by a callback.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from proxy.clock import monotonic
from proxy.model import AppName

BLOCK = 64 * 1024  # what is stored, read and sent again at a time
BLOCKS_A_WRITE = 4
HIGH_MARK = 1024 * 1024  # bytes waiting for the disk above which the client has to wait too
TIGHT_MARK = 0  # the same, while more than half of a memory budget is in use
READ_AHEAD = 2  # blocks
PIECES_A_TURN = 16  # sent again before other connections get their turn
THREADS = 2
WARN_EVERY_S = 60.0

MIB = 1024 * 1024
GIB = 1024 * MIB

_log = logging.getLogger("wakefront.edge")


class BodySink(Protocol):
    """Who takes a body that is sent again. None of these may raise."""

    def write(self, data: bytes) -> None: ...

    def done(self) -> None:
        """All that came from the client so far is written; what comes from now on is the caller's to pass on."""

    def failed(self, error: Exception) -> None:
        """The rest cannot be read; nothing more follows."""


class _Use:
    """What the bodies of one app hold."""

    __slots__ = ("memory", "spool")

    def __init__(self) -> None:
        self.memory = 0
        self.spool = 0


class BodyBudget:
    """The bounds that all kept bodies of a worker share, and the pool that does their disk work.

    The folder may be shared by workers; it and the threads are made when the first body outgrows its memory.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        folder: Path,
        memory_per_worker: int = 64 * MIB,
        memory_per_app: int = 32 * MIB,
        spool_per_worker: int = 8 * GIB,
        spool_per_app: int = 4 * GIB,
    ) -> None:
        self.loop = loop
        self.folder = folder
        self.memory_used = 0  # bytes; those in the hands of a thread count until it is through with them
        self.spool_used = 0  # not counting files given up, which a thread has yet to close
        self.given_up = 0  # bodies that passed a bound or met a failing disk
        self.is_closed = False
        self._memory_per_worker = memory_per_worker
        self._memory_per_app = memory_per_app
        self._spool_per_worker = spool_per_worker
        self._spool_per_app = spool_per_app
        self._uses: dict[AppName, _Use] = {}  # never shrinks: names come from the configuration, not from clients
        self._files: set[_SpoolFile] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._warned_at = -WARN_EVERY_S

    def use_of(self, app: AppName) -> _Use:
        """The counts of one app: `memory` and `spool`, in bytes."""
        use = self._uses.get(app)
        if use is None:
            use = self._uses[app] = _Use()
        return use

    def take_memory(self, use: _Use, count: int) -> bool:
        if self.memory_used + count > self._memory_per_worker or use.memory + count > self._memory_per_app:
            return False
        self.charge_memory(use, count)
        return True

    def charge_memory(self, use: _Use, count: int) -> None:
        """Count bytes that are held whatever the bounds say, or (negative) that are held no more."""
        self.memory_used += count
        use.memory += count

    def take_spool(self, use: _Use, count: int) -> bool:
        if self.spool_used + count > self._spool_per_worker or use.spool + count > self._spool_per_app:
            return False
        self.charge_spool(use, count)
        return True

    def charge_spool(self, use: _Use, count: int) -> None:
        self.spool_used += count
        use.spool += count

    def is_tight(self, use: _Use) -> bool:
        """Whether memory runs short, so that bodies go to the disk early and their clients wait for it sooner."""
        return 2 * self.memory_used > self._memory_per_worker or 2 * use.memory > self._memory_per_app

    def open_file(self) -> _SpoolFile:
        file = _SpoolFile(self.folder)
        file.is_abandoned = self.is_closed
        self._files.add(file)
        return file

    def forget_file(self, file: _SpoolFile) -> None:
        self._files.discard(file)

    def run(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do `job` in a thread, then call `then` in the loop with what it returned or raised.

        Jobs start in the order given. A body asks for one at a time, so that many share the threads fairly.
        """
        if self.is_closed:
            self._work(job, then)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="body")
        self._pool.submit(self._work, job, then)

    def _work(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        result: Any
        try:
            result = job()
        except Exception as error:  # whatever it is, it must reach the request that waits
            result = error
        self.loop.call_soon_threadsafe(then, result)

    def warn(self, error: Exception) -> None:
        """Log a failing disk, at most once a minute: it fails every body that comes by."""
        now = monotonic()
        if not self.is_closed and now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            _log.warning("bodies cannot be kept in %s, requests go on but cannot be replayed: %s", self.folder, error)

    def close(self) -> None:
        """End the threads and close every file; bodies that are kept in one can be replayed no more."""
        for file in self._files:
            file.is_abandoned = True
        self.is_closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        for file in self._files:
            file.close()
        self._files.clear()


class _SpoolFile:
    """A file without a name, gone with its descriptor. Its methods block: the pool calls them, one at a time."""

    __slots__ = ("_fd", "_folder", "is_abandoned")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self.is_abandoned = False  # nobody wants what is in it: a job that has not begun does nothing

    def write(self, blocks: list[bytearray], offset: int) -> None:
        if self.is_abandoned:
            raise _abandoned()
        if self._fd < 0:
            self._fd = _open_unnamed(self._folder)
        left = [memoryview(block) for block in blocks]
        while left:
            written = os.pwritev(self._fd, left, offset)
            if written == 0:
                raise OSError(errno.EIO, "the file takes no more")
            offset += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]

    def read(self, offset: int, length: int) -> bytes:
        if self.is_abandoned:
            raise _abandoned()
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"the file ends at {offset + len(data)}, before what was written to it")
            data += more
        return data

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _abandoned() -> OSError:
    return OSError(errno.ECANCELED, "the file is given up")


def _open_unnamed(folder: Path) -> int:
    try:
        return _open_in(folder)
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _open_in(folder)


def _open_in(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    # No such files here (NFS, some FUSE). A name is taken away at once, together with what a crash between the two may
    # have left; another worker's is as good as gone already.
    fd, _ = tempfile.mkstemp(prefix="body-", dir=folder)
    for name in folder.glob("body-*"):
        name.unlink(missing_ok=True)
    return fd


class KeptBody:
    """The body of one request, as far as it has come.

    `pause` and `resume` are called in turns, `pause` first: the client has to wait while too much waits for the disk,
    and, once the body is not kept any more, until a replay under way has caught up.
    """

    __slots__ = (
        "_blocks", "_budget", "_file", "_held", "_is_busy", "_is_freed", "_is_paused", "_is_spooling", "_limit",
        "_memory_limit", "_pause", "_replays", "_resume", "_spool_limit", "_spooled", "_start", "_use", "_writing",
        "_wrote_last", "is_replayable", "size",
    )  # fmt: skip

    def __init__(
        self,
        budget: BodyBudget,
        app: AppName,
        memory_limit: int,
        spool_limit: int,
        pause: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        """Up to `memory_limit` bytes stay in memory, up to `spool_limit` go to a file; 0 = memory only."""
        self.size = 0  # bytes added, kept or not
        self.is_replayable = True  # all of them are kept
        self._budget = budget
        self._use = budget.use_of(app)
        self._memory_limit = memory_limit
        self._spool_limit = spool_limit
        self._limit = max(memory_limit, spool_limit)
        self._pause = pause
        self._resume = resume
        self._blocks: list[bytearray] = []  # all full but the last
        self._start = 0  # offset of the first of them: what is before lies on disk
        self._held = 0  # bytes charged for blocks
        self._spooled = 0  # bytes charged for the file
        self._writing = 0  # bytes of the first blocks that a thread is writing
        self._file: _SpoolFile | None = None
        self._is_spooling = False
        self._is_busy = False  # a thread works for this body
        self._wrote_last = False  # reads and writes take turns
        self._is_freed = False
        self._is_paused = False
        self._replays: list[Replayed] = []

    def add(self, data: bytes) -> None:
        """Keep the next bytes of the body."""
        count = len(data)
        if not count:
            return
        self.size += count
        if not self.is_replayable:
            if self._replays:
                self._store_anyway(data)
            return
        if self.size > self._limit or not self._budget.take_memory(self._use, count):
            self._give_up()
            if self._replays:
                self._store_anyway(data)
            return
        self._store(data)
        if self._is_spooling or self._should_spool():
            self._is_spooling = True
            self.next_job()
            self.settle_pause()

    def replay(self, sink: BodySink) -> Replayed:
        """Send all that is kept to `sink`, beginning in the loop's next turn, and what is added meanwhile after it."""
        if not self.is_replayable:
            raise RuntimeError("the body is not kept whole")
        replayed = Replayed(self, sink)
        self._replays.append(replayed)
        self._budget.loop.call_soon(replayed.pump)
        return replayed

    def stop_keeping(self) -> None:
        """No other replay will be asked for: free everything, at once or when the replay under way has caught up."""
        if self.is_replayable:
            self.is_replayable = False
            if not self._replays:
                self._free()
            self.settle_pause()

    def release(self) -> None:
        """Free everything now and call nobody any more, but for the `resume` that may be due."""
        self.is_replayable = False
        for replayed in self._replays:
            replayed.stop()
        self._replays.clear()
        self._free()
        self.settle_pause()

    # What follows is for Replayed and the pool.

    def piece_at(self, offset: int) -> bytes | None:
        """The bytes from `offset` to the end of its block; None when they lie on disk."""
        if offset < self._start:
            return None
        block = self._blocks[(offset - self._start) // BLOCK]
        within = offset % BLOCK
        return bytes(memoryview(block)[within:]) if within else bytes(block)

    def is_on_disk(self, offset: int) -> bool:
        return offset < self._start

    def charge_ahead(self, count: int) -> None:
        """Count what was read for a replay and not taken yet: two blocks at most, so no bound is asked."""
        self._budget.charge_memory(self._use, count)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._budget.loop.call_soon(callback)

    def replay_ended(self, replayed: Replayed) -> None:
        self._replays.remove(replayed)
        if not self.is_replayable and not self._replays:
            self._free()

    def next_job(self) -> None:
        """Give the pool this body's next job, if it has none and there is one."""
        if self._is_busy or self._is_freed:
            return
        may_write = self._is_spooling and self.is_replayable and self.size - self._start >= BLOCK
        if self._wrote_last or not may_write:
            for replayed in self._replays:
                if replayed.wants_read():
                    self._read(replayed)
                    return
        if may_write:
            self._write()

    def settle_pause(self) -> None:
        """Tell the client's reading, if that changed, whether it has to wait."""
        wanted = self._wants_pause()
        if wanted != self._is_paused:
            self._is_paused = wanted
            (self._pause if wanted else self._resume)()

    def _should_spool(self) -> bool:
        if not self._spool_limit or self._budget.is_closed:
            return False
        return self.size > self._memory_limit or self._budget.is_tight(self._use)

    def _store_anyway(self, data: bytes) -> None:
        """Hold what a replay has still to send, though the client is paused: it was read before that took effect."""
        self._budget.charge_memory(self._use, len(data))
        self._store(data)

    def _store(self, data: bytes) -> None:
        blocks = self._blocks
        self._held += len(data)
        room = BLOCK - len(blocks[-1]) if blocks else 0
        if room and len(data) <= room:
            blocks[-1] += data
            return
        if not room and len(data) <= BLOCK:  # as most bodies are: one piece, which is all
            blocks.append(bytearray(data))
            return
        view = memoryview(data)
        if room:
            blocks[-1] += view[:room]
        blocks.extend(bytearray(view[at : at + BLOCK]) for at in range(room, len(data), BLOCK))

    def _give_up(self) -> None:
        if self.is_replayable:
            self._budget.given_up += 1
            self.stop_keeping()

    def _write(self) -> None:
        blocks = self._blocks[: min(BLOCKS_A_WRITE, (self.size - self._start) // BLOCK)]
        count = len(blocks) * BLOCK
        if not self._budget.take_spool(self._use, count):
            self._give_up()
            self.next_job()  # a replay may wait for its turn to read
            return
        if self._file is None:
            self._file = self._budget.open_file()
        self._spooled += count
        self._writing = count
        self._is_busy = True
        self._wrote_last = True
        self._budget.run(partial(self._file.write, blocks, self._start), self._written)

    def _written(self, result: Exception | None) -> None:
        count, self._writing = self._writing, 0
        if self._is_freed:
            self._drop_memory()
        elif result is not None:
            self._budget.warn(result)
            self._give_up()
        else:
            del self._blocks[: count // BLOCK]
            self._start += count
            self._held -= count
            self._budget.charge_memory(self._use, -count)
        self._job_ended()

    def _read(self, replayed: Replayed) -> None:
        assert self._file is not None
        offset = replayed.next_offset
        count = BLOCK - offset % BLOCK
        self.charge_ahead(count)
        self._is_busy = True
        self._wrote_last = False
        self._budget.run(partial(self._file.read, offset, count), partial(self._was_read, replayed, count))

    def _was_read(self, replayed: Replayed, count: int, result: bytes | Exception) -> None:
        if not replayed.is_running:
            self.charge_ahead(-count)
        elif isinstance(result, Exception):
            self.charge_ahead(-count)
            self._budget.warn(result)
            replayed.end()
            self._give_up()
            replayed.sink.failed(result)
        else:
            replayed.take(result)
        self._job_ended()

    def _job_ended(self) -> None:
        self._is_busy = False
        if self._is_freed:
            self._close_file()
        self.next_job()
        self.settle_pause()

    def _free(self) -> None:
        if self._is_freed:
            return
        self._is_freed = True
        self._blocks.clear()
        self._drop_memory()
        # At once, though the disk takes its time: else many that reach the bound together would all be given up, where
        # the room that one leaves lets others finish.
        self._budget.charge_spool(self._use, -self._spooled)
        if self._file is not None:
            self._file.is_abandoned = True
            if not self._is_busy:
                self._close_file()

    def _drop_memory(self) -> None:
        """Count as free all that no thread is writing."""
        self._budget.charge_memory(self._use, self._writing - self._held)
        self._held = self._writing

    def _close_file(self) -> None:
        """In a thread too: to give back the blocks of a large file takes the disk its time."""
        if self._file is not None:
            file, self._file = self._file, None
            self._budget.run(file.close, partial(self._closed, file))

    def _closed(self, file: _SpoolFile, result: Exception | None) -> None:
        if result is not None:
            self._budget.warn(result)
        self._budget.forget_file(file)

    def _wants_pause(self) -> bool:
        if not self.is_replayable:
            return bool(self._replays)
        if not self._is_spooling:
            return False
        waiting = (self.size - self._start) // BLOCK * BLOCK
        mark = TIGHT_MARK if self._budget.is_tight(self._use) else HIGH_MARK
        return waiting > (mark // 4 if self._is_paused else mark)


class Replayed:
    """One sending again of a kept body. While `is_running` it waits for its start, the sink, or the disk."""

    __slots__ = ("_ahead", "_body", "_is_paused", "_is_pumping", "is_running", "next_offset", "sink")

    def __init__(self, body: KeptBody, sink: BodySink) -> None:
        self.is_running = True
        self.next_offset = 0  # where what is neither sent nor read ahead begins
        self._body = body
        self.sink = sink
        self._ahead: deque[bytes] = deque()
        self._is_paused = False
        self._is_pumping = False

    def pause(self) -> None:
        """The sink's way is full."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self.pump()

    def cancel(self) -> None:
        """Send nothing more; the sink is not called again. The body stays kept."""
        if self.is_running:
            self.end()
            self._body.settle_pause()

    # What follows is for KeptBody.

    def pump(self) -> None:
        """Send on as long as the sink takes it and it need not be waited for."""
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            self._send()
        finally:
            self._is_pumping = False
        if self.is_running:
            self._body.next_job()

    def wants_read(self) -> bool:
        return len(self._ahead) < READ_AHEAD and self._body.is_on_disk(self.next_offset)

    def take(self, piece: bytes) -> None:
        self._ahead.append(piece)
        self.next_offset += len(piece)
        self.pump()

    def stop(self) -> None:
        self.is_running = False
        while self._ahead:
            self._body.charge_ahead(-len(self._ahead.popleft()))

    def end(self) -> None:
        self.stop()
        self._body.replay_ended(self)

    def _send(self) -> None:
        for _ in range(PIECES_A_TURN):
            if self._is_paused or not self.is_running:
                return
            if self._ahead:
                piece = self._ahead.popleft()
                self._body.charge_ahead(-len(piece))
            elif self.next_offset < self._body.size:
                in_memory = self._body.piece_at(self.next_offset)
                if in_memory is None:
                    return
                piece = in_memory
                self.next_offset += len(piece)
            else:
                self.end()
                self.sink.done()
                self._body.settle_pause()
                return
            self.sink.write(piece)
        self._body.call_soon(self.pump)

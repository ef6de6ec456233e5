"""Shared memory: heartbeats, load counters and metric cells, one writer to a cell.

Laid out as 8-byte aligned cells in a memfd that the supervisor makes and every child maps. A cell is written by one
process only; others read it. So no increment is ever lost and no lock is needed, but for the one fence in `Load.admit`.
The supervisor zeroes a dead worker's gauges after it has been reaped; counters that only grow stay.

Every living worker has a row of its own. There are more rows than workers, so that workers which take over from others
can serve beside them; sums go over the rows in use alone.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from typing import Final

LAYOUT: Final = 2  # of this memory: processes that share it agree on it, or one of them leaves
MACHINE_SLOTS: Final = 65_536
APP_SLOTS: Final = 16_384
_LINE: Final = 8  # cells in a cache line

# Cells of the header: the layout is the first, the number of rows the second.
_IN_USE: Final = 2
_EVER_USED: Final = 3

# Cells of a worker's own block.
WORKER_CELLS: Final = 64
W_CONNECTIONS: Final = 0  # gauge: client connections open
W_TLS_HANDSHAKES: Final = 1
W_TLS_RESUMED: Final = 2
W_TLS_ERRORS: Final = 3
W_ACCEPTED: Final = 4
W_REFUSED: Final = 5  # connections over the limit
W_LOG_DROPPED: Final = 6  # access-log lines lost because the file could not be written
W_WAKES: Final = 7
W_TLS_TIME_US: Final = 8
W_LOOP_LAG_US: Final = 9  # gauge: latest measured lateness of the loop
W_QUEUED: Final = 10  # gauge: requests that wait for a machine below its hard limit
W_QUEUE_TIMEOUTS: Final = 11  # those that waited in vain
W_SOURCE_REFUSED: Final = 12  # connections and handshakes over the limits of their source
W_SHED_CONNECTIONS: Final = 13  # connections refused for overload
W_SHED_REQUESTS: Final = 14  # requests refused for overload
W_OVERLOAD_STAGE: Final = 15  # gauge: decide.overload.Stage
W_PEER_CONNECTS: Final = 16  # connections made to other edges
W_PEER_REQUESTS: Final = 17  # requests sent to other edges, each attempt
W_PEER_REFUSALS: Final = 18  # of those, the ones that the other edge refused
W_BACKHAUL_REQUESTS: Final = 19  # requests that other edges sent here
_WORKER_GAUGES = (W_CONNECTIONS, W_LOOP_LAG_US, W_QUEUED, W_OVERLOAD_STAGE)

# Cells of an app's block, in each worker's part.
APP_CELLS: Final = 128
STATUSES = (
    100, 101, 103, 200, 201, 202, 203, 204, 205, 206, 207, 208, 226, 300, 301, 302, 303, 304, 307, 308, 400, 401, 402,
    403, 404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 423, 424, 425, 426, 428,
    429, 431, 451, 500, 501, 502, 503, 504, 505, 506, 507, 508, 510, 511,
)  # fmt: skip
STATUS_CELL: Final = {status: cell for cell, status in enumerate(STATUSES)}
OTHER_STATUS: Final = 63  # the cell of every status not listed
LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
A_LATENCY: Final = 64  # len(LATENCY_BOUNDS_S) + 1 buckets, not cumulative
A_LATENCY_SUM_US: Final = 80
A_BYTES_IN: Final = 81
A_BYTES_OUT: Final = 82
A_CONNECTS: Final = 83  # client connections whose first request was for this app
A_DISCONNECTS: Final = 84
A_UPSTREAM_CONNECTS: Final = 85
A_UPSTREAM_DISCONNECTS: Final = 86
A_UPSTREAM_CONNECT_TIME_US: Final = 87
A_UPSTREAM_LATENCY: Final = 88  # buckets of the time to the machine's response head
A_UPSTREAM_LATENCY_SUM_US: Final = 104
A_ERRORS: Final = 105  # answers that we made ourselves because something failed
A_WAKES: Final = 106  # requests that waited for a machine to start


class SharedMemory:
    """The map and where things are in it. Sizes follow from the number of rows alone, which the memory itself tells.

    `cells` is the whole as signed 64-bit integers. The file is sparse: pages never written cost nothing.
    Raises ValueError for a memory of another layout.
    """

    def __init__(self, fd: int) -> None:
        header: tuple[int, int] = struct.unpack("2q", os.pread(fd, 16, 0).ljust(16, b"\0"))
        layout, rows = header
        if layout != LAYOUT:
            raise ValueError(f"the shared memory is of layout {layout}, this program's is {LAYOUT}")
        self.rows = rows
        self._heartbeats = _LINE
        self._workers = self._heartbeats + (rows + 1) * _LINE
        self._load = self._workers + rows * WORKER_CELLS
        self._apps = self._load + rows * MACHINE_SLOTS * 2
        self._queues = self._apps + rows * APP_SLOTS * APP_CELLS
        self.size = (self._queues + rows * APP_SLOTS) * 8
        if os.fstat(fd).st_size < self.size:
            os.ftruncate(fd, self.size)
        self._map = mmap.mmap(fd, self.size)
        self.cells = memoryview(self._map).cast("q")

    @staticmethod
    def create(workers: int, rows: int = 0) -> tuple[int, SharedMemory]:
        """A new, zeroed memory with the first `workers` rows in use, of `rows` in all.

        The descriptor is inheritable by fork and closed on exec.
        """
        fd = os.memfd_create("wakefront", os.MFD_CLOEXEC)
        os.pwrite(fd, struct.pack("2q", LAYOUT, max(workers, rows)), 0)
        memory = SharedMemory(fd)
        memory.use_rows(workers)
        return fd, memory

    @property
    def rows_in_use(self) -> int:
        """Rows that may have a living worker: all below this number."""
        return self.cells[_IN_USE]

    @property
    def rows_ever_used(self) -> int:
        return self.cells[_EVER_USED]

    def use_rows(self, number: int) -> None:
        """For the supervisor, before the fork of a worker in a higher row, or when the highest ones are free."""
        self.cells[_IN_USE] = number
        self.cells[_EVER_USED] = max(number, self.cells[_EVER_USED])

    # heartbeats: monotonic nanoseconds, written by the child itself
    def beat(self, index: int, now_ns: int) -> None:
        self.cells[self._heartbeats + index * _LINE] = now_ns

    def last_beat(self, index: int) -> int:
        return self.cells[self._heartbeats + index * _LINE]

    def worker_base(self, worker: int) -> int:
        """First cell of a worker's own block (W_ names are offsets into it)."""
        return self._workers + worker * WORKER_CELLS

    def app_base(self, worker: int, app_slot: int) -> int:
        """First cell of an app's block in a worker's part (A_ names and STATUS_CELL are offsets into it)."""
        return self._apps + (worker * APP_SLOTS + app_slot) * APP_CELLS

    def load_base(self, worker: int) -> int:
        """First cell of a worker's load column: in-flight of machine slot s at +2*s, admitted in all at +2*s+1."""
        return self._load + worker * MACHINE_SLOTS * 2

    def queue_base(self, worker: int) -> int:
        """First of a worker's queue cells: for each app slot since when its oldest request waits, ns; 0 = none does."""
        return self._queues + worker * APP_SLOTS

    def in_flight(self, slot: int) -> int:
        """Requests (or connections) in flight on a machine, over all workers."""
        cells = self.cells
        first = self._load + slot * 2
        return sum(cells[first : first + cells[_IN_USE] * (MACHINE_SLOTS * 2) : MACHINE_SLOTS * 2])

    def waiting(self, app_slot: int) -> int:
        """Not 0 if requests of an app wait in any worker: the sum of its queue cells."""
        cells = self.cells
        first = self._queues + app_slot
        return sum(cells[first : first + cells[_IN_USE] * APP_SLOTS : APP_SLOTS])

    def admitted(self, slot: int) -> int:
        """Requests ever admitted to a machine slot. It only grows, so a difference means there was traffic."""
        first = self._load + slot * 2 + 1
        return sum(self.cells[first + worker * MACHINE_SLOTS * 2] for worker in range(self.rows_ever_used))

    def app_total(self, app_slot: int, cell: int) -> int:
        return sum(self.cells[self.app_base(worker, app_slot) + cell] for worker in range(self.rows_ever_used))

    def worker_total(self, cell: int) -> int:
        return sum(self.cells[self.worker_base(worker) + cell] for worker in range(self.rows_ever_used))

    def clear_worker(self, worker: int) -> None:
        """Zero a reaped worker's gauges: its load column's in-flight cells and its connection count."""
        first = self._load + worker * MACHINE_SLOTS * 2
        column = self.cells[first : first + MACHINE_SLOTS * 2]
        for cell in range(0, MACHINE_SLOTS * 2, 2):
            if column[cell]:
                column[cell] = 0
        first = self.queue_base(worker)
        waiting = self.cells[first : first + APP_SLOTS]
        for slot in range(APP_SLOTS):
            if waiting[slot]:
                waiting[slot] = 0
        base = self.worker_base(worker)
        for gauge in _WORKER_GAUGES:
            self.cells[base + gauge] = 0

    def close(self) -> None:
        self.cells.release()
        self._map.close()


class Load:
    """One worker's column of the load counters, and admission against the sum over all workers."""

    __slots__ = ("_base", "_cells", "_fence", "_memory")

    def __init__(self, memory: SharedMemory, worker: int) -> None:
        self._memory = memory
        self._cells = memory.cells
        self._base = memory.load_base(worker)
        self._fence = threading.Lock()

    def admit(self, slot: int, hard_limit: int | None) -> bool:
        """Count one more on a machine, or, when that would pass `hard_limit` over all workers, leave it uncounted.

        The own increment is published before the others are read, with a full fence between: two workers may both
        retreat, never both pass. An uncontended lock is that fence (measured: without one two processes missed each
        other).
        """
        cells = self._cells
        index = self._base + slot * 2
        cells[index] += 1
        if hard_limit is not None:
            self.fence()
            if self._memory.in_flight(slot) > hard_limit:
                cells[index] -= 1
                return False
        cells[index + 1] += 1
        return True

    def release(self, slot: int) -> None:
        self._cells[self._base + slot * 2] -= 1

    def release_fenced(self, slot: int) -> None:
        """Release a place that others may wait for: what is read after this was written by who saw it taken."""
        self._cells[self._base + slot * 2] -= 1
        self.fence()

    def fence(self) -> None:
        """A full memory fence: what was written before is seen by others before what is read after."""
        with self._fence:
            pass

    def count_connection(self, slot: int, change: int) -> None:
        """Count a tunnel or raw connection in or out without admission."""
        self._cells[self._base + slot * 2] += change

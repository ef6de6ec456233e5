"""state.py: counters of several processes in one memory; nothing is lost, no limit is passed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from proxy.state import (
    A_ERRORS,
    A_LATENCY,
    A_LATENCY_SUM_US,
    A_UPSTREAM_LATENCY,
    A_UPSTREAM_LATENCY_SUM_US,
    A_WAKES,
    APP_CELLS,
    LATENCY_BOUNDS_S,
    MACHINE_SLOTS,
    OTHER_STATUS,
    STATUS_CELL,
    STATUSES,
    W_ACCEPTED,
    W_CONNECTIONS,
    W_LOOP_LAG_US,
    WORKER_CELLS,
    Load,
    SharedMemory,
)

WORKERS = 2
SLOT = 5


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    fd, memory = SharedMemory.create(WORKERS)
    os.close(fd)
    yield memory
    memory.close()


def in_processes(*jobs: Callable[[], None]) -> list[int]:
    """Run each job in a forked process, at once; the exit codes."""
    pids = []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                job()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_two_processes_together_never_pass_a_hard_limit(memory: SharedMemory, limit: int) -> None:
    """Each marks what it holds only between admit and release, so both marks read by one are a floor of the truth."""
    held = memory.worker_base(0) + 32, memory.worker_base(1) + 32  # cells that nobody else uses
    cells = memory.cells

    def job(worker: int) -> None:
        load = Load(memory, worker)
        mine, other = held[worker], held[1 - worker]
        most = 0
        for _ in range(40_000):
            taken = 0
            for _ in range(limit + 1):
                if not load.admit(SLOT, limit):
                    break
                taken += 1
                cells[mine] += 1
                for _ in range(8):  # hold it for a moment, so that two holders meet
                    most = max(most, cells[mine] + cells[other])
            for _ in range(taken):
                cells[mine] -= 1
                load.release(SLOT)
        assert most <= limit and most > 0

    assert in_processes(lambda: job(0), lambda: job(1)) == [0, 0]
    assert memory.in_flight(SLOT) == 0 and memory.admitted(SLOT) > 0


@pytest.mark.slow
def test_no_increment_of_two_processes_is_lost(memory: SharedMemory) -> None:
    def job(worker: int) -> None:
        load = Load(memory, worker)
        for _ in range(20_000):
            assert load.admit(SLOT, None)

    assert in_processes(lambda: job(0), lambda: job(1)) == [0, 0]
    assert memory.in_flight(SLOT) == memory.admitted(SLOT) == 40_000


def test_a_refusal_leaves_no_count_behind(memory: SharedMemory) -> None:
    first, second = Load(memory, 0), Load(memory, 1)
    assert first.admit(SLOT, 1) and not second.admit(SLOT, 1) and not first.admit(SLOT, 1)
    assert memory.in_flight(SLOT) == 1 and memory.admitted(SLOT) == 1
    first.release(SLOT)
    assert second.admit(SLOT, 1) and memory.in_flight(SLOT) == 1


def test_slots_and_workers_do_not_touch_each_other(memory: SharedMemory) -> None:
    loads = [Load(memory, worker) for worker in range(WORKERS)]
    for load in loads:
        for slot in (0, 1, MACHINE_SLOTS - 1):
            assert load.admit(slot, None)
    loads[0].count_connection(1, 3)
    assert [memory.in_flight(slot) for slot in (0, 1, 2, MACHINE_SLOTS - 1)] == [2, 5, 0, 2]


def test_a_reaped_workers_gauges_go_and_what_only_grows_stays(memory: SharedMemory) -> None:
    for worker in range(WORKERS):
        load = Load(memory, worker)
        load.admit(SLOT, None)
        load.admit(MACHINE_SLOTS - 1, None)
        base = memory.worker_base(worker)
        for cell in (W_CONNECTIONS, W_LOOP_LAG_US, W_ACCEPTED):
            memory.cells[base + cell] = 7
        memory.cells[memory.app_base(worker, 3) + A_WAKES] = 7
    memory.clear_worker(0)
    assert memory.in_flight(SLOT) == memory.in_flight(MACHINE_SLOTS - 1) == 1 and memory.admitted(SLOT) == 2
    assert memory.worker_total(W_CONNECTIONS) == memory.worker_total(W_LOOP_LAG_US) == 7
    assert memory.worker_total(W_ACCEPTED) == 14 and memory.app_total(3, A_WAKES) == 14


def test_heartbeats_are_read_by_who_did_not_write_them(memory: SharedMemory) -> None:
    (code,) = in_processes(lambda: memory.beat(2, 123_456_789))
    assert code == 0 and memory.last_beat(2) == 123_456_789 and memory.last_beat(0) == memory.last_beat(1) == 0


def test_blocks_lie_apart_and_within_the_map(memory: SharedMemory) -> None:
    starts = [
        memory.worker_base(0),
        memory.worker_base(1),
        memory.load_base(0),
        memory.load_base(1),
        memory.app_base(0, 0),
    ]
    sizes = [WORKER_CELLS, WORKER_CELLS, MACHINE_SLOTS * 2, MACHINE_SLOTS * 2, APP_CELLS]
    assert starts[0] >= (WORKERS + 1) * 8
    assert all(start + size == after for start, size, after in zip(starts, sizes, starts[1:], strict=False))
    assert memory.app_base(1, 16_383) + APP_CELLS == memory.queue_base(0)
    assert memory.queue_base(1) + 16_384 == len(memory.cells) and memory.size == len(memory.cells) * 8


def test_cells_of_an_app_do_not_overlap() -> None:
    assert len(set(STATUSES)) == len(STATUSES) <= OTHER_STATUS < A_LATENCY and max(STATUS_CELL.values()) < OTHER_STATUS
    assert A_LATENCY + len(LATENCY_BOUNDS_S) + 1 <= A_LATENCY_SUM_US
    assert A_UPSTREAM_LATENCY + len(LATENCY_BOUNDS_S) + 1 <= A_UPSTREAM_LATENCY_SUM_US < A_ERRORS < A_WAKES < APP_CELLS
    assert list(LATENCY_BOUNDS_S) == sorted(LATENCY_BOUNDS_S)


def test_the_memory_of_unused_slots_costs_nothing(memory: SharedMemory) -> None:
    fd, other = SharedMemory.create(4)
    try:
        other.beat(0, 1)
        assert os.fstat(fd).st_size == other.size > 64 * 1024 * 1024 and os.fstat(fd).st_blocks * 512 < 64 * 1024
    finally:
        other.close()
        os.close(fd)

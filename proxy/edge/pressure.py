"""Measures how hard pressed this worker is, ten times a second, and puts decide/overload.py's judgement into effect.

What reads the effect: `EdgeContext.sheds_connections` at accept (listener.py), `sheds_requests` where a request begins
(exchange.py), `is_crowded` where an answer says whether its connection stays (downstream.py).
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy.clock import monotonic
from proxy.decide.overload import Overload, Pressure, Stage
from proxy.state import W_OVERLOAD_STAGE

if TYPE_CHECKING:
    from proxy.edge.context import EdgeContext
    from proxy.edge.listener import Gate

LOOK_S = 0.1
MEMORY_EVERY = 10  # looks: to read it costs 10 us
CROWDED_LINGER_S = 1.0  # a kept connection that rests goes after this
_SHARE_OF_HOST = 0.8  # of the host's memory that all workers together may have, where nothing else is said
TRIM_FROM = 0.75  # of the limit: below every mark of memory
TRIM_EVERY_S = 10.0  # it may take milliseconds
TOLD_EVERY_S = 30.0  # that descriptors are out
_PAGE = os.sysconf("SC_PAGE_SIZE")
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, malloc_trim(3)

log = logging.getLogger("overload")


class PressureGauge:
    """Belongs to one worker. `start` it on its loop."""

    def __init__(self, edge: EdgeContext, gate: Gate, workers: int, let_go: Callable[[float], None]) -> None:
        """`let_go(linger_s)` has every connection that rests end after so long."""
        self._edge = edge
        self._gate = gate
        self._workers = workers
        self._let_go = let_go
        self._overload = Overload()
        self._due = 0.0
        self._looks = 0
        self._memory_bytes = 0
        self._trimmed_at = float("-inf")
        self._host_bytes = host_memory_bytes()
        self._statm = open_statm()
        self._is_out_of_descriptors = False
        self._told_at = float("-inf")
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due = monotonic() + LOOK_S
        self._handle = self._edge.loop.call_later(LOOK_S, self._look)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        os.close(self._statm)

    def _look(self) -> None:
        now = monotonic()
        lag = max(0.0, now - self._due)
        try:
            self.judge(lag, now)
        finally:
            self._due = monotonic() + LOOK_S
            self._handle = self._edge.loop.call_later(LOOK_S, self._look)

    def judge(self, lag_s: float, now: float) -> None:
        """Take one measurement of the loop's lateness, and all others at hand."""
        limit = self._edge.settings.max_memory_bytes or int(self._host_bytes * _SHARE_OF_HOST / self._workers)
        if self._looks % MEMORY_EVERY == 0:
            self._memory_bytes = resident_bytes(self._statm)
            if self._memory_bytes >= limit * TRIM_FROM and now - self._trimmed_at >= TRIM_EVERY_S:
                self._trimmed_at = now
                release_free_memory()
                self._memory_bytes = resident_bytes(self._statm)
            self._look_for_descriptors(now)
        self._looks += 1
        # without a descriptor to give, it has as many connections as it can have
        open_share = 1.0 if self._is_out_of_descriptors else self._gate.open / max(1, self._gate.limit)
        pressure = Pressure(open_share, self._memory_bytes / max(1, limit), lag_s)
        before = self._overload.stage
        stage = self._overload.look(pressure, now)
        if stage is not before:
            self._apply(stage, before)

    def _look_for_descriptors(self, now: float) -> None:
        """Whether there is one left. The loop closes what it accepts without, and tells nobody."""
        try:
            os.close(os.dup(self._statm))
            self._is_out_of_descriptors = False
        except OSError as error:
            self._is_out_of_descriptors = True
            if now - self._told_at >= TOLD_EVERY_S:
                self._told_at = now
                most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                log.warning(
                    "no file descriptor is left of %d, new connections are closed: %s. Raise the limit of open files"
                    " (LimitNOFILE of a systemd unit), or lower max_connections",
                    most, error.strerror,
                )  # fmt: skip

    def _apply(self, stage: Stage, before: Stage) -> None:
        edge = self._edge
        edge.is_crowded = stage >= Stage.CROWDED
        edge.sheds_connections = stage >= Stage.SHED_CONNECTIONS
        edge.sheds_requests = stage >= Stage.SHED_REQUESTS
        edge.cells[edge.worker_base + W_OVERLOAD_STAGE] = int(stage)
        why = f" ({self._overload.why})" if self._overload.why else ""
        log.warning("overload: %s, was %s%s", stage.name.lower(), before.name.lower(), why)
        if stage >= Stage.CROWDED and before is Stage.NORMAL:
            self._let_go(CROWDED_LINGER_S)


def release_free_memory() -> None:
    """Give back what the allocator keeps of memory that is free: else a flood that is over would go on counting."""
    if _trim is not None:
        _trim(0)


def open_statm() -> int:
    """A descriptor for `resident_bytes` of this process: to be had before descriptors run out."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def resident_bytes(statm: int) -> int:
    """Of the process that opened it (proc(5), statm)."""
    return int(os.pread(statm, 128, 0).split()[1]) * _PAGE


def host_memory_bytes(root: str = "") -> int:
    """What there is for all: the host's memory, or less where a control group says so (cgroup v2, memory.max)."""
    most = os.sysconf("SC_PHYS_PAGES") * _PAGE
    try:
        with open(f"{root}/proc/self/cgroup") as file:
            group = next((line.split("::", 1)[1].strip() for line in file if line.startswith("0::")), "/")
        while True:
            try:
                with open(f"{root}/sys/fs/cgroup{group.rstrip('/')}/memory.max") as file:
                    if (text := file.read().strip()).isdigit():
                        most = min(most, int(text))
            except OSError:  # this level sets none
                pass
            if group in ("", "/"):
                return most
            group = os.path.dirname(group)
    except OSError:  # no control groups here
        return most

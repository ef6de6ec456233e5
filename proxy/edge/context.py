"""What every connection of a worker shares: the table, the clock, the counters, the ways to control."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from proxy.clock import unix
from proxy.decide.ewma import MachineScores
from proxy.decide.replay_cache import ReplayCache
from proxy.decide.ulid import TraceMaker, UlidMaker
from proxy.edge.access_log import AccessLog
from proxy.edge.access_record import Record
from proxy.edge.body import BodyBudget
from proxy.edge.peer_tls import PeerTls
from proxy.edge.queue import Queue, Ring
from proxy.edge.sources import Sources
from proxy.edge.table import Table
from proxy.edge.timers import Wheel
from proxy.edge.waker import Waker
from proxy.edge.warmth import Warmth
from proxy.errors import Code, ProxyError, http_status
from proxy.ipc import Message, Settings
from proxy.model import NodeName, RegionCode
from proxy.state import (
    A_BYTES_IN,
    A_BYTES_OUT,
    A_ERRORS,
    A_LATENCY,
    A_LATENCY_SUM_US,
    A_UPSTREAM_CONNECT_TIME_US,
    A_UPSTREAM_CONNECTS,
    A_UPSTREAM_DISCONNECTS,
    A_UPSTREAM_LATENCY,
    A_UPSTREAM_LATENCY_SUM_US,
    A_WAKES,
    LATENCY_BOUNDS_S,
    OTHER_STATUS,
    STATUS_CELL,
    W_LOG_DROPPED,
    Load,
    SharedMemory,
)
from proxy.wire.http1 import Limits

_log = logging.getLogger("wakefront.edge")
_BOUNDS_US: Final[tuple[int, ...]] = tuple(int(bound * 1_000_000) for bound in LATENCY_BOUNDS_S)


class ControlLink(Protocol):
    """How a worker tells control something; a message is lost while control is away, and asked again after."""

    def send(self, message: Message) -> bool: ...


class EdgeContext:
    """One per worker process."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        memory: SharedMemory,
        worker: int,
        settings: Settings,
        public_ports: dict[int, int],
        link: ControlLink,
        spool_folder: Path,
        ring: Ring,
        workers: int = 1,
    ) -> None:
        """`public_ports` maps each public port that is listened on to the port bound for it; `spool_folder` is where
        request bodies that are kept go beyond memory; `ring` rings the bell of another worker (queue.py); `workers`
        share what a rule allows the whole node."""
        self.loop = loop
        self.memory = memory
        self.worker = worker
        self.cells = memory.cells
        self.worker_base = memory.worker_base(worker)
        self.load = Load(memory, worker)
        self.wheel = Wheel(loop)
        self.table = Table(public_ports, lambda slot: memory.app_base(worker, slot), workers)
        self.public_ports = public_ports
        self.rng = random.Random()
        self.held_bytes = 0  # of request bodies that have no machine to go to yet
        self.scores = MachineScores()
        self.table.on_moved = self.scores.forget
        self.replays = ReplayCache()
        self.queue = Queue(loop, self.load, memory, worker, self.wheel, ring)
        self.sticky_keys: tuple[bytes, ...] = (os.urandom(32),)  # until the node's own are given
        self.bodies = BodyBudget(loop, spool_folder)
        self.link = link
        self.waker = Waker(self.wheel, link, self.table)
        self.waker.on_started = self.queue.poke
        self.warmth = Warmth(self)
        self.waker.on_machine, self.waker.on_gone = self.warmth.on_machine, self.warmth.on_gone
        self.http_challenge: Callable[[str], bytes | None] = lambda token: None  # what a CA looks for, by its token
        self.ulids = UlidMaker(os.urandom(8))
        self.traces = TraceMaker(os.urandom(16))
        self.is_drained = False  # other nodes' machines are to have the requests, where there are any
        self.region_ranks: dict[RegionCode, int] = {}  # 0 = the nearest
        self.peer_tls: Callable[[NodeName], PeerTls] | None = None  # while this node has a certificate of the fleet's
        self.log = AccessLog("", "json", self.wheel, self._count_dropped)
        self.draining = False
        self.sources = Sources(workers)
        self.is_crowded = False  # these three: see pressure.py
        self.sheds_connections = False
        self.sheds_requests = False
        self.settings = Settings(settings.protocol, "", "", "")
        self.server = b"wakefront"
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Take new settings: they hold from the next connection or request on."""
        old = self.settings
        log_changed = (old.access_log, old.access_log_format) != (settings.access_log, settings.access_log_format)
        self.settings = settings
        self.region = settings.region
        self.limits = Limits(settings.max_head_bytes, settings.max_headers, settings.max_target_bytes)
        self.id_suffix = b"-" + settings.region.encode("ascii")
        self.waker.set_budgets(settings.wake_hints_per_source_s, settings.wake_hints_per_s)
        if log_changed:
            self.log.close()
            self.log = self._open_log(settings)

    def _open_log(self, settings: Settings) -> AccessLog:
        """The access log asked for; none, and a word of why, where it can't be opened: requests go on without."""
        try:
            return AccessLog(settings.access_log, settings.access_log_format, self.wheel, self._count_dropped)
        except OSError as error:
            _log.error("the access log %s cannot be opened, requests go unrecorded: %s", settings.access_log, error)
            return AccessLog("", "json", self.wheel, self._count_dropped)

    def in_flight(self, slot: int) -> int:
        return self.memory.in_flight(slot)

    def new_request_id(self) -> bytes:
        return self.ulids.next(int(unix() * 1000)) + self.id_suffix

    def count(self, cell: int, change: int = 1) -> None:
        """Change one of this worker's own cells (state.W_*)."""
        self.cells[self.worker_base + cell] += change

    def count_app(
        self, base: int, upstream_connects: int = 0, upstream_disconnects: int = 0, upstream_connect_us: int = 0
    ) -> None:
        cells = self.cells
        if upstream_connects:
            cells[base + A_UPSTREAM_CONNECTS] += upstream_connects
            cells[base + A_UPSTREAM_CONNECT_TIME_US] += upstream_connect_us
        if upstream_disconnects:
            cells[base + A_UPSTREAM_DISCONNECTS] += upstream_disconnects

    def count_request(
        self, base: int, status: int, us: int, upstream_us: int, bytes_in: int, bytes_out: int, failed: bool, woke: bool
    ) -> None:
        """Account one finished request of the app whose cells begin at `base`."""
        cells = self.cells
        cells[base + STATUS_CELL.get(status, OTHER_STATUS)] += 1
        cells[base + A_LATENCY + bisect_left(_BOUNDS_US, us)] += 1
        cells[base + A_LATENCY_SUM_US] += us
        if upstream_us:
            cells[base + A_UPSTREAM_LATENCY + bisect_left(_BOUNDS_US, upstream_us)] += 1
            cells[base + A_UPSTREAM_LATENCY_SUM_US] += upstream_us
        if bytes_in:
            cells[base + A_BYTES_IN] += bytes_in
        if bytes_out:
            cells[base + A_BYTES_OUT] += bytes_out
        if failed:
            cells[base + A_ERRORS] += 1
        if woke:
            cells[base + A_WAKES] += 1

    def log_rejected(self, client_ip: str, is_tls: bool, public_port: int, error: ProxyError) -> None:
        """The record of bytes that made no request."""
        if self.log.is_on:
            self.log.write(
                Record(
                    unix(), "", client_ip, "", "", "", http_status(error.code), 0.0, 0, 0, "", public_port, is_tls,
                    code=error.code.value, detail=error.detail,
                )
            )  # fmt: skip

    def log_failed_tls(self, client_ip: str, public_port: int, name: str | None, code: Code, detail: str) -> None:
        """The record of a connection that failed before, or beneath, its requests. Its status is 0: none was sent."""
        if self.log.is_on:
            app = self.table.find(name or "")
            self.log.write(
                Record(
                    unix(), app.record.name if app is not None else "", client_ip, "", name or "", "", 0, 0.0, 0, 0, "",
                    public_port, True, code=code.value, detail=detail,
                )
            )  # fmt: skip

    def _count_dropped(self, lines: int) -> None:
        self.count(W_LOG_DROPPED, lines)

    def close(self) -> None:
        self.queue.close()
        self.bodies.close()
        self.log.close()
        self.wheel.close()

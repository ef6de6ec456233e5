"""Requests that wait because every machine they may go to is at its hard limit: in line, the oldest first, bounded.

One `Queue` per worker; the line runs through all of them. Each worker publishes, for every app, since when its oldest
request waits. Who frees a place reads those, and gives the place to the oldest: to one of its own, or by ringing the
bell of the worker that has it. A request that comes while others wait goes to the end of the line, even if a place is
free: it is another's. So order holds over workers but for the moment that a bell takes. Those who wait for one certain
machine hold up nobody who may go to another: they are passed over, and a worker that is rung and has nobody for the
place rings the one whose oldest comes next.

No place is lost: waiting publishes, then looks for room; freeing makes room, then looks for who waits; with a full
memory fence in between on both sides, one of the two sees the other. For bells that reached nobody (their worker was
killed) every worker looks again ten times a second while somebody waits.

Admission itself, and so the limit, is Load.admit's. Choosing again is the waiter's, and so is coming back with its
place (`since_ns`) if another was quicker.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable

from proxy.clock import monotonic_ns
from proxy.edge.timers import Call, Wheel
from proxy.errors import Code, ProxyError, Source
from proxy.state import W_QUEUE_TIMEOUTS, W_QUEUED, Load, SharedMemory

RECHECK_S = 0.1
_AT_ONCE = 64  # waiters called in one go

Waiter = Callable[[ProxyError | None], None]
Ring = Callable[[int], None]  # the bell of the worker in a slot


class Ticket:
    """A place in line. The waiter is called once: with None when it may try, else with why it waits no longer."""

    __slots__ = ("_deadline", "_queue", "app_slot", "hard_limit", "since_ns", "slots", "waiter")

    def __init__(
        self, queue: Queue, app_slot: int, since_ns: int, slots: tuple[int, ...], hard_limit: int, waiter: Waiter
    ) -> None:
        self._queue = queue
        self._deadline: Call | None = None
        self.app_slot = app_slot
        self.since_ns = since_ns
        self.slots = slots
        self.hard_limit = hard_limit
        self.waiter = waiter

    def __lt__(self, other: Ticket) -> bool:
        return self.since_ns < other.since_ns

    def expire_at(self, deadline: Call) -> None:
        self._deadline = deadline

    def stop_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def cancel(self) -> None:
        """Its client has gone."""
        self._queue.remove(self)


class Queue:
    """This worker's part of the lines."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, load: Load, memory: SharedMemory, worker: int, wheel: Wheel, ring: Ring
    ) -> None:
        self._loop = loop
        self._load = load
        self._memory = memory
        self._cells = memory.cells
        self._worker = worker
        self._wheel = wheel
        self._ring = ring
        self._bases = tuple(memory.queue_base(one) for one in range(memory.rows))
        self._own = self._bases[worker]
        self._gauge = memory.worker_base(worker)
        self._lines: dict[int, list[Ticket]] = {}  # app slot -> tickets, the oldest first
        self._recheck: Call | None = None

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def is_contended(self, app_slot: int) -> bool:
        """Whether requests of the app wait, here or in another worker: then a new one belongs behind them."""
        return self._memory.waiting(app_slot) != 0

    def wait(
        self, app_slot: int, slots: tuple[int, ...], hard_limit: int, timeout_s: float, most: int, waiter: Waiter,
        since_ns: int = 0,
    ) -> Ticket:  # fmt: skip
        """Stand in line for any of the machines in `slots`. `since_ns`: the place of one that was here before.

        `waiter` is not called before this returns. Raises ProxyError(QUEUE_FULL) where `most` wait here already, and
        QUEUE_TIMEOUT for one that has waited its time.
        """
        line = self._lines.get(app_slot)
        if line is not None and not since_ns and len(line) >= most:
            raise ProxyError(Code.QUEUE_FULL, Source.MACHINE, detail=f"{len(line)} requests wait", retry_after_s=1)
        now = monotonic_ns()
        since_ns = since_ns or now
        left = timeout_s - (now - since_ns) / 1e9
        if left <= 0:
            raise self._too_late()
        ticket = Ticket(self, app_slot, since_ns, slots, hard_limit, waiter)
        ticket.expire_at(self._wheel.call_later(left, lambda: self._expire(ticket)))
        if line is None:
            line = self._lines[app_slot] = []
        elif line[-1].slots == slots:
            ticket.slots = line[-1].slots  # one object, which _first_with_room looks at once
        insort(line, ticket)
        self._cells[self._gauge + W_QUEUED] += 1
        self._publish(app_slot)
        self._load.fence()
        if self._has_room(ticket):
            self._loop.call_soon(self.freed, app_slot)
        if self._recheck is None:
            self._recheck = self._wheel.call_later(RECHECK_S, self._look_again)
        return ticket

    def freed(self, app_slot: int) -> None:
        """A place of a machine of this app became free, by Load.release_fenced: who waits longest gets it."""
        if not self._memory.waiting(app_slot):  # a strided sum: a third of looking one by one
            return
        whose = self._next_after(app_slot, 0, -1)
        if whose == self._worker:
            self._let_go_on(app_slot)
        elif whose >= 0:
            self._ring(whose)

    def on_bell(self) -> None:
        """Another worker freed a place that is for one of ours."""
        for app_slot in list(self._lines):
            self._let_go_on(app_slot)

    def poke(self, app_slot: int) -> None:
        """The app's machines changed: everybody in line chooses anew, in order."""
        line = self._lines.pop(app_slot, None)
        if line is None:
            return
        self._cells[self._gauge + W_QUEUED] -= len(line)
        self._publish(app_slot)
        for ticket in line:
            self._call(ticket, None)

    def remove(self, ticket: Ticket) -> None:
        line = self._lines.get(ticket.app_slot)
        if line is not None and ticket in line:
            self._leave(line, ticket)

    # --- letting go on

    def _let_go_on(self, app_slot: int, pass_on: bool = True) -> None:
        """Call those for whom there is room, as long as nobody older waits in another worker.

        The first is called whatever waits elsewhere: we were told to, or whom it was for has had its time.
        """
        ticket = self._first_with_room(app_slot)
        if ticket is None:
            since = self._cells[self._own + app_slot]
            whose = self._next_after(app_slot, since, self._worker) if since and pass_on else -1
            if whose >= 0:
                self._ring(whose)
            return
        for _ in range(_AT_ONCE):
            self._call(self._take(self._lines[app_slot], ticket), None)
            if not self._has_room(ticket):
                return
            whose = self._next_after(app_slot, 0, -1)
            if whose != self._worker:
                if whose >= 0:
                    self._ring(whose)
                return
            following = self._first_with_room(app_slot)
            if following is None:
                return
            ticket = following

    def _next_after(self, app_slot: int, since_ns: int, worker: int) -> int:
        """The worker whose oldest request came first of those after this place; -1 = none."""
        cells = self._cells
        oldest, whose = 0, -1
        for other in range(self._memory.rows_in_use):
            since = cells[self._bases[other] + app_slot]
            is_after = since > since_ns or (since == since_ns and other > worker)
            if since and is_after and (not oldest or since < oldest):
                oldest, whose = since, other
        return whose

    def _first_with_room(self, app_slot: int) -> Ticket | None:
        full: set[tuple[int, int]] = set()
        for ticket in self._lines.get(app_slot, ()):
            wants = id(ticket.slots), ticket.hard_limit
            if wants not in full:
                if self._has_room(ticket):
                    return ticket
                full.add(wants)
        return None

    def _leave(self, line: list[Ticket], ticket: Ticket) -> None:
        """Give up a place in line; if a bell for it is on its way, the next one has to hear."""
        was_oldest = line[0] is ticket
        self._take(line, ticket)
        if was_oldest:
            self._load.fence()
            if self._has_room(ticket):
                self._loop.call_soon(self.freed, ticket.app_slot)

    def _has_room(self, ticket: Ticket) -> bool:
        in_flight, limit = self._memory.in_flight, ticket.hard_limit
        return any(in_flight(slot) < limit for slot in ticket.slots)

    def _take(self, line: list[Ticket], ticket: Ticket) -> Ticket:
        line.remove(ticket)
        ticket.stop_timer()
        if not line:
            del self._lines[ticket.app_slot]
        self._cells[self._gauge + W_QUEUED] -= 1
        self._publish(ticket.app_slot)
        return ticket

    def _publish(self, app_slot: int) -> None:
        line = self._lines.get(app_slot)
        self._cells[self._own + app_slot] = line[0].since_ns if line else 0

    def _call(self, ticket: Ticket, error: ProxyError | None) -> None:
        ticket.stop_timer()
        try:
            ticket.waiter(error)
        except Exception as fault:  # one client's fault must not leave the others waiting
            self._wheel.report("a waiter failed", fault)

    def _expire(self, ticket: Ticket) -> None:
        line = self._lines.get(ticket.app_slot)
        if line is not None and ticket in line:
            self._leave(line, ticket)
            self._call(ticket, self._too_late())

    def _too_late(self) -> ProxyError:
        self._cells[self._gauge + W_QUEUE_TIMEOUTS] += 1
        detail = "no machine came below its hard limit in time"
        return ProxyError(Code.QUEUE_TIMEOUT, Source.MACHINE, detail=detail, retry_after_s=1)

    def _look_again(self) -> None:
        self._recheck = None
        for app_slot in list(self._lines):
            self._let_go_on(app_slot, pass_on=False)
        if self._lines and self._recheck is None:
            self._recheck = self._wheel.call_later(RECHECK_S, self._look_again)

    def close(self) -> None:
        if self._recheck is not None:
            self._recheck.cancel()
            self._recheck = None

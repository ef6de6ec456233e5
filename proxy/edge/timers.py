"""One coarse timer wheel for a worker: a connection's deadline is an attribute, not a loop timer.

`arm` is what a request pays: one assignment, and only when the deadline comes nearer than the bucket the entry lies in
is it moved. An entry whose bucket comes up early is put into the bucket of its deadline then. Time is counted from the
latest tick: a deadline is met late by up to one, or early by as much as the loop was behind when it was set.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final, Protocol

from proxy.clock import monotonic

TICK_S: Final = 0.1
NEVER: Final = math.inf


class Entry(Protocol):
    deadline: float  # monotonic seconds; NEVER = none
    wheel_tick: int  # bucket the entry lies in, 0 = none

    def on_deadline(self) -> None: ...


class Wheel:
    """Deadlines of one event loop. `now` is monotonic seconds, refreshed each tick."""

    __slots__ = ("_buckets", "_handle", "_loop", "_tick", "now")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.now = monotonic()
        self._tick = int(self.now / TICK_S)
        self._buckets: dict[int, set[Entry]] = {}
        self._handle: asyncio.TimerHandle | None = loop.call_later(TICK_S, self._turn)

    def arm(self, entry: Entry, seconds: float) -> None:
        """Call `entry.on_deadline` in `seconds`, in place of any deadline it had."""
        deadline = self.now + seconds
        entry.deadline = deadline
        tick = int(deadline / TICK_S) + 1
        if entry.wheel_tick and entry.wheel_tick <= tick:
            return
        if entry.wheel_tick:
            self._buckets[entry.wheel_tick].discard(entry)
        self._put(entry, tick)

    def disarm(self, entry: Entry) -> None:
        """The entry waits for nothing now; it may be armed again."""
        entry.deadline = NEVER

    def drop(self, entry: Entry) -> None:
        """Forget the entry, so that the wheel keeps no ended connection alive."""
        entry.deadline = NEVER
        if entry.wheel_tick:
            bucket = self._buckets.get(entry.wheel_tick)
            if bucket is not None:
                bucket.discard(entry)
            entry.wheel_tick = 0

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Call:
        """A one-shot call with a handle to cancel it, as the loop's own but coarse."""
        call = Call(self, callback)
        self.arm(call, seconds)
        return call

    def report(self, what: str, error: Exception) -> None:
        """Give a fault to the loop's handler."""
        self._loop.call_exception_handler({"message": what, "exception": error})

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._buckets.clear()

    def _put(self, entry: Entry, tick: int) -> None:
        if tick <= self._tick:
            tick = self._tick + 1
        entry.wheel_tick = tick
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
        bucket.add(entry)

    def _turn(self) -> None:
        self._handle = self._loop.call_later(TICK_S, self._turn)
        self.now = now = monotonic()
        until = int(now / TICK_S)
        while self._tick < until:
            self._tick += 1
            bucket = self._buckets.pop(self._tick, None)
            if bucket is not None:
                self._run(bucket, now)

    def _run(self, bucket: set[Entry], now: float) -> None:
        for entry in bucket:
            entry.wheel_tick = 0
        for entry in bucket:
            if entry.deadline <= now:
                entry.deadline = NEVER
                try:
                    entry.on_deadline()
                except Exception as error:
                    self.report("a deadline's handler failed", error)
            elif entry.deadline is not NEVER and entry.deadline != NEVER and not entry.wheel_tick:
                self._put(entry, int(entry.deadline / TICK_S) + 1)


class Call:
    """The handle of `Wheel.call_later`."""

    __slots__ = ("_callback", "_wheel", "deadline", "wheel_tick")

    def __init__(self, wheel: Wheel, callback: Callable[[], None]) -> None:
        self._wheel = wheel
        self._callback: Callable[[], None] | None = callback
        self.deadline = NEVER
        self.wheel_tick = 0

    def on_deadline(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def cancel(self) -> None:
        self._callback = None
        self._wheel.drop(self)

"""A clock that stands still until the test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class FakeClock:
    """Keeps the contract of proxy.clock.Clock. Sleepers wake in order as `advance` passes their moment."""

    def __init__(self, monotonic: float = 1000.0, unix: float = 1_800_000_000.0) -> None:
        self._monotonic = monotonic
        self._offset = unix - monotonic
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def monotonic(self) -> float:
        return self._monotonic

    def unix(self) -> float:
        return self._monotonic + self._offset

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        await self.wake_at(seconds)

    def alarm(self, callback: Callable[[], None]) -> FakeAlarm:
        return FakeAlarm(self, callback)

    def wake_at(self, seconds: float) -> asyncio.Future[None]:
        """A future that `advance` completes when that much has passed."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._order), woken))
        return woken

    @property
    def sleeping(self) -> int:
        return sum(1 for _, _, woken in self._sleepers if not woken.done())

    async def advance(self, seconds: float) -> None:
        """Move on, waking each sleeper at its moment and letting it run before the next one."""
        end = self._monotonic + seconds
        await settle(kernel_s=0.001)
        while self._sleepers and self._sleepers[0][0] <= end:
            moment, _, woken = heapq.heappop(self._sleepers)
            self._monotonic = max(self._monotonic, moment)
            if not woken.done():
                woken.set_result(None)
                await settle()
        self._monotonic = end
        await settle(kernel_s=0.001)


class FakeAlarm:
    """Keeps the contract of proxy.control.prober.Alarm."""

    def __init__(self, clock: FakeClock, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._callback = callback
        self._woken: asyncio.Future[None] | None = None

    def set(self, seconds: float) -> None:
        self.close()
        self._woken = self._clock.wake_at(seconds)
        self._woken.add_done_callback(lambda woken: None if woken.cancelled() else self._callback())

    def close(self) -> None:
        if self._woken is not None:
            self._woken.cancel()


async def settle(turns: int = 20, kernel_s: float = 0.0) -> None:
    """Let everything that can run without time passing run; sockets and disks are real, and get a moment too."""
    for _ in range(turns):
        await asyncio.sleep(0)
    if kernel_s:
        await asyncio.sleep(kernel_s)
        for _ in range(turns):
            await asyncio.sleep(0)

"""A clock that stands still until the test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools


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
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + seconds, next(self._order), woken))
        await woken

    @property
    def sleeping(self) -> int:
        return sum(1 for _, _, woken in self._sleepers if not woken.done())

    async def advance(self, seconds: float) -> None:
        """Move on, waking each sleeper at its moment and letting it run before the next one."""
        end = self._monotonic + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            moment, _, woken = heapq.heappop(self._sleepers)
            self._monotonic = max(self._monotonic, moment)
            if not woken.done():
                woken.set_result(None)
                await settle()
        self._monotonic = end
        await settle()


async def settle(turns: int = 20) -> None:
    """Let everything that can run without time passing run."""
    for _ in range(turns):
        await asyncio.sleep(0)

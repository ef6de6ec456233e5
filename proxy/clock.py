"""The only place that asks the time, waits for it, seeds randomness, or starts a task.

Code that decides takes `now` as an argument; code that waits takes a `Clock`, which tests replace by one they advance.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """What shells need of time."""

    def monotonic(self) -> float:
        """Seconds that never go back; the same scale in every process of this host."""

    def unix(self) -> float:
        """Seconds since 1970, as the operator's clock has it."""

    async def sleep(self, seconds: float) -> None:
        """Wait; ends early only by cancellation."""


class SystemClock:
    """The host's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


monotonic = time.monotonic
monotonic_ns = time.monotonic_ns
unix = time.time


def new_random() -> random.Random:
    """A generator seeded by the system, one per process (a forked child must not share its parent's draws)."""
    return random.Random()


_tasks: set[asyncio.Task[Any]] = set()


def spawn(coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Start a named task and keep a reference until it ends; its exception reaches the loop's handler."""
    task = asyncio.get_running_loop().create_task(coro, name=name)
    _tasks.add(task)
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Task[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler(
            {"message": f"task {task.get_name()} failed", "exception": error, "task": task}
        )

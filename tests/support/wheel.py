"""A timer wheel that the test turns: it stands where the wheel's loop and clock are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.edge import timers
from proxy.edge.timers import TICK_S


class Turner:
    """Give it to `Wheel` as its loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 1000.0
        self.errors: list[dict[str, object]] = []
        self._turn: Callable[[], None] | None = None
        monkeypatch.setattr(timers, "monotonic", lambda: self.time)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Turner:
        self._turn = callback
        return self

    def cancel(self) -> None:
        self._turn = None

    def call_exception_handler(self, context: dict[str, object]) -> None:
        self.errors.append(context)

    def to(self, time: float) -> None:
        """Time passes, the loop being late for nothing."""
        while self.time + TICK_S < time:
            self.jump(self.time + TICK_S)
        self.jump(time)

    def jump(self, time: float) -> None:
        """The loop was blocked until now."""
        self.time = time
        assert self._turn is not None
        self._turn()

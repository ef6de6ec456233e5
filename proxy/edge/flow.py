"""Back-pressure: counted pause and resume of one transport's reading.

Several parties may ask a connection to stand still: a full pipeline, a slow peer, a body that nobody takes yet. Reading
goes on when the last of them has let go.
"""

from __future__ import annotations

from typing import Protocol


class Readable(Protocol):
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool: ...


class ReadGate:
    """The pauses asked of one transport."""

    __slots__ = ("_transport", "pauses")

    def __init__(self, transport: Readable) -> None:
        self._transport = transport
        self.pauses = 0

    def pause(self) -> None:
        self.pauses += 1
        if self.pauses == 1 and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.pauses == 0:
            raise RuntimeError("resume without a pause")
        self.pauses -= 1
        if self.pauses == 0 and not self._transport.is_closing():
            self._transport.resume_reading()

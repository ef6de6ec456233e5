"""An answer by which a machine hands its request on: read to its end where that is near, and then followed.

A replay in a header is known with the head; the rest of the answer is of use to nobody, but a connection can be kept
only if it is read. A replay in JSON is the body, and makes sense only whole. Both have a bound in bytes and in time.
What the directive says is decide/replay.py's to read, following it handover.py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.decide.replay import MAX_JSON_BYTES, Directive, parse_headers, parse_json
from proxy.edge.timers import Call
from proxy.errors import Code, ProxyError, Source
from proxy.wire.http1 import UNTIL_CLOSE, ResponseHead

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange

DISCARD_BYTES = 64 * 1024  # read at most, of what is of no use
DISCARD_S = 2.0  # the answer has this long to be whole


def replay_answer(exchange: Exchange, head: ResponseHead) -> ReplayAnswer | None:
    """What the fields noted of a head make of it; None for an ordinary answer. Raises ProxyError(REPLAY_INVALID).

    JSON goes before a header beside it, which some apps send as `fly-replay: true`.
    """
    if any(name == b"content-type" for name, _ in head.noted):
        return ReplayAnswer(exchange, head, None)
    directive = parse_headers(head.noted)
    return ReplayAnswer(exchange, head, directive) if directive is not None else None


class ReplayAnswer:
    """One answer on its way in. At its end it tells the exchange to hand the request on, or to refuse it."""

    __slots__ = ("_directive", "_exchange", "_pieces", "_size", "_timer", "head")

    def __init__(self, exchange: Exchange, head: ResponseHead, directive: Directive | None) -> None:
        """`directive`: what the head said; None if the body is to say it."""
        self._exchange = exchange
        self._directive = directive
        self._pieces: list[bytes] = []
        self._size = 0
        self._timer: Call | None = None
        self.head = head

    def begin(self) -> None:
        """The head has been read."""
        length = self.head.length
        if self._directive is None:
            if length > MAX_JSON_BYTES:
                self._refuse("a replay in JSON that is too long")
                return
        elif length > DISCARD_BYTES or (length == UNTIL_CLOSE and not self._exchange.head_only):
            self._exchange.go_on(lambda: self._cut_off(""))
            return
        self._timer = self._exchange.edge.wheel.call_later(DISCARD_S, self._on_time)

    def add(self, data: bytes) -> None:
        """A piece of the body."""
        self._size += len(data)
        if self._directive is None:
            self._pieces.append(data)
            if self._size > MAX_JSON_BYTES:
                self._refuse("a replay in JSON that is too long")
        elif self._size > DISCARD_BYTES:
            self._exchange.go_on(lambda: self._cut_off(""))

    def end(self) -> None:
        """The answer is whole."""
        self.stop()
        directive = self._directive
        if directive is None:
            try:
                directive = parse_json(b"".join(self._pieces))
            except ProxyError as error:
                self._exchange.refuse(error)
                return
        self._exchange.hand_on(directive)

    def fail(self, detail: str) -> None:
        """The answer is broken off."""
        if self._directive is None:
            self._refuse(f"a replay that was cut off: {detail}")
        else:
            self.stop()
            self._exchange.hand_on(self._directive)

    def stop(self) -> None:
        """Nobody waits for its end any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        self._timer = None
        self._exchange.go_on(lambda: self._cut_off(f"not whole after {DISCARD_S:g} s"))

    def _cut_off(self, detail: str) -> None:
        self._exchange.cut_off()
        self.fail(detail)

    def _refuse(self, detail: str) -> None:
        self._exchange.refuse(ProxyError(Code.REPLAY_INVALID, Source.MACHINE, detail=detail))

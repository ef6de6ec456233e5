"""As much of WebSocket (RFC 6455) as is needed to end one politely: where frames end, and a close frame to put there.

A tunnel relays bytes and looks at nothing else. Before a machine is stopped its clients are to be told "going away"
(1001), and that may stand only between two frames. `FrameTracker` follows the machine's bytes and knows when they
are. A close frame may stand between the fragments of a message (§5.4), so ends of messages do not matter. Extensions
change what is in a payload, never its length (§5.2), so they do not matter either. When to send it is the relay's.
"""

from __future__ import annotations

_LONGEST_HEAD = 14
_LONGEST_REASON = 123
_CLOSE = 0x8
_FIN = 0x80


class FrameTracker:
    """Follows one direction of a WebSocket, from the first byte after the 101's head, in pieces of any size."""

    __slots__ = ("_head", "_left", "is_lost", "saw_close")

    def __init__(self) -> None:
        self._head = b""  # of a frame whose head has not come whole
        self._left = 0  # bytes of payload still to come
        self.saw_close = False  # a close frame has begun: nothing may follow it (§5.5.1)
        self.is_lost = False  # this is not WebSocket: there will be no boundary any more

    @property
    def at_boundary(self) -> bool:
        """Whether a frame may be put in here: the last one is whole, and it did not say goodbye."""
        return not (self._left or self._head or self.saw_close or self.is_lost)

    def feed(self, data: bytes, to_boundary: bool = False) -> int:
        """Take what goes by, or only up to where a frame may be put in. How many bytes of `data` that is.

        Constant state; costs nothing by the byte.
        """
        at, end = 0, len(data)
        while at < end and not self.is_lost:
            if self._left:
                step = min(self._left, end - at)
                self._left -= step
                at += step
            else:
                at += self._take_head(data, at)
            if to_boundary and self.at_boundary:
                return at
        return end

    def _take_head(self, data: bytes, at: int) -> int:
        """Read the head of a frame, or as much as there is. How many bytes of `data` it took."""
        kept = len(self._head)
        head = self._head + data[at : at + _LONGEST_HEAD - kept]
        size = _head_size(head)
        if size is None or len(head) < size:
            self._head = head
            return len(head) - kept
        self._head = b""
        short = head[1] & 0x7F
        self._left = short if short < 126 else int.from_bytes(head[2 : 4 if short == 126 else 10], "big")
        self.is_lost = short == 127 and head[2] >= 0x80  # §5.2: the most significant bit is 0
        self.saw_close = self.saw_close or head[0] & 0x0F == _CLOSE
        return size - kept


def _head_size(head: bytes) -> int | None:
    """How long a frame's head is, from its first two bytes; None while they are not there."""
    if len(head) < 2:
        return None
    short = head[1] & 0x7F
    return 2 + (0 if short < 126 else 2 if short == 126 else 8) + (4 if head[1] & 0x80 else 0)


def close_frame(code: int, reason: bytes = b"") -> bytes:
    """A close frame as a server sends it, unmasked. `reason` is UTF-8 for people.

    Raises ValueError for a code that may not be sent, or a reason over 123 bytes (RFC 6455 §5.5, §7.4).
    """
    if not 1000 <= code <= 4999 or code in (1004, 1005, 1006, 1015):
        raise ValueError(f"{code} is no close code that can be sent")
    if len(reason) > _LONGEST_REASON:
        raise ValueError(f"a reason of {len(reason)} bytes: a close frame has room for {_LONGEST_REASON}")
    return bytes((_FIN | _CLOSE, 2 + len(reason))) + code.to_bytes(2, "big") + reason

"""A tunnel after an upgrade: raw bytes both ways, under the exchange's back-pressure, until both ends have closed.

Either side may send its end first and go on receiving (RFC 9293 §3.6); a TLS client's end closes both ways. A tunnel in
which nothing moves ends after the app's idle timeout.

Where the machine is about to be stopped, or this worker is, a WebSocket's client is told so between two frames (1001,
going away); from there on the machine's bytes go nowhere, and the client has a moment to close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.edge.timers import NEVER
from proxy.errors import Code
from proxy.wire.websocket import FrameTracker, close_frame

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange
    from proxy.edge.upstream import UpstreamConnection


GOODBYE_S = 1.0  # for the frame under way to end, and again for the client to close
_GOING_AWAY = close_frame(1001, b"going away")


class Tunnel:
    """The two ends of an upgraded connection. The stream calls `from_client` and kin, the exchange the others."""

    __slots__ = (
        "_bytes_in", "_client_ended", "_closed", "_connection", "_exchange", "_frames", "_idle_s", "_is_leaving",
        "_machine", "_machine_ended", "_said_goodbye", "_wheel", "deadline", "wheel_tick",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, connection: UpstreamConnection, idle_s: float) -> None:
        self._exchange = exchange
        self._connection = connection
        self._wheel = exchange.edge.wheel
        self._idle_s = idle_s
        self._bytes_in = 0
        self._client_ended = False
        self._machine_ended = False
        self._closed = False
        upgrade = exchange.head.upgrade
        self._frames = FrameTracker() if upgrade is not None and upgrade.lower() == b"websocket" else None
        self._is_leaving = False
        self._said_goodbye = False
        self._machine = exchange.machine
        if self._machine is not None:
            self._machine.tunnels.add(self)
        self.deadline = NEVER
        self.wheel_tick = 0
        self._wheel.arm(self, idle_s)

    def from_client(self, data: bytes) -> None:
        if not self._closed:
            self._bytes_in += len(data)
            if not self._is_leaving:
                self._wheel.arm(self, self._idle_s)
            self._connection.write(data)

    def from_machine(self, data: bytes) -> None:
        if self._said_goodbye:
            return
        if not self._is_leaving:
            self._wheel.arm(self, self._idle_s)
        if self._frames is not None:
            taken = self._frames.feed(data, to_boundary=self._is_leaving)
            if taken < len(data):  # the goodbye comes between these two frames
                data = data[:taken]
        self._exchange.stream.send_data(data)
        self._exchange.stream.flush()
        if self._is_leaving:
            self._say_goodbye()

    def client_eof(self) -> bool:
        """The client sends no more. True: the machine may still send."""
        if self._closed or self._machine_ended:
            self._close()
            return False
        self._client_ended = True
        if not self._connection.transport.is_closing():
            self._connection.transport.write_eof()
        return True

    def machine_eof(self) -> bool:
        """The machine sends no more. True: the client may still send."""
        if self._closed or self._client_ended or not self._exchange.stream.end_output():
            self._close()
            return False
        self._machine_ended = True
        return True

    def client_lost(self) -> None:
        if not self._closed:
            self._connection.abort()
            self._finish()

    def machine_lost(self) -> None:
        if not self._closed:
            self._finish()
            self._exchange.stream.finish(close=True)

    def going_away(self) -> None:
        """The machine, or this worker, is about to stop: end both sides, a WebSocket with a word to its client."""
        if self._closed or self._is_leaving:
            return
        self._is_leaving = True
        self._wheel.arm(self, GOODBYE_S)
        if self._frames is None or self._frames.saw_close or self._frames.is_lost or self._machine_ended:
            self._close()
        else:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if self._frames is not None and self._frames.at_boundary:
            self._said_goodbye = True
            self._wheel.arm(self, GOODBYE_S)
            self._exchange.stream.send_data(_GOING_AWAY)
            self._exchange.stream.flush()

    def on_deadline(self) -> None:
        if not self._is_leaving:
            self._exchange.code = Code.IDLE_TIMEOUT
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._connection.release(clean=False)
            self._finish()
            self._exchange.stream.finish(close=True)

    def _finish(self) -> None:
        self._closed = True
        self._wheel.drop(self)
        if self._machine is not None:
            self._machine.tunnels.discard(self)
        self._exchange.on_tunnel_closed(self._bytes_in)

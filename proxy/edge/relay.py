"""A tunnel after an upgrade: raw bytes both ways, under the exchange's back-pressure, until both ends have closed.

Either side may send its end first and go on receiving (RFC 9293 §3.6); a TLS client's end closes both ways. A tunnel in
which nothing moves ends after the app's idle timeout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.edge.timers import NEVER
from proxy.errors import Code

if TYPE_CHECKING:
    from proxy.edge.exchange import Exchange
    from proxy.edge.upstream import UpstreamConnection


class Tunnel:
    """The two ends of an upgraded connection. The stream calls `from_client` and kin, the exchange the others."""

    __slots__ = (
        "_bytes_in", "_client_ended", "_closed", "_connection", "_exchange", "_idle_s", "_machine_ended", "_wheel",
        "deadline", "wheel_tick",
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
        self.deadline = NEVER
        self.wheel_tick = 0
        self._wheel.arm(self, idle_s)

    def from_client(self, data: bytes) -> None:
        if not self._closed:
            self._bytes_in += len(data)
            self._wheel.arm(self, self._idle_s)
            self._connection.write(data)

    def from_machine(self, data: bytes) -> None:
        self._wheel.arm(self, self._idle_s)
        self._exchange.stream.send_data(data)
        self._exchange.stream.flush()

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
        """The worker stops: end both sides now."""
        self._close()

    def on_deadline(self) -> None:
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
        self._exchange.on_tunnel_closed(self._bytes_in)

"""The origins of bench/balance.py: several ports of one process, each answering after a time of its own.

usage: delayed.py PORT:MILLISECONDS ...   listens on 127.0.0.1, prints "ready" once it does

Answers any GET with 200, its port in the field `x-port`, and, as the load it reports, a hundredth of the requests that
it has under way.
"""

import asyncio
import sys
from functools import partial
from typing import cast

import uvloop


class Origin:
    """One port."""

    def __init__(self, port: int, delay_s: float) -> None:
        self.port, self.delay_s, self.in_flight = port, delay_s, 0


class Connection(asyncio.Protocol):
    def __init__(self, origin: Origin) -> None:
        self._origin, self._held = origin, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class, but do what it does

    def data_received(self, data: bytes) -> None:
        self._held += data
        while b"\r\n\r\n" in self._held:
            self._held = self._held.partition(b"\r\n\r\n")[2]
            self._origin.in_flight += 1
            asyncio.get_running_loop().call_later(self._origin.delay_s, self._answer)

    def _answer(self) -> None:
        self._origin.in_flight -= 1
        if self._transport.is_closing():
            return
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nX-Port: %d\r\nWakefront-Machine-Load: %.2f\r\n\r\nok\n"
            % (self._origin.port, self._origin.in_flight / 100)
        )


async def main(arguments: list[str]) -> None:
    loop = asyncio.get_running_loop()
    for argument in arguments:
        port, _, delay_ms = argument.partition(":")
        origin = Origin(int(port), float(delay_ms) / 1000)
        await loop.create_server(partial(Connection, origin), "127.0.0.1", origin.port, backlog=1024)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))

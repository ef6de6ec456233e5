"""Handing a connected socket to the event loop, so that its descriptor has one owner.

uvloop closes the descriptor of a transport by itself, and takes note of the socket object it came from only once
`create_connection` returns. A transport that ends before that leaves the object with a number that the next connection
gets: closing the object, or its end as garbage, then closes another client's connection.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import TypeVar

import uvloop

P = TypeVar("P", bound=asyncio.BaseProtocol)


async def adopt(
    loop: asyncio.AbstractEventLoop, factory: Callable[[], P], sock: socket.socket,
    context: ssl.SSLContext | None = None, server_hostname: str | None = None,
) -> tuple[asyncio.Transport, P]:  # fmt: skip
    """`loop.create_connection` over a connected socket, which is the loop's from here on, whatever comes of it."""
    is_ours = not isinstance(loop, uvloop.Loop)  # asyncio's own transports keep the object
    try:
        return await loop.create_connection(factory, sock=sock, ssl=context, server_hostname=server_hostname)
    except BaseException:
        if is_ours:
            sock.close()
        raise
    finally:
        if not is_ours:
            sock.detach()

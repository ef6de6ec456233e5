"""Frames between control and workers: what leaves within the call, and in which order."""

from __future__ import annotations

import asyncio
import socket

from proxy.ipc import NeedCertificate, encode, write


async def test_what_is_written_at_once_and_what_the_kernel_does_not_take_arrive_in_order() -> None:
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    theirs.setblocking(False)
    frames = [encode(NeedCertificate("a" * size)) for size in (10, 2_000_000, 20, 30)]
    try:
        write(transport, frames[0])
        assert theirs.recv(100) == frames[0]  # within the call: the loop has not turned
        for frame in frames[1:]:
            write(transport, frame)
        assert transport.get_write_buffer_size()
        expected = b"".join(frames[1:])
        got = bytearray()
        async with asyncio.timeout(5):
            while len(got) < len(expected):
                got += await loop.sock_recv(theirs, 1 << 20)
        assert got == expected
    finally:
        theirs.close()
        transport.close()


async def test_a_write_to_a_peer_that_is_gone_ends_the_connection_and_raises_nothing() -> None:
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()

    class Losing(asyncio.Protocol):
        def connection_lost(self, error: Exception | None) -> None:
            lost.set()

    transport, _ = await asyncio.get_running_loop().create_connection(Losing, sock=ours)
    theirs.close()
    write(transport, encode(NeedCertificate("a")))
    async with asyncio.timeout(5):
        await lost.wait()

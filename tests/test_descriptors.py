"""A descriptor that the loop was given is closed once, and never when it is another's by then."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
import uvloop

from proxy.descriptors import adopt


@pytest.fixture(autouse=True)
def young() -> Iterator[None]:
    """Collections look at what these tests make, not at all that a long run of tests has left: that is seconds each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Quiet(asyncio.Protocol):
    pass


class Aborting(asyncio.Protocol):
    """Ends before whoever asked for the connection has heard that it stands."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "abort")
        transport.abort()


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize("factory", [Quiet, Aborting])
@pytest.mark.parametrize("resets", [False, True], ids=["stays", "resets"])
def test_a_number_that_is_anothers_by_then_is_not_closed(
    new_loop: Callable[[], asyncio.AbstractEventLoop], factory: type[asyncio.Protocol], resets: bool
) -> None:
    async def take() -> int:
        harmed = 0
        with socket.create_server(("127.0.0.1", 0)) as server:
            for _ in range(50):
                harmed += await _one(server, factory, resets)
        return harmed

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(take()) == 0


async def _one(server: socket.socket, factory: type[asyncio.Protocol], resets: bool) -> bool:
    sock = socket.create_connection(server.getsockname())
    sock.setblocking(False)
    peer, _ = server.accept()
    if resets:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    transport, _ = await adopt(asyncio.get_running_loop(), factory, sock)
    await asyncio.sleep(0)
    others = [*socket.socketpair(), *socket.socketpair()]  # one of them has the number, if it is free
    inodes = [os.fstat(one.fileno()).st_ino for one in others]
    del sock
    gc.collect()
    transport.abort()
    await asyncio.sleep(0.001)
    peer.close()
    try:
        return [os.fstat(one.fileno()).st_ino for one in others] != inodes
    except OSError:
        return True
    finally:
        for one in others:
            try:
                one.close()
            except OSError:
                one.detach()


def test_one_that_is_given_up_midway_is_closed_once() -> None:
    async def give_up() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            for turns in range(6):
                sock = socket.create_connection(server.getsockname())
                sock.setblocking(False)
                number = sock.fileno()
                task = asyncio.get_running_loop().create_task(adopt(asyncio.get_running_loop(), Quiet, sock))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
                if not task.cancelled():
                    task.result()[0].abort()
                await asyncio.sleep(0.001)
                if sock.fileno() < 0:  # the loop had taken it: that is who closes it
                    with pytest.raises(OSError, match="Bad file descriptor"):
                        os.fstat(number)
                sock.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(give_up())

"""cli/wan.py: links are as late as they say, lose nothing, and can be stalled and cut while they are used."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from proxy.cli.wan import Wan


@pytest.fixture
def wan() -> Iterator[Wan]:
    with Wan() as made:
        yield made


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets, and ends when its client does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads = []

        def serve(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                while data := client.recv(65_536):
                    client.sendall(data)
                client.shutdown(socket.SHUT_WR)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threads.append(threading.Thread(target=serve, args=(server.accept()[0],), daemon=True))
                    threads[-1].start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


def connect(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, 10)


def round_trip_s(sock: socket.socket) -> float:
    began = time.monotonic()
    sock.sendall(b"?")
    assert sock.recv(1) == b"?"
    return time.monotonic() - began


def test_a_round_trip_takes_what_the_link_says_and_changes_at_once(wan: Wan, echo: tuple[str, int]) -> None:
    address = wan.link("a", "b", echo)
    with connect(address) as sock:
        for rtt_s in (0.0, 0.08, 0.02):
            wan.set("a", "b", rtt_s=rtt_s)
            took = min(round_trip_s(sock) for _ in range(5))  # the least: the host may be busy
            assert rtt_s - 0.001 <= took < rtt_s + 0.01  # a timer may be a hair early


def test_jitter_keeps_the_order_and_loses_nothing(wan: Wan, echo: tuple[str, int]) -> None:
    address = wan.link("a", "b", echo)
    wan.set("a", "b", rtt_s=0.01, jitter_s=0.02)
    data = os.urandom(10_000_000)
    with connect(address) as sock:
        sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
        sender.start()
        digest, size = hashlib.sha256(), 0
        while piece := sock.recv(1 << 20):
            digest.update(piece)
            size += len(piece)
        sender.join()
    assert size == len(data) and digest.digest() == hashlib.sha256(data).digest()


def test_a_stalled_link_swallows_and_gives_back(wan: Wan, echo: tuple[str, int]) -> None:
    address = wan.link("a", "b", echo)
    with connect(address) as sock:
        round_trip_s(sock)
        wan.set("a", "b", is_stalled=True)
        sock.sendall(b"late")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(4)
        sock.settimeout(5)
        wan.set("a", "b", is_stalled=False)
        assert sock.recv(4) == b"late"


def test_a_stalled_link_holds_up_who_sends_without_end(wan: Wan, echo: tuple[str, int]) -> None:
    address = wan.link("a", "b", echo)
    with connect(address) as sock:
        wan.set("a", "b", is_stalled=True)
        sock.settimeout(1.0)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 200_000_000:
                sent += sock.send(bytes(65_536))
        assert sent < 40_000_000


def test_a_cut_link_resets_what_is_open_and_what_is_new_until_it_is_healed(wan: Wan, echo: tuple[str, int]) -> None:
    address = wan.link("a", "b", echo)
    with connect(address) as sock:
        round_trip_s(sock)
        wan.set("a", "b", is_cut=True)
        with pytest.raises(OSError, match="reset"):
            sock.recv(1)
    with pytest.raises(OSError), connect(address) as again:
        round_trip_s(again)
    wan.set("a", "b", is_cut=False)
    with connect(address) as healed:
        assert round_trip_s(healed) < 1
    assert wan.stats("a", "b")["bytes"] >= 2


def test_who_is_not_there_is_refused(wan: Wan) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = server.getsockname()
    address = wan.link("a", "b", gone)
    with connect(address) as sock:
        sock.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    with pytest.raises(KeyError, match="no link"):
        wan.set("x", "y", rtt_s=1.0)

"""Large bodies and slow peers through a served node: every byte arrives, and no worker keeps what is not taken yet."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.plane import Plane, scripted_app
from tests.support.processes import wait_for
from tests.support.script import pattern, script, send

pytestmark = pytest.mark.slow
SIZE = 100 * 1024 * 1024
GROWTH_MAX = 12 * 1024 * 1024  # of all workers together, while 100 MB pass through
MB = 1024 * 1024


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    folder = tmp_path_factory.mktemp("bodies")
    with Plane(folder, scripted_app(folder, "web")) as served:
        for tls in (False, True):
            for _ in range(8):  # both workers have done all kinds of things once
                assert served.ask(
                    script(send(f"HTTP/1.1 200 OK\r\nContent-Length: {MB}\r\n\r\n"), f"spray:{MB}"), tls=tls
                )
        yield served


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def content() -> tuple[bytes, str]:
    data = pattern(SIZE)
    return data, hashlib.sha256(data).hexdigest()


class Growth:
    """How much the workers' memory peaked above what it was."""

    def __init__(self, plane: Plane) -> None:
        self._pids = plane.worker_pids
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew (proc(5))
        self._before = self._sum("VmRSS")

    def _sum(self, name: str) -> int:
        total = 0
        for pid in self._pids:
            text = Path(f"/proc/{pid}/status").read_text()
            total += int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) * 1024
        return total

    def check(self) -> None:
        grown = self._sum("VmHWM") - self._before
        assert grown < GROWTH_MAX, f"the workers grew by {grown / MB:.1f} MB"


@pytest.mark.parametrize("framing", ["length", "close"])
def test_100_mb_come_down_byte_for_byte(plane: Plane, tls: bool, framing: str, content: tuple[bytes, str]) -> None:
    field = f"Content-Length: {SIZE}\r\n" if framing == "length" else ""
    end = [] if framing == "length" else ["close"]
    growth = Growth(plane)
    found = hashlib.sha256()
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(send(f"HTTP/1.1 200 OK\r\n{field}\r\n"), f"spray:{SIZE}", *end)))
        head = peer.read_head()
        if framing == "length":
            left = SIZE
            while left:
                data = peer.read_exactly(min(left, 1 << 18))
                found.update(data)
                left -= len(data)
        else:
            assert head["transfer-encoding"] == "chunked"
            while data := peer.read_chunk():
                found.update(data)
    assert found.hexdigest() == content[1]
    growth.check()


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_100_mb_go_up_byte_for_byte(plane: Plane, tls: bool, framing: str, content: tuple[bytes, str]) -> None:
    data, digest = content
    growth = Growth(plane)
    with plane.peer(tls=tls) as peer:
        if framing == "length":
            peer.send(plane.head("/tell", f"Content-Length: {SIZE}", method="PUT"))
            peer.send(data)
        else:
            peer.send(plane.head("/tell", "Transfer-Encoding: chunked", method="PUT"))
            view = memoryview(data)
            for at in range(0, SIZE, MB):
                peer.send(b"%x\r\n%b\r\n" % (MB, view[at : at + MB]))
            peer.send("0\r\n\r\n")
        told = peer.read_answer().told
    assert (told["size"], told["sha256"]) == (SIZE, digest)
    growth.check()


def test_a_slow_reader_holds_the_machine_back_and_misses_nothing(
    plane: Plane, tls: bool, content: tuple[bytes, str]
) -> None:
    growth = Growth(plane)
    with plane.peer(tls=tls) as peer:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        head = send(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n")
        peer.send(plane.head(script(head, f"spray:{SIZE}", f"poke:sprayed-{tls}")))
        peer.read_head()
        with plane.peer(tls=tls) as other:  # who else is served meanwhile, is
            for _ in range(50):
                other.send(plane.head("/tell"))
                assert other.read_answer().status == 200
            other.send(plane.head(script(f"wait:sprayed-{tls}", "tell")))
            assert other.has_nothing(0.5), "the machine was rid of 100 MB though nobody read them"
            growth.check()
            found = hashlib.sha256()
            left = SIZE
            while left:
                data = peer.read_exactly(min(left, 1 << 18))
                found.update(data)
                left -= len(data)
            assert other.read_answer().status == 200
    assert found.hexdigest() == content[1]


def test_a_machine_that_does_not_read_holds_the_client_back(
    plane: Plane, tls: bool, content: tuple[bytes, str]
) -> None:
    data, digest = content
    sent = 0
    growth = Growth(plane)
    with plane.peer(tls=tls, timeout=40) as peer:

        def upload() -> None:
            nonlocal sent
            view = memoryview(data)
            for at in range(0, SIZE, 1 << 18):
                peer.send(bytes(view[at : at + (1 << 18)]))
                sent = at

        peer.send(plane.head(script(f"wait:read-{tls}", "read", "tell"), f"Content-Length: {SIZE}", method="PUT"))
        thread = threading.Thread(target=upload)
        thread.start()
        before = -1

        def stands_still() -> bool:
            nonlocal before
            thread.join(0.2)
            still, before = sent == before, sent
            return still

        wait_for(stands_still, 20, "the client to be held back")
        assert sent < SIZE // 2, f"{sent / MB:.0f} MB went to a machine that reads nothing"
        growth.check()
        plane.poke(f"read-{tls}")
        told = peer.read_answer().told
        thread.join(20)
    assert (told["size"], told["sha256"]) == (SIZE, digest)


def test_both_directions_at_full_speed_do_not_block_each_other(
    plane: Plane, tls: bool, content: tuple[bytes, str]
) -> None:
    size = 20 * MB
    data = content[0][:size]
    growth = Growth(plane)
    with plane.peer(tls=tls) as peer:
        target = script(send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), "echo")
        peer.send(plane.head(target, f"Content-Length: {size}", method="POST"))
        assert peer.read_head().status == 200
        # One thread at a time may use a TLS connection: pieces go out as their echo comes in, well behind.
        view, read, found = memoryview(data), 0, hashlib.sha256()
        for at in range(0, size, 65_536):
            peer.send(bytes(view[at : at + 65_536]))
            while at - read > MB:
                chunk = peer.read_chunk()
                read += len(chunk)
                found.update(chunk)
        while chunk := peer.read_chunk():
            found.update(chunk)
    assert found.hexdigest() == hashlib.sha256(data).hexdigest()
    growth.check()

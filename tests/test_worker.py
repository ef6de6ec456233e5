from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from proxy import ipc
from proxy.clock import monotonic
from proxy.model import Machine, MachineId, MachineState, RegionCode
from proxy.process import unix_address
from proxy.worker import Link, Mailbox


async def test_a_link_that_is_tried_again_and_again_under_a_long_path_leaves_no_descriptors(tmp_path: Path) -> None:
    run_dir = tmp_path / ("d" * 120)
    run_dir.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as full:
        full.bind(unix_address(str(run_dir), "control.sock"))  # nobody listens there: each attempt is refused
        Link(cast(Any, None), str(run_dir)).start()  # the worker is not asked before control has spoken
        try:
            await asyncio.sleep(0.03)
            before = len(os.listdir("/proc/self/fd"))
            await asyncio.sleep(0.15)
            assert len(os.listdir("/proc/self/fd")) == before
        finally:
            for task in asyncio.all_tasks():
                if task.get_name() == "control-link":
                    task.cancel()


class Sender:
    """Control's side of a mailbox, and what a machine would accept."""

    def __init__(self, folder: Path) -> None:
        self.mailbox = Mailbox(str(folder), 0)
        self.mailbox.open()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.connect(self.mailbox.path)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(5)

    def send(self, machine: str = "m1", version: int = 7, age_s: float = 0.0, count: int = 1) -> list[socket.socket]:
        """Hand over so many connections at once; the machine's ends of them."""
        made = [socket.create_connection(self.server.getsockname()) for _ in range(count)]
        message = ipc.encode_handed(ipc.Handed(MachineId(machine), version, 8080, monotonic() - age_s))
        socket.send_fds(self.socket, [message], [one.fileno() for one in made])
        for one in made:
            one.close()
        ends = [self.server.accept()[0] for _ in made]
        for end in ends:
            end.settimeout(5)
        return ends

    def close(self) -> None:
        self.socket.close()
        self.server.close()


STARTED = Machine(MachineId("m1"), RegionCode("ams"), "app", MachineState.STARTED, 7, 1)


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[Sender]:
    one = Sender(tmp_path)
    yield one
    one.mailbox.close()
    one.close()


def test_a_connection_that_goes_with_the_record_is_taken(sender: Sender) -> None:
    (end,) = sender.send()
    taken = sender.mailbox.take(STARTED)
    assert taken is not None
    port, sock = taken
    with end, sock:
        sock.send(b"hello")
        assert (port, end.recv(5), sock.get_inheritable()) == (8080, b"hello", False)
    assert sender.mailbox.take(STARTED) is None


@pytest.mark.parametrize("other", [{"machine": "m2"}, {"version": 6}, {"age_s": 2.0}, {"count": 2}, {"count": 6}])
def test_what_does_not_go_with_the_record_is_closed(sender: Sender, other: dict[str, Any]) -> None:
    ends = [*sender.send(**other), *sender.send()]
    taken = sender.mailbox.take(STARTED)
    assert taken is not None
    with taken[1]:
        for end in ends[:-1]:
            with end:
                assert end.recv(1) == b""
        ends[-1].close()


def test_datagrams_that_are_no_connections_are_passed_over(sender: Sender) -> None:
    sender.socket.send(b"")
    sender.socket.send(ipc.encode_handed(ipc.Handed(MachineId("m1"), 7, 8080, monotonic())))
    with open("/dev/null") as nothing:
        socket.send_fds(sender.socket, [b"\xc1"], [nothing.fileno()])
        socket.send_fds(
            sender.socket, [ipc.encode_handed(ipc.Handed(MachineId("m1"), 7, 8080, monotonic()))], [nothing.fileno()]
        )
    assert sender.mailbox.take(STARTED) is None


def test_without_a_free_descriptor_there_is_none_to_take_and_no_harm(sender: Sender) -> None:
    (end,) = sender.send()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) - 1, limits[1]))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        assert sender.mailbox.take(STARTED) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for one in held:
            os.close(one)
    with end:
        assert end.recv(1) == b""


def test_an_emptied_or_closed_mailbox_keeps_nothing_open(sender: Sender) -> None:
    ends = sender.send() + sender.send("m2")
    sender.mailbox.empty()
    ends += sender.send()
    sender.mailbox.close()
    for end in ends:
        with end:
            assert end.recv(1) == b""


def test_only_the_owner_may_write_to_a_mailbox(sender: Sender) -> None:
    assert os.stat(sender.mailbox.path).st_mode & 0o777 == 0o600

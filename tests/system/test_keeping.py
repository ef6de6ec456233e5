"""Cordons under traffic, leases through the CLI, and WebSockets that are told before their machine is stopped."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.support.apps import PROGRAM, make_app, starts
from tests.support.processes import wait_for
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
CLIENTS = 6
WEBSOCKET = Path(__file__).with_name("programs") / "websocket.py"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    folder = tmp_path_factory.mktemp("node")
    apps = [make_app(folder, "pair", autostop="off", keys="count = 2"), make_app(folder, "lone")]
    idle = 'idle_timeout = "300ms"\n'
    apps += [make_app(folder, "busy", keys=idle + 'busy = "/busy"', env={"BUSY": str(folder / "busy")})]
    apps += [make_app(folder, "marked", keys=idle), make_app(folder, "idle", keys=idle)]
    apps += [make_app(folder, "warm", keys=idle + 'count = 2\nwarm_hours = ["daily 00:00-24:00 Europe/Amsterdam"]')]
    apps += [
        make_app(folder, name).replace(str(PROGRAM), str(WEBSOCKET)) for name in ("chat", "chat-frozen", "chat-gone")
    ]
    with ServedNode(folder, "".join(apps)) as served:
        yield served


@pytest.fixture
def pair(node: ServedNode) -> Iterator[list[str]]:
    """Two running machines, uncordoned before and after."""

    def both() -> list[str] | None:
        found = [one["id"] for one in node.machines("pair") if one["state"] == "started"]
        return found if len(found) == 2 else None

    ids = wait_for(both, 20, "both machines started")
    yield ids
    for one in ids:
        assert verb(node, "pair", one, "uncordon") == (200, {"ok": True})


def verb(node: ServedNode, app: str, machine: str, name: str) -> tuple[int, Any]:
    return node.api("POST", f"/v1/apps/{app}/machines/{machine}/{name}")


@dataclass(frozen=True)
class Answer:
    asked_at: float
    status: int
    machine: str


class Traffic:
    """Clients that ask as fast as they are answered, each on one kept connection, until the block ends."""

    def __init__(self, node: ServedNode, app: str) -> None:
        self.answers: list[Answer] = []
        self._node, self._app = node, app
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)

    def __enter__(self) -> Traffic:
        self._running = [self._pool.submit(self._ask) for _ in range(CLIENTS)]
        self.wait_for(lambda one: True, 100)
        return self

    def __exit__(self, *failure: object) -> None:
        self._end.set()
        self._pool.shutdown()
        for one in self._running:
            one.result()

    def _ask(self) -> None:
        client = self._node.client(self._app)
        try:
            while not self._end.is_set():
                asked_at = time.monotonic()
                client.request("GET", "/", headers={"Host": self._node.host(self._app)})
                with client.getresponse() as response:
                    told = json.loads(response.read())
                    self.answers.append(Answer(asked_at, response.status, told["machine"]))
        finally:
            client.close()

    def wait_for(self, counts: Any, count: int) -> None:
        """Until so many answers count."""
        wait_for(lambda: sum(1 for one in list(self.answers) if counts(one)) >= count, 20, f"{count} answers")


def test_a_cordoned_machine_gets_nothing_new_from_the_moment_that_it_is_answered(
    node: ServedNode, pair: list[str]
) -> None:
    with Traffic(node, "pair") as traffic:
        for machine in pair:
            traffic.wait_for(lambda one, machine=machine: one.machine == machine, 10)
        assert verb(node, "pair", pair[0], "cordon") == (200, {"ok": True, "acknowledged": True})
        cordoned_at = time.monotonic()
        traffic.wait_for(lambda one: one.asked_at > cordoned_at, 500)
        assert verb(node, "pair", pair[0], "uncordon")[0] == 200
        traffic.wait_for(lambda one: one.asked_at > cordoned_at and one.machine == pair[0], 10)
        uncordoned_at = min(
            one.asked_at for one in traffic.answers if one.asked_at > cordoned_at and one.machine == pair[0]
        )
    during = [one for one in traffic.answers if cordoned_at < one.asked_at < uncordoned_at]
    assert len(during) >= 400 and {one.machine for one in during} == {pair[1]}
    assert {one.status for one in traffic.answers} == {200}


def test_a_cordon_lets_finish_what_the_machine_has(node: ServedNode, pair: list[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert verb(node, "pair", pair[1], "cordon")[0] == 200
        slow = pool.submit(node.get, "pair", "/wait/1.5")
        wait_for(lambda: in_flight(node, pair[0]) == 1, 10, "a request at the other machine")
        assert verb(node, "pair", pair[1], "uncordon")[0] == verb(node, "pair", pair[0], "cordon")[0] == 200
        assert in_flight(node, pair[0]) == 1 and not slow.done()
        status, _, body = slow.result()
    assert status == 200 and json.loads(body)["machine"] == pair[0]


def in_flight(node: ServedNode, machine: str) -> int:
    _, told = node.api("GET", "/v1/status")
    return next(one["in_flight"] for app in told["apps"] for one in app["machines"] if one["id"] == machine)


def test_where_all_machines_are_cordoned_requests_are_refused_and_wake_nothing(
    node: ServedNode, pair: list[str]
) -> None:
    for one in pair:
        node.cli("machine", "cordon", one)
    status, fields, _ = node.get("pair")
    assert (status, fields["wakefront-error"]) == (503, "PR04")
    node.cli("machine", "uncordon", pair[0])
    assert node.get("pair")[0] == 200
    assert verb(node, "lone", node.machines("lone")[0]["id"], "cordon")[0] == 200
    assert node.get("lone")[0] == 503 and starts(node.folder, "lone") == []
    assert verb(node, "lone", node.machines("lone")[0]["id"], "uncordon")[0] == 200


def test_a_cordon_and_a_lease_outlive_control(node: ServedNode, pair: list[str]) -> None:
    path = f"/v1/apps/pair/machines/{pair[0]}"
    taken = node.cli("machine", "lease", "take", pair[0], "--ttl", "600", "-d", "deploying", "--json")
    lease = json.loads(taken)["lease"]
    node.cli("machine", "cordon", pair[0], "--nonce", lease["nonce"])
    old = node.pid_of("control")
    os.kill(old, signal.SIGKILL)
    node.wait_replaced("control", 0, old)
    node.wait_ready()
    assert node.api("GET", path)[1]["cordoned"] is True
    assert {json.loads(node.get("pair")[2])["machine"] for _ in range(20)} == {pair[1]}
    assert node.cli("machine", "uncordon", pair[0], status=1) == ""
    assert node.api("POST", path + "/stop")[0] == 409
    node.cli("machine", "uncordon", pair[0], "--nonce", lease["nonce"])
    node.cli("machine", "lease", "release", pair[0], "--nonce", lease["nonce"])
    assert node.api("GET", path)[1]["state"] == "started"


# --- what keeps an idle machine up


def come_and_go(node: ServedNode, times: int) -> None:
    """An app of the same idle timeout is woken and stopped, so that every other one was looked at meanwhile."""
    for _ in range(times):
        assert node.get("idle")[0] == 200
        node.wait_machine_state("idle", "stopped")


def test_a_machine_that_says_it_is_busy_stays_until_it_is_not(node: ServedNode) -> None:
    mark = node.folder / "busy"
    mark.touch()
    assert node.get("busy")[0] == 200
    come_and_go(node, 2)
    wait_for(lambda: "says that it is busy" in node.log(), 10, "the machine asked")
    assert node.machines("busy")[0]["state"] == "started"
    mark.unlink()
    node.wait_machine_state("busy", "stopped", 25)  # it is not asked again for 15 s
    assert len(starts(node.folder, "busy")) == 1


def test_a_machine_that_is_marked_busy_stays_until_the_mark_goes(node: ServedNode) -> None:
    node.cli("machine", "metadata", "set", "marked", "wakefront_busy=true")
    assert node.get("marked")[0] == 200
    come_and_go(node, 2)
    assert node.machines("marked")[0]["state"] == "started"
    node.cli("machine", "metadata", "set", "marked", f"wakefront_busy={time.time() + 1:.3f}")
    node.wait_machine_state("marked", "stopped")
    assert len(starts(node.folder, "marked")) == 1


def test_in_warm_hours_one_machine_runs_that_nobody_asked_for_and_stays(node: ServedNode) -> None:
    node.wait_machine_state("warm", "started")
    come_and_go(node, 2)
    assert sorted(one["state"] for one in node.machines("warm")) == ["created", "started"]
    assert len(starts(node.folder, "warm")) == 1


# --- WebSockets


def read_frame(stream: BinaryIO) -> tuple[int, bytes]:
    """Opcode and payload; fails where the stream is no sequence of whole, unmasked frames."""
    head = stream.read(2)
    assert len(head) == 2 and head[0] & 0x70 == 0 and not head[1] & 0x80, head
    size = head[1]
    if size == 126:
        (size,) = struct.unpack("!H", stream.read(2))
    assert size < 127 or size == 200
    payload = stream.read(size)
    assert len(payload) == size
    return head[0] & 0x0F, payload


def open_websocket(node: ServedNode, app: str, client: socket.socket, stream: BinaryIO) -> None:
    key = base64.b64encode(os.urandom(16)).decode()
    fields = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
    client.sendall(f"GET / HTTP/1.1\r\nHost: {node.host(app)}\r\n{fields}\r\n".encode())
    assert stream.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
    while stream.readline() != b"\r\n":
        pass
    for _ in range(20):
        assert read_frame(stream) == (1, b"tick" * 50)


@pytest.mark.parametrize(
    ("app", "how", "state"), [("chat", "stop", "stopped"), ("chat-frozen", "suspend", "suspended")]
)
@pytest.mark.parametrize("tls", [False, True])
def test_websockets_are_told_1001_between_two_frames_before_their_machine_ends(
    node: ServedNode, app: str, how: str, state: str, tls: bool
) -> None:
    with node.connect(app, tls=tls) as client, client.makefile("rb") as stream:
        open_websocket(node, app, client, stream)
        machine = node.machines(app)[0]["id"]
        began = time.monotonic()
        assert verb(node, app, machine, how)[0] == 200
        while (frame := read_frame(stream))[0] == 1:
            assert frame[1] == b"tick" * 50
        assert frame[0] == 8 and frame[1][:2] == struct.pack("!H", 1001)
        client.sendall(b"\x88\x82\x00\x00\x00\x00\x03\xe9")
        if not tls:
            client.shutdown(1)  # as clients do that have had the last word
    node.wait_machine_state(app, state)
    assert time.monotonic() - began < 5


def test_websockets_of_an_app_that_is_no_longer_configured_are_told_1001_too(node: ServedNode) -> None:
    before = node.config.read_text()
    with node.connect("chat-gone") as client, client.makefile("rb") as stream:
        open_websocket(node, "chat-gone", client, stream)
        node.config.write_text(_without(before, "chat-gone"))
        assert "chat-gone" in node.cli("reload")
        while (frame := read_frame(stream))[0] == 1:
            pass
        assert frame[0] == 8 and frame[1][:2] == struct.pack("!H", 1001)


def _without(config: str, app: str) -> str:
    """The config less one app's section."""
    head, *sections = config.split("[[apps]]")
    return "[[apps]]".join([head, *(one for one in sections if f"/{app}/fly.toml" not in one)])

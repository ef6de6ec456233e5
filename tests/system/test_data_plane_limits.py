"""Bounds and deadlines of a served node, and its access log as text: each limit answers as it says, and is logged."""

from __future__ import annotations

import os
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.peer import Closed, Peer
from tests.support.plane import Plane, scripted_app, static_app
from tests.support.processes import wait_for
from tests.support.script import answer, script, send

pytestmark = pytest.mark.slow
LIMITS = """[limits]
max_head_bytes = 8192
max_headers = 20
max_target_bytes = 2000
max_connections = 10
handshake_timeout = "1s"
head_timeout = "1s"
idle_timeout = "1s"
"""


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path / "one", scripted_app(tmp_path, "web"), workers=1) as node:
        yield node


@pytest.fixture(scope="module")
def deaf() -> Iterator[str]:
    """The address of a listener whose queue is full: a connect to it is neither taken nor refused."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(3):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(listener.getsockname())
        yield "{}:{}".format(*listener.getsockname())
        for one in waiting:
            one.close()


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory, deaf: str) -> Iterator[Plane]:
    folder = tmp_path_factory.mktemp("limits")
    apps = [
        scripted_app(folder, "web"),
        scripted_app(folder, "brief", more='first_byte_timeout = "1s"\nstream_idle_timeout = "1s"\n'),
        scripted_app(folder, "patient", more='stream_idle_timeout = "1s"\n'),
        static_app(folder, "deaf", deaf, more='connect_timeout = "500ms"\nwake_timeout = "1s"\n'),
    ]
    with Plane(folder, "\n".join(apps), LIMITS, log_format="text") as served:
        for app in ("web", "brief", "patient"):
            assert served.ask("/tell", app=app).status == 200
        yield served


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class Clock:
    """How long something took: not before its time, and not much after."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def check(self, seconds: float) -> None:
        took = time.monotonic() - self._began
        assert seconds * 0.9 <= took < seconds + 2.0, f"{took:.2f} s instead of {seconds} s"


# --- limits


@pytest.mark.parametrize(
    ("status", "code", "target", "fields"),
    [
        (431, "WD02", "/", [f"X-Big: {'x' * 9000}"]),
        (431, "WD02", "/", [f"X-{number}: 1" for number in range(25)]),
        (431, "WD02", "/", ["X-Endless: " + "x" * 200_000]),
        (414, "WD03", "/" + "a" * 2100, []),
    ],
    ids=["bytes", "fields", "endless", "target"],
)
def test_a_head_over_a_limit_is_refused(
    plane: Plane, tls: bool, status: int, code: str, target: str, fields: list[str]
) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(target, *fields))
        got = peer.read_answer()
        assert (got.status, got["wakefront-error"], got["connection"]) == (status, code, "close")
    plane.line(lambda line: f" {status} " in line and line.endswith(f" {code}"))


def test_heads_just_within_the_limits_pass(plane: Plane, tls: bool) -> None:
    for target, fields in [
        ("/tell", [f"X-Big: {'x' * 7900}"]),
        ("/tell", [f"X-{number}: 1" for number in range(19)]),
        ("/tell" + "a" * 1900, []),
    ]:
        assert plane.ask(target, *fields, tls=tls).status == 200


def test_connections_over_the_limit_are_closed_and_counted(plane: Plane) -> None:
    wait_for(lambda: plane.metric("wakefront_connections") == 0, 10, "an idle node")
    dropped = plane.metric("fly_edge_tcp_connections_drop_count")
    peers = [plane.peer() for _ in range(80)]
    try:
        kept = closed = 0
        for peer in peers:
            try:
                peer.send(plane.head("/tell"))
                kept += peer.read_answer().status == 200
            except (Closed, ConnectionResetError, BrokenPipeError):
                closed += 1
        assert (kept, closed) == (20, 60), "ten for each of the two workers"
    finally:
        for peer in peers:
            peer.socket.close()
    assert plane.metric("fly_edge_tcp_connections_drop_count") == dropped + 60
    wait_for(lambda: plane.metric("wakefront_connections") == 0, 10, "all to have ended")
    assert plane.ask("/tell").status == 200


def test_a_worker_without_a_descriptor_left_goes_on_serving_and_says_so(one_worker: Plane) -> None:
    """What comes beyond is closed; connections that rest are let go for the sake of what is under way."""
    node = one_worker
    (pid,) = node.worker_pids
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with node.peer() as kept:
        kept.send(node.head("/tell"))
        assert kept.read_answer().status == 200
        least = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (least + 6, hard))
        try:
            crowd = [node.peer(timeout=5) for _ in range(30)]
            wait_for(lambda: "no file descriptor is left" in node.log(), 10, "the worker to say so")
            kept.send(node.head("/tell"))
            answered = kept.read_answer()
            assert answered.status == 200 and answered["connection"] == "close"
            for peer in crowd:
                peer.socket.close()
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert "LimitNOFILE" in node.log() and "Traceback" not in node.log()
    wait_for(lambda: "overload: normal, was crowded" in node.log(), 15, "the worker to be at ease again")
    assert node.ask("/tell").status == 200 and node.worker_pids == [pid]


# --- deadlines of the client


def test_a_head_that_stalls_gets_a_408(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head("/tell"))
        assert peer.read_answer().status == 200
        clock = Clock()
        peer.send(plane.head("/tell")[:30])
        got = peer.read_answer()
        clock.check(1.0)
        assert (got.status, got["wakefront-error"], got["connection"]) == (408, "WD06", "close")
    plane.line(lambda line: " 408 " in line and line.endswith(" WD06"))


def test_an_idle_connection_ends_without_a_word(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head("/tell"))
        assert peer.read_answer().status == 200
        clock = Clock()
        assert peer.is_closed()
        clock.check(1.0)


def test_a_connection_that_never_says_anything_ends(plane: Plane, tls: bool) -> None:
    clock = Clock()
    with plane.peer(tls=tls) as peer:
        try:
            assert peer.read_to_end() == b""
        except ConnectionResetError:
            pass
    clock.check(1.0)


@pytest.mark.parametrize(
    "start", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], ids=["silent", "half a hello"]
)
def test_a_handshake_that_stalls_ends(plane: Plane, start: bytes) -> None:
    clock = Clock()
    with Peer(plane.connect_to(plane.https_port, None)) as peer:
        peer.send(start)
        assert peer.is_closed()
    clock.check(1.0)
    if start:
        plane.line(lambda line: line.startswith("127.0.0.1 ") and line.endswith(" PT08"))


def test_a_body_that_stalls_gets_a_408_and_the_machine_no_end(plane: Plane, tls: bool) -> None:
    with plane.peer("brief", tls) as peer:
        clock = Clock()
        peer.send(plane.head(f"/stalled-{tls}", "Content-Length: 10", app="brief", method="POST", body="half"))
        got = peer.read_answer()
        clock.check(1.0)
        assert (got.status, got["wakefront-error"], got["connection"]) == (408, "WD07", "close")
    plane.line(lambda line: f"/stalled-{tls}" in line and line.endswith(" WD07"))


# --- deadlines of the machine


def test_a_machine_that_does_not_answer_in_time_is_a_504(plane: Plane, tls: bool) -> None:
    with plane.peer("brief", tls) as peer:
        clock = Clock()
        peer.send(plane.head(script("wait:never"), app="brief"))
        got = peer.read_answer()
        clock.check(1.0)
        assert (got.status, got["wakefront-error"]) == (504, "WU02")
        peer.send(plane.head("/tell", app="brief"))
        assert peer.read_answer().status == 200
    plane.line(lambda line: got["fly-request-id"] in line and " 504 " in line and line.endswith(" WU02"))


def test_a_machine_that_takes_nothing_of_a_body_is_given_up(plane: Plane) -> None:
    with plane.peer("brief") as peer:
        peer.send(plane.head(script("wait:never"), "Content-Length: 100000000", app="brief", method="PUT"))
        sender = threading.Thread(target=send_until_refused, args=(peer, 100_000_000))
        clock = Clock()
        sender.start()
        got = peer.read_answer()
        clock.check(1.0)
        assert (got.status, got["wakefront-error"], got["connection"]) == (504, "WU02", "close")
        sender.join(10)
        assert not sender.is_alive(), "a client that never stops sending is cut off after the answer"


def send_until_refused(peer: Peer, size: int) -> None:
    try:
        while size > 0:
            peer.send(b"x" * 65_536)
            size -= 65_536
    except OSError:
        pass


def test_an_answer_that_stalls_is_broken_off(plane: Plane, tls: bool) -> None:
    with plane.peer("brief", tls) as peer:
        peer.send(
            plane.head(script(send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"), "wait:never"), app="brief")
        )
        clock = Clock()
        head = peer.read_head()
        assert peer.read_to_end() == b"half"
        clock.check(1.0)
    plane.line(lambda line: head["fly-request-id"] in line and " 200 " in line and line.endswith(" WU04"))


def test_a_connect_that_nobody_takes_up_is_given_up(plane: Plane, tls: bool) -> None:
    with plane.peer("deaf", tls) as peer:
        peer.send(plane.head("/", app="deaf"))
        got = peer.read_answer()
    assert got.status in (503, 504) and got["wakefront-error"] in ("PC05", "PM03", "PM05")
    plane.line(lambda line: got["fly-request-id"] in line and line.endswith(got["wakefront-error"]))


def test_a_tunnel_in_which_nothing_moves_ends(plane: Plane, tls: bool) -> None:
    switch = send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: line\r\nConnection: Upgrade\r\n\r\n")
    with plane.peer("brief", tls) as peer:
        peer.send(plane.head(script(switch, "tunnel"), "Connection: Upgrade", "Upgrade: line", app="brief"))
        assert peer.read_head().status == 101
        for _ in range(5):
            time.sleep(0.4)
            peer.send("still here")
            assert peer.read_exactly(10) == b"still here"
        clock = Clock()
        assert peer.is_closed()
        clock.check(1.0)


# --- what is no reason to end anything


def test_an_upload_that_goes_on_outlives_the_idle_timeout_while_the_machine_says_nothing(
    plane: Plane, tls: bool
) -> None:
    for start in (
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhead\r\n",
    ):
        end = "tell" if "100" in start else send("4\r\ntail\r\n0\r\n\r\n")
        with plane.peer("patient", tls) as peer:
            peer.send(plane.head(script(send(start), "read", end), "Content-Length: 6", app="patient", method="PUT"))
            for byte in "slowly":
                peer.send(byte)
                time.sleep(0.3)
            got = peer.read_answer()
            assert got.status == 200 and (b'"start": "slowly"' in got.body or got.body == b"headtail")


def test_a_client_that_waits_for_its_100_is_not_the_slow_side(plane: Plane, tls: bool) -> None:
    with plane.peer("patient", tls) as peer:
        target = script("wait:late", send("HTTP/1.1 100 Continue\r\n\r\n"), "read", "tell")
        peer.send(plane.head(target, "Expect: 100-continue", "Content-Length: 2", app="patient", method="PUT"))
        assert peer.has_nothing(1.8)
        plane.poke("late", app="patient")
        assert peer.read_head().status == 100
        peer.send("ok")
        assert peer.read_answer().told["start"] == "ok"


def test_a_machine_that_never_says_100_or_anything_else_is_a_504(plane: Plane, tls: bool) -> None:
    with plane.peer("brief", tls) as peer:
        clock = Clock()
        peer.send(
            plane.head(script("wait:never"), "Expect: 100-continue", "Content-Length: 2", app="brief", method="PUT")
        )
        got = peer.read_answer()
        clock.check(1.0)
        assert (got.status, got["wakefront-error"]) == (504, "WU02")


# --- the log as text

LINE = re.compile(
    r"127\.0\.0\.1 \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d \+0000\] "
    r'"(?P<request>[^"]*)" (?P<host>\S+) (?P<status>\d+)'
    r" (?P<bytes>\d+) \d+\.\d{3}ms (?P<where>\S+/\S+) (?P<id>\S+) (?P<code>\S+)"
)


def test_each_request_is_a_line_of_the_text_log(plane: Plane, tls: bool) -> None:
    got = plane.ask(script(answer(b"12345")), tls=tls)
    found = LINE.fullmatch(plane.line(lambda line: got["fly-request-id"] in line))
    assert found
    assert found["request"].startswith("GET /do?do=send:") and found["host"] == "web.apps.localhost"
    assert (found["status"], found["bytes"], found["code"]) == ("200", "5", "-")
    assert found["where"] == f"web/{plane.machines('web')[0]['id']}"
    got = plane.ask("/a%22b", app="nobody")
    found = LINE.fullmatch(plane.line(lambda line: got["fly-request-id"] in line))
    assert found and (found["status"], found["where"], found["code"]) == ("404", "-/-", "WD09")


def test_all_lines_of_the_text_log_have_the_one_form(plane: Plane) -> None:
    with plane.peer() as peer:
        peer.send(b'GET /"quoted" HTTP/1.1\r\n\r\n')
        assert peer.read_answer().status == 400
    lines = plane.log_file.read_text().splitlines()
    assert lines and not [line for line in lines if not LINE.fullmatch(line)]

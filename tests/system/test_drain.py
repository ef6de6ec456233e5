"""SIGTERM: what was asked before it is answered, kept connections end with `Connection: close`, then all else ends."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.processes import wait_for
from tests.support.serve import ServedNode

PROGRAM = Path(__file__).parent.parent / "support" / "counting.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ServedNode]:
    fly_toml = tmp_path / "fly.toml"
    fly_toml.write_text('app = "counted"\n[http_service]\ninternal_port = 8080\nauto_stop_machines = "off"\n')
    command = json.dumps([sys.executable, "-I", str(PROGRAM)])
    with ServedNode(tmp_path, f'[[apps]]\nfly_toml = "{fly_toml}"\ncommand = {command}\n') as one:
        assert one.get("counted", "/work")[0] == 200
        yield one


def begin_to_end(node: ServedNode) -> None:
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining: workers have" in node.log(), 10, node.log)


def test_requests_under_way_and_half_an_upload_are_answered(node: ServedNode) -> None:
    node.client_context()  # got once, and not by ten commands at once
    with ThreadPoolExecutor(21) as pool, node.connect("counted") as upload:
        slow = [pool.submit(node.get, "counted", "/work?ms=3000", tls=place % 2 == 0) for place in range(20)]
        upload.sendall(b"POST /work?id=1 HTTP/1.1\r\nHost: counted.apps.localhost\r\nContent-Length: 10\r\n\r\nhalf.")
        wait_for(lambda: node.machines("counted") and in_flight(node) >= 21, 10, "all are under way")
        began = time.monotonic()
        begin_to_end(node)
        time.sleep(0.5)  # well into the drain
        upload.sendall(b"half.")
        head = upload.recv(65_536).lower()
        assert head.startswith(b"http/1.1 200 ") and b"\r\nconnection: close\r\n" in head
        answers = [one.result(timeout=20) for one in slow]
        assert [status for status, _, _ in answers] == [200] * 20
        assert all(fields["connection"] == "close" for _, fields, _ in answers)
        ended_well(node)
        assert 1.0 < time.monotonic() - began < 10.0, "it waited for them, and for nothing else"


def ended_well(node: ServedNode) -> None:
    assert node.process is not None
    assert node.process.wait(20) == 0, node.log()


def in_flight(node: ServedNode) -> int:
    return int(node.api("GET", "/v1/status")[1]["apps"][0]["machines"][0]["in_flight"])


def test_busy_kept_connections_get_a_last_answer_that_says_so(node: ServedNode) -> None:
    """Every request that was sent has its answer: none meets a connection closed under it."""
    request = b"GET /work HTTP/1.1\r\nHost: counted.apps.localhost\r\n\r\n"
    ends: list[str] = []

    def client(tls: bool) -> None:
        with node.connect("counted", tls=tls) as sock:
            while True:
                sock.sendall(request)
                answer = read_answer(sock)
                if not answer or b"connection: close" in answer:
                    ends.append("told" if answer else "cut")
                    return

    threads = [threading.Thread(target=client, args=(place % 3 == 0,)) for place in range(24)]
    for one in threads:
        one.start()
    time.sleep(0.5)
    begin_to_end(node)
    for one in threads:
        one.join(20)
    assert ends == ["told"] * 24
    ended_well(node)


def read_answer(sock: socket.socket) -> bytes:
    """A head in lower case, its body read; nothing if the connection has ended."""
    held = b""
    while b"\r\n\r\n" not in held:
        data = sock.recv(65_536)
        if not data:
            return b""
        held += data
    head, _, body = held.lower().partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(65_536)
    return head


def test_a_connection_that_rests_does_not_hold_the_end_up(node: ServedNode) -> None:
    with node.connect("counted") as idle:
        idle.sendall(b"GET /work HTTP/1.1\r\nHost: counted.apps.localhost\r\n\r\n")
        assert b"connection: close" not in read_answer(idle)
        began = time.monotonic()
        node.stop()
        assert time.monotonic() - began < 5.0
        assert idle.recv(100) == b"", "an orderly end, no reset"

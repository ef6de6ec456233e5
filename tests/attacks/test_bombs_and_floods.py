"""A15: heads of every excess. And floods of connections and handshakes, from one source and from all."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode
from tests.support.processes import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

HEADS = {
    "a field of 64 KB": (("X-Long: " + "a" * 65_536,), 431),
    "a field of 1 MB": (("X-Long: " + "a" * 1_048_576,), 431),
    "10,000 fields": (tuple(f"X-{number}: y" for number in range(10_000)), 431),
    "10,000 empty fields": (("X:",) * 10_000, 431),
    "101 fields": (tuple(f"X-{number}: y" for number in range(101)), 431),
    "1,000 cookies": (tuple(f"Cookie: name{number}=value" for number in range(1_000)), 431),
    "1,000 cookies in one field": (("Cookie: " + "; ".join(f"n{number}=" + "v" * 64 for number in range(1_000)),), 431),
    "a name of 64 KB": (("X" * 65_536 + ": y",), 431),
}


def test_heads_of_every_excess_are_refused_in_constant_memory(node: AttackedNode, attack: Begin) -> None:
    with attack("A15", "header bombs", node, growth_mib=16) as run:
        for name, (fields, status) in HEADS.items():
            for tls in (False, True):
                run.case(name)
                got = node.attempt(node.head("/", *fields), tls=tls, take_its_word=True)
                assert got.statuses[:1] in ([status], [400]) and len(got.answers) == 1, (name, got)
                assert node.origin.take() == []
        for length in (16_385, 65_536, 1_048_576):
            run.case(f"target of {length}")
            got = node.attempt(node.head("/" + "a" * length))
            assert got.statuses == [414], (length, got)
        assert node.origin.take() == []


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedNode]:
    """127.0.0.0/8 counts as any source, and one worker takes 400 connections."""
    sections = """[limits]
max_connections = 400
source_connections = 100
source_connects = 0
source_handshakes = 50
exempt_sources = []
"""
    with AttackedNode(tmp_path_factory.mktemp("limited"), sections=sections) as one:
        one.client_context()
        yield one


def connect(node: AttackedNode, source: str, tls: bool = False) -> socket.socket:
    port = node.https_port if tls else node.http_port
    return socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0))


def is_cut(sock: socket.socket) -> bool:
    sock.settimeout(5)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def test_one_source_has_its_share_of_connections_and_the_others_theirs(limited: AttackedNode, attack: Begin) -> None:
    with attack("limits", "connections of one source", limited, p99_ms=50) as run, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(limited, "127.0.0.77")) for _ in range(100)]
        wait_for(lambda: limited.metric("wakefront_connections") >= 100, 10, "all are accepted")
        for _ in range(500):
            run.case()
            with connect(limited, "127.0.0.77") as over:
                assert is_cut(over)
        held[0].sendall(limited.head("/"))
        assert held[0].recv(12) == b"HTTP/1.1 200", "those it has are served"
        assert limited.ask("/").status == 200, "and so is who comes from elsewhere"
        held.pop().close()

        def again() -> bool:
            with connect(limited, "127.0.0.77") as sock:
                sock.sendall(limited.head("/"))
                with contextlib.suppress(ConnectionError):
                    return sock.recv(12) == b"HTTP/1.1 200"
                return False

        wait_for(again, 10, "one that ended makes room for another")
        assert limited.metric("wakefront_source_refused_count") >= 500
    assert "connections refused, the last of 127.0.0.77" in limited.log()


def test_all_sources_together_meet_the_limit_of_the_worker_and_resting_ones_make_room(
    limited: AttackedNode, attack: Begin
) -> None:
    """At nine tenths connections that rest are let go, so that a crowd of them keeps nobody out."""
    with attack("limits", "connections of all sources", limited, p99_ms=50) as run, contextlib.ExitStack() as stack:
        for number in range(380):
            run.case()
            sock = stack.enter_context(connect(limited, f"127.0.1.{1 + number % 200}"))
            sock.sendall(limited.head("/"))
            assert sock.recv(12)[:12] in (b"HTTP/1.1 200", b"")
        wait_for(lambda: limited.metric("wakefront_connections") < 360, 20, "those that rest are let go")
        assert limited.ask("/").status == 200
    wait_for(lambda: limited.metric("wakefront_overload_stage") == 0, 10, "it is over")


def test_a_flood_of_handshakes_of_one_source_is_refused_at_the_hello(limited: AttackedNode, attack: Begin) -> None:
    context = limited.client_context()
    done, refused = 0, 0
    with attack("limits", "handshakes of one source", limited, p99_ms=50) as run:
        for _ in range(200):
            run.case()
            with connect(limited, "127.0.0.88", tls=True) as raw:
                try:
                    context.wrap_socket(raw, server_hostname=limited.host("web")).close()
                    done += 1
                except (ssl.SSLError, ConnectionError):
                    refused += 1
        run.note(f"{done} done, {refused} refused")
        assert done >= 50 and refused >= 50
        assert limited.ask("/", tls=True).status == 200


def test_a_flood_of_handshakes_from_everywhere_leaves_requests_their_turn(node: AttackedNode, attack: Begin) -> None:
    """Loopback is exempt at the defaults: four clients do nothing but handshakes, as fast as they can."""
    over = threading.Event()
    context = node.client_context()
    count = [0] * 4

    def shake(place: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), connect(node, f"127.0.2.{place}", tls=True) as raw:
                context.wrap_socket(raw, server_hostname=node.host("web")).close()
                count[place] += 1

    threads = [threading.Thread(target=shake, args=(place,)) for place in range(4)]
    with attack("limits", "handshakes of all sources", node, p99_ms=100) as run:
        for one in threads:
            one.start()
        time.sleep(3)  # how long the flood lasts is the test's parameter
        over.set()
        for one in threads:
            one.join(20)
        for _ in range(sum(count)):
            run.case()
        assert sum(count) > 200

"""The harness finds what it is there to find: a test of it, not of the edge."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.support.attack_table import Figures, Ledger
from tests.support.attacks import Attack, AttackedNode
from tests.support.edge import EdgeHarness
from tests.support.processes import state_of, wait_for
from tests.support.recording import RecordingOrigin, Seen

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: state_of(pid) == "T", 5, "it stands still")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_row_tells_cases_memory_cpu_and_what_the_bystander_met(node: AttackedNode) -> None:
    ledger = Ledger()
    for _ in range(2):
        with Attack(ledger, "A0", "nothing hostile", node) as run:
            for number in range(200):
                run.case(number)
                got = node.attempt(node.head(f"/{number}"))
                assert got.statuses == [200] and got.closed
                assert [one.target for one in node.origin.take()] == [f"/{number}"]
    (row,) = ledger.rows
    assert (row.cases, row.outcome) == (400, "held")
    assert row.growth_mib is not None and row.cpu_s is not None and 0 < row.cpu_s < row.seconds
    assert row.bystander_answers > 2 and row.bystander_p99_ms and row.fresh_p99_ms and row.quiet_p99_ms
    assert json.loads(ledger.json())[0]["row"] == "A0"
    assert ledger.lines()[2].startswith("| A0 | nothing hostile | 400 |")


def test_a_worker_that_stands_still_shows_in_the_bystanders_p99(node: AttackedNode) -> None:
    ledger = Ledger()

    def stand_still() -> None:
        with Attack(ledger, "A0", "held", node, p99_ms=200):
            with frozen(node.worker_pids[0]), node.peer() as peer:
                peer.send(node.head("/"))
                assert peer.has_nothing(0.5)
            assert node.ask("/").status == 200

    with pytest.raises(AssertionError, match="p99 of the bystander"):
        stand_still()
    assert ledger.rows[0].outcome.startswith("NOT HELD: p99")
    assert (ledger.rows[0].bystander_p99_ms or 0) >= 300


def test_a_failed_case_is_named_in_the_table_and_in_the_error(node: AttackedNode) -> None:
    ledger = Ledger()

    def fail() -> None:
        with Attack(ledger, "A0", "failing", node) as run:
            run.case("the third spelling")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as failed:
        fail()
    assert "the third spelling" in failed.value.__notes__[0]
    assert ledger.rows[0].outcome == "NOT HELD: ZeroDivisionError the third spelling"


def test_bytes_that_no_edge_may_write_are_a_fault_of_the_attack(node: AttackedNode) -> None:
    ledger = Ledger()

    def split() -> None:
        with Attack(ledger, "A0", "split", node), socket.create_connection(("127.0.0.1", node.origin.port)) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert sock.recv(100) == b""

    with pytest.raises(AssertionError, match="the origin was sent"):
        split()
    node.origin.reset()


@pytest.mark.parametrize(
    "data",
    [
        b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX y: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;x\r\na\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc0\r\n\r\n",
    ],
)
def test_the_origin_takes_only_the_narrowest_framing(data: bytes) -> None:
    with RecordingOrigin() as origin, socket.create_connection(("127.0.0.1", origin.port)) as sock:
        sock.settimeout(5)
        sock.sendall(data)
        assert sock.recv(100) == b""
        assert len(origin.faults) == 1 and origin.take() == []
        assert bytes(origin.connections[0].data) == data


def test_the_origin_keeps_exact_bytes_and_its_peak_and_answers_as_told() -> None:
    first = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n"
    second = b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nde"
    with RecordingOrigin() as origin, socket.create_connection(("127.0.0.1", origin.port)) as one:
        origin.hold()
        one.sendall(first + second)
        with socket.create_connection(("127.0.0.1", origin.port)) as two:
            two.sendall(second)
            origin.wait_count(2)
            origin.release()
            assert two.recv(100).startswith(b"HTTP/1.1 200 OK")
        origin.wait_count(3)
        assert origin.peak_in_flight == 2
        seen = [one for one in origin.take() if one.connection == 0]
        assert [(each.raw, each.body) for each in seen][:1] == [(first, b"abc")]
        assert seen[0].trailers == b"X: y\r\n" and seen[0].all("transfer-encoding") == ["chunked"]

        async def teapot(seen: Seen, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 418 Teapot\r\nContent-Length: 0\r\n\r\n")

        origin.respond = teapot
        with socket.create_connection(("127.0.0.1", origin.port)) as three:
            three.sendall(second)
            assert three.recv(100).startswith(b"HTTP/1.1 418 ")


async def test_an_edge_in_the_tests_own_process_gives_a_row_too(edge: EdgeHarness) -> None:
    ledger = Ledger()
    with Attack(ledger, "A0", "in process") as run:
        run.case()
        assert (await edge.request(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert ledger.rows[0].cases == 1 and ledger.rows[0].growth_mib is None


def test_rows_are_in_the_order_of_their_numbers_with_their_notes() -> None:
    ledger = Ledger()
    for row in ("A12", "A6"):
        with Attack(ledger, row, "name") as run:
            run.case()
            run.note("figures | of its own")
    assert [one.row for one in ledger.ordered()] == ["A6", "A12"]
    assert "held; figures / of its own" in ledger.lines()[2]


def test_rows_of_several_runs_become_one_that_holds_only_if_all_did() -> None:
    runs = [
        Figures("A6", "name", 3, 1.0, growth_mib=2.0, cpu_s=0.5, notes=["a"]),
        Figures("A6", "name", 4, 2.0, growth_mib=1.0, cpu_s=0.25, outcome="NOT HELD: why", notes=["a", "b"]),
    ]
    total = Ledger()
    for one in runs:
        ledger = Ledger()
        ledger.add(one)
        total.add_json(ledger.json())
    (row,) = total.rows
    assert (row.cases, row.seconds, row.growth_mib, row.cpu_s) == (7, 3.0, 2.0, 0.75)
    assert (row.outcome, row.notes) == ("NOT HELD: why", ["a", "b"])

"""HTTP/1.1 through a served node with two workers, plain and TLS: what the client gets and what the machine saw."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.peer import Closed, Peer
from tests.support.plane import HTTP_80, TLS_443, Plane, scripted_app, static_app
from tests.support.processes import wait_for
from tests.support.script import answer, script, send
from tests.support.serve import free_ports

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

TLS_8000 = '[[services.ports]]\nport = 8000\nhandlers = ["tls", "http"]\n'
PLAIN_8000 = '[[services.ports]]\nport = 8000\nhandlers = ["http"]\n'
RULES = (
    '[services.ports.http_options.response.headers]\nx-gone = false\nX-Set = "ours"\nX-Many = ["a", "b"]\n'
    "fly-request-id = false\n"
)
PRISTINE = "[services.ports.http_options.response]\npristine = true\n"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    folder = tmp_path_factory.mktemp("plane")
    (closed,) = free_ports(1)
    apps = [
        scripted_app(folder, "web", HTTP_80 + TLS_443 + TLS_8000),
        scripted_app(folder, "other", HTTP_80 + TLS_443 + PLAIN_8000),
        scripted_app(folder, "each", kind="connections"),
        scripted_app(folder, "kept"),
        scripted_app(folder, "forced", HTTP_80 + "force_https = true\n" + TLS_443),
        scripted_app(folder, "rules", HTTP_80 + RULES + TLS_443 + RULES),
        scripted_app(folder, "pristine", HTTP_80 + PRISTINE + TLS_443 + PRISTINE),
        static_app(folder, "gone", f"127.0.0.1:{closed}", more='wake_timeout = "1s"\n'),
        f'[[apps]]\nfly_toml = "{ROOT}/demo/apps/echo/fly.toml"\n',
    ]
    with Plane(folder, "\n".join(apps)) as served:
        yield served


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# --- framing


def test_chunks_and_trailers_pass_both_ways(plane: Plane, tls: bool) -> None:
    target = script("read", send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Check\r\n\r\n"),
                    send("3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nX-Check: 9\r\nHost: evil\r\n\r\n"))  # fmt: skip
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(target, "Transfer-Encoding: chunked", method="POST"))
        peer.send("2;ext=1\r\nhi\r\n5\r\nthere\r\n0\r\nX-Sum: 7\r\nCookie: a=b\r\nFly-Region: zzz\r\n\r\n")
        got = peer.read_answer()
        assert (got.body, got.trailers) == (b"abcde", b"X-Check: 9\r\n")
        peer.send(plane.head("/tell", "Transfer-Encoding: chunked", method="PUT"))
        peer.send("2;ext=1\r\nhi\r\n5\r\nthere\r\n0\r\nX-Sum: 7\r\nCookie: a=b\r\nFly-Region: zzz\r\n\r\n")
        told = peer.read_answer().told
    assert told["start"] == "hithere"
    assert told["trailers"] == "X-Sum: 7\r\n"
    assert "transfer-encoding: chunked\r\n" in told["head"] and "content-length" not in told["head"].lower()


def test_answers_without_a_body_leave_the_connection_usable(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        for method, status, fields, shown in [
            ("HEAD", "200 OK", "Content-Length: 5000\r\n", "5000"),
            ("HEAD", "200 OK", "Transfer-Encoding: chunked\r\n", None),
            ("GET", "204 No Content", "", None),
            ("GET", "304 Not Modified", 'ETag: "x"\r\nContent-Length: 77\r\n', "77"),
        ]:
            peer.send(plane.head(script(send(f"HTTP/1.1 {status}\r\n{fields}\r\n")), method=method))
            got = peer.read_answer(method)
            assert f"{got.status}" == status[:3]
            assert got.all("content-length") == ([shown] if shown else [])
        peer.send(plane.head("/tell"))
        assert peer.read_answer().status == 200


def test_an_answer_that_ends_with_the_connection_arrives_whole(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(send("HTTP/1.1 200 OK\r\n\r\n"), send("all of it"), "close")))
        got = peer.read_answer()
        assert got["transfer-encoding"] == "chunked" and got.body == b"all of it"
        peer.send(plane.head("/tell"))
        assert peer.read_answer().status == 200


def test_a_request_split_at_every_byte_gives_the_same_result(plane: Plane, tls: bool) -> None:
    body = "4\r\nbody\r\n0\r\nX-T: 1\r\n\r\n"
    request = plane.head("/split", "X-A: 1", "Transfer-Encoding: chunked", method="POST", body=body)
    with plane.peer(tls=tls) as peer:
        for cut in range(1, len(request)):
            peer.send(request[:cut])
            time.sleep(0.001)  # so that the two parts are read apart; if ever not, no harm is done
            peer.send(request[cut:])
            told = peer.read_answer().told
            assert (told["start"], told["trailers"]) == ("body", "X-T: 1\r\n"), cut
            assert "X-A: 1\r\n" in told["head"]
        for byte in request:
            peer.send(bytes([byte]))
        assert peer.read_answer().told["start"] == "body"


def test_sixteen_mixed_requests_in_one_write_are_answered_in_order(plane: Plane, tls: bool) -> None:
    requests, expected = b"", []
    for number in range(4):
        requests += plane.head(f"/pipe-{number}-get")
        requests += plane.head(
            f"/pipe-{number}-post", f"Content-Length: {number + 1}", method="POST", body="x" * (number + 1)
        )
        requests += plane.head(script(send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")), method="HEAD")
        requests += plane.head(
            f"/pipe-{number}-chunks", "Transfer-Encoding: chunked", method="PUT", body="2\r\nhi\r\n0\r\n\r\n"
        )
        expected += [("GET", f"/pipe-{number}-get", 0), ("POST", f"/pipe-{number}-post", number + 1), ("HEAD", "", 0),
                     ("PUT", f"/pipe-{number}-chunks", 2)]  # fmt: skip
    with plane.peer(tls=tls) as peer:
        peer.send(requests)
        for method, target, size in expected:
            got = peer.read_answer(method)
            if method == "HEAD":
                continue
            assert got.told["head"].startswith(f"{method} {target} HTTP/1.1\r\n")
            assert got.told["size"] == size
        assert peer.has_nothing(0.05)


def test_http_1_0_clients_are_served_with_and_without_keep_alive(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head("/tell", "Connection: keep-alive", version="1.0"))
        got = peer.read_answer()
        assert got["connection"] == "keep-alive" and "HTTP/1.1\r\n" in got.told["head"]
        assert "via: 1.0 wakefront\r\n" in got.told["head"]
        chunks = script(send("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                             "3\r\nabc\r\n0\r\n\r\n"))  # fmt: skip
        peer.send(plane.head(chunks, "Connection: keep-alive", version="1.0"))
        got = peer.read_answer()
        assert "transfer-encoding" not in got and "content-length" not in got and got["connection"] == "close"
        assert got.body == b"abc" and got.interim == ()
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head("/tell", version="1.0"))
        assert peer.read_answer()["connection"] == "close"
        assert peer.is_closed()


def test_a_client_that_asks_to_close_gets_its_answer_and_the_end(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head("/tell", "Connection: close"))
        assert peer.read_answer()["connection"] == "close"
        assert peer.is_closed()


def test_a_client_that_half_closes_still_gets_its_answers(plane: Plane) -> None:
    with plane.peer() as peer:
        peer.send(plane.head("/tell") + plane.head(script("wait:half", answer(b"late"))))
        peer.half_close()
        assert peer.read_answer().status == 200
        plane.poke("half")
        assert peer.read_answer().body == b"late"
        assert peer.is_closed()


# --- interim answers


@pytest.mark.parametrize("more", [(), ("Content-Length: 0",)], ids=["bare", "empty body"])
def test_a_client_that_asks_to_close_gets_the_end_of_our_own_answer_at_once(
    plane: Plane, tls: bool, more: tuple[str, ...]
) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head("/", "Connection: close", "fly-force-instance-id: none", *more))
        answered = peer.read_answer()
        assert answered["wakefront-error"] and answered["connection"] == "close"
        began = time.monotonic()
        assert peer.is_closed()
        assert time.monotonic() - began < 1.5, "what a connection lingers for its client to end"


def _send_for_half_a_second(sock: socket.socket) -> None:
    for _ in range(25):
        sock.send(b"x")
        time.sleep(0.02)


def test_over_tls_the_end_of_a_client_that_asked_to_close_is_not_waited_for(plane: Plane) -> None:
    """It has our close_notify, and has sent all it will: nothing that is still to come could be lost."""
    with plane.connect("web", tls=True) as sock:
        sock.sendall(plane.head("/tell", "Connection: close"))
        received = b""
        while data := sock.recv(65536):  # up to close_notify, without which it raises
            received += data
        assert received.startswith(b"HTTP/1.1 200 ") and received.endswith(b"}")
        with socket.socket(fileno=sock.detach()) as raw, pytest.raises(ConnectionError):
            _send_for_half_a_second(raw)  # a socket that is only half closed would take it


def test_100_continue_comes_from_the_machine_before_the_body_is_sent(plane: Plane, tls: bool) -> None:
    target = script("wait:go", send("HTTP/1.1 100 Continue\r\n\r\n"), "read", "tell")
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(target, "Expect: 100-continue", "Content-Length: 5", method="PUT"))
        assert peer.has_nothing(0.1), "the 100 is the machine's to send, not ours"
        plane.poke("go")
        assert peer.read_head().status == 100
        peer.send("hello")
        told = peer.read_answer().told
        assert told["start"] == "hello" and "Expect: 100-continue\r\n" in told["head"]


@pytest.mark.parametrize("status", ["417 Expectation Failed", "413 Content Too Large"])
def test_a_refusal_comes_without_the_body(plane: Plane, tls: bool, status: str) -> None:
    with plane.peer(tls=tls) as peer:
        target = script(answer(b"no", status), "close")
        peer.send(plane.head(target, "Expect: 100-continue", "Content-Length: 500000", method="PUT"))
        got = peer.read_answer()
        assert (got.status, got.body, got.interim) == (int(status[:3]), b"no", ())
        assert got["connection"] == "close", "what comes next on this connection could be the body or a request"
    assert plane.ask("/tell", tls=tls).told["size"] == 0


def test_an_expectation_that_nobody_knows_is_refused_by_us(plane: Plane, tls: bool) -> None:
    got = plane.ask("/tell", "Expect: wonders", tls=tls)
    assert got.status == 417 and got["wakefront-error"] == "WD10"


def test_early_hints_arrive_before_the_answer(plane: Plane, tls: bool) -> None:
    hints = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\n"
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(send(hints), send(hints), "wait:hints", answer(b"page"))))
        first, second = peer.read_head(), peer.read_head()
        assert first.raw == second.raw == b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n"
        plane.poke("hints")
        assert peer.read_answer().body == b"page"


# --- streams and tunnels


def test_events_arrive_one_by_one(plane: Plane, tls: bool) -> None:
    head = send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    steps = [head]
    for number in range(5):
        steps += ["wait:event", send(f"9\r\ndata: {number}\n\n\r\n")]
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(*steps, "wait:event", send("0\r\n\r\n"))))
        assert peer.read_head()["content-type"] == "text/event-stream"
        for number in range(5):
            assert peer.has_nothing(0.01)
            plane.poke("event")
            assert peer.read_chunk() == f"data: {number}\n\n".encode()
        plane.poke("event")
        assert peer.read_chunk() == b""


def test_a_long_poll_is_answered_when_there_is_something_to_say(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script("poke:polling", "wait:news", answer(b"news"))))
        plane.wait_poked("polling")
        assert peer.has_nothing(0.3)
        plane.poke("news")
        assert peer.read_answer().body == b"news"


def test_both_directions_stream_at_once(plane: Plane, tls: bool) -> None:
    target = script(send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), "echo")
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(target, "Transfer-Encoding: chunked", method="POST"))
        assert peer.read_head().status == 200
        for number in range(20):
            piece = f"piece {number}".encode()
            peer.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            assert peer.read_chunk() == piece, "the echo of a piece comes before the next is sent"
        peer.send("0\r\n\r\n")
        assert peer.read_chunk() == b""


def test_a_websocket_echoes(plane: Plane, tls: bool) -> None:
    authority = f"echo.apps.localhost:{plane.https_port if tls else plane.http_port}"
    ca = plane.folder / "ca.pem"
    ca.write_text(plane.cli("certs", "ca"))
    lines = "".join(f"line {number}\n" for number in range(50)) + "x" * 100_000 + "\n"
    done = subprocess.run(
        ["python3", str(ROOT / "demo" / "ws.py"), "--cacert", str(ca), f"{'wss' if tls else 'ws'}://{authority}/chat"],
        input=lines, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, lines), done.stderr
    record = plane.record(app="echo", target="/chat", tls=tls)
    assert record["status"] == 101 and record["upgrade"] and record["bytes_in"] > 100_000 < record["bytes_out"]


SWITCH = send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: line\r\nConnection: Upgrade\r\n\r\n")
UPGRADE = ("Connection: Upgrade", "Upgrade: line")


def test_nothing_raw_reaches_the_machine_before_its_101(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script("quiet:0.3", SWITCH, "tunnel"), *UPGRADE, body="too early"))
        head = peer.read_head()
        assert head.status == 101 and head["upgrade"] == "line" and head["connection"].lower() == "upgrade"
        assert peer.read_exactly(9) == b"too early"
        peer.send("GET /not-a-request HTTP/1.1\r\n\r\n")
        assert peer.read_until(b"\r\n\r\n") == b"GET /not-a-request HTTP/1.1\r\n\r\n"


def test_a_refused_upgrade_closes_and_hides_no_second_request(plane: Plane, tls: bool) -> None:
    hidden = plane.head("/hidden-behind-an-upgrade")
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(answer(b"no")), *UPGRADE, body=hidden))
        got = peer.read_answer()
        assert (got.status, got.body, got["connection"]) == (200, b"no", "close")
        peer.socket.settimeout(5)
        assert peer.is_closed()
    told = plane.ask("/tell").told
    assert not any("hidden" in target for target in told["targets"])
    assert not any("hidden" in left for left in told["leftovers"])


def test_a_101_that_nobody_asked_for_is_an_error(plane: Plane, tls: bool) -> None:
    got = plane.ask(script(SWITCH, "tunnel"), tls=tls)
    assert got.status == 502 and got["wakefront-error"] in ("WU01", "WU03")


def test_either_end_of_a_plain_tunnel_may_end_first(plane: Plane) -> None:
    with plane.peer() as peer:  # the client first: the machine answers what it got after the end
        peer.send(plane.head(script(SWITCH, "tunnel"), *UPGRADE))
        assert peer.read_head().status == 101
        peer.send("last words")
        peer.half_close()
        assert peer.read_to_end() == b"last words"
    with plane.peer() as peer:  # the machine first: the client still sends
        peer.send(plane.head(script(SWITCH, send("bye"), "end", f"until:{send('ok')[5:]}", "poke:heard"), *UPGRADE))
        assert peer.read_head().status == 101
        assert peer.read_to_end() == b"bye"
        peer.send("ok")
        plane.wait_poked("heard")


def test_a_tunnel_ends_when_the_machine_closes(plane: Plane, tls: bool) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(SWITCH, send("x" * 1000), "close"), *UPGRADE))
        assert peer.read_head().status == 101
        assert peer.read_exactly(1000) == b"x" * 1000
        assert peer.is_closed()


# --- connections to machines


def test_a_service_of_type_connections_gets_a_new_connection_for_each_request(plane: Plane, tls: bool) -> None:
    with plane.peer("each", tls) as peer:
        seen = []
        for _ in range(4):
            peer.send(plane.head("/tell", app="each"))
            told = peer.read_answer().told
            assert told["served"] == 1 and "connection: close\r\n" in told["head"]
            seen.append(told["connection"])
    assert len(set(seen)) == 4


def test_a_service_of_type_requests_reuses_connections(plane: Plane, tls: bool) -> None:
    with plane.peer("kept", tls) as peer:
        seen = []
        for _ in range(4):
            peer.send(plane.head("/tell", app="kept"))
            told = peer.read_answer().told
            assert "connection: close\r\n" not in told["head"].lower()
            seen.append(told["connection"])
    assert len(set(seen)) == 1, "one client connection is one worker's, which keeps one connection to the machine"


@pytest.mark.parametrize(
    ("after", "steps"),
    [
        (
            "more bytes than it announced",
            [send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n")],
        ),
        ("a second answer", [answer(b"ok"), "quiet:0.05", answer(b"nobody asked")]),
        ("a close", [answer(b"ok", "200 OK", "Connection: close"), "close"]),
        ("a close that it did not announce", [answer(b"ok"), "close"]),
        ("a reset", [answer(b"ok"), "reset"]),
    ],
)
def test_a_request_after_a_dirty_exchange_is_unaffected(plane: Plane, tls: bool, after: str, steps: list[str]) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(*steps, path="/dirty")))
        try:
            got = peer.read_answer().body
        except Closed:
            got = b"broken off"
        assert got in ((b"ok", b"broken off") if after.startswith("more") else (b"ok",))
    for number in range(4):
        got = plane.ask(f"/clean-{number}", tls=tls)
        assert got.told["head"].startswith(f"GET /clean-{number} "), after


@pytest.mark.parametrize(
    ("code", "steps"),
    [
        ("WU01", [send("nonsense\r\n\r\n"), "close"]),
        ("WU01", [send("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")]),
        ("WU01", [send("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nab")]),
        ("WU01", [send("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nab")]),
        ("WU01", [send("HTTP/1.1 200 OK\r\nX-Big: " + "x" * 200 + "\r\nBad Name: 1\r\n\r\n")]),
        ("PU02", ["close"]),
        ("PC03", ["reset"]),
        ("PU05", [send("HTTP/1.1 200 O"), "close"]),
    ],
)
def test_an_answer_that_is_none_is_a_502_with_its_code(plane: Plane, tls: bool, code: str, steps: list[str]) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script("read", *steps), "Content-Length: 1", method="POST", body="x"))
        got = peer.read_answer()
        assert (got.status, got["wakefront-error"]) == (502, code)
        assert got.body.startswith(code.encode()), "a sentence for people, and nothing of what the machine said"
        record = plane.record(request_id=got["fly-request-id"])
        assert (record["status"], record["code"], record["app"], record["tls" if tls else "app"]) == (
            502, code, "web", True if tls else "web",
        )  # fmt: skip
        peer.send(plane.head("/after"))
        assert peer.read_answer().told["head"].startswith("GET /after ")


@pytest.mark.parametrize(
    ("start", "code"),
    [
        ("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "PU05"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", "PU05"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nZZ\r\n", "WU01"),
    ],
)
def test_an_answer_broken_off_is_never_taken_for_whole(plane: Plane, tls: bool, start: str, code: str) -> None:
    with plane.peer(tls=tls) as peer:
        peer.send(plane.head(script(send(start), "close")))
        head = peer.read_head()
        rest = peer.read_to_end()
        assert b"half" in rest and not rest.endswith(b"0\r\n\r\n")
        record = plane.record(request_id=head["fly-request-id"])
    assert (record["status"], record["code"]) == (200, code)


def test_a_client_that_resets_harms_nobody_and_is_on_record(plane: Plane, tls: bool) -> None:
    peer = plane.peer(tls=tls)
    peer.send(plane.head(script("poke:begun", "wait:never", path=f"/left-{tls}")))
    plane.wait_poked("begun")
    peer.reset()
    record = wait_for(
        lambda: next((one for one in plane.records() if one["target"].startswith(f"/left-{tls}")), None),
        10,
        "the record",
    )
    assert (record["status"], record["code"]) == (499, "WD11")
    assert plane.ask("/tell", tls=tls).status == 200


# --- header fields

IDENTITY = (
    "fly-client-ip", "x-forwarded-for", "fly-forwarded-proto", "x-forwarded-proto", "fly-forwarded-ssl",
    "x-forwarded-ssl", "fly-forwarded-port", "x-forwarded-port", "fly-region", "via", "fly-request-id",
    "x-request-start", "fly-traceparent",
)  # fmt: skip


def received(told_head: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in told_head.split("\r\n")[1:-2]:
        name, _, value = line.partition(": ")
        found.setdefault(name.lower(), []).append(value)
    return found


def test_the_machine_is_told_who_asks_and_a_client_can_say_none_of_it(plane: Plane, tls: bool) -> None:
    lies = [f"{name}: lie" for name in IDENTITY if name != "via"]
    lies += [name.replace("-", "_") + ": lie" for name in IDENTITY if name != "via"]
    lies += [name.upper() + ": lie" for name in IDENTITY if name != "via"]
    lies += ["Forwarded: for=lie", "X-Real-IP: lie", "Fly-Replay-Src: lie", "Fly-Anything: lie",
             "X-Forwarded-Host: lie", "Wakefront-Error: lie", "X-Original-URL: lie"]  # fmt: skip
    lies += ["Connection: X-Listed", "X-Listed: lie", "Keep-Alive: timeout=lie", "TE: lie", "Proxy-Connection: lie"]
    got = plane.ask("/tell", *lies, "Fly-Prefer-Region: ams", "X-Mine: kept", tls=tls)
    assert "lie" not in got.told["head"].replace("client", "")
    found = received(got.told["head"])
    assert found["host"] == ["web.apps.localhost"] and found["x-mine"] == ["kept"]
    assert found["fly-prefer-region"] == ["ams"], "this one is the client's to send"
    proto, ssl, port = ("https", "on", "443") if tls else ("http", "off", "80")
    expected = {
        "fly-client-ip": "127.0.0.1", "x-forwarded-for": "127.0.0.1, 127.0.0.1", "fly-region": "tst",
        "fly-forwarded-proto": proto, "x-forwarded-proto": proto, "fly-forwarded-ssl": ssl, "x-forwarded-ssl": ssl,
        "fly-forwarded-port": port, "x-forwarded-port": port, "via": "1.1 wakefront",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == {name: [value] for name, value in expected.items()}
    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}-tst", found["fly-request-id"][0])
    assert found["fly-request-id"] == [got["fly-request-id"]]
    assert re.fullmatch(r"t=\d{16}", found["x-request-start"][0])
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", found["fly-traceparent"][0])


def test_the_client_is_told_our_names_and_nothing_hop_by_hop(plane: Plane, tls: bool) -> None:
    told = ["Server: mine", "X-App: 1", "X-Hop: 1", "Connection: X-Hop, keep-alive", "Keep-Alive: timeout=5",
            "Wakefront-Error: lie", "Set-Cookie: a=1", "Set-Cookie: b=2"]  # fmt: skip
    got = plane.ask(script(answer(b"ok", "200 Fine", *told)), tls=tls)
    assert got.raw.startswith(b"HTTP/1.1 200 Fine\r\n")
    assert got["server"] == "wakefront" and got["via"] == "1.1 wakefront" and got["x-app"] == "1"
    assert got.all("set-cookie") == ["a=1", "b=2"]
    for name in ("x-hop", "connection", "keep-alive", "wakefront-error"):
        assert name not in got


def test_response_rules_remove_set_and_repeat(plane: Plane, tls: bool) -> None:
    got = plane.ask(
        script(answer(b"", "200 OK", "X-Gone: 1", "X-SET: theirs", "X-Many: c", "X-Kept: 1")), app="rules", tls=tls
    )
    assert "x-gone" not in got and "fly-request-id" not in got
    assert got["x-set"] == "ours" and got.all("x-many") == ["a", "b"] and got["x-kept"] == "1"


def test_pristine_adds_and_alters_nothing(plane: Plane, tls: bool) -> None:
    got = plane.ask(script(answer(b"", "200 OK", "Server: mine", "Via: 1.1 inner")), app="pristine", tls=tls)
    assert got.fields == [("via", "1.1 inner"), ("server", "mine"), ("content-length", "0")]


def test_force_https_redirects_to_the_port_that_the_client_can_reach(plane: Plane) -> None:
    for authority, location in [
        ("forced.apps.localhost", "https://forced.apps.localhost/a?b=c"),
        (f"forced.apps.localhost:{plane.http_port}", f"https://forced.apps.localhost:{plane.https_port}/a?b=c"),
        ("forced.apps.localhost:80", "https://forced.apps.localhost/a?b=c"),
    ]:
        with plane.peer("forced") as peer:
            peer.send(f"GET /a?b=c HTTP/1.1\r\nHost: {authority}\r\n\r\n")
            got = peer.read_answer()
            assert (got.status, got["location"], got.body) == (301, location, b"")
    assert plane.machines("forced")[0]["state"] != "started", "a redirect wakes nothing"
    assert plane.ask("/tell", app="forced", tls=True).status == 200


# --- which app


def test_a_name_that_nobody_serves_is_a_404(plane: Plane) -> None:
    got = plane.ask("/", app="nobody")
    assert (got.status, got["wakefront-error"]) == (404, "WD09")
    record = plane.record(request_id=got["fly-request-id"])
    assert (record["host"], record["app"], record["code"]) == ("nobody.apps.localhost", "", "WD09")


def test_another_apps_host_on_a_tls_connection_is_a_421(plane: Plane) -> None:
    with plane.peer("web", tls=True) as peer:
        peer.send(plane.head("/tell", app="other"))
        got = peer.read_answer()
        assert (got.status, got["wakefront-error"]) == (421, "WD08")
        assert plane.record(request_id=got["fly-request-id"])["code"] == "WD08"
        peer.send(plane.head("/tell"))
        assert peer.read_answer().status == 200


def test_a_machine_that_is_not_there_is_reported_with_its_reason(plane: Plane, tls: bool) -> None:
    got = plane.ask("/", app="gone", tls=tls)
    assert got.status in (502, 503, 504)
    record = plane.record(request_id=got["fly-request-id"])
    assert (record["code"], record["app"]) == (got["wakefront-error"], "gone") and record["detail"]


def test_a_port_on_which_one_app_takes_tls_and_another_plain_serves_both(plane: Plane) -> None:
    with Peer(plane.connect_to(plane.third_port, None)) as peer:
        peer.send(plane.head("/tell", app="other"))
        assert "fly-forwarded-port: 8000\r\n" in peer.read_answer().told["head"]
    with Peer(plane.connect_to(plane.third_port, "web")) as peer:
        peer.send(plane.head("/tell"))
        assert "fly-forwarded-proto: https\r\n" in peer.read_answer().told["head"]
    with Peer(plane.connect_to(plane.third_port, None)) as peer:
        peer.send(plane.head("/tell"))
        assert peer.read_answer().status == 400, "this app takes TLS here, and what it is told in the clear is refused"


# --- records and figures


def test_every_request_ends_in_one_record(plane: Plane, tls: bool) -> None:
    body = "x" * 1234
    with plane.peer(tls=tls) as peer:
        peer.send(
            plane.head(script("read", answer(b"y" * 99), path="/one"), "Content-Length: 1234", method="PUT", body=body)
        )
        request_id = peer.read_answer()["fly-request-id"]
    record = plane.record(request_id=request_id)
    assert record["app"] == "web" and record["client"] == "127.0.0.1" and record["method"] == "PUT"
    assert record["host"] == "web.apps.localhost" and record["target"].startswith("/one?do=read")
    assert (record["status"], record["bytes_in"], record["bytes_out"]) == (200, 1234, 99)
    assert record["port"] == (443 if tls else 80) and record.get("tls", False) is tls
    assert record["machine"] == plane.machines("web")[0]["id"]
    assert 0 < record["first_byte_ms"] <= record["duration_ms"]


def test_bytes_that_make_no_request_are_on_record_too(plane: Plane, tls: bool) -> None:
    for data, status, code in [
        (b"GET / HTTP/1.1\r\n\r\n", 400, "WD01"),
        (b"GET / HTTP/1.1\r\nHost: web.apps.localhost\r\nHost: web.apps.localhost\r\n\r\n", 400, "WD01"),
        (b"WHAT? / HTTP/1.1\r\n\r\n", 501, "WD04"),
        (b"GET / HTTP/2.0\r\nHost: web.apps.localhost\r\n\r\n", 505, "WD05"),
        (
            b"GET / HTTP/1.1\r\nHost: web.apps.localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "WD01",
        ),
    ]:
        before = sum(one.get("code") == code for one in plane.records())
        with plane.peer(tls=tls) as peer:
            peer.send(data)
            got = peer.read_answer()
            assert (got.status, got["wakefront-error"], got["connection"]) == (status, code, "close"), data
        wait_for(
            lambda code=code, before=before: sum(one.get("code") == code for one in plane.records()) > before,
            10, f"the record of {data!r}",
        )  # fmt: skip


def test_figures_grow_with_the_traffic(plane: Plane, tls: bool) -> None:
    series = {
        "fly_edge_http_responses_count": {"app": "kept", "status": "200"}, "fly_edge_data_in": {"app": "kept"},
        "fly_edge_data_out": {"app": "kept"}, "fly_edge_http_response_time_seconds_count": {"app": "kept"},
        "fly_app_http_response_time_seconds_count": {"app": "kept"}, "fly_edge_tcp_connects_count": {"app": "kept"},
        "fly_edge_tcp_disconnects_count": {"app": "kept"},
    }  # fmt: skip
    before = {name: plane.metric(name, **labels) for name, labels in series.items()}
    for _ in range(3):
        with plane.peer("kept", tls) as peer:
            peer.send(
                plane.head(
                    script("read", answer(b"y" * 50)), "Content-Length: 7", app="kept", method="POST", body="1234567"
                )
            )
            assert peer.read_answer().status == 200
    grown = lambda: {name: plane.metric(name, **labels) - before[name] for name, labels in series.items()}  # noqa: E731
    wait_for(lambda: grown()["fly_edge_tcp_disconnects_count"] == 3, 10, lambda: f"three ends: {grown()}")
    assert grown() == {
        "fly_edge_http_responses_count": 3, "fly_edge_data_in": 21, "fly_edge_data_out": 150,
        "fly_edge_http_response_time_seconds_count": 3, "fly_app_http_response_time_seconds_count": 3,
        "fly_edge_tcp_connects_count": 3, "fly_edge_tcp_disconnects_count": 3,
    }  # fmt: skip
    assert plane.metric("fly_instance_up", app="kept") == 1
    assert plane.metric("fly_app_concurrency", app="kept") == 0
    assert plane.metric("fly_app_tcp_connects_count", app="kept") >= 1


# --- clients of others


def curl(plane: Plane, tls: bool, *arguments: str, app: str = "web") -> subprocess.CompletedProcess[bytes]:
    ca = plane.folder / "ca.pem"
    ca.write_text(plane.cli("certs", "ca"))
    port = plane.https_port if tls else plane.http_port
    host = plane.host(app)
    *options, target = arguments
    return subprocess.run(
        ["curl", "-sS", "--max-time", "20", "--cacert", str(ca), "--resolve", f"{host}:{port}:127.0.0.1", *options,
         f"{'https' if tls else 'http'}://{host}:{port}{target}"],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip


def test_curl_gets_heads_uploads_and_continues(plane: Plane, tls: bool, tmp_path: Path) -> None:
    assert curl(plane, tls, script(answer(b"for curl"))).stdout == b"for curl"
    assert (
        b"content-length: 9"
        in curl(plane, tls, "-I", script(send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"))).stdout
    )
    upload = tmp_path / "upload"
    upload.write_bytes(b"z" * 3_000_000)
    told = curl(plane, tls, "-T", str(upload), "-H", "Expect: 100-continue",
                script(send("HTTP/1.1 100 Continue\r\n\r\n"), "read", "tell"))  # fmt: skip
    assert b'"size": 3000000' in told.stdout, told.stderr
    chunked = curl(plane, tls, "-T", str(upload), "-H", "Transfer-Encoding: chunked", "-H", "Expect:", "/tell")
    assert b'"size": 3000000' in chunked.stdout, chunked.stderr
    broken = curl(plane, tls, script(send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"), "close"))
    assert broken.returncode in (18, 56), broken.stderr  # partial file, or reset


def openssl(plane: Plane, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    ca = plane.folder / "ca.pem"
    ca.write_text(plane.cli("certs", "ca"))
    return subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{plane.https_port}", "-CAfile", str(ca), "-verify_return_error",
         *arguments],
        input=text, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("version", ["1_2", "1_3"])
def test_openssl_talks_tls_1_2_and_1_3(plane: Plane, version: str) -> None:
    request = f"GET {script(answer(b'by hand'))} HTTP/1.1\r\nHost: web.apps.localhost\r\nConnection: close\r\n\r\n"
    done = openssl(plane, f"-tls{version}", "-servername", "web.apps.localhost", "-quiet", "-ign_eof", text=request)
    assert done.stdout.endswith("\n\nby hand"), done.stderr  # text: CR LF was read as LF


@pytest.mark.parametrize("version", ["1", "1_1"])
def test_older_versions_of_tls_are_refused(plane: Plane, version: str) -> None:
    done = openssl(
        plane, f"-tls{version}", "-servername", "web.apps.localhost", "-cipher", "DEFAULT:@SECLEVEL=0", text="x"
    )
    assert done.returncode != 0
    assert "alert protocol version" in done.stderr, done.stderr


@pytest.mark.parametrize("name", [["-noservername"], ["-servername", "unknown.apps.localhost"]])
def test_a_hello_without_a_known_name_is_refused_before_any_certificate(plane: Plane, name: list[str]) -> None:
    before = plane.metric("fly_edge_tls_handshake_errors")
    done = openssl(plane, *name, text="x")
    assert done.returncode != 0 and "unrecognized name" in done.stderr, done.stderr
    assert "BEGIN CERTIFICATE" not in done.stdout
    assert plane.metric("fly_edge_tls_handshake_errors") == before + 1


def test_a_refused_hello_is_on_record_with_its_code(plane: Plane) -> None:
    openssl(plane, "-servername", "strange.apps.localhost", text="x")
    record = plane.record(host="strange.apps.localhost")
    assert (record["code"], record["status"], record["client"], record["tls"]) == ("PT05", 0, "127.0.0.1", True)


def test_requests_of_many_connections_at_once_all_get_their_own_answer(plane: Plane, tls: bool) -> None:
    wrong: list[object] = []

    def ask(number: int) -> None:
        try:
            with plane.peer(tls=tls) as peer:
                for turn in range(10):
                    peer.send(plane.head(script(answer(f"{number}-{turn}".encode()))))
                    got = peer.read_answer()
                    if got.body != f"{number}-{turn}".encode():
                        wrong.append(got)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""A7: answers given before the request was read. What is left of it must never be read as the next request.

Two legs. At the client's: on every path on which we answer early, a body that looks like a request follows, and behind
it a true one; the bytes of the body are drained or the connection is closed, and never answered. At the machine's: it
answers before it has the body, and keeps its connection; no later request may go there.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import sys
from collections.abc import Iterator

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode, Attempt
from tests.support.edge import EdgeHarness, Handler, read_head
from tests.support.peer import Peer
from tests.support.plane import static_app
from tests.support.recording import Seen

pytestmark = pytest.mark.slow
PLAIN = '[[services.ports]]\nport = 80\nhandlers = ["http"]\nforce_https = true\n'
TLS = '[[services.ports]]\nport = 443\nhandlers = ["tls", "http"]\n'
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: web.apps.localhost\r\n\r\n"
BEHIND = b"GET /behind HTTP/1.1\r\nHost: web.apps.localhost\r\nConnection: close\r\n\r\n"
HOST = b"Host: %b.apps.localhost\r\n"


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and nobody else will be given."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, closed_port: int) -> Iterator[AttackedNode]:
    folder = tmp_path_factory.mktemp("early")
    nobody = f"127.0.0.1:{closed_port}"
    fails = folder / "fails.toml"
    fails.write_text(f'app = "fails"\n[[services]]\ninternal_port = 8080\nprotocol = "tcp"\n{PLAIN}{TLS}'.replace(
        "force_https = true\n", ""
    ))  # fmt: skip
    apps = [
        static_app(folder, "secure", nobody, PLAIN + TLS),
        static_app(folder, "down", nobody, more='wake_timeout = "300ms"\n'),
        static_app(folder, "denied", nobody) + '[apps.access]\ndeny = ["127.0.0.0/8"]\n',
        static_app(folder, "small", nobody) + "[apps.access]\nmax_body = 3\n",
        static_app(folder, "often", nobody) + "[apps.access]\nrequests_per_second = 0.001\nrequests_burst = 1\n",
        f'[[apps]]\nfly_toml = "{fails}"\ncommand = ["{sys.executable}", "-c", "raise SystemExit(1)"]\n'
        'wake_timeout = "2s"\n',
    ]
    with AttackedNode(folder, apps="\n".join(apps)) as served:
        assert served.ask("/", app="often").status >= 400  # the burst is spent
        yield served


# --- the client's leg

PATHS = [  # (app, target, statuses of our own answer)
    ("secure", "/", (301,)),
    ("nobody", "/", (404,)),
    ("down", "/", (502, 503, 504)),
    ("denied", "/", (403,)),
    ("small", "/", (413,)),
    ("often", "/", (429,)),
    ("fails", "/", (502, 503, 504)),
]
EXPECTS = [b"", b"Expect: 100-continue\r\n", b"Expect: 100-Continue\r\n", b"expect:100-continue\r\n"]
BAD_EXPECTS = [
    b"Expect: 100-continue, 100-continue\r\n", b"Expect: y 100-continue\r\n", b"Expect: 100-continue y\r\n",
    b"Expect: 200-ok\r\n", b"Expect: \r\n", b"Expect: 100-continue;q=1\r\n", b"Expect: x\r\nExpect: 100-continue\r\n",
    b"Expect : 100-continue\r\n", b"Expect:\r\n 100-continue\r\n", b"Expect: 100-continue\x00\r\n",
]  # fmt: skip


def bodies() -> Iterator[tuple[str, bytes, bytes]]:
    """Framing fields and the bytes behind the head: whole, in part, and more than we drain."""
    length = b"Content-Length: %d\r\n" % len(HIDDEN)
    chunks = b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"
    yield "a length", length, HIDDEN
    yield "a length, one byte missing", b"Content-Length: %d\r\n" % (len(HIDDEN) + 1), HIDDEN
    yield "chunks", b"Transfer-Encoding: chunked\r\n", chunks
    yield "chunks without end", b"Transfer-Encoding: chunked\r\n", chunks[:-5]
    yield "a chunk without end", b"Transfer-Encoding: chunked\r\n", b"fff\r\n" + HIDDEN
    yield "a large one", b"Content-Length: %d\r\n" % (len(HIDDEN) * 4000), HIDDEN * 4000
    yield "larger, cut off", b"Content-Length: 10000000\r\n", HIDDEN * 4000
    yield "not begun", length, b""


def request_to(app: str, target: str, framing: bytes, method: bytes = b"POST") -> bytes:
    return method + b" " + target.encode() + b" HTTP/1.1\r\n" + HOST % app.encode() + framing + b"\r\n"


def test_no_body_of_an_early_answer_is_read_as_a_request(node: AttackedNode, attack: Begin) -> None:
    with attack("A7", "CL.0 on our own answers", node) as run:
        for (app, target, statuses), (kind, framing, body), expect in itertools.product(PATHS, bodies(), EXPECTS):
            run.case((app, kind, expect))
            if app == "small" and kind in ("chunks without end", "not begun", "a chunk without end"):
                continue  # nothing says yet that the body is too large
            data = request_to(app, target, framing + expect) + body
            got = node.attempt(data + BEHIND, half_close=False)
            judge_early(node, got, statuses, whole=kind in ("a length", "chunks", "a large one"))


def judge_early(node: AttackedNode, got: Attempt, statuses: tuple[int, ...], whole: bool) -> None:
    """Our answer, then the end; or the answer to the true request behind, if the body has come whole."""
    assert got.answers and got.closed, got
    targets = [one.target for one in node.origin.take()]
    if whole:
        assert got.statuses[0] in statuses
        assert (targets, got.statuses[1:]) in (([], []), (["/behind"], [200])), got
    else:  # the body has taken a part of what is behind; what is left of that is no request
        assert got.statuses[0] in (*statuses, 400) and targets == []
        assert got.statuses[1:] in ([], [400], [501]), got
    assert got.answers[-1].all("connection") == ["close"]


@pytest.mark.parametrize("name", ["web", "quiet", "nobody"])
def test_a_misdirected_request_takes_its_body_along(node: AttackedNode, attack: Begin, name: str) -> None:
    """421: the certificate shown was another app's."""
    with attack("A7", "CL.0 on 421, 404 over TLS", node) as run:
        for (kind, framing, body), expect in itertools.product(bodies(), EXPECTS[:2]):
            run.case((name, kind, expect))
            data = request_to(name, "/", framing + expect) + body + request_to("secure", "/behind", b"", b"GET")
            got = node.attempt(data, app="secure", tls=True, take_its_word=True)
            assert got.answers[0].status == (404 if name == "nobody" else 421)
            assert len(got.answers) <= 2
            assert all(one.status >= 500 for one in got.answers[1:]), got  # `secure` itself has no machine
        assert node.origin.take() == []


def test_an_expectation_that_is_not_ours_ends_the_connection(node: AttackedNode, attack: Begin) -> None:
    with attack("A7", "Expect in other forms", node) as run:
        for expect, (kind, framing, body) in itertools.product(BAD_EXPECTS, bodies()):
            run.case((expect, kind))
            data = request_to("web", "/", framing + expect) + body + BEHIND
            node.attempt(data, half_close=False).assert_refused(400, 417)
        assert node.origin.take() == []


def test_a_redirect_or_refusal_without_a_body_keeps_the_connection_in_step(node: AttackedNode, attack: Begin) -> None:
    """The control: nothing is left to read, so the next request is answered, and as itself."""
    with attack("A7", "the control: early answers without a body", node) as run:
        for (app, target, statuses), zero in itertools.product(PATHS, (b"", b"Content-Length: 0\r\n")):
            if app == "small":
                continue  # no body is not too large a one
            run.case((app, zero))
            with node.peer() as peer:
                peer.send(request_to(app, target, zero) + node.head("/behind"))
                assert peer.read_answer().status in statuses
                assert peer.read_answer().status == 200
            assert [one.target for one in node.origin.take()] == ["/behind"]


# --- the machine's leg


def test_a_machine_that_answers_before_the_body_gets_no_other_request_on_that_connection(
    node: AttackedNode, attack: Begin
) -> None:
    """0.CL: the rest of the body must not stand where the machine looks for a head."""

    answered: list[tuple[int, str]] = []

    async def at_once(seen: Seen, writer: asyncio.StreamWriter) -> None:
        answered.append((seen.connection, seen.target))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    node.origin.reset()
    node.origin.respond_before_body = True
    node.origin.respond = at_once
    with attack("A7", "0.CL: a machine that answers early", node) as run:
        for kind, framing, body in bodies():
            if kind in ("chunks without end", "not begun", "a chunk without end", "a length, one byte missing"):
                run.case(kind)
                with node.peer() as peer:
                    peer.send(request_to("web", "/x", framing) + body)
                    assert peer.read_answer().status == 200
                    ask_behind(node)
                    peer.send(HIDDEN)
                    assert peer.is_closed()
                (first, x), (second, behind) = answered
                assert (x, behind) == ("/x", "/behind") and first != second
                answered.clear()


def ask_behind(node: AttackedNode) -> None:
    with node.peer() as peer:
        peer.send(node.head("/behind"))
        assert peer.read_answer().status == 200


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 2])
@pytest.mark.parametrize("status", [b"200 OK", b"417 No", b"401 Who", b"304 Same"])
async def test_an_expectation_answered_by_a_final_answer_leaves_no_body_behind(
    edge: EdgeHarness, attack: Begin, first: bytes, status: bytes
) -> None:
    """The client waits for a 100, gets a final answer, and sends its body all the same: as bytes of a request."""
    connections: list[list[bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(targets := [])
        while True:
            targets.append((await read_head(reader)).split(b" ")[1])
            length = b"" if b"304" in status else b"Content-Length: 2\r\n\r\nok"
            writer.write(first + b"HTTP/1.1 " + status + b"\r\n" + (length or b"\r\n"))

    origin = await edge.origin(handle)
    edge.set_app(edge.app(edge.machine(origin.port)))
    host = b"Host: hello.apps.test\r\n"
    hidden = HIDDEN.replace(b"web.apps.localhost", b"hello.apps.test")
    with attack("A7", "Expect, and a final answer") as run:
        for framing in (b"Content-Length: %d\r\n" % len(hidden), b"Transfer-Encoding: chunked\r\n"):
            run.case(framing)
            reader, writer = await edge.connect()
            writer.write(b"POST /x HTTP/1.1\r\n" + host + framing + b"Expect: 100-continue\r\n\r\n")
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            while answer.startswith(b"HTTP/1.1 100 "):
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert answer.startswith(b"HTTP/1.1 " + status[:3]) and b"\r\nconnection: close\r\n" in answer
            writer.write(hidden)
            assert b"HTTP/1.1 " not in await asyncio.wait_for(reader.read(), 5)
            after = await edge.request(b"GET /behind HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n")
            assert b"HTTP/1.1 " + status[:3] in after
    assert sorted(itertools.chain(*connections)) == [b"/behind", b"/behind", b"/x", b"/x"]
    assert all(b"/x" not in targets[:-1] for targets in connections), "a connection on which a body is owed was reused"


async def test_a_replay_takes_the_body_to_its_target_and_leaves_none_of_it(edge: EdgeHarness, attack: Begin) -> None:
    """The first machine hands on before it has the body; the body and what follows it come whole to the second."""
    seen: dict[str, list[bytes]] = {"first": [], "second": []}

    def machine(name: str, answer: bytes, wait_body: bool) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                head = await read_head(reader)
                length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
                body = b""
                while wait_body and length and len(body) < int(length[1]):
                    body += await reader.read(int(length[1]) - len(body))
                seen[name].append(head.split(b" ")[1] + b" " + body)
                writer.write(answer)

        return handle

    replay = b"HTTP/1.1 200 OK\r\nfly-replay: instance=m2\r\nContent-Length: 0\r\n\r\n"
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    hidden = HIDDEN.replace(b"web.apps.localhost", b"hello.apps.test")
    with attack("A7", "a replay before the body was read") as run:
        for early in (True, False):
            run.case(early)
            for one in seen.values():
                one.clear()
            machine_one = await edge.origin(machine("first", replay, not early))
            machine_two = await edge.origin(machine("second", ok, True))
            edge.set_app(edge.app(edge.machine(machine_one.port), edge.machine(machine_two.port, "m2", slot=2)))
            reader, writer = await edge.connect()
            fields = b"Host: hello.apps.test\r\nFly-Prefer-Instance-Id: m1\r\n"
            head = b"POST /x HTTP/1.1\r\n" + fields + b"Content-Length: %d\r\n\r\n" % len(hidden)
            writer.write(head + hidden + b"GET /behind HTTP/1.1\r\nHost: hello.apps.test\r\nConnection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.count(b"HTTP/1.1 200 OK") in (1, 2)
            assert seen["second"][0] == b"/x " + hidden
            everything = seen["first"] + seen["second"]
            assert not [one for one in everything if one.startswith(b"/hidden")] or early


async def test_a_request_refused_after_its_replay_takes_its_body_along(edge: EdgeHarness, attack: Begin) -> None:
    """A replay to nowhere, and one that is none: our answer comes after all of the body, or the connection ends."""
    hidden = HIDDEN.replace(b"web.apps.localhost", b"hello.apps.test")
    replays = (b"instance=gone", b"nonsense", b"app=unknown", b"region=xxx")
    with attack("A7", "a replay that leads nowhere") as run:
        for value, (kind, framing, body) in itertools.product(replays, bodies()):
            run.case((value, kind))
            body = body.replace(b"web.apps.localhost", b"hello.apps.test")
            framing = framing.replace(b"%d" % len(HIDDEN), b"%d" % len(hidden))
            if kind not in ("a length", "not begun"):
                continue
            answer = b"HTTP/1.1 200 OK\r\nfly-replay: " + value + b"\r\nContent-Length: 0\r\n\r\n"
            targets: list[bytes] = []

            async def handle(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, a: bytes = answer, t: list[bytes] = targets
            ) -> None:
                t.append((await read_head(reader)).split(b" ")[1])
                writer.write(a)
                await reader.read()

            origin = await edge.origin(handle)
            edge.set_app(edge.app(edge.machine(origin.port)))
            reader, writer = await edge.connect()
            writer.write(b"POST /x HTTP/1.1\r\nHost: hello.apps.test\r\n" + framing + b"\r\n" + body)
            got = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert int(got[9:12]) >= 500
            if b"connection: close" in got:
                writer.write(hidden)
                assert (await asyncio.wait_for(reader.read(), 5)).count(b"HTTP/1.1 ") == 0
            assert targets == [b"/x"]


# --- both legs at once


def test_two_clients_never_get_each_others_answers_after_early_answers(node: AttackedNode, attack: Begin) -> None:
    """Answers are told apart by what they echo, while early answers, cut-off bodies and honest requests mix."""

    async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
        text = seen.target.encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))

    node.origin.reset()
    node.origin.respond = echo
    with attack("A7", "answers stay with their requests", node) as run, node.peer() as honest:
        for number, (kind, framing, body) in enumerate(itertools.chain(*[list(bodies())] * 12)):
            run.case((number, kind))
            with Peer(socket.create_connection(("127.0.0.1", node.http_port), timeout=10)) as bad:
                bad.send(request_to("web", f"/bad-{number}", framing) + body)
                honest.send(node.head(f"/good-{number}"))
                assert honest.read_answer().body == f"/good-{number}".encode()
                if kind in ("a length", "chunks", "a large one"):
                    assert bad.read_answer().body == f"/bad-{number}".encode()
                else:
                    bad.reset()
        assert all(one.target != "/hidden" for one in node.origin.take())

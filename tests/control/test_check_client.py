"""One health question at a time, put to servers that are well, ill, mute, endless or not who they should be."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.control.check_client import SHOWN_CHARACTERS, CheckClient, Target, request_bytes
from proxy.control.prober import plain_socket
from proxy.model import Check
from tests.support.tls import NAME, make_authority

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def an_http_check(**more: object) -> Check:
    values: dict[str, object] = {"type": "http", "interval_s": 15.0, "timeout_s": 2.0, "grace_period_s": 1.0}
    return Check(**(values | more))  # type: ignore[arg-type]  # the keys are those of Check


TCP = Check("tcp", 15.0, 2.0, 1.0)


class Server:
    """Answers each connection by what the test says, and keeps the heads it got."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.heads: list[str] = []
        self.sent = 0
        self.ended = asyncio.Event()  # the latest connection is over

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended.clear()
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
                await self._answer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()
            self.ended.set()


def says(data: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return answer


def repeats(first: bytes, then: bytes, pause_s: float = 0.0) -> Answer:
    """For as long as somebody listens."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(then)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return answer


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@asynccontextmanager
async def serving(answer: Answer, context: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Server, Target]]:
    server = Server(answer)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server, Target("127.0.0.1", listener.sockets[0].getsockname()[1])
    finally:
        listener.close()
        await listener.wait_closed()


@pytest.fixture
def client() -> CheckClient:
    return CheckClient(plain_socket)


def status(line: str, body: bytes = b"", *fields: str) -> bytes:
    head = "".join(f"{one}\r\n" for one in (f"HTTP/1.1 {line}", f"Content-Length: {len(body)}", *fields))
    return head.encode() + b"\r\n" + body


# --- HTTP


@pytest.mark.parametrize(
    ("line", "passes"),
    [("200 OK", True), ("204 No Content", True), ("299 Fine", True), ("300 Choices", False), ("404 Not Found", False)],
)
async def test_2xx_passes_and_nothing_else_does(client: CheckClient, line: str, passes: bool) -> None:
    async with serving(says(status(line))) as (_, target):
        finding = await client.check(an_http_check(path="/up"), target)
    assert finding.passes is passes and finding.output == f"GET /up: {line}"


async def test_the_beginning_of_a_failing_answer_is_shown_without_control_characters(client: CheckClient) -> None:
    body = b"the \x1b[31mdatabase\n is gone " + b"x" * 1000
    async with serving(says(status("500 Oh no", body))) as (_, target):
        finding = await client.check(an_http_check(), target)
    assert not finding.passes
    assert finding.output.startswith("GET /: 500 Oh no: the [31mdatabase is gone xxx")
    assert finding.output.isprintable() and len(finding.output) < SHOWN_CHARACTERS + 50


async def test_an_answer_with_control_characters_in_its_reason_fails_and_is_not_shown(client: CheckClient) -> None:
    async with serving(says(status("500 Oh \x07no", b"gone"))) as (_, target):
        finding = await client.check(an_http_check(), target)
    assert not finding.passes
    assert finding.output.endswith("its answer is not valid: control characters in the reason")


async def test_a_redirect_is_not_followed(client: CheckClient) -> None:
    async with serving(says(status("200 OK"))) as (second, elsewhere):
        redirect = status("302 Found", b"", f"Location: http://127.0.0.1:{elsewhere.port}/")
        async with serving(says(redirect)) as (first, target):
            finding = await client.check(an_http_check(), target)
    assert not finding.passes and finding.output == "GET /: 302 Found"
    assert len(first.heads) == 1 and second.heads == []


async def test_the_request_is_what_was_configured(client: CheckClient) -> None:
    check = an_http_check(
        method="POST", path="/health?deep=1", headers=(("X-Forwarded-Proto", "https"), ("Host", "web.example"))
    )
    async with serving(says(status("200 OK"))) as (server, target):
        assert (await client.check(check, target)).passes
    lines = server.heads[0].split("\r\n")
    assert lines[0] == "POST /health?deep=1 HTTP/1.1"
    assert {"X-Forwarded-Proto: https", "Host: web.example", "Content-Length: 0"} <= set(lines)
    assert "User-Agent: wakefront-check" in lines


async def test_a_path_without_a_slash_gets_one_and_the_host_is_the_machines_address(client: CheckClient) -> None:
    async with serving(says(status("200 OK"))) as (server, target):
        assert (await client.check(an_http_check(path="up"), target)).passes
    lines = server.heads[0].split("\r\n")
    assert lines[0] == "GET /up HTTP/1.1" and f"Host: 127.0.0.1:{target.port}" in lines


async def test_a_configured_field_that_is_none_fails_the_check_with_the_reason(client: CheckClient) -> None:
    async with serving(says(status("200 OK"))) as (server, target):
        finding = await client.check(an_http_check(headers=(("X-A", "b\r\nEvil: 1"),)), target)
    assert not finding.passes and finding.output
    assert server.heads == []


async def test_a_machine_that_does_not_listen_fails(client: CheckClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        target = Target("127.0.0.1", gone.getsockname()[1])
    for check in (TCP, an_http_check()):
        finding = await client.check(check, target)
        assert not finding.passes and "refused" in finding.output


# --- machines that hang or lie


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        says_nothing,
        repeats(b"HTTP/1.1 200 ", b"O", 0.02),  # a status line, byte by byte
        repeats(b"HTTP/1.1 200 OK\r\n", b"a", 0.02),
        repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1),
    ],
    ids=["mute", "drip", "drip-in-head", "continue-slowly"],
)
async def test_a_machine_that_does_not_come_to_an_answer_fails_at_the_timeout(
    client: CheckClient, answer: Answer
) -> None:
    async with serving(answer) as (server, target):
        began = time.monotonic()
        finding = await client.check(an_http_check(timeout_s=0.3), target)
        assert 0.25 < time.monotonic() - began < 3.0
        assert not finding.passes
        await asyncio.wait_for(server.ended.wait(), 5)


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1\r\n\r\n", b""],
    ids=["ssh", "tls", "no-status", "half-line", "nothing"],
)
async def test_garbage_fails_at_once(client: CheckClient, data: bytes) -> None:
    async with serving(says(data)) as (_, target):
        finding = await client.check(an_http_check(timeout_s=30.0), target)
    assert not finding.passes and finding.output and finding.output.isprintable()


async def test_an_endless_head_is_given_up_before_it_takes_memory(client: CheckClient) -> None:
    field = b"X-" + b"y" * 7000 + b": " + b"z" * 1000 + b"\r\n"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with serving(repeats(b"HTTP/1.1 200 OK\r\n", field)) as (server, target):
        finding = await client.check(an_http_check(timeout_s=30.0), target)
        await asyncio.wait_for(server.ended.wait(), 5)
    assert not finding.passes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


async def test_a_flood_of_informational_answers_costs_control_no_time(client: CheckClient) -> None:
    """It all fits in a read, and must neither be parsed to its end nor be waited out."""
    async with serving(repeats(b"", b"HTTP/1.1 102\r\n\r\n" * 4000)) as (server, target):
        finding = await client.check(an_http_check(timeout_s=30.0), target)
        await asyncio.wait_for(server.ended.wait(), 5)
    assert not finding.passes and finding.output == "its answer is not valid: informational answers without end"


async def test_some_informational_answers_are_passed_over(client: CheckClient) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    async with serving(says(early * 3 + status("200 OK"))) as (_, target):
        assert (await client.check(an_http_check(), target)).passes


async def test_an_upgrade_is_no_pass(client: CheckClient) -> None:
    switch = b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nbytes"
    async with serving(says(switch)) as (_, target):
        finding = await client.check(an_http_check(timeout_s=30.0), target)
    assert not finding.passes and finding.output


async def test_head_is_answered_without_a_body(client: CheckClient) -> None:
    async with serving(says(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")) as (server, target):
        assert (await client.check(an_http_check(method="HEAD"), target)).passes
    assert server.heads[0].startswith("HEAD / HTTP/1.1\r\n") and "Content-Length" not in server.heads[0]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/up?a=1&b=%20c", "/up?a=1&b=%20c"),
        ("/a b\r\nX: y", "/a%20b%0D%0AX:%20y"),
        ("/caf\u00e9#top", "/caf%C3%A9%23top"),
    ],
)
def test_whatever_the_path_the_request_line_is_one(path: str, target: str) -> None:
    request = request_bytes(an_http_check(path=path), Target("::1", 80))
    assert request.startswith(f"GET {target} HTTP/1.1\r\nHost: [::1]:80\r\n".encode())


def test_framing_is_ours_whatever_is_configured() -> None:
    fields = (("Transfer-Encoding", "chunked"), ("content-length", "7"), ("Connection", "keep-alive"), ("A", "b"))
    lines = request_bytes(an_http_check(method="PUT", headers=fields), Target("127.0.0.1", 80)).split(b"\r\n")
    assert [line for line in lines if line.lower().startswith((b"trans", b"content", b"connection"))] == [
        b"Connection: close", b"Content-Length: 0",
    ]  # fmt: skip
    assert b"A: b" in lines


async def test_an_endless_body_is_neither_read_nor_waited_for(client: CheckClient) -> None:
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    for line, passes in (("200 OK", True), ("503 Busy", False)):
        answer = repeats(f"HTTP/1.1 {line}\r\nTransfer-Encoding: chunked\r\n\r\n".encode(), chunk)
        async with serving(answer) as (server, target):
            finding = await client.check(an_http_check(timeout_s=30.0), target)
            await asyncio.wait_for(server.ended.wait(), 5)
        assert finding.passes is passes


async def test_a_compressed_bomb_stays_packed(client: CheckClient) -> None:
    packed = b"\x1f\x8b not gzip at all"
    async with serving(says(status("500 No", packed, "Content-Encoding: gzip"))) as (_, target):
        finding = await client.check(an_http_check(), target)
    assert finding.output.startswith("GET /: 500 No") and "not gzip" in finding.output


# --- TCP


async def test_a_tcp_check_passes_as_soon_as_it_is_connected_and_says_nothing(client: CheckClient) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.read())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        finding = await client.check(TCP, Target("127.0.0.1", port))
        assert finding.passes and finding.output == f"connected to port {port}"
        assert await asyncio.wait_for(got, 5) == b""


@pytest.mark.slow
async def test_a_tcp_check_ends_at_its_timeout(client: CheckClient) -> None:
    """A listener whose queue is full answers no SYN."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as opened:
        for _ in range(4):
            one = opened.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        finding = await client.check(Check("tcp", 15.0, 0.2, 1.0), Target("127.0.0.1", full.getsockname()[1]))
    assert not finding.passes and finding.output == "no answer within 0.2 s"


async def test_sockets_are_made_in_the_network_of_the_machine_that_is_checked() -> None:
    """However many are checked at once."""
    asked: list[int] = []

    def make_socket(netns_pid: int, family: int) -> socket.socket:
        asked.append(netns_pid)
        return plain_socket(0, family)

    client = CheckClient(make_socket)
    async with serving(says(status("200 OK"))) as (_, target):
        there = [Target(target.host, target.port, 5000 + number) for number in range(20)]
        checks = [client.check(an_http_check() if one.netns_pid % 2 else TCP, one) for one in there]
        findings = await asyncio.gather(*checks)
    assert all(one.passes for one in findings)
    assert sorted(asked) == [5000 + number for number in range(20)]


async def test_a_network_that_is_gone_fails_the_check(client: CheckClient) -> None:
    for check in (TCP, an_http_check()):
        finding = await client.check(check, Target("127.0.0.1", 9, netns_pid=1))  # plain_socket knows no networks
        assert not finding.passes and finding.output


# --- TLS


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """The root of an authority of our own, and a server context with its certificate for app.apps.localhost."""
    folder = tmp_path_factory.mktemp("tls")
    certificate = make_authority(folder).issue(NAME)
    pem = folder / "server.pem"
    pem.write_bytes(certificate.chain_pem + certificate.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return folder / "certs" / "ca.pem", context


@pytest_asyncio.fixture
async def https(
    client: CheckClient, tls_files: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[CheckClient, Server, Target]]:
    """A client whose system trusts our authority, as SSL_CERT_FILE says."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tls_files[0]))
    async with serving(says(status("200 OK")), tls_files[1]) as (server, target):
        yield client, server, target


async def test_https_passes_when_the_certificate_is_good_for_the_configured_name(
    https: tuple[CheckClient, Server, Target],
) -> None:
    client, server, target = https
    finding = await client.check(an_http_check(protocol="https", tls_server_name=NAME), target)
    assert finding.passes, finding
    assert len(server.heads) == 1


@pytest.mark.parametrize("name", ["other.example", None])
async def test_https_fails_when_the_certificate_is_for_another_name(
    https: tuple[CheckClient, Server, Target], name: str | None
) -> None:
    client, server, target = https
    finding = await client.check(an_http_check(protocol="https", tls_server_name=name), target)
    assert not finding.passes and "certificate" in finding.output
    assert server.heads == []


async def test_https_takes_any_certificate_when_told_to(https: tuple[CheckClient, Server, Target]) -> None:
    client, _, target = https
    check = an_http_check(protocol="https", tls_server_name="other.example", tls_skip_verify=True)
    assert (await client.check(check, target)).passes
    assert (await client.check(an_http_check(protocol="https", tls_skip_verify=True), target)).passes


async def test_https_to_a_port_without_tls_fails(client: CheckClient) -> None:
    async with serving(says(status("200 OK"))) as (_, target):
        finding = await client.check(an_http_check(protocol="https", tls_skip_verify=True, timeout_s=1.0), target)
    assert not finding.passes and finding.output

"""One timed request: what is sent, what is read, and the order and truth of its times."""

from __future__ import annotations

import http.client
import socket
import ssl
import time

import pytest

from proxy.cli.visit import percentile, trusting, visit
from tests.cli.origin import Authority, origin, read_head

HOST = "app.test"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority(HOST)


def hello(connection: socket.socket) -> None:
    read_head(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-One: 1\r\n\r\nhello")


def test_a_plain_request_names_the_host_and_reads_the_answer() -> None:
    heads = []

    def script(connection: socket.socket) -> None:
        heads.append(read_head(connection))
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nWakefront-Error: WD09\r\n\r\nno")

    with origin(script) as address:
        answer = visit(address, HOST, None, path="/a?b=c", port=address[1])
    assert heads[0].startswith(b"GET /a?b=c HTTP/1.1\r\nHost: app.test:%d\r\n" % address[1])
    assert (answer.status, answer.body, answer.headers["wakefront-error"]) == (404, b"no", "WD09")
    assert list(answer.times.ms()) == ["connected", "request_sent", "first_byte", "ended"]


def test_over_tls_every_phase_is_timed_in_order(authority: Authority) -> None:
    with origin(hello, authority) as address:
        answer = visit(address, HOST, trusting(authority.pem))
    times = answer.times.ms()
    assert answer.body == b"hello"
    assert list(times) == ["connected", "hello_sent", "handshake_done", "request_sent", "first_byte", "ended"]
    assert list(times.values()) == sorted(times.values())


@pytest.mark.slow
def test_the_hello_is_timed_when_it_leaves_and_the_first_byte_when_it_comes(authority: Authority) -> None:
    def slow(connection: socket.socket) -> None:
        read_head(connection)
        time.sleep(0.3)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with origin(slow, authority) as address:
        times = visit(address, HOST, trusting(authority.pem)).times.ms()
    assert times["first_byte"] - times["request_sent"] >= 290
    assert times["handshake_done"] < 290


@pytest.mark.slow
def test_a_handshake_held_back_shows_between_hello_and_handshake(authority: Authority) -> None:
    def reluctant(connection: socket.socket) -> None:
        time.sleep(0.3)
        with authority.context.wrap_socket(connection, server_side=True) as tls:
            hello(tls)

    with origin(reluctant) as address:
        times = visit(address, HOST, trusting(authority.pem)).times.ms()
    assert times["hello_sent"] < 290 <= times["handshake_done"]


def test_a_certificate_of_another_authority_is_refused(authority: Authority) -> None:
    with origin(hello, Authority(HOST)) as address, pytest.raises(ssl.SSLCertVerificationError):
        visit(address, HOST, trusting(authority.pem))


def test_a_certificate_for_another_name_is_refused(authority: Authority) -> None:
    with origin(hello, authority) as address, pytest.raises(ssl.SSLCertVerificationError):
        visit(address, "other.test", trusting(authority.pem))


def test_pieces_of_a_streamed_answer_have_their_own_times(authority: Authority) -> None:
    def stream(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b"3\r\none\r\n", b"3\r\ntwo\r\n", b"0\r\n\r\n"):
            time.sleep(0.05)
            connection.sendall(piece)

    with origin(stream, authority) as address:
        answer = visit(address, HOST, trusting(authority.pem))
    assert answer.body == b"onetwo"
    assert answer.arrivals[1] - answer.arrivals[0] >= 0.04


def test_a_connection_closed_without_an_answer_is_an_error() -> None:
    with (
        origin(lambda connection: read_head(connection) and None) as address,
        pytest.raises(http.client.RemoteDisconnected),
    ):
        visit(address, HOST, None)


def test_a_server_that_never_answers_is_waited_for_only_so_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError):
        visit(server.getsockname()[:2], HOST, None, timeout_s=0.1)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50.0), (0.9, 90.0), (0.99, 99.0), (0.001, 1.0), (1.0, 100.0)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == expected
    assert percentile([7.0], share) == 7.0

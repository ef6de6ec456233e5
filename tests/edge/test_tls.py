"""The TLS layer against real clients: Python's ssl, openssl s_client, curl."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import select
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from proxy.edge.tls import TlsConnection, TlsTransport
from proxy.errors import Code, ProxyError
from proxy.tickets import new_base_context
from tests.support.tls import NAME, Echo, Server, make_authority, serve
from tests.support.tls_echo import run_until_killed

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Http(Echo):
    """Answers each request, however many come at once, and ends after one if asked to."""

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" * data.count(b"\r\n\r\n"))
        if b"connection: close" in data.lower():
            self.transport.close()


def client_hello(name: str | None = NAME) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return client, incoming, outgoing


async def run_program(*arguments: str, stdin: bytes = b"") -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(stdin), 20)
    return process.returncode or 0, output


async def handshake_by_hand(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Any]:
    """A client whose bytes the test moves itself: socket, and (object, incoming, outgoing)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    client, incoming, outgoing = client_hello()
    while True:
        writer.write(outgoing.read())
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            incoming.write(await asyncio.wait_for(reader.read(65536), 5))
    writer.write(outgoing.read())
    return reader, writer, (client, incoming, outgoing)


@pytest.mark.parametrize("version", VERSIONS)
async def test_bytes_come_back_over_both_versions(tmp_path: Path, version: ssl.TLSVersion) -> None:
    async with serve(tmp_path) as server:
        reader, writer = await server.connect(version=version)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert server.events.handshakes[0][0] == version.name.replace("_", ".")
        inner = server.inners[0]
        assert inner.transport.get_extra_info("server_name") == NAME
        assert inner.transport.get_extra_info("peername") == writer.get_extra_info("sockname")
        assert inner.transport.get_extra_info("ssl_object").selected_alpn_protocol() is None
        writer.close()
        await writer.wait_closed()
        assert await asyncio.wait_for(inner.lost, 5) is None
        assert inner.got_eof


async def test_tls_1_1_and_other_suites_are_refused(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        address = f"127.0.0.1:{server.port}"
        for option in (
            ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
            ["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA256"],
            ["-tls1_2", "-cipher", "AES128-GCM-SHA256"],
        ):
            status, output = await run_program("openssl", "s_client", "-connect", address, "-servername", NAME, *option)
            assert status != 0, output
        assert server.events.codes == [Code.TLS_FAILED] * 3


async def test_curl_verifies_our_authority_and_negotiates_http_1_1(tmp_path: Path) -> None:
    async with serve(tmp_path, Http) as server:
        status, output = await run_program(
            "curl", "-sv", "--http1.1", "--cacert", str(server.ca_path), "--resolve", f"{NAME}:{server.port}:127.0.0.1",
            f"https://{NAME}:{server.port}/",
        )  # fmt: skip
        assert status == 0, output
        assert b"200 OK" in output
        assert server.hellos[0].alpn == (b"http/1.1",)
        assert server.inners[0].transport.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_openssl_resumes_its_sessions(tmp_path: Path, version: str) -> None:
    async with serve(tmp_path, Http) as server:
        session = str(tmp_path / "session")
        base = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-servername", NAME, version, "-quiet"]
        base += ["-verify_quiet", "-no_ign_eof"]
        request = b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"
        _, first = await run_program(*base, "-sess_out", session, "-ign_eof", stdin=request)
        assert b"200 OK" in first
        _, second = await run_program(*base, "-sess_in", session, "-ign_eof", stdin=request)
        assert b"200 OK" in second
        assert [resumed for _, resumed, _ in server.events.handshakes] == [False, True]


async def test_a_session_resumes_after_the_leaf_was_renewed(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        context = server.client_context()

        def connect(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bytes]:
            with (
                socket.create_connection(("127.0.0.1", server.port)) as raw,
                context.wrap_socket(raw, server_hostname=NAME, session=session) as tls,
            ):
                tls.sendall(b"x")
                assert tls.recv(1) == b"x"
                return tls.session, tls.getpeercert(binary_form=True) or b""

        session, before = await asyncio.to_thread(connect, None)
        server.issue(NAME)
        server.certificates.ready(NAME, None)
        _, fresh = await asyncio.to_thread(connect, None)
        assert fresh != before
        await asyncio.to_thread(connect, session)
        assert [resumed for _, resumed, _ in server.events.handshakes] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
async def test_ten_megabytes_come_back_identical_while_the_reader_is_slow(
    tmp_path: Path, version: ssl.TLSVersion
) -> None:
    async with serve(tmp_path) as server:
        reader, writer = await server.connect(version=version)
        sent = os.urandom(10_000_000)

        async def send() -> None:
            for at in range(0, len(sent), 100_000):
                writer.write(sent[at : at + 100_000])
                await writer.drain()

        sender = asyncio.create_task(send())
        # Nothing is read until the server has stopped taking more: that is what the bound is about.
        while not (server.inners and server.inners[0].writing_paused):
            await asyncio.sleep(0.001)
        received = hashlib.sha256()
        left = len(sent)
        while left:
            piece = await reader.read(50_000)
            received.update(piece)
            left -= len(piece)
        await sender
        assert received.digest() == hashlib.sha256(sent).digest()
        # one read of uvloop's (256 kB) above the high mark at most
        assert server.inners[0].most_buffered < 600_000
        writer.close()
        await writer.wait_closed()


async def test_every_cut_of_the_handshake_bytes_is_as_good(tmp_path: Path) -> None:
    """Each flight arrives in two pieces, cut at every place."""
    async with serve(tmp_path) as server:
        client, _, outgoing = client_hello()
        for cut in range(1, len(outgoing.read()), 7):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client, incoming, outgoing = client_hello()
            done = False
            while not done:
                flight = outgoing.read()
                writer.write(flight[:cut])
                await asyncio.sleep(0)
                writer.write(flight[cut:])
                try:
                    client.do_handshake()
                    done = True
                except ssl.SSLWantReadError:
                    incoming.write(await asyncio.wait_for(reader.read(65536), 5))
            client.write(b"ping")
            flight = outgoing.read()
            writer.write(flight[:cut])
            await asyncio.sleep(0)
            writer.write(flight[cut:])
            answer = b""
            while not answer:
                incoming.write(await asyncio.wait_for(reader.read(65536), 5))
                try:
                    answer = client.read(100)
                except ssl.SSLWantReadError:
                    pass
            assert answer == b"ping"
            writer.close()
        assert server.events.errors == []


async def test_a_request_in_the_same_segment_as_finished_is_answered(tmp_path: Path) -> None:
    async with serve(tmp_path, Http) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        client, incoming, outgoing = client_hello()
        writer.write(outgoing.read())
        incoming.write(await reader.read(65536))
        client.do_handshake()
        client.write(b"GET / HTTP/1.1\r\n\r\n")
        writer.write(outgoing.read())
        incoming.write(await asyncio.wait_for(reader.read(65536), 5))
        assert client.read(1000).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_the_hello_is_told_before_finished_and_a_client_that_withholds_it_is_ended(tmp_path: Path) -> None:
    async with serve(tmp_path, handshake_timeout_s=0.1) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        _, _, outgoing = client_hello()
        writer.write(outgoing.read())
        await asyncio.wait_for(server.hello_came.wait(), 5)
        assert server.events.handshakes == []
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(100_000), 5)
        assert server.events.codes == [Code.TLS_TIMEOUT]
        assert server.inners == []
        writer.close()


async def test_a_silent_connection_ends_with_the_handshake_timeout(tmp_path: Path) -> None:
    async with serve(tmp_path, handshake_timeout_s=0.05) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        assert server.events.codes == [Code.TLS_TIMEOUT]
        writer.close()


async def test_after_its_handshake_a_connection_keeps_nothing_of_it(tmp_path: Path) -> None:
    def count() -> int:
        return sum(isinstance(one, TlsConnection) for one in gc.get_objects())

    async with serve(tmp_path) as server:
        gc.collect()
        gc.disable()
        try:
            before = count()  # other tests' own
            reader, writer = await server.connect()
            writer.write(b"x")
            await reader.readexactly(1)
            assert count() == before
        finally:
            gc.enable()
        writer.close()
        await writer.wait_closed()
        assert not server.events.unfinished


async def test_a_port_scan_is_no_error(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert server.events.errors == []


async def test_a_refusal_by_on_hello_is_an_alert_before_any_handshake_work(tmp_path: Path) -> None:
    def refuse(hello: Any, peer: Any) -> None:
        raise ProxyError(Code.TLS_NO_CERTIFICATE, detail="not ours")

    async with serve(tmp_path, on_hello=refuse) as server:
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await server.connect()
        assert server.events.errors == [(Code.TLS_NO_CERTIFICATE, NAME, "not ours")]


async def test_a_client_that_names_no_host_gets_unrecognized_name(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        context = server.client_context()
        context.check_hostname = False
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="")
        assert server.events.codes == [Code.TLS_NO_CERTIFICATE]


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n"])
async def test_plain_http_on_the_tls_port_is_told_so(tmp_path: Path, start: bytes) -> None:
    async with serve(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(start)
        head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert f"Content-Length: {len(body)}".encode() in head
        assert server.events.codes == [Code.TLS_FAILED]
        writer.close()


@pytest.mark.parametrize("garbage", [b"\x00" * 50, b"SSH-2.0-x\r\n", b"\x16\x03\x01\x00\x00", b"\x16\x03\x01\xff\xff"])
async def test_garbage_gets_an_alert_and_a_clean_end(tmp_path: Path, garbage: bytes) -> None:
    async with serve(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(garbage)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer[:1] == b"\x15" and len(answer) == 7
        assert server.events.codes == [Code.TLS_FAILED]
        writer.close()


async def test_garbage_after_a_good_hello_gets_openssls_alert(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        _, _, outgoing = client_hello()
        writer.write(outgoing.read() + b"\x16\x03\x03\x00\x20" + b"\x00" * 32)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer[-24:-19] == b"\x17\x03\x03\x00\x13"  # an alert, already encrypted
        assert server.events.codes == [Code.TLS_FAILED]
        writer.close()


async def test_an_altered_record_ends_the_connection_with_an_alert(tmp_path: Path) -> None:
    async with serve(tmp_path, shutdown_timeout_s=0.05) as server:
        reader, writer, (client, incoming, outgoing) = await handshake_by_hand(server)
        client.write(b"secret")
        record = bytearray(outgoing.read())
        record[-1] ^= 1
        writer.write(bytes(record))
        incoming.write(await asyncio.wait_for(reader.read(), 5))
        with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
            client.read(10)
        assert isinstance(await asyncio.wait_for(server.inners[0].lost, 5), ssl.SSLError)
        assert server.inners[0].received == 0
        assert server.events.codes == [Code.TLS_IO]
        writer.close()


async def test_an_end_without_close_notify_is_a_reset_to_the_inner_protocol(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        _, writer, _ = await handshake_by_hand(server)
        writer.write_eof()
        await asyncio.wait_for(asyncio.shield(_first_inner_lost(server)), 5)
        assert isinstance(server.inners[0].lost.result(), ConnectionResetError)
        assert not server.inners[0].got_eof
        writer.close()


async def _first_inner_lost(server: Server) -> None:
    while not server.inners:
        await asyncio.sleep(0.001)
    await server.inners[0].lost


async def test_after_the_peers_close_notify_the_answer_can_still_be_written(tmp_path: Path) -> None:
    class HalfOpen(Echo):
        def eof_received(self) -> bool:
            asyncio.get_running_loop().call_soon(self._answer)
            return True

        def _answer(self) -> None:
            self.transport.write(b"late answer")
            self.transport.close()

    async with serve(tmp_path, HalfOpen) as server:
        reader, writer, (client, incoming, outgoing) = await handshake_by_hand(server)
        with pytest.raises(ssl.SSLWantReadError):
            client.unwrap()
        writer.write(outgoing.read())
        writer.write_eof()
        incoming.write(await asyncio.wait_for(reader.read(), 5))
        assert client.read(100) == b"late answer"
        with pytest.raises(ssl.SSLZeroReturnError):
            client.read(1)
        assert await asyncio.wait_for(server.inners[0].lost, 5) is None
        writer.close()


async def test_close_sends_close_notify_and_what_was_written_before(tmp_path: Path) -> None:
    class Goodbye(Echo):
        def data_received(self, data: bytes) -> None:
            self.transport.write(b"a" * 300_000)
            self.transport.close()
            self.transport.write(b"never sent")
            assert self.transport.is_closing()

    async with serve(tmp_path, Goodbye) as server:
        reader, writer = await server.connect()
        writer.write(b"x")
        assert await asyncio.wait_for(reader.read(), 5) == b"a" * 300_000
        writer.close()
        assert await asyncio.wait_for(server.inners[0].lost, 5) is None


async def test_a_peer_that_does_not_end_is_ended_by_the_shutdown_timeout(tmp_path: Path) -> None:
    async with serve(tmp_path, Http, shutdown_timeout_s=0.05) as server:
        _, writer, (client, _, outgoing) = await handshake_by_hand(server)
        client.write(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
        writer.write(outgoing.read())
        await asyncio.wait_for(_first_inner_lost(server), 5)
        writer.close()


async def test_a_slow_reader_gets_all_of_a_closed_connection(tmp_path: Path) -> None:
    """The shutdown timeout counts only once what was written before has left."""

    class Big(Echo):
        def data_received(self, data: bytes) -> None:
            self.transport.write(b"b" * 8_000_000)
            self.transport.close()

    async with serve(tmp_path, Big, shutdown_timeout_s=0.02) as server:
        reader, writer, (client, incoming, outgoing) = await handshake_by_hand(server)
        client.write(b"x")
        writer.write(outgoing.read())
        got = 0
        while True:
            data = await asyncio.wait_for(reader.read(65_536), 5)
            if got < 2_000_000:
                await asyncio.sleep(0.005)
            if not data:
                break
            incoming.write(data)
            try:
                while piece := client.read(65_536):
                    got += len(piece)
            except ssl.SSLWantReadError:
                pass
        assert got == 8_000_000
        writer.close()


async def test_pause_reading_stops_delivery_within_one_read_and_resume_goes_on(tmp_path: Path) -> None:
    class OneByOne(Echo):
        """Takes one record, then pauses until told."""

        def __init__(self) -> None:
            super().__init__()
            self.pieces: list[bytes] = []
            self.paused = asyncio.Event()

        def data_received(self, data: bytes) -> None:
            assert self.transport.is_reading()
            self.pieces.append(data)
            self.transport.pause_reading()
            self.paused.set()

    async with serve(tmp_path, OneByOne) as server:
        _, writer, (client, _, outgoing) = await handshake_by_hand(server)
        for byte in b"abcdef":
            client.write(bytes((byte,)) * 10_000)
        writer.write(outgoing.read())
        while not server.inners:
            await asyncio.sleep(0.001)
        inner = server.inners[0]
        for count in range(1, 7):
            await asyncio.wait_for(inner.paused.wait(), 5)
            inner.paused.clear()
            assert len(inner.pieces) == count
            inner.transport.resume_reading()
        assert b"".join(inner.pieces) == b"".join(bytes((byte,)) * 10_000 for byte in b"abcdef")
        writer.close()
        await asyncio.wait_for(inner.lost, 5)


async def test_pause_and_resume_within_one_delivery_do_not_reenter(tmp_path: Path) -> None:
    class Nervous(Echo):
        inside = False

        def data_received(self, data: bytes) -> None:
            assert not self.inside
            self.inside = True
            self.transport.pause_reading()
            self.transport.resume_reading()
            super().data_received(data)
            self.inside = False

    async with serve(tmp_path, Nervous) as server:
        reader, writer = await server.connect()
        sent = os.urandom(400_000)
        writer.write(sent)
        assert await asyncio.wait_for(reader.readexactly(len(sent)), 5) == sent
        writer.close()
        await writer.wait_closed()


async def test_a_peer_that_makes_us_answer_and_does_not_read_is_not_heard_any_more(tmp_path: Path) -> None:
    """Even where the inner protocol ignores back-pressure: nothing is decrypted above the outer buffer's mark."""

    class Deaf(Echo):
        def data_received(self, data: bytes) -> None:
            self.received += 1
            self.transport.write(b"x" * 20_000)
            self.most_buffered = max(self.most_buffered, self.transport.get_write_buffer_size())

        def pause_writing(self) -> None:
            self.writing_paused = True

        def resume_writing(self) -> None:
            self.writing_paused = False

    async with serve(tmp_path, Deaf) as server:
        reader, writer, (client, incoming, outgoing) = await handshake_by_hand(server)
        requests = 2_000
        for _ in range(requests):
            client.write(b"r")
        writer.transport.pause_reading()
        writer.write(outgoing.read())
        while not (server.inners and server.inners[0].writing_paused):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        inner = server.inners[0]
        assert inner.received < requests
        assert inner.most_buffered < 150_000
        writer.transport.resume_reading()
        got = 0
        while got < requests * 20_000:
            incoming.write(await asyncio.wait_for(reader.read(262_144), 5))
            try:
                while True:
                    got += len(client.read(65_536))
            except ssl.SSLWantReadError:
                pass
        assert inner.received == requests
        assert inner.most_buffered < 150_000
        writer.close()


async def test_openssl_key_updates_are_answered(tmp_path: Path) -> None:
    """`K` makes s_client update its key and ask for ours."""
    async with serve(tmp_path) as server:
        process = await asyncio.create_subprocess_exec(
            "openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-servername", NAME, "-tls1_3",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        for line in (b"one\n", b"K\n", b"two\n", b"k\n", b"three\n"):
            process.stdin.write(line)
            await process.stdin.drain()
            if line.strip().lower() != b"k":
                while await asyncio.wait_for(process.stdout.readline(), 5) != line:
                    pass
            else:
                while b"KEYUPDATE" not in await asyncio.wait_for(process.stdout.readline(), 5):
                    pass
        process.stdin.write(b"Q\n")
        await asyncio.wait_for(process.communicate(), 5)
        assert server.events.errors == []


async def test_a_renegotiation_is_refused_and_the_connection_goes_on_or_ends(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        _, output = await run_program(
            "openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-servername", NAME, "-tls1_2",
            stdin=b"R\nQ\n",
        )  # fmt: skip
        assert b"RENEGOTIATING" in output
        assert b"no renegotiation" in output
        assert len(server.events.handshakes) == 1


async def test_an_unknown_name_waits_for_its_certificate_and_asks_once(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        connecting = [asyncio.create_task(server.connect("new.example.com")) for _ in range(5)]
        while server.certificates.waiting < 5:
            await asyncio.sleep(0.001)
        assert server.asked == ["new.example.com"]
        server.issue("new.example.com")
        server.certificates.ready("new.example.com", None)
        for _, writer in await asyncio.gather(*connecting):
            writer.close()
            await writer.wait_closed()
        assert server.certificates.waiting == 0


async def test_a_client_that_leaves_while_it_waits_is_forgotten(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        _, _, outgoing = client_hello("new.example.com")
        writer.write(outgoing.read())
        while server.certificates.waiting < 1:
            await asyncio.sleep(0.001)
        writer.close()
        await asyncio.wait_for(server.events.error_came.wait(), 5)
        assert server.events.codes == [Code.TLS_CANCELLED]
        assert server.certificates.waiting == 0
        while not server.events.unfinished:
            await asyncio.sleep(0.001)


async def test_a_refused_name_gets_an_alert_and_is_not_asked_for_again_at_once(tmp_path: Path) -> None:
    async with serve(tmp_path) as server:
        connecting = asyncio.create_task(server.connect("evil.example.com"))
        while server.certificates.waiting < 1:
            await asyncio.sleep(0.001)
        server.certificates.ready("evil.example.com", "no such app")
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await connecting
        with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
            await server.connect("evil.example.com")
        assert server.asked == ["evil.example.com"]


async def test_a_write_that_openssl_cannot_take_now_is_sent_later(tmp_path: Path) -> None:
    """Half a key update has come: OpenSSL may want its rest before it writes. Told here by a stand-in for its write."""
    async with serve(tmp_path) as server:
        reader, writer = await server.connect()
        writer.write(b"x")
        await reader.readexactly(1)
        inner: Echo = server.inners[0]
        transport: TlsTransport = inner.transport
        encrypt = transport._encrypt

        def refuse(data: Any) -> int:
            raise ssl.SSLWantReadError

        transport._encrypt = refuse  # type: ignore[method-assign]
        transport.write(b"first ")
        transport.write(b"second ")
        assert inner.writing_paused
        assert transport.get_write_buffer_size() == 13
        transport._encrypt = encrypt  # type: ignore[method-assign]
        transport.resume_reading()
        writer.write(b"third")
        assert await asyncio.wait_for(reader.readexactly(18), 5) in (b"thirdfirst second ", b"first second third")
        assert not inner.writing_paused
        writer.close()
        await writer.wait_closed()


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_sessions_resume_at_every_forked_worker_and_across_renewed_leafs(
    tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """The base context is made before the fork; each process builds a leaf context, one of a renewed leaf."""
    base = new_base_context()
    authority = make_authority(tmp_path)
    listeners, pids = [], []
    for _ in range(2):
        leaf = tmp_path / "leaf.pem"
        leaf.write_bytes(authority.issue(NAME).to_pem())
        listener = socket.create_server(("127.0.0.1", 0))
        pid = os.fork()
        if pid == 0:
            try:
                run_until_killed(base, str(leaf), listener)
            finally:
                os._exit(0)
        listeners.append(listener)
        pids.append(pid)
        _wait_until_answers(listener.getsockname()[1])
    try:
        context = ssl.create_default_context(cafile=tmp_path / "certs" / "ca.pem")
        context.minimum_version = context.maximum_version = version
        session = None
        reused = []
        for turn in range(20):
            port = listeners[turn % 2].getsockname()[1]
            with (
                socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
                context.wrap_socket(raw, server_hostname=NAME, session=session) as tls,
            ):
                tls.sendall(b"x")
                assert tls.recv(1) == b"x"
                session = tls.session
                reused.append(tls.session_reused)
        assert reused == [False] + [True] * 19
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        for listener in listeners:
            listener.close()


def _wait_until_answers(port: int) -> None:
    """The forked server has read its leaf when it answers garbage."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        raw.sendall(b"\x00" * 10)
        assert raw.recv(100)[:1] == b"\x15"


@pytest.mark.slow
def test_memory_of_a_connection_idle_and_after_ten_megabytes_each_way(tmp_path: Path) -> None:
    """design.md §8.2: at most 30 KB after the handshake, 50 KB after 10 MB each way, measured as RSS of the server."""
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(make_authority(tmp_path).issue(NAME).to_pem())
    context = ssl.create_default_context(cafile=tmp_path / "certs" / "ca.pem")
    clients: list[ssl.SSLSocket] = []
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.tls_echo", str(leaf)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with server:
        assert server.stdout is not None
        port = int(server.stdout.readline())

        def connect(count: int) -> None:
            for _ in range(count):
                raw = socket.create_connection(("127.0.0.1", port), timeout=10)
                tls = context.wrap_socket(raw, server_hostname=NAME)
                clients.append(tls)
                tls.sendall(b"x")
                assert tls.recv(1) == b"x"

        try:
            connect(100)  # allocators and caches have warmed up
            before = _rss(server.pid)
            connect(400)
            idle = (_rss(server.pid) - before) / 400
            for tls in clients[:10]:
                _echo_much(tls, 10_000_000)  # what the process needs once, not each connection
            before = _rss(server.pid)
            for tls in clients[-100:]:
                _echo_much(tls, 10_000_000)
            used = idle + (_rss(server.pid) - before) / 100
        finally:
            for tls in clients:
                tls.close()
            server.communicate(timeout=10)
    print(f"idle {idle:.0f} B, after 10 MB each way {used:.0f} B a connection")
    assert idle <= 30_000
    assert used <= 50_000


def _rss(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _echo_much(tls: ssl.SSLSocket, total: int) -> None:
    tls.setblocking(False)
    sent = received = 0
    block = bytes(65_536)
    deadline = time.monotonic() + 30
    while received < total:
        assert time.monotonic() < deadline
        select.select([tls], [tls] if sent < total else [], [], 1)
        try:
            while sent < total:
                sent += tls.send(block[: total - sent])
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        try:
            while received < total:
                received += len(tls.recv(65_536))
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
    tls.settimeout(10)


async def test_what_one_read_brings_is_delivered_between_its_beginning_and_its_end(tmp_path: Path) -> None:
    class Gathering(Echo):
        """Is told of long reads, and keeps what happens in order."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []
            self.size = 0
            self.whole = asyncio.Event()

        def read_begins(self) -> None:
            self.seen.append("begins")

        def read_ends(self) -> None:
            self.seen.append("ends")

        def data_received(self, data: bytes) -> None:
            self.seen.append("data")
            self.size += len(data)
            if self.size == 60_000:
                asyncio.get_running_loop().call_soon(self.whole.set)

    async with serve(tmp_path, Gathering) as server:
        _, writer, (client, _, outgoing) = await handshake_by_hand(server)
        for byte in b"abcdef":
            client.write(bytes((byte,)) * 10_000)
        writer.write(outgoing.read())
        while not server.inners:
            await asyncio.sleep(0.001)
        inner = server.inners[0]
        await asyncio.wait_for(inner.whole.wait(), 5)
        assert inner.seen.count("data") == 6
        depth = within = 0  # a short read, at the end, has no marks
        for step in inner.seen:
            depth += {"begins": 1, "ends": -1, "data": 0}[step]
            assert depth in (0, 1)
            within += step == "data" and depth == 1
        assert depth == 0
        assert within >= 1
        writer.close()
        await asyncio.wait_for(inner.lost, 5)


async def test_the_ticket_comes_with_the_answer_to_a_request_that_came_with_the_end_of_the_handshake(
    tmp_path: Path,
) -> None:
    async with serve(tmp_path) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        client, incoming, outgoing = client_hello()
        writer.write(outgoing.read())
        while True:
            incoming.write(await asyncio.wait_for(reader.read(65536), 5))
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
        client.write(b"hello")
        writer.write(outgoing.read())  # Finished and the request in one
        answer = b""
        while not answer:
            incoming.write(await asyncio.wait_for(reader.read(65536), 5))
            with contextlib.suppress(ssl.SSLWantReadError):
                answer = client.read(100)
        assert answer == b"hello"
        assert client.session is not None and client.session.has_ticket
        writer.close()
        await asyncio.wait_for(server.inners[0].lost, 5)

"""Custom domains where everything goes wrong: names and tokens that nobody means well, a full disk, a store that is
damaged, a control that is killed again and again, and another ACME client that wants to be let through.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from certs.store import SealedStore
from tests.attacks import cases
from tests.attacks.test_wedge import DAY_S, FAKETIME
from tests.support.disk import fill
from tests.support.faults import kill_control
from tests.support.pebble import Pebble, is_installed, pebble
from tests.support.plane import static_app
from tests.support.processes import wait_for
from tests.support.serve import ServedNode
from tests.system.test_custom_domains import certs_section

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.skipif(not is_installed(), reason="pebble is not installed"),
]

UNRECOGNIZED_NAME = 112
DECODE_ERROR = 50
SERVED = 22  # a handshake record


class Upstream:
    """An app that answers with what it was asked for, and has files of its own to serve at ACME's path."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.tokens: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append(self.path)
                body = outer.tokens.get(self.path.rpartition("/")[2], f"the app: {self.path}").encode("latin-1")
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Hosted:
    """A node beside a CA, with an app `web` that is in this process."""

    def __init__(self, node: ServedNode, ca: Pebble, upstream: Upstream) -> None:
        self.node, self.ca, self.upstream = node, ca, upstream
        self.context = ssl.create_default_context(cadata=ca.roots().decode())

    def add(self, host: str) -> int:
        return self.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": host})[0]

    def status_of(self, host: str) -> str:
        status, found = self.node.api("GET", f"/v1/apps/web/certificates/{host}")
        return str(found["status"]) if status == 200 else f"HTTP {status}"

    def wait_active(self, host: str, seconds: float = 30.0) -> None:
        def told() -> str:
            found = self.node.api("GET", f"/v1/apps/web/certificates/{host}")
            return f"{host} is active: {json.dumps(found, indent=1)}\n{self.node.log()[-6000:]}"

        wait_for(lambda: _quietly(lambda: self.status_of(host) == "active"), seconds, told)

    def leaf_of(self, host: str) -> bytes:
        with (
            socket.create_connection(("127.0.0.1", self.node.https_port), timeout=20) as raw,
            self.context.wrap_socket(raw, server_hostname=host) as sock,
        ):
            leaf = sock.getpeercert(binary_form=True)
            assert leaf is not None
            return leaf


def _quietly(what: object) -> bool:
    assert callable(what)
    with contextlib.suppress(OSError, http.client.HTTPException):
        return bool(what())
    return False


@contextlib.contextmanager
def hosted(
    folder: Path, node_folder: Path | None = None, more: str = "", env: dict[str, str] | None = None
) -> Iterator[Hosted]:
    upstream = Upstream()
    node = ServedNode(node_folder or folder / "node", workers=2, env=env)
    try:
        with pebble(folder / "ca", node.http_port, node.https_port) as ca:
            web = static_app(node.folder, "web", upstream.address, more=more)
            node.write_config(certs_section(ca) + web)
            with node:
                yield Hosted(node, ca, upstream)
    finally:
        upstream.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with hosted(tmp_path_factory.mktemp("hostile")) as one:
        assert one.add("known.example.com") == 201 and one.add("xn--mnchen-3ya.example.com") == 201
        one.wait_active("known.example.com")
        one.wait_active("xn--mnchen-3ya.example.com")
        yield one


# --- names in ClientHellos


def hello(extension: bytes | None) -> bytes:
    """A ClientHello as OpenSSL makes it, whose server_name extension is these bytes (None: it has none)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="place.example").do_handshake()
    record = outgoing.read()
    body = record[9:]
    at = 34 + 1 + body[34]  # version, random, session
    at += 2 + int.from_bytes(body[at : at + 2], "big")  # cipher suites
    at += 1 + body[at]  # compression methods
    rest, extensions = body[at + 2 :], b""
    while rest:
        kind, length = struct.unpack_from("!HH", rest)
        if kind != 0:
            extensions += rest[: 4 + length]
        rest = rest[4 + length :]
    if extension is not None:
        extensions = struct.pack("!HH", 0, len(extension)) + extension + extensions
    body = body[:at] + struct.pack("!H", len(extensions)) + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack("!H", len(message)) + message


def names(*entries: bytes, kind: int = 0) -> bytes:
    listed = b"".join(struct.pack("!BH", kind, len(one)) + one for one in entries)
    return struct.pack("!H", len(listed)) + listed


def answer_to(node: ServedNode, data: bytes) -> int:
    """22 for a handshake that goes on, else the alert's number; -1 for a close without a word."""
    with socket.create_connection(("127.0.0.1", node.https_port), timeout=10) as sock:
        sock.sendall(data)
        head = b""
        with contextlib.suppress(ConnectionError):
            while len(head) < 7 and (piece := sock.recv(7 - len(head))):
                head += piece
    if head[:1] == b"\x16":
        return 22
    return head[6] if head[:1] == b"\x15" and len(head) == 7 else -1


GOOD = b"known.example.com"
SPELLINGS: list[tuple[str, bytes | None, int]] = [
    ("as it is", names(GOOD), SERVED),
    ("upper case", names(GOOD.upper()), SERVED),
    ("mixed case", names(b"KnOwN.eXample.COM"), SERVED),
    ("A-label", names(b"xn--mnchen-3ya.example.com"), SERVED),
    ("A-label, upper case", names(b"XN--MNCHEN-3YA.example.com"), SERVED),
    # RFC 6066 §3 has names without one, but there are clients that send it: it is the same name
    ("trailing dot", names(GOOD + b"."), SERVED),
    ("two trailing dots", names(GOOD + b".."), UNRECOGNIZED_NAME),
    ("U-label", names("münchen.example.com".encode()), UNRECOGNIZED_NAME),
    ("Latin-1", names(b"m\xfcnchen.example.com"), UNRECOGNIZED_NAME),
    ("300 bytes", names(b"a." * 144 + b"example.com"), UNRECOGNIZED_NAME),
    ("a label of 64", names(b"a" * 64 + b".example.com"), UNRECOGNIZED_NAME),
    ("empty name", names(b""), DECODE_ERROR),
    ("IPv4 literal", names(b"127.0.0.1"), UNRECOGNIZED_NAME),
    ("IPv6 literal", names(b"[::1]"), UNRECOGNIZED_NAME),
    ("NUL within", names(b"known.example.com\x00.evil.example"), UNRECOGNIZED_NAME),
    ("NUL at the end", names(GOOD + b"\x00"), UNRECOGNIZED_NAME),
    ("line feed", names(GOOD + b"\n"), UNRECOGNIZED_NAME),
    ("a record of another kind", names(b"rsa/known.example.com"), UNRECOGNIZED_NAME),
    ("traversal", names(b"../known.example.com"), UNRECOGNIZED_NAME),
    ("a wildcard", names(b"*.example.com"), UNRECOGNIZED_NAME),
    ("a blank", names(b"known.example.com evil"), UNRECOGNIZED_NAME),
    ("two names", names(GOOD, b"evil.example"), DECODE_ERROR),
    ("no name at all", None, UNRECOGNIZED_NAME),
    ("an empty list", b"\0\0", DECODE_ERROR),
    ("an empty extension", b"", DECODE_ERROR),
    ("a list longer than it is", b"\xff\xff\0\0\x01a", DECODE_ERROR),
    ("bytes after the list", names(GOOD) + b"x", DECODE_ERROR),
    ("another kind of name", names(GOOD, kind=7), DECODE_ERROR),
    ("never added", names(b"stranger.example.com"), UNRECOGNIZED_NAME),
]


@pytest.mark.parametrize(("extension", "expected"), [one[1:] for one in SPELLINGS], ids=[one[0] for one in SPELLINGS])
def test_each_spelling_of_a_name_is_served_or_refused_with_its_alert(
    site: Hosted, extension: bytes | None, expected: int
) -> None:
    assert answer_to(site.node, hello(extension)) == expected
    assert "Traceback" not in site.node.log()


def test_random_bytes_for_a_name_end_in_an_alert_and_no_traceback(site: Hosted) -> None:
    rng = random.Random("names")
    for _ in range(cases(300)):
        name = rng.randbytes(rng.randrange(1, 80))
        extension = names(name) if rng.random() < 0.7 else rng.randbytes(rng.randrange(40))
        got = answer_to(site.node, hello(extension))
        assert got in {UNRECOGNIZED_NAME, DECODE_ERROR}, (extension, got)
    assert site.leaf_of("known.example.com")
    assert "Traceback" not in site.node.log()


# --- challenge paths


@pytest.mark.parametrize(
    "path",
    [
        "/.well-known/acme-challenge/",
        "/.well-known/acme-challenge/foreign-token",
        "/.well-known/acme-challenge/../../etc/passwd",
        "/.well-known/acme-challenge/..%2f..%2fetc%2fpasswd",
        "/.well-known/acme-challenge/%2e%2e/known.example.com",
        "/.well-known/acme-challenge/known.example.com",
        "/.well-known/acme-challenge/../http-01/x",
        "/.well-known/acme-challenge/tls-alpn-01/known.example.com",
        "/.well-known/acme-challenge//x",
        "/.well-known/acme-challenge/x?y=z",
        "/.well-known/acme-challenge/x;y",
        "/.well-known/acme-challenge/" + "a" * 5000,
        "/.well-known/acme-challenge/%00",
        "/.well-known/acme-challenge/%ff%fe",
    ],
)
def test_what_is_no_token_of_ours_is_the_apps_as_it_was_sent(site: Hosted, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.node.http_port, timeout=10)
    try:
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", "known.example.com")
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    assert answer.status == 200 and body == f"the app: {path}".encode(), (answer.status, body[:200])
    assert site.upstream.seen[-1] == path
    assert b"PRIVATE KEY" not in body and "Traceback" not in site.node.log()


def test_another_acme_client_behind_the_node_gets_its_own_certificate(site: Hosted, tmp_path: Path) -> None:
    """certbot, whose tokens are files of the app's: the node passes them on, and its own orders go on beside."""
    certbot = shutil.which("certbot")
    if certbot is None:
        pytest.skip("certbot is not installed")
    hook = tmp_path / "auth.sh"  # certbot's tokens, told to the app
    hook.write_text(f'#!/bin/sh\nprintf %s "$CERTBOT_VALIDATION" > {tmp_path}/tokens/"$CERTBOT_TOKEN"\n')
    hook.chmod(0o755)
    tokens = tmp_path / "tokens"
    tokens.mkdir()

    class Files(dict[str, str]):
        def get(self, name: str, default: str = "") -> str:  # type: ignore[override]  # text alone
            file = tokens / Path(name).name
            return file.read_text() if name and file.is_file() else default

    assert site.add("theirs.example.com") == 201
    site.wait_active("theirs.example.com")
    before = site.leaf_of("theirs.example.com")
    site.upstream.tokens = Files()
    try:
        done = subprocess.run(
            [certbot, "certonly", "--manual", "--preferred-challenges", "http", "--manual-auth-hook", str(hook),
             "--server", site.ca.directory_url, "-d", "theirs.example.com", "--non-interactive", "--agree-tos",
             "--register-unsafely-without-email", "--config-dir", str(tmp_path / "c"),
             "--work-dir", str(tmp_path / "w"), "--logs-dir", str(tmp_path / "l")],
            env={"REQUESTS_CA_BUNDLE": str(site.ca.ca_file), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
    finally:
        site.upstream.tokens = {}
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = tmp_path / "c" / "live" / "theirs.example.com" / "fullchain.pem"
    assert "BEGIN CERTIFICATE" in theirs.read_text()
    shown = {one.name for one in tokens.iterdir()}
    assert shown and shown <= {one.rpartition("/")[2] for one in site.upstream.seen}, (
        "the CA asked the app, by the node"
    )
    assert site.leaf_of("theirs.example.com") == before, "what the node shows is its own"
    assert "Traceback" not in site.node.log()


# --- a control that is killed


def test_names_added_while_control_is_killed_again_and_again_have_one_order_each(site: Hosted) -> None:
    """Again and again five names are added, and control is killed at a moment of their orders."""
    rng = random.Random("kill -9 in the middle of orders")
    rounds, before = cases(6), orders_at(site.ca)
    slowest = 0.0
    added: list[str] = []
    for number in range(rounds):
        hosts = [f"n{number}-{one}.killed.example.com" for one in range(5)]
        began = time.monotonic()
        adding = [threading.Thread(target=add_surely, args=(site, host)) for host in hosts]
        for one in adding:
            one.start()
        time.sleep(rng.uniform(0.0, 0.5))  # an order takes about as long
        kill_control(site.node)
        for one in adding:
            one.join(30)
        for host in hosts:
            site.wait_active(host)
        slowest = max(slowest, time.monotonic() - began)
        added += hosts
        time.sleep(0.3)  # who keeps dying at once is made to wait: that is not tested here
    assert orders_at(site.ca) - before == len(added), "one order each"
    serials = {site.leaf_of(host) for host in added}
    assert len(serials) == len(added)
    assert slowest < 20, slowest
    assert "Traceback" not in site.node.log()


def orders_at(ca: Pebble) -> int:
    """How many orders the CA has made, ever."""
    return ca.log.read_text().count("Added order ")


def add_surely(site: Hosted, host: str) -> None:
    """As a script would: again, where the answer is lost with its control."""

    def added() -> bool:
        return _quietly(lambda: site.add(host) == 201)

    wait_for(added, 30, lambda: f"{host} is added\n{site.node.log()[-3000:]}")


# --- a clock that is wrong


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
@pytest.mark.parametrize("days", [2, -2])
def test_a_clock_that_is_days_off_orders_once_and_status_says_how_far(tmp_path: Path, days: int) -> None:
    clock = tmp_path / "clock"
    clock.write_text(f"{days:+d}d\n")
    env = {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    with hosted(tmp_path, env=env) as one:
        assert one.add("skewed.example.com") == 201
        one.wait_active("skewed.example.com")
        first = one.leaf_of("skewed.example.com")
        side = "ahead of" if days > 0 else "behind"

        def told() -> str | None:
            shown = one.node.cli("status")
            return next((line for line in shown.splitlines() if "clock" in line and side in line), None)

        line = wait_for(told, 5, lambda: one.node.cli("status"))
        found = re.search(r"clock is (\d+) s", line)
        assert found is not None and abs(int(found[1]) - abs(days) * DAY_S) < 120, line
        metrics = one.node.api("GET", "/metrics")[1]
        skew = re.search(r"^wakefront_ca_clock_skew_seconds(?:\{.*\})? (\S+)$", metrics, re.MULTILINE)
        assert skew is not None and abs(float(skew[1]) + days * DAY_S) < 120, metrics[:2000]
        kill_control(one.node)
        one.node.wait_ready()
        time.sleep(1.0)  # what would be renewed in a circle would be so by now: an order takes a third of that
        assert one.leaf_of("skewed.example.com") == first
        assert orders_at(one.ca) == 1
        clock.write_text("+0\n")  # the clock is mended
        assert one.add("mended.example.com") == 201
        one.wait_active("mended.example.com")
        wait_for(lambda: told() is None, 5, lambda: one.node.cli("status"))
        assert one.leaf_of("skewed.example.com") == first and orders_at(one.ca) == 2
        assert "Traceback" not in one.node.log()


# --- a store that is lost, a disk without room


@pytest.mark.parametrize("kind", ["garbage", "another node's", "cut in the middle"])
def test_a_store_that_is_spoilt_is_set_aside_and_named_and_configured_names_are_issued_anew(
    tmp_path: Path, kind: str
) -> None:
    with hosted(tmp_path, more='hostnames = ["own.example.com"]\n') as one:
        one.wait_active("own.example.com")
        before = one.leaf_of("own.example.com")
        store = one.node.data_dir / "certs" / "store.db"
        one.node.stop()
        if kind == "garbage":
            store.write_bytes(random.Random(kind).randbytes(20_000))
        elif kind == "another node's":
            store.unlink()
            SealedStore(store, bytes(32), time.time).close()
        else:
            for tail in ("-wal", "-shm"):
                store.with_name(store.name + tail).unlink(missing_ok=True)
            content = store.read_bytes()
            store.write_bytes(content[: len(content) // 3])
        one.node.start()
        one.node.wait_ready()
        one.wait_active("own.example.com")
        status, told = one.node.api("GET", "/v1/status")
        assert status == 200
        named = [text for text in told["warnings"] if "set aside" in text and "store.db" in text]
        assert named, told["warnings"]
        assert list(store.parent.glob("store.db.unusable-*"))
        if kind != "cut in the middle":
            # Workers serve the former one until they are told of the new: a moment after it is stored.
            wait_for(lambda: one.leaf_of("own.example.com") != before, 5, "the certificate issued anew is served")
        assert "Traceback" not in one.node.log()


def test_without_room_on_the_disk_orders_wait_and_nothing_is_lost(small_disk: Path, tmp_path: Path) -> None:
    with hosted(tmp_path, small_disk) as one:
        assert one.add("before.example.com") == 201
        one.wait_active("before.example.com")
        one.ca.set_a("waiting.example.com", "192.0.2.1")
        assert one.add("waiting.example.com") == 201
        before = one.leaf_of("before.example.com")
        ballast = fill(small_disk)
        status, told = one.node.api("POST", "/v1/apps/web/certificates/acme", {"hostname": "full.example.com"})
        assert status in (500, 503, 507), (status, told)
        assert "full" in told["error"] and "store.db" in told["error"], told
        one.ca.set_a("waiting.example.com", "127.0.0.1")

        def named() -> bool:
            found = one.node.api("GET", "/v1/apps/web/certificates/waiting.example.com")[1]
            return "full" in json.dumps(found["validation_errors"])

        wait_for(named, 15, lambda: f"{one.node.api('GET', '/v1/apps/web/certificates/waiting.example.com')}")
        assert one.leaf_of("before.example.com") == before
        kill_control_bluntly(one.node)
        assert one.leaf_of("before.example.com") == before, "workers serve on"
        failed = "No space left on device"
        seen = one.node.log().count(failed)
        wait_for(lambda: one.node.log().count(failed) > seen, 20, "its successor meets the full disk")
        assert one.leaf_of("before.example.com") == before, "and still"
        ballast.unlink()
        one.wait_active("before.example.com", 60)
        one.wait_active("waiting.example.com", 60)
        add_surely(one, "full.example.com")
        one.wait_active("full.example.com")
        assert one.leaf_of("before.example.com") == before
        assert not list((one.node.data_dir / "certs").glob("store.db.unusable-*"))


def kill_control_bluntly(node: ServedNode) -> None:
    """Without a look at who follows: without room on the disk nobody can write that down."""
    os.kill(node.pid_of("control"), signal.SIGKILL)

"""A20: the name of the TLS handshake and the host of the request disagree, or the request has two hosts.

A connection is for the app whose certificate it was shown. Whatever names another app on it is 421; what can be read in
two ways is 400; and the other app's machine sees nothing of either.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import pytest

from tests.attacks.conftest import Begin
from tests.support.attacks import AttackedNode
from tests.support.peer import Peer
from tests.support.plane import static_app
from tests.support.recording import RecordingOrigin

pytestmark = pytest.mark.slow
WEB, OTHER = "web.apps.localhost", "other.apps.localhost"
CLOSE = "Connection: close"
METHODS = ("GET", "POST", "OPTIONS")

MISDIRECTED = [
    (OTHER,),
    (OTHER.upper(),),
    ("Other.Apps.LocalHost",),
    (f"{OTHER}.",),
    (f"{OTHER}:443",),
    (f"{OTHER}:80",),
    (f"{OTHER}:65535",),
    (f"{OTHER}.:443",),
]
AMBIGUOUS = [
    (WEB, WEB),
    (WEB, OTHER),
    (OTHER, WEB),
    (WEB, ""),
    ("", WEB),
    (),
    ("",),
    (f"{WEB}, {OTHER}",),
    (f"{WEB} {OTHER}",),
    (f"\t {OTHER}\t",),
    (f"{WEB}@{OTHER}",),
    (f"{OTHER}/@{WEB}",),
    (f"{OTHER}#@{WEB}",),
    (f"{WEB}\x00{OTHER}",),
    (f"{WEB}\x0b",),
    (f"{WEB}:443:443",),
    (f"{WEB}:http",),
    (f"{WEB}\r\n {OTHER}",),
    (f"http://{OTHER}",),
    ("[::1",),
    ("%6f" + OTHER[1:],),
    ("x" * 70_000,),
]
TARGETS = [  # (target, Host, status)
    (f"http://{OTHER}/", WEB, 400),
    (f"https://{OTHER}/", WEB, 400),
    (f"http://{WEB}/", OTHER, 400),
    (f"http://{OTHER}/", OTHER, 421),
    (f"https://{OTHER}:443/", f"{OTHER}:443", 421),
    (f"HTTPS://{OTHER.upper()}/", OTHER, 421),
    (f"http://{WEB}@{OTHER}/", WEB, 400),
    (f"http://{OTHER}@{WEB}/", WEB, 400),
    (f"http:///{OTHER}/", WEB, 400),
    (f"http:{OTHER}/", WEB, 400),
    (f"ws://{OTHER}/", WEB, 400),
    (f"ftp://{OTHER}/", WEB, 400),
    (f"//{OTHER}/", WEB, 200),  # a path, however it looks
    (f"/http://{OTHER}/", WEB, 200),
]


@pytest.fixture(scope="module")
def other() -> Iterator[RecordingOrigin]:
    with RecordingOrigin() as origin:
        yield origin


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, other: RecordingOrigin) -> Iterator[AttackedNode]:
    folder = tmp_path_factory.mktemp("names")
    with AttackedNode(folder, apps=static_app(folder, "other", f"127.0.0.1:{other.port}")) as served:
        assert served.ask("/", app="other", tls=True).status == 200
        other.forget()
        yield served


def request_for(hosts: tuple[str, ...], target: str = "/", method: str = "GET", *fields: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *(f"Host: {host}" for host in hosts), *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def test_a_host_of_another_app_than_the_certificates_is_a_421_however_it_is_written(
    node: AttackedNode, other: RecordingOrigin, attack: Begin
) -> None:
    with attack("A20", "name a, Host b", node) as run, node.peer(tls=True) as kept:
        for hosts in MISDIRECTED:
            for method in METHODS:
                run.case(hosts)
                got = node.attempt(request_for(hosts, "/", method, CLOSE), tls=True, take_its_word=True)
                assert got.statuses == [421], got
                kept.send(request_for((WEB,)))
                assert kept.read_answer().status == 200
                kept.send(request_for(hosts, "/", method))
                assert kept.read_answer().status == 421, "a kept connection stays the app's it was made for"
        assert other.take() == []


@pytest.mark.parametrize("tls", [False, True])
def test_more_or_fewer_hosts_than_one_are_a_400_and_reach_nobody(
    node: AttackedNode, other: RecordingOrigin, attack: Begin, tls: bool
) -> None:
    other.forget()
    node.origin.reset()
    with attack("A20", "two Hosts, none, or no name", node) as run:
        for hosts in AMBIGUOUS:
            for target in ("/", f"http://{WEB}/"):
                run.case((hosts, target))
                got = node.attempt(request_for(hosts, target), tls=tls, take_its_word=True)
                got.assert_refused(400, 431)
        assert node.origin.take() == other.take() == []


def test_an_absolute_target_is_held_to_the_host_and_to_the_certificate(
    node: AttackedNode, other: RecordingOrigin, attack: Begin
) -> None:
    node.origin.reset()
    with attack("A20", "absolute targets", node) as run:
        for target, host, status in TARGETS:
            run.case((target, host))
            got = node.attempt(request_for((host,), target, "GET", CLOSE), tls=True, take_its_word=True)
            assert got.statuses == [status], got
        assert [one.target for one in node.origin.take()] == [f"//{OTHER}/", f"/http://{OTHER}/"]
        assert other.take() == []


def test_no_other_field_and_no_upgrade_leads_to_another_app(
    node: AttackedNode, other: RecordingOrigin, attack: Begin
) -> None:
    node.origin.reset()
    fields = [
        f"X-Forwarded-Host: {OTHER}", f"Forwarded: host={OTHER}", f"X-Host: {OTHER}", f"X-Original-Host: {OTHER}",
        f"X-Http-Host-Override: {OTHER}", "Connection: Host", f"fly-prefer-app: {OTHER}", f":authority: {OTHER}",
    ]  # fmt: skip
    with attack("A20", "other fields that name hosts", node) as run:
        for field in fields:
            run.case(field)
            got = node.attempt(request_for((WEB,), "/", "GET", field, CLOSE), tls=True, take_its_word=True)
            assert got.statuses in ([200], [400]), got
            for seen in node.origin.take():
                assert seen.all("host") == [WEB]
        run.case("an upgrade")
        upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
        got = node.attempt(request_for((OTHER,), "/", "GET", *upgrade), tls=True, timeout=0.2)
        assert got.statuses == [421]
        assert other.take() == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_of_one_app_does_not_carry_over_to_another(
    node: AttackedNode, other: RecordingOrigin, attack: Begin, version: ssl.TLSVersion
) -> None:
    """Sessions and coalescing: what counts is the name of this connection's own hello, and HTTP/2 is not offered."""
    context = ssl.create_default_context(cadata=node.cli("certs", "ca"))
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])

    def connect(name: str, session: ssl.SSLSession | None) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", node.https_port), timeout=10)
        return context.wrap_socket(raw, server_hostname=name, session=session)

    with attack("A20", "sessions of another name, h2", node) as run:
        run.case("resumed with another name")
        with connect(WEB, None) as first:
            assert first.selected_alpn_protocol() == "http/1.1", "so no browser joins names on one connection"
            with Peer(first) as peer:
                peer.send(request_for((WEB,)))
                assert peer.read_answer().status == 200
                session = first.session
        with Peer(connect(OTHER, session)) as peer:
            peer.send(request_for((WEB,)))
            assert peer.read_answer().status == 421
            peer.send(request_for((OTHER,), "/own"))
            assert peer.read_answer().status == 200
    assert [one.target for one in other.take()] == ["/own"]

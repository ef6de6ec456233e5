"""A25: the admin API as a page in a browser, a hosted machine or a stranger on the wire would go at it.

Whatever is refused has done nothing: after every attack the machine is as it was, and was never started.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from proxy.machines.volumes import network_support
from tests.attacks.conftest import Begin
from tests.support.apps import make_app, starts
from tests.support.attacks import AttackedNode, Attempt, open_descriptors
from tests.support.peer import Peer
from tests.support.processes import wait_for

pytestmark = pytest.mark.slow
HOSTED = Path(__file__).with_name("hosted.py")
MIB = 1 << 20
IDLE = 600

DEEDS = [
    *(("POST", f"/{deed}") for deed in ("start", "stop", "suspend", "restart", "signal", "cordon", "uncordon")),
    ("POST", "/lease"), ("DELETE", "/lease"), ("PUT", "/metadata"), ("POST", "/metadata"), ("POST", "/metadata/key"),
    ("DELETE", "/metadata/key"),
]  # fmt: skip
LOOKS = [("GET", ""), ("GET", "/lease"), ("GET", "/metadata"), ("GET", "/events"), ("GET", "/wakes"), ("GET", "/wait")]


class Node(AttackedNode):
    """An attacked node with an app that sleeps and shall go on sleeping."""

    def state(self) -> Any:
        """All that a deed would change."""
        (machine,) = self.machines("sleeper")
        path = f"/v1/apps/sleeper/machines/{machine['id']}"
        details = [self.api("GET", f"{path}/{what}") for what in ("lease", "metadata", "events")]
        return machine, details, starts(self.folder, "sleeper")

    def paths(self) -> list[tuple[str, str]]:
        """Every way of asking and doing that needs the token."""
        base = f"/v1/apps/sleeper/machines/{self.machines('sleeper')[0]['id']}"
        of_machine = [(method, base + path) for method, path in DEEDS + LOOKS]
        other = ["/v1/status", "/v1/certs/ca", "/v1/apps", "/v1/apps/sleeper", "/v1/apps/sleeper/logs", "/v1/nothing"]
        return [*of_machine, ("POST", "/v1/reload"), ("POST", "/v1/explain"), *(("GET", path) for path in other)]

    def tell_admin(
        self,
        method: str,
        path: str,
        *fields: str,
        host: str | None = "",
        token: bool = True,
        body: bytes = b"",
        length: int | None = None,
        version: str = "1.1",
    ) -> Attempt:
        """One request to the admin port. `host`: "" is the right one, None is none."""
        lines = [f"{method} {path} HTTP/{version}", *fields]
        if host is not None:
            lines.append(f"Host: {host or f'127.0.0.1:{self.admin_port}'}")
        if token:
            lines.append(f"Authorization: Bearer {self.admin_token}")
        if length is not None or body:
            lines.append(f"Content-Length: {len(body) if length is None else length}")
        with Peer(socket.create_connection(("127.0.0.1", self.admin_port), timeout=10)) as peer:
            peer.send(("\r\n".join([*lines, "Connection: close"]) + "\r\n\r\n").encode("latin-1") + body)
            return Attempt.read(peer, [method])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("admin")
    with Node(folder, apps=make_app(folder, "sleeper")) as served:
        yield served


def assert_refused(got: Attempt, *statuses: int) -> None:
    assert len(got.answers) == 1 and got.answers[0].status in statuses, got
    answer = got.answers[0]
    told = [name for name, _ in answer.fields if name.startswith("access-control-") or name == "set-cookie"]
    assert told == [], "a browser is told nothing that would open the API to a page"


def test_a_rebound_name_is_refused_whatever_it_asks(node: Node, attack: Begin) -> None:
    before = node.state()
    port = node.admin_port
    hosts = [
        f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}", f"localhost.evil.example:{port}",
        f"evil.example@127.0.0.1:{port}", f"127.0.0.1:{port}@evil.example", f"127.0.0.1:{port}.evil.example",
        "127.0.0.1", "localhost", f"127.0.0.1:{port + 1}", f"127.0.0.1:0{port}", f"0.0.0.0:{port}", f"127.1:{port}",
        f"2130706433:{port}", f"localhost.:{port}", f"web.apps.localhost:{port}", f"127.0.0.1:{node.http_port}", " ",
        None,
    ]  # fmt: skip
    with attack("A25", "DNS rebinding", node, of_control=True) as run:
        for host in hosts:
            for method, path in [*node.paths(), ("GET", "/healthz"), ("GET", "/metrics")]:
                run.case((host, method, path))
                assert_refused(node.tell_admin(method, path, host=host), 400, 403)
        run.case("two Hosts")
        assert_refused(node.tell_admin("POST", "/v1/reload", "Host: evil.example"), 400, 403)
        run.case("absolute target")
        evil = f"http://evil.example:{port}/v1/reload"
        assert_refused(node.tell_admin("POST", evil, host=f"evil.example:{port}"), 400, 403)
    assert node.state() == before


def test_a_page_of_another_origin_does_nothing_with_or_without_the_token(node: Node, attack: Begin) -> None:
    before = node.state()
    port = node.admin_port
    origins = [
        "http://evil.example", "https://evil.example", "null", "http://localhost:3000", f"http://127.0.0.1:{port + 1}",
        f"http://127.0.0.1:{node.http_port}", f"http://web.apps.localhost:{node.http_port}", "file://", "",
        f"http://127.0.0.1:{port}.evil.example", f"http://evil.example/127.0.0.1:{port}", f"127.0.0.1:{port}",
        "http://evil.example http://127.0.0.1", f"http://evil.example#://127.0.0.1:{port}",
    ]  # fmt: skip
    kinds = ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", "application/json"]
    with attack("A25", "CSRF from a page", node, of_control=True) as run:
        for method, path in node.paths():
            for origin in origins:
                run.case((method, path, origin))
                assert_refused(node.tell_admin(method, path, f"Origin: {origin}"), 403)
            for kind in kinds:
                run.case((method, path, kind))
                fields = (f"Content-Type: {kind}", "Sec-Fetch-Site: cross-site", f"Cookie: token={node.admin_token}")
                assert_refused(node.tell_admin(method, path, *fields, token=False, body=b"{}"), 401)
            run.case((method, path, "preflight"))
            asked = ("Origin: http://evil.example", f"Access-Control-Request-Method: {method}")
            assert_refused(node.tell_admin("OPTIONS", path, *asked, token=False), 403)
            assert_refused(node.tell_admin("OPTIONS", path, token=False), 401)
    assert node.state() == before


def test_no_token_but_the_right_one_is_taken_and_only_from_its_field(node: Node, attack: Begin) -> None:
    before = node.state()
    token = node.admin_token
    bearer = "Authorization: Bearer "
    wrong = [
        (), (bearer,), (f"{bearer}{token[:-1]}",), (f"{bearer}{token}x",), (f"{bearer}{token.swapcase()}",),
        (f"{bearer}{token[::-1]}",), (f"{bearer}{token} {token}",), (f"{bearer}Bearer {token}",),
        (f"Authorization: {token}",), (f"Authorization: Basic {token}",), (f"Authorization: Token {token}",),
        (f"{bearer}x", f"{bearer}{token}"), (f"X-Authorization: Bearer {token}",), (f"Cookie: Authorization={token}",),
        (f"Proxy-Authorization: Bearer {token}",), (f"{bearer}{'x' * 7000}",), (f"{bearer}\xff\xfe",),
    ]  # fmt: skip
    with attack("A25", "missing and wrong tokens", node, of_control=True) as run:
        for method, path in node.paths():
            for fields in wrong:
                run.case((method, path, fields))
                assert_refused(node.tell_admin(method, path, *fields, token=False), 400, 401)
            run.case((method, path, "in the query"))
            assert_refused(node.tell_admin(method, f"{path}?token={token}&access_token={token}", token=False), 401)
    assert node.state() == before


def test_a_body_beyond_the_limit_is_refused_in_little_memory(node: Node, attack: Begin) -> None:
    before = node.state()
    bomb = gzip.compress(bytes(256 * MIB), 9)
    chunks = (b"10000\r\n" + bytes(65536) + b"\r\n") * 64
    bodies = [
        ("told", (), b"", 1 << 40),
        ("sent", (), bytes(65537), 65537),
        ("chunked", ("Transfer-Encoding: chunked",), chunks, None),
        ("bomb", ("Content-Encoding: gzip",), bomb, len(bomb)),
        ("bombs", ("Content-Encoding: gzip, gzip",), gzip.compress(bomb), None),
    ]
    read = ("/stop", "/signal", "/lease", "/metadata", "/metadata/key", "/v1/explain")  # the others do without
    with attack("A25", "oversized bodies", node, of_control=True, growth_mib=32) as run:
        for method, path in node.paths():
            for name, fields, body, length in bodies:
                if method in ("POST", "PUT") and path.endswith(read):
                    run.case((method, path, name))
                    assert_refused_or_closed(send_much(node, method, path, fields, body, length, True), 400, 413)
                run.case((method, path, name, "no token"))
                assert_refused_or_closed(send_much(node, method, path, fields, body, length, False), 400, 401, 413)
    assert node.state() == before


def assert_refused_or_closed(got: Attempt, *statuses: int) -> None:
    if got.answers:
        assert_refused(got, *statuses)
    else:
        assert got.closed, got


def send_much(
    node: Node, method: str, path: str, fields: tuple[str, ...], body: bytes, length: int | None, token: bool
) -> Attempt:
    """A request whose body the other side may not want to have: it may close under it."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{node.admin_port}", *fields, "Connection: close"]
    lines += [f"Authorization: Bearer {node.admin_token}"] * token
    lines += [f"Content-Length: {len(body) if length is None else length}"] * ("chunked" not in "".join(fields))
    with Peer(socket.create_connection(("127.0.0.1", node.admin_port), timeout=10)) as peer:
        try:
            peer.send(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
            if length == len(body) or length is None:
                peer.half_close()
        except ConnectionError:
            pass  # what it has to say is read all the same
        return Attempt.read(peer, [method], True)


def test_a_path_in_any_disguise_needs_the_token_and_leads_nowhere_else(node: Node, attack: Begin) -> None:
    before = node.state()
    machine = before[0]["id"]
    guarded = [
        "/healthz/../v1/status", "/healthz/..%2fv1/status", "/healthz%2f../v1/status", "/metrics/../v1/apps",
        "/metrics/%2e%2e/v1/apps", "/healthz/", "/metrics/", "//healthz", "//v1/status", "/./v1/status", "/v1//status",
        "/v1/status/", "/V1/STATUS", "/%76%31/status", "/v1/status%00", "/v1/status;/healthz", "/v1/status?/healthz",
        "/healthz;/../v1/status", "/healthz%00", "/healthz#/v1/status", "/v1/status%23/healthz", "/healthz\\..\\v1",
        "/v1/reload?/metrics", f"/v1/apps/sleeper/machines/{machine}/start/../../../../../healthz", "*", "/healthz/x",
        f"http://127.0.0.1:{node.admin_port}/v1/status", "/HEALTHZ", "/metrics%2f", "/v1/apps/..", "/\xff",
    ]  # fmt: skip
    climbing = [
        "/v1/apps/../logs", "/v1/apps/%2e%2e/logs", "/v1/apps/..%2f..%2fetc/logs", "/v1/apps/sleeper%2f../logs",
        "/v1/apps/%2fetc%2fpasswd/logs", "/v1/apps/sleeper%00/logs", "/v1/apps/sleeper/logs/../../../admin.token",
        "/v1/apps/sleeper/machines/..", "/v1/apps/sleeper/machines/%2e%2e%2f%2e%2e", "/v1/certs/../admin.token",
        "/v1/certs/%2e%2e%2fadmin.token", "/admin.token", "/v1/certs/ca/../ca.key", "/static/../config.toml",
    ]  # fmt: skip
    with attack("A25", "path tricks", node, of_control=True) as run:
        for method in ("GET", "POST", "HEAD", "PUT", "TRACE", "CONNECT", "PROPFIND"):
            for path in guarded:
                run.case((method, path))
                got = node.tell_admin(method, path, token=False)
                if not (method in ("GET", "HEAD") and path == "/healthz#/v1/status" and got.statuses == [200]):
                    assert_refused(got, 400, 401, 403, 404, 405)
            for path in climbing:
                run.case((method, path, "with the token"))
                assert_refused(node.tell_admin(method, path), 400, 401, 404, 405)
    assert node.state() == before


def test_the_api_is_to_be_had_at_no_other_port(node: Node, attack: Begin) -> None:
    before = node.state()
    admin = f"127.0.0.1:{node.admin_port}"
    bearer = f"Authorization: Bearer {node.admin_token}"
    with attack("A25", "through the public ports", node, of_control=True) as run:
        for tls in (False, True):
            for method, path in [*node.paths(), ("GET", "/healthz"), ("GET", "/metrics")]:
                for target, host in ((path, admin), (f"http://{admin}{path}", admin), (path, node.host("web"))):
                    run.case((tls, method, target, host))
                    fields = (f"Host: {host}", bearer, "Content-Length: 0", "Connection: close")
                    data = "\r\n".join([f"{method} {target} HTTP/1.1", *fields, "", ""]).encode()
                    got = node.attempt(data, tls=tls, take_its_word=True)
                    seen = [one.target for one in node.origin.take()]
                    if host == admin:
                        assert got.statuses in ([404], [421]) and not seen, got
                    else:
                        assert got.answers[0].body == b"ok" and seen == [path], "this is the app's own path"
    assert node.state() == before


def test_a_hosted_machine_gets_neither_token_nor_socket_nor_api(tmp_path: Path, attack: Begin, network: str) -> None:
    folder = tmp_path
    folder.chmod(0o755)
    for parent in folder.parents[:3]:
        if parent.owner() == "root" and parent != Path("/tmp"):
            parent.chmod(0o755)
    command = json.dumps([sys.executable, "-I", "-S", str(HOSTED)])
    toml = folder / "hosted.toml"
    toml.write_text('app = "hosted"\n[http_service]\ninternal_port = 8080\n')
    apps = (
        f'[[apps]]\nfly_toml = "{toml}"\ncommand = {command}\ncwd = "/"\nuser = "65534:65534"\nnetwork = "{network}"\n'
    ) + make_app(folder, "sleeper")
    with Node(folder / "node", apps=apps) as node:
        before = node.state()
        node.get("hosted")

        def tries(what: str, **words: object) -> str:
            query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in words.items())
            status, _, body = node.get("hosted", f"{what}?{query}")
            told = json.loads(body)
            assert status == 200 and told["uid"] == 65534
            return str(told["result"])

        run_dir = node.data_dir / "run"
        with attack("A25", f"from a hosted machine, network {network}", node, of_control=True) as run:
            node.data_dir.chmod(0o711)  # as where machines pass through to volumes: every file is private by itself
            files = [one for one in node.data_dir.rglob("*") if one.is_file()]
            assert {"admin.token", "wakefront.db", "table.msgpack", "certificates"} <= {one.name for one in files}
            for file in files:
                run.case(file)
                if file.name != "ca.pem":  # the root, for whoever shall trust it
                    assert tries("/read", path=file).startswith("PermissionError"), file
            for path in (run_dir / "control.sock", f"/proc/{node.pid}/root{run_dir}/control.sock"):
                run.case(path)
                assert tries("/unix", path=path).startswith(("PermissionError", "FileNotFoundError"))
            for pid in (node.pid, node.pid_of("control"), *node.worker_pids):
                for what in ("mem", "environ", "fd/0", "root/etc/passwd"):
                    run.case((pid, what))
                    assert tries("/read", path=f"/proc/{pid}/{what}").startswith(("PermissionError", "OSError"))
            for path in ("/v1/reload", f"/v1/apps/sleeper/machines/{before[0]['id']}/start"):
                for host in ("127.0.0.1", "localhost"):
                    run.case((host, path))
                    got = tries("/reach", host=host, port=node.admin_port, path=path)
                    assert got.startswith("401 " if network == "port" else "ConnectionRefusedError"), got
        assert node.state() == before


@pytest.fixture(params=["port", "namespace"])
def network(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if os.geteuid() != 0:
        pytest.skip("only root can give machines another user")
    if name == "namespace" and (why := network_support()):
        pytest.skip(f"network namespaces: {why}")
    return name


def test_connections_that_say_nothing_leave_the_api_and_wakes_alone(node: Node, attack: Begin) -> None:
    control = node.pid_of("control")
    before = open_descriptors(control)
    with attack("A25", f"{IDLE} silent connections", node, of_control=True, growth_mib=32) as run:
        with ExitStack() as held:
            for number in range(IDLE):
                run.case(number)
                sock = held.enter_context(socket.create_connection(("127.0.0.1", node.admin_port), timeout=10))
                if number % 2:
                    sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0")
            run.note(f"control held {open_descriptors(control) - before} more descriptors at the most")
            assert open_descriptors(control) - before <= 300
            assert node.get("sleeper")[0] == 200, "a wake needs no place among them"
            wait_for(lambda: node.tell_admin("GET", "/v1/status").statuses == [200], 15, "the API answers again")
        wait_for(lambda: open_descriptors(control) <= before + 20, 10, "all are let go")

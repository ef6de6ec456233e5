"""TLS tickets of one worker are good at every other, and at the successor of a killed one."""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.apps import make_app
from tests.support.faults import kill_control, kill_worker
from tests.support.load import client_ports_of
from tests.support.serve import ServedNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]
WORKERS = 4
MOST_CONNECTIONS = 400


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedNode]:
    folder = tmp_path_factory.mktemp("node")
    with ServedNode(folder, make_app(folder, "web"), workers=WORKERS) as served:
        served.get("web")
        yield served


class Client:
    """Connects anew each time, with the last session it was given."""

    def __init__(self, node: ServedNode, version: ssl.TLSVersion) -> None:
        self._node = node
        self._context = ssl.create_default_context(cadata=node.cli("certs", "ca"))
        self._context.minimum_version = self._context.maximum_version = version
        self._session: ssl.SSLSession | None = None

    def visit(self) -> tuple[int, bool]:
        """The worker's pid, and whether the session was resumed."""
        raw = socket.create_connection(("127.0.0.1", self._node.https_port), timeout=10)
        host = self._node.host("web")
        with self._context.wrap_socket(raw, server_hostname=host, session=self._session) as sock:
            sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")
            port = sock.getsockname()[1]
            (owner,) = [pid for pid in self._node.worker_pids if port in client_ports_of(pid, {self._node.https_port})]
            self._session = sock.session
            return owner, bool(sock.session_reused)

    def visit_all(self, least: int = 3) -> Counter[tuple[int, bool]]:
        """Until every worker was met `least` times."""
        seen: Counter[tuple[int, bool]] = Counter()
        for _ in range(MOST_CONNECTIONS):
            seen[self.visit()] += 1
            if all(seen[pid, True] + seen[pid, False] >= least for pid in self._node.worker_pids):
                return seen
        raise AssertionError(f"not every worker of {self._node.worker_pids} was met: {seen}")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])
def test_every_worker_resumes_every_ticket_also_after_one_was_killed(node: ServedNode, version: ssl.TLSVersion) -> None:
    client = Client(node, version)
    assert not client.visit()[1], "the first is a full handshake"
    seen = client.visit_all()
    assert {pid for pid, _ in seen} == set(node.worker_pids) and len(node.worker_pids) == WORKERS
    assert all(resumed for _, resumed in seen), seen
    old, _ = kill_worker(node, 0)
    node.wait_replaced("worker", 0, old)
    seen = client.visit_all()
    assert old not in {pid for pid, _ in seen}
    assert all(resumed for _, resumed in seen), seen
    kill_control(node)
    assert all(resumed for _, resumed in client.visit_all(1)), "tickets are no matter of control's"
